"""Handles, mount paths and keys: tables, and properties that hold for any path."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hubfs.errors import RefusedError
from hubfs.handles import (
    Address,
    Alias,
    HandleMap,
    InModel,
    Namespace,
    Place,
    cache_key,
    compressed_url,
    is_archive,
    version_of,
)

TFHUB = HandleMap("https://tfhub.dev", ["example.org", "127.0.0.1:8080", "[::1]:9000"])
PREFIXED = HandleMap("http://127.0.0.1:8500/models/v2", ["example.org"])

ALLOWED = {"tfhub.dev", "example.org", "127.0.0.1:8080", "[::1]:9000"}


def model(handle: str, inner: str = "") -> InModel:
    return InModel(handle, inner)


PLACES: list[tuple[str, Place]] = [
    ("/", Namespace((), None)),
    ("", Namespace((), None)),
    ("/google", Namespace(("google",), None)),
    ("/google/nnlm", Namespace(("google", "nnlm"), "https://tfhub.dev/google/nnlm")),
    ("/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/google/nnlm/2/", model("https://tfhub.dev/google/nnlm/2")),
    ("//google///nnlm//2", model("https://tfhub.dev/google/nnlm/2")),
    ("/google/nnlm/2/variables/x", model("https://tfhub.dev/google/nnlm/2", "variables/x")),
    ("/google/nnlm/2/3/4", model("https://tfhub.dev/google/nnlm/2", "3/4")),
    ("/google/a/b/c/d/5", model("https://tfhub.dev/google/a/b/c/d/5")),
    ("/google/7", model("https://tfhub.dev/google/7")),
    # A publisher may be called by a number.
    ("/7", Namespace(("7",), None)),
    ("/7/m/1", model("https://tfhub.dev/7/m/1")),
    ("/google/nnlm/007", model("https://tfhub.dev/google/nnlm/007")),
    ("/google/nnlm/2a", Namespace(("google", "nnlm", "2a"), "https://tfhub.dev/google/nnlm/2a")),
    ("/google/m.tar.gz", model("https://tfhub.dev/google/m.tar.gz")),
    ("/google/m.tgz/saved_model.pb", model("https://tfhub.dev/google/m.tgz", "saved_model.pb")),
    ("/m.tar", model("https://tfhub.dev/m.tar")),
    ("/google/модель/1", model("https://tfhub.dev/google/модель/1")),
    ("/google/a+b=c,d;e:f@g!h/1", model("https://tfhub.dev/google/a+b=c,d;e:f@g!h/1")),
    ("/https:", Namespace(("https:",), None)),
    ("/http:", Namespace(("http:",), None)),
    ("/https:/tfhub.dev", Alias("..")),
    ("/http:/tfhub.dev", Alias("..")),
    ("/https:/tfhub.dev:443", Alias("..")),
    ("/http:/tfhub.dev:80", Alias("..")),
    ("/https:/TFHub.Dev", Alias("..")),
    ("/https:/tfhub.dev/google/nnlm/2/x", model("https://tfhub.dev/google/nnlm/2", "x")),
    ("/https://tfhub.dev/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/http:/tfhub.dev/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/https:/example.org", Namespace(("https:", "example.org"), None)),
    ("/https:/EXAMPLE.org", Alias("example.org")),
    ("/https:/example.org:443", Alias("example.org")),
    ("/http:/example.org:80", Alias("example.org")),
    ("/https:/example.org/x.tar.gz", model("https://example.org/x.tar.gz")),
    ("/http:/example.org/x.tar.gz", model("http://example.org/x.tar.gz")),
    ("/https:/example.org:443/p/m/1", model("https://example.org/p/m/1")),
    ("/http:/127.0.0.1:8080/p/m/1", model("http://127.0.0.1:8080/p/m/1")),
    ("/http:/[::1]:9000/p/m/1", model("http://[::1]:9000/p/m/1")),
]


@pytest.mark.parametrize(("path", "place"), PLACES)
def test_path_means(path: str, place: Place) -> None:
    assert TFHUB.place(path) == place


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/google/m/1", model("http://127.0.0.1:8500/models/v2/google/m/1")),
        ("/http:/127.0.0.1:8500/models/v2/google/m/1", model("http://127.0.0.1:8500/models/v2/google/m/1")),
        ("/https:/127.0.0.1:8500/models/v2", Alias("../../..")),
        ("/http:/127.0.0.1:8500/models", Namespace(("http:", "127.0.0.1:8500", "models"), None)),
        ("/http:/127.0.0.1:8500/other/m/1", model("http://127.0.0.1:8500/other/m/1")),
        ("/http:/127.0.0.1:8500/models/v2x/1", model("http://127.0.0.1:8500/models/v2x/1")),
        ("/http:/example.org/a/b/1", model("http://example.org/a/b/1")),
    ],
)
def test_path_means_at_a_hub_with_port_and_prefix(path: str, place: Place) -> None:
    assert PREFIXED.place(path) == place


@pytest.mark.parametrize(
    "path",
    [
        "/https:/other.org/a/b/1",
        "/https:/other.org",
        "/https:/sub.example.org/a/b/1",
        "/https:/example.org.evil.net/a/b/1",
        "/https:/example.org:8443/a/b/1",
        "/https:/127.0.0.1/a/b/1",
        "/http:/127.0.0.1:8081/a/b/1",
        "/http:/[::1]/a/b/1",
        "/https:/user@tfhub.dev/a/b/1",
        "/https:/user:pw@example.org/a/b/1",
        "/https:/example.org:99999/a/b/1",
        "/https:/example.org:0/a/b/1",
        "/https:/example.org:x/a/b/1",
        "/https:/example.org\\.evil.net/a/b/1",
        "/https:/exam ple.org/a/b/1",
        "/https:/tfhub.dev%2f@evil/a/b/1",
        "/https:/..",
        "/https:/[::1",
        "/gs:/bucket/model",
        "/s3:/bucket/model",
        "/file:/etc/passwd",
        "/ftp:/tfhub.dev/a/b/1",
        "/:/x",
    ],
)
def test_host_that_is_not_allowed_is_refused(path: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(path)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "a%2f",
        "a?b",
        "a#b",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\tb",
        "a\x7fb",
        "a\x1bb",
        "\udcff",
        "%",
        "a%",
    ],
)
@pytest.mark.parametrize("where", ["/{}/m/1", "/google/{}/1", "/google/m/{}", "/https:/example.org/{}/m/1"])
def test_name_that_could_change_the_url_is_refused(name: str, where: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(where.format(name))


@pytest.mark.parametrize(
    "name",
    [
        ".git", ".svn", ".hg", ".Trash", ".Trash-1000", ".DS_Store", ".hidden", ".directory",
        "autorun.inf", "desktop.ini", "Thumbs.db", "CVS", "RCS", "lost+found", "__pycache__", "node_modules",
        "tags", "TAGS", "GTAGS", "Makefile", "makefile", "GNUmakefile", "setup.cfg", "package.json",
        "x.py", "x.pyc", "x.so", "x.sh", "x~", "#x#", ".x.swp", "x.swp", "x.bak", "x.orig", "x.rej", "x.tmp",
        "x.lock", "README.md", "index.html", "a.txt", "variables.pb", ".tar.gz", "core",
    ],
)  # fmt: skip
def test_litter_never_becomes_a_part_of_a_handle(name: str) -> None:
    for path in (f"/{name}", f"/google/{name}", f"/google/m/{name}", f"/https:/example.org/a/{name}"):
        with pytest.raises(RefusedError):
            TFHUB.place(path)
    # Below a version the publisher names files as he likes.
    assert TFHUB.place(f"/google/m/1/{name}") == model("https://tfhub.dev/google/m/1", name)


@pytest.mark.parametrize(
    ("handle", "path"),
    [
        ("https://tfhub.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev/google/m/1/", "google/m/1"),
        ("http://tfhub.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev:443/google/m/1", "google/m/1"),
        ("https://TFHUB.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev/google/m/1?tf-hub-format=compressed", "google/m/1"),
        ("https://tfhub.dev/google/m", "google/m"),
        ("https://example.org/x.tar.gz", "https:/example.org/x.tar.gz"),
        ("http://127.0.0.1:8080/a/b/1", "http:/127.0.0.1:8080/a/b/1"),
        ("http://[::1]:9000/a/b/1", "http:/[::1]:9000/a/b/1"),
        ("https://tfhub.dev/google/m/1?lite-format=tflite", None),
        ("https://tfhub.dev/google/m/1#part", None),
        ("https://tfhub.dev/google/m/1/variables", None),
        ("https://tfhub.dev/google", None),
        ("https://tfhub.dev/", None),
        ("https://tfhub.dev", None),
        ("https://other.org/a/b/1", None),
        ("https://user:pw@tfhub.dev/google/m/1", None),
        ("gs://bucket/model", None),
        ("/tmp/model", None),
        ("google/m/1", None),
        ("", None),
        ("https://tfhub.dev/google/.git/1", None),
        ("https://tfhub.dev/google/../m/1", None),
        ("https://tfhub.dev/go%6fgle/m/1", None),
        ("https://tfhub.dev/goo\ngle/m/1", None),
        ("https://tfhub.dev/goo\tgle/m/1", None),
        ("https://[::1/google/m/1", None),
        ("https://[v1.x]/google/m/1", None),
        ("https://tfhub.dev\u2100/google/m/1", None),
        # Its mount path would begin as another host's does.
        ("https://tfhub.dev/http:/example.org/1", None),
        ("https://tfhub.dev/https://example.org/m/1", None),
    ],
)
def test_mount_path_of_handle(handle: str, path: str | None) -> None:
    assert TFHUB.mount_path(handle) == path


@pytest.mark.parametrize(
    ("text", "handle"),
    [
        ("google/m/1", "https://tfhub.dev/google/m/1"),
        ("/google/m/1/", "https://tfhub.dev/google/m/1"),
        ("google/m", "https://tfhub.dev/google/m"),
        ("https://tfhub.dev/google/m/1", "https://tfhub.dev/google/m/1"),
        ("http://tfhub.dev:80/google/m/1", "https://tfhub.dev/google/m/1"),
        ("https://example.org/a/x.tgz", "https://example.org/a/x.tgz"),
        ("https:/example.org/a/x.tgz", "https://example.org/a/x.tgz"),
        ("http:/127.0.0.1:8080/a/b/1", "http://127.0.0.1:8080/a/b/1"),
    ],
)
def test_what_a_user_types_is_taken_as_a_handle(text: str, handle: str) -> None:
    assert TFHUB.handle_of(text) == handle


@pytest.mark.parametrize(
    "text",
    [
        "google", "", "/", "https://tfhub.dev", "https://other.org/a/b/1", "gs://bucket/m",
        "google/m/1/saved_model.pb",
        "google/m/1?x=y", "google/../m/1", "https://[::1/google/m/1", "goo\ngle/m/1", "https://", "https:///a/b/1",
    ],
)  # fmt: skip
def test_what_cannot_be_a_handle_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.handle_of(text)


def test_refused_host_is_named_with_the_remedy() -> None:
    with pytest.raises(RefusedError, match=r"other\.org.*--allow-host other\.org"):
        TFHUB.handle_of("https://other.org/a/b/1")


_NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_+=,-]{0,20}", fullmatch=True)
_HOST = st.sampled_from(
    ["", "https:/example.org", "http:/example.org", "http:/127.0.0.1:8080", "https:/[::1]:9000"]
)


@given(host=_HOST, names=st.lists(_NAME, min_size=1, max_size=5), version=st.integers(0, 10**12))
def test_handle_and_mount_path_are_each_others_inverse(host: str, names: list[str], version: int) -> None:
    path = "/".join(filter(None, [host, *names, str(version)]))
    try:
        place = TFHUB.place(path)
    except RefusedError:
        return  # a name of litter
    assert isinstance(place, InModel)
    shown = TFHUB.mount_path(place.handle)
    assert shown is not None
    assert TFHUB.place(shown) == InModel(place.handle, "")
    assert TFHUB.handle_of(shown) == place.handle


_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("/.:@?#%\\[]~\0\n0123456789"), max_size=40)
_PIECE = st.sampled_from(["/https:/", "/http:/", "tfhub.dev", "example.org", "..", "/1"])
_PATH = st.lists(_TEXT | _PIECE, max_size=8).map("".join)


@given(path=_PATH)
@example(path="/https:/example.org:80@evil.net/a/b/1")
@example(path="/https:/example.org#@evil.net/a/1")
def test_no_path_leads_to_a_host_that_is_not_allowed(path: str) -> None:
    try:
        place = TFHUB.place(path)
    except RefusedError:
        return
    handle = getattr(place, "handle", None)
    if handle is None:
        return
    for url in (handle, compressed_url(handle)):
        split = urlsplit(url)
        assert split.scheme in ("http", "https")
        assert split.netloc in ALLOWED
        assert not split.fragment
        assert not re.search(r"[\x00-\x1f\x7f\\%]|/\.\.?(/|$)", split.path)
    # What the path says is what is asked for: no part of it was read as a query.
    assert urlsplit(handle).query == ""


@given(text=_PATH | st.text(max_size=40))
@example(text="https://[::1/google/m/1")
@example(text="/http:/TFHUB.DEV")
@example(text="https://tfhub.dev\u2100/google/m/1")
def test_any_text_is_a_handle_or_refused(text: str) -> None:
    TFHUB.mount_path(text)
    try:
        handle = TFHUB.handle_of(text)
    except RefusedError:
        return
    assert TFHUB.handle_of(handle) == handle
    assert urlsplit(handle).netloc in ALLOWED


@given(handle=st.text(st.characters(codec="utf-8"), max_size=80))
def test_cache_key_is_the_sha1_of_the_handle_as_given(handle: str) -> None:
    assert cache_key(handle) == hashlib.sha1(handle.encode("utf-8")).hexdigest()


def test_cache_key_tells_spellings_apart_as_tensorflow_hub_does() -> None:
    assert cache_key("https://tfhub.dev/a/b/1") != cache_key("https://tfhub.dev/a/b/1/")


@pytest.mark.parametrize(
    ("handle", "query"),
    [
        ("https://tfhub.dev/a/b/1", {"tf-hub-format": ["compressed"]}),
        ("https://h.org/a/b/1?key=v", {"key": ["v"], "tf-hub-format": ["compressed"]}),
        ("https://h.org/x.tar.gz?a=1&b=2", {"a": ["1"], "b": ["2"], "tf-hub-format": ["compressed"]}),
        ("https://h.org/x.tar.gz?a=%26%3D", {"a": ["&="], "tf-hub-format": ["compressed"]}),
    ],
)
def test_url_of_the_archive_keeps_the_handles_own_query(handle: str, query: dict[str, list[str]]) -> None:
    url = compressed_url(handle)
    assert parse_qs(urlsplit(url).query) == query
    assert url.startswith(handle.partition("?")[0] + "?")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("https", "a.org"), ("https", "a.org:443"), True),
        (("https", "a.org"), ("http", "a.org"), True),
        (("https", "a.org"), ("http", "A.ORG:80"), True),
        (("http", "a.org:8500"), ("https", "a.org:8500"), True),
        (("https", "a.org"), ("https", "a.org:8443"), False),
        (("http", "a.org:8500"), ("http", "a.org"), False),
        (("https", "a.org"), ("https", "b.org"), False),
        (("http", "[::1]:80"), ("http", "[::1]"), True),
    ],
)
def test_same_service(first: tuple[str, str], second: tuple[str, str], same: bool) -> None:
    one, other = Address.parse(*first), Address.parse(*second)
    assert one.same_service(other) is same
    assert other.same_service(one) is same


def test_allowed_host_with_a_port_is_allowed_at_that_port_only() -> None:
    handles = HandleMap("https://tfhub.dev", ["a.org:81"])
    assert handles.allows(Address.parse("http", "a.org:81"))
    assert not handles.allows(Address.parse("http", "a.org"))
    assert not handles.allows(Address.parse("https", "a.org:443"))


@pytest.mark.parametrize(
    ("handle", "version"),
    [
        ("https://h/a/b/12", "12"),
        ("https://h/a/b", None),
        ("https://h/a/b/1x", None),
        ("https://h/x.tar.gz", None),
    ],
)
def test_version_of_a_handle(handle: str, version: str | None) -> None:
    assert version_of(handle) == version


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_archive_names(name: str) -> None:
    assert is_archive(name)
    assert not is_archive(name + ".txt")
    assert not is_archive(name.replace(".", "_"))
