"""Kaggle's hub, next to the clients that Kaggle itself gives out: both must read the same thing."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    ConfigError,
    DamagedError,
    HostileError,
    HubfsError,
    NotFoundError,
    ProtocolError,
    StoppedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.hubs.base import Archive, Listing, RemoteFile
from hubfs.hubs.kaggle import Kaggle, endpoint, parse_time
from hubfs.hubs.kaggle_login import find_credentials
from hubfs.net import Net
from hubfs.transfer.archive import Limits, extract_any
from hubfs.transfer.download import Download
from hubfs.transfer.storage import Storage
from tests import remote
from tests.kaggle import KaggleServer, make_tar_gz
from tests.models import make_tree
from tests.unit.test_archive import Recorder

HANDLE = "google/demo/tensorFlow2/small"
URL = f"https://www.kaggle.com/models/{HANDLE}"
SECRET = "KGAT_0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("KAGGLE"):
            monkeypatch.delenv(name)


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    with KaggleServer() as server:
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", server.url)
        yield server


@pytest.fixture
def hub(kaggle: KaggleServer) -> Iterator[Kaggle]:
    settings = Settings.load({"retry_delay": 0.01, "max_model_files": 300, "max_model_size": 1 << 20})
    net = Net(settings)
    yield Kaggle(net, settings)
    net.close()


@pytest.fixture
def official(kaggle: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """kagglehub's own download, of this test's server: returns the directory."""
    import tqdm

    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "no-login"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    # Its thread would outlive the test.
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    # Not at the top: the import makes directories in the home, which is now the test's own.
    import kagglehub
    from kagglesdk import kaggle_env

    # Its own port, 7777, may be taken on a machine where tests run side by side.
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.TEST, kaggle.url)
    return lambda handle: Path(kagglehub.model_download(handle))


def listing(hub: Kaggle, handle: str = f"{URL}/1", how: LoadFormat = LoadFormat.AUTO) -> Listing:
    found = hub.locate(handle, how)
    assert isinstance(found, Listing)
    return found


def read(found: Listing, name: str, start: int = 0, stop: int | None = None) -> bytes:
    file = found.files[name]
    stop = file.size if stop is None else stop
    return remote.read(found.source, found.handle, file, start, stop)


def contents(found: Listing) -> dict[str, bytes]:
    return {name: read(found, name) for name in found.files}


def tree_at(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# Kaggle's own


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "https://www.kaggle.com"),
        ({"KAGGLE_API_ENVIRONMENT": "PROD"}, "https://www.kaggle.com"),
        ({"KAGGLE_API_ENVIRONMENT": "TEST"}, "http://localhost:7777"),
        ({"KAGGLE_API_ENDPOINT": "https://mirror.example/kaggle/api/v1/"}, "https://mirror.example/kaggle"),
    ],
)
def test_endpoint(environ: Mapping[str, str], url: str) -> None:
    assert endpoint(environ) == url


@pytest.mark.parametrize(
    "url",
    ["mirror.example", "ftp://a.example", "https://user:pw@a.example", "https://", "https://a.example?x"],
)
def test_endpoint_that_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        endpoint({"KAGGLE_API_ENDPOINT": url})
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-02-21T09:30:00.1234567Z", 1708507800),
        ("2024-02-21T09:30:00Z", 1708507800),
        ("2024-02-31T09:30:00Z", 0),
        ("", 0),
        (None, 0),
        (17, 0),
    ],
)
def test_time(text: object, seconds: int) -> None:
    assert parse_time(text) == seconds


# The same as Kaggle's own clients


def test_files_are_those_that_kagglehub_gets(
    kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]
) -> None:
    kaggle.publish(f"{HANDLE}/1", make_tree())
    found = listing(hub)
    assert tree_at(official(f"{HANDLE}/1")) == contents(found) == make_tree()
    assert {file.mtime for file in found.files.values()} == {1708507800}
    assert found.where == f"{URL}/1"


def test_listing_of_many_files(kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]) -> None:
    # Over Kaggle's page for hubfs (200), and over kagglehub's limit (25), which then takes the archive.
    files = {f"d{i % 7}/f {i}%#?é.txt": bytes([i % 256]) * (i % 5) for i in range(250)}
    kaggle.publish(f"{HANDLE}/1", files)
    found = listing(hub)
    assert len(kaggle.seen("api", "files")) == 2
    assert {name: file.size for name, file in found.files.items()} == {n: len(b) for n, b in files.items()}
    name = "d3/f 178%#?é.txt"
    assert read(found, name) == files[name]
    assert tree_at(official(f"{HANDLE}/1")) == files
    assert [seen.what for seen in kaggle.seen("storage")] == [name, "archive.tar.gz"]


def test_listing_is_the_sdks(kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]) -> None:
    from kagglehub.handle import parse_model_handle
    from kagglesdk.kaggle_client import KaggleClient
    from kagglesdk.models.types.model_api_service import ApiListModelInstanceVersionFilesRequest

    kaggle.publish(f"{HANDLE}/1", {f"file{i:02}": b"x" * i for i in range(45)})
    request = ApiListModelInstanceVersionFilesRequest()
    request.owner_slug, request.model_slug, request.instance_slug = "google", "demo", "small"
    request.framework = parse_model_handle(HANDLE).framework_enum()
    request.version_number = 1
    theirs: dict[str, tuple[int, int]] = {}
    pages = 0
    with KaggleClient() as client:
        while pages == 0 or request.page_token:
            pages += 1
            page = client.models.model_api_client.list_model_instance_version_files(request)
            theirs |= {
                file.name: (file.size, parse_time(file.creation_date.isoformat())) for file in page.files
            }
            request.page_token = page.next_page_token
    assert pages == 3  # as many as Kaggle's own number for a page makes
    assert {name: (file.size, file.mtime) for name, file in listing(hub).files.items()} == theirs


def test_latest_version(kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]) -> None:
    for number in (1, 2, 10):
        kaggle.publish(f"{HANDLE}/{number}", make_tree(seed=number))
    found = listing(hub, URL)
    assert (found.handle, found.where) == (URL, f"{URL}/10")
    assert contents(found) == tree_at(official(HANDLE)) == make_tree(seed=10)


def test_any_framework_in_any_case(
    kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# Read me"}
    kaggle.publish("o/m/gemmaCpp/v/1", files)
    found = listing(hub, "https://www.kaggle.com/models/o/m/frameworks/GEMMACPP/variations/v/versions/1")
    assert contents(found) == files == tree_at(official("o/m/gemmaCpp/v/1"))


def test_no_such_version(kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path]) -> None:
    from kagglehub.exceptions import KaggleApiHTTPError

    kaggle.publish(f"{HANDLE}/1", make_tree())
    with pytest.raises(KaggleApiHTTPError, match="404"):
        official(f"{HANDLE}/2")
    for how in LoadFormat:
        with pytest.raises(NotFoundError, match="no such model"):
            hub.locate(f"{URL}/2", how)


# Reading


def test_ranges(kaggle: KaggleServer, hub: Kaggle) -> None:
    body = bytes(range(256)) * 100
    kaggle.publish(f"{HANDLE}/1", {"data": body, "empty": b""})
    found = listing(hub)
    spans = [(0, 1), (25599, 25600), (100, 300), (0, 25600), (7, 7)]
    assert [read(found, "data", *span) for span in spans] == [body[a:b] for a, b in spans]
    assert read(found, "empty") == b""
    assert [seen.range for seen in kaggle.seen("storage")] == [
        "bytes=0-0", "bytes=25599-25599", "bytes=100-299", "bytes=0-25599"
    ]  # fmt: skip
    # Kaggle itself is asked where the file is once.
    assert len(kaggle.seen("api", "download")) == 1


def test_address_that_is_too_old_is_asked_for_again(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found = listing(hub)
    assert read(found, "data", 0, 5) == b"01234"
    kaggle.expire()
    assert read(found, "data", 5, 10) == b"56789"
    assert [seen.status for seen in kaggle.seen("storage")] == [206, 400, 206]
    assert len({seen.signature for seen in kaggle.seen("storage")}) == 2


@pytest.mark.parametrize(
    "faults", [{"chunked"}, {"no-ranges"}, {"chunked", "no-ranges"}, {"gzip"}, {"no-hash"}]
)
def test_storage_may_say_less(kaggle: KaggleServer, hub: Kaggle, faults: set[str]) -> None:
    body = bytes(range(256)) * 10
    kaggle.publish(f"{HANDLE}/1", {"data": body})
    kaggle.object(f"{HANDLE}/1", "data").faults = faults
    found = listing(hub)
    spans = [(0, 2560), (1000, 1001), (0, 10), (2550, 2560)]
    assert [read(found, "data", *span) for span in spans] == [body[a:b] for a, b in spans]


@pytest.mark.parametrize(
    "faults", [{"short"}, {"short", "chunked"}, {"short", "no-ranges"}, {"less"}, {"elsewhere"}]
)
def test_wrong_range_may_be_tried_again(kaggle: KaggleServer, hub: Kaggle, faults: set[str]) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found, stored = listing(hub), kaggle.object(f"{HANDLE}/1", "data")
    stored.faults = faults
    with pytest.raises(UnavailableError):
        read(found, "data", 0, 8)
    stored.faults = set()
    assert read(found, "data") == b"0123456789"


def test_storage_that_is_too_slow_is_given_up(kaggle: KaggleServer) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"x" * 10_000})
    kaggle.object(f"{HANDLE}/1", "data").faults = {"trickle"}
    settings = Settings.load({"stall_timeout": 0.5})
    net = Net(settings)
    found = listing(Kaggle(net, settings))
    with pytest.raises(UnavailableError):
        read(found, "data")  # which would take minutes
    net.close()


def test_compressed_body_is_refused(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.object(f"{HANDLE}/1", "data").faults = {"encoded"}
    with pytest.raises(ProtocolError, match="another encoding"):
        read(listing(hub), "data")


def test_only_so_much_is_read_past(
    kaggle: KaggleServer, hub: Kaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.object(f"{HANDLE}/1", "data").faults = {"no-ranges"}
    monkeypatch.setattr("hubfs.hubs.url_files._MAX_SKIP", 5)
    found = listing(hub)
    assert read(found, "data", 5, 7) == b"56"
    with pytest.raises(ProtocolError, match="does not give ranges; use --load-format compressed"):
        read(found, "data", 6, 7)


def test_checksum_of_a_whole_file(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found, stored = listing(hub), kaggle.object(f"{HANDLE}/1", "data")
    stored.faults = {"flip"}
    with pytest.raises(DamagedError, match="data: its crc32c is"):
        read(found, "data")
    stored.faults = set()
    assert read(found, "data") == b"0123456789"


def test_checksums_are_learnt_from_any_range(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found = listing(hub)
    file = found.files["data"]
    assert (file.md5, file.crc32c) == (None, None)
    read(found, "data", 3, 5)
    known = found.source.declared(file)
    assert known.md5 is not None
    assert known.crc32c is not None
    assert known.md5.hex() == "781e5e245d69b566979b86e28d23f2c7"
    assert known.crc32c.hex() == "280c069e"
    assert known.etag == '"781e5e245d69b566979b86e28d23f2c7"'


@pytest.mark.parametrize("now", [b"abcdefghij", b"0123", b"0123456789more", b""])
@pytest.mark.parametrize("faults", [set(), {"chunked", "no-ranges"}, {"no-ranges"}])
def test_file_that_changed_under_its_listing(
    kaggle: KaggleServer, hub: Kaggle, now: bytes, faults: set[str]
) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found, stored = listing(hub), kaggle.object(f"{HANDLE}/1", "data")
    stored.faults = faults
    assert read(found, "data", 0, 5) == b"01234"
    stored.body = now
    with pytest.raises(ChangedOriginError, match="data is not the file that was listed"):
        read(found, "data", 5, 10)


def test_file_that_was_known_to_an_earlier_process(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found = listing(hub)
    read(found, "data", 0, 1)
    known, cancel = found.source.declared(found.files["data"]), threading.Event()

    def read_known(file: RemoteFile, again: bool) -> bytes:
        source = listing(hub).source if again else found.source
        return remote.read(source, "h", file, 2, 4, cancel)

    assert read_known(known, again=True) == b"23"
    stored = kaggle.object(f"{HANDLE}/1", "data")
    # Another file by each of the three, in a source that has read it and in one that has not.
    for change in ({"etag": '"x"'}, {"md5": bytes(16)}, {"crc32c": bytes(4)}):
        for again in (True, False):
            with pytest.raises(ChangedOriginError, match="other bytes than before"):
                read_known(dataclasses.replace(known, **change), again)  # type: ignore[arg-type]
    # What storage does not say any more is no change, and is not forgotten.
    stored.faults = {"no-hash"}
    source = listing(hub).source
    assert remote.read(source, "h", known, 2, 4, cancel) == b"23"
    assert source.declared(known) == known
    stored.body = b"abcdefghij"
    with pytest.raises(ChangedOriginError):
        read_known(known, again=True)


def test_pieces(kaggle: KaggleServer, hub: Kaggle) -> None:
    body = os.urandom(1_048_575)
    kaggle.publish(f"{HANDLE}/1", {"data": body})
    found, stored = listing(hub), kaggle.object(f"{HANDLE}/1", "data")
    file, cancel = found.files["data"], threading.Event()

    def pieces(start: int, stop: int) -> list[bytes]:
        return [bytes(piece) for piece in found.source.pieces("h", file, start, stop, cancel)]

    whole = pieces(0, file.size)
    assert b"".join(whole) == body
    assert len(whole) > 1, "as they come"
    assert b"".join(pieces(7, 1_000_000)) == body[7:1_000_000]
    assert pieces(7, 7) == []
    left_early = found.source.pieces("h", file, 0, file.size, cancel)
    next(left_early)
    left_early.close()
    stored.faults = {"flip"}
    with pytest.raises(DamagedError):
        pieces(0, file.size)
    stored.faults = {"short"}
    with pytest.raises(UnavailableError):
        pieces(0, file.size)


def test_pieces_before_a_failure_are_given(kaggle: KaggleServer) -> None:
    body = os.urandom(5 << 20)
    kaggle.publish(f"{HANDLE}/1", {"data": body})
    settings = Settings.load({})
    net = Net(settings)
    found, cancel = listing(Kaggle(net, settings)), threading.Event()
    for fault, error, least in (("short", UnavailableError, 2 << 20), ("flip", DamagedError, 4 << 20)):
        kaggle.object(f"{HANDLE}/1", "data").faults = {fault}
        came = 0
        with pytest.raises(error):
            for piece in found.source.pieces("h", found.files["data"], 0, 5 << 20, cancel):
                came += len(piece)
        assert least <= came < 5 << 20
    net.close()


@pytest.mark.parametrize("faults", [set(), {"chunked", "no-ranges", "no-hash"}])
def test_file_of_another_size_than_listed(kaggle: KaggleServer, hub: Kaggle, faults: set[str]) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found, stored = listing(hub), kaggle.object(f"{HANDLE}/1", "data")
    stored.body, stored.faults = b"0123456789more", faults
    with pytest.raises(ChangedOriginError):
        read(found, "data")


def test_reading_can_be_stopped(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    found, cancel = listing(hub), threading.Event()
    cancel.set()
    with pytest.raises(StoppedError):
        remote.read(found.source, found.handle, found.files["data"], 0, 10, cancel)


def test_threads_share_a_source(kaggle: KaggleServer, hub: Kaggle) -> None:
    from concurrent.futures import ThreadPoolExecutor

    body = bytes(range(256)) * 64
    kaggle.publish(f"{HANDLE}/1", {"a": body, "b": body[::-1]})
    found = listing(hub)
    with ThreadPoolExecutor(8) as pool:
        parts = [
            (name, start, pool.submit(read, found, name, start, start + 512))
            for start in range(0, len(body), 512)
            for name in ("a", "b")
        ]
        for name, start, part in parts:
            assert part.result() == {"a": body, "b": body[::-1]}[name][start : start + 512]


# Archives


@pytest.mark.parametrize("status", [404, 400, 501])
def test_archive_where_there_is_no_listing(
    kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path], status: int
) -> None:
    kaggle.publish(f"{HANDLE}/1", make_tree())
    kaggle.unlist(f"{HANDLE}/1", status)
    if status == 501:
        # It may have one later.
        with pytest.raises(UnavailableError):
            hub.locate(f"{URL}/1")
        return
    with pytest.raises(HubfsError):
        hub.locate(f"{URL}/1", LoadFormat.UNCOMPRESSED)
    found = hub.locate(f"{URL}/1")
    assert isinstance(found, Archive)
    assert found.size == len(kaggle.object(f"{HANDLE}/1").body)
    assert found.etag


def test_compressed_means_the_archive(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/4", make_tree())
    found = hub.locate(URL, LoadFormat.COMPRESSED)
    assert isinstance(found, Archive)
    assert found.url == f"{kaggle.url}/api/v1/models/{HANDLE}/4/download"
    with hub._net.get(found.url, URL) as response:
        assert response.raw.read() == make_tar_gz(make_tree())
    assert not kaggle.seen("api", "files")


def test_archive_that_is_a_zip(
    kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path], tmp_path: Path
) -> None:
    # So many that kagglehub takes the archive too.
    files, buffer = {**make_tree(), **{f"assets/{i}": b"x" * i for i in range(30)}}, io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    kaggle.publish(f"{HANDLE}/1", files, ("archive.zip", buffer.getvalue()))
    found, into = hub.locate(f"{URL}/1", LoadFormat.COMPRESSED), tmp_path / "into"
    assert isinstance(found, Archive)
    into.mkdir()
    download = Download(hub._net, found, hub._settings, threading.Event())
    with closing(Storage()) as storage:
        extract_any(
            iter(download), into, Recorder(into), storage, Limits(300, 1 << 20), name=URL,
            spool=tmp_path / "spool", stop=download.abort,
        )  # fmt: skip
    assert tree_at(into) == files == tree_at(official(f"{HANDLE}/1"))


# Credentials


def login_files(home: Path, names: Mapping[str, str]) -> None:
    for name, text in names.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


TOKEN_FILE = {".kaggle/access_token": " from-file\n"}
JSON_FILE = {".kaggle/kaggle.json": '{"username": "ann", "key": "k1"}'}
PAIR = {"KAGGLE_USERNAME": "bob", "KAGGLE_KEY": "k2"}
EVERYTHING = {**TOKEN_FILE, **JSON_FILE}


@pytest.mark.parametrize(
    ("environ", "files", "header"),
    [
        ({}, {}, None),
        ({"KAGGLE_API_TOKEN": SECRET, **PAIR}, EVERYTHING, f"Bearer {SECRET}"),
        (
            {"KAGGLE_API_TOKEN": "{home}/my-token", **PAIR},
            {**EVERYTHING, "my-token": "mine\n"},
            "Bearer mine",
        ),
        (PAIR, EVERYTHING, "Bearer from-file"),
        (PAIR, {".kaggle/access_token.txt": "windows"}, "Bearer windows"),
        (PAIR, {".kaggle/access_token": "\n", **JSON_FILE}, "Basic Ym9iOmsy"),
        ({"KAGGLE_USERNAME": "bob"}, JSON_FILE, "Basic YW5uOmsx"),
        (
            {"KAGGLE_CONFIG_DIR": "{home}/elsewhere"},
            {**JSON_FILE, "elsewhere/kaggle.json": '{"username": "eve", "key": "k3"}'},
            "Basic ZXZlOmsz",
        ),
        ({"KAGGLE_CONFIG_DIR": "{home}/elsewhere"}, JSON_FILE, None),
    ],
)
def test_credentials_are_kagglehubs(
    kaggle: KaggleServer,
    hub: Kaggle,
    official: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    environ: Mapping[str, str],
    files: Mapping[str, str],
    header: str | None,
) -> None:
    from kagglehub import config

    home = Path(os.environ["HOME"])
    login_files(home, files)
    monkeypatch.delenv("KAGGLE_CONFIG_DIR")
    # kagglehub keeps the home it saw when it was imported.
    monkeypatch.setattr(config, "DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(home / ".kaggle"))
    for name, value in environ.items():
        monkeypatch.setenv(name, value.replace("{home}", str(home)))
    if header:
        kaggle.accounts.add(header)
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    assert read(listing(hub), "data") == b"0123456789"
    assert {seen.authorization for seen in kaggle.seen("api")} == {header}
    # Its SDK looks into ~/.kaggle too where kagglehub finds nothing in KAGGLE_CONFIG_DIR.
    if header or not files:
        kaggle.forget()
        official(f"{HANDLE}/1")
        assert {seen.authorization for seen in kaggle.seen("api")} == {header}
    assert kaggle.seen("storage")
    assert {seen.authorization for seen in kaggle.seen("storage")} == {None}


def test_token_may_be_longer_than_a_file_name() -> None:
    login = find_credentials({"HOME": "/nowhere", "KAGGLE_API_TOKEN": "x" * 5000})
    assert login is not None
    assert login.header == "Bearer " + "x" * 5000


@pytest.mark.parametrize("text", ["{", "[]", '{"username": "ann"}', '{"username": "ann", "key": 5}'])
def test_broken_credentials_file(text: str) -> None:
    login_files(Path(os.environ["HOME"]), {".kaggle/kaggle.json": text})
    with pytest.raises(ConfigError, match=r"kaggle\.json"):
        find_credentials(os.environ)


@pytest.mark.parametrize("token", [f"{SECRET}\nX-Other: 1", f"{SECRET} {SECRET}", f"{SECRET}é"])
def test_token_that_is_no_header_is_not_shown(
    kaggle: KaggleServer, hub: Kaggle, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    with pytest.raises(ConfigError, match="KAGGLE_API_TOKEN") as caught:
        hub.locate(f"{URL}/1")
    assert SECRET not in str(caught.value)
    assert not kaggle.seen()


def test_credentials_are_never_told(
    kaggle: KaggleServer, hub: Kaggle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    with pytest.raises(AccessError) as refused:
        hub.locate(f"{URL}/1")
    assert kaggle.seen()[0].authorization == f"Bearer {SECRET}"
    assert caplog.records  # the HTTP library's own, for one
    login = find_credentials(os.environ)
    for text in (caplog.text, str(refused.value), repr(login), repr(vars(hub)), repr(vars(hub._net))):
        assert SECRET not in text


def test_credentials_are_not_sent_in_the_clear(kaggle: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that hubfs does not know as this machine's, and that yet leads to this test's server.
    monkeypatch.setenv("KAGGLE_API_ENDPOINT", kaggle.url.replace("localhost", "127.1"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    settings = Settings.load({})
    net = Net(settings)
    assert read(listing(Kaggle(net, settings)), "data") == b"0123456789"
    net.close()
    assert {seen.authorization for seen in kaggle.seen()} == {None}


# Refusals


def test_licence_that_was_not_accepted(
    kaggle: KaggleServer, hub: Kaggle, official: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagglehub.exceptions import KaggleApiHTTPError

    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.gated.add("google/demo")
    with pytest.raises(AccessError) as stranger:
        hub.locate(f"{URL}/1")
    assert "403" in str(stranger.value) and "User has not consented to terms of use." in str(stranger.value)
    assert "log in" in str(stranger.value) and "KAGGLE_API_TOKEN" in str(stranger.value)
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.accounts.add(f"Bearer {SECRET}")
    with pytest.raises(AccessError) as known:
        hub.locate(f"{URL}/1")
    assert f"licence at {URL} as the user of KAGGLE_API_TOKEN" in str(known.value)
    with pytest.raises(KaggleApiHTTPError, match="403"):
        official(f"{HANDLE}/1")
    kaggle.consents.add((f"Bearer {SECRET}", "google/demo"))
    found = listing(hub)
    assert read(found, "data") == b"0123456789"
    assert tree_at(official(f"{HANDLE}/1")) == {"data": b"0123456789"}
    # And if the consent is taken back while files are read:
    kaggle.consents.clear()
    kaggle.expire()
    with pytest.raises(AccessError, match="not consented"):
        read(found, "data")


def test_archive_of_a_gated_model(kaggle: KaggleServer, hub: Kaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.gated.add("google/demo")
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.accounts.add(f"Bearer {SECRET}")
    kaggle.consents.add((f"Bearer {SECRET}", "google/demo"))
    found = hub.locate(f"{URL}/1", LoadFormat.COMPRESSED)
    assert isinstance(found, Archive)
    # Whoever transfers it needs to know nothing of credentials.
    with hub._net.get(found.url, URL) as response:
        assert response.raw.read() == make_tar_gz({"data": b"0123456789"})
    assert {seen.authorization for seen in kaggle.seen("storage")} == {None}


def test_unknown_credentials(kaggle: KaggleServer, hub: Kaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    monkeypatch.setenv("KAGGLE_USERNAME", "bob")
    monkeypatch.setenv("KAGGLE_KEY", "old")
    with pytest.raises(AccessError, match=r"\(HTTP 401\): Unauthenticated; .*KAGGLE_USERNAME and KAGGLE_KEY"):
        hub.locate(f"{URL}/1")


# What a server may say that is wrong


def test_names_that_lead_elsewhere(kaggle: KaggleServer, hub: Kaggle) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    climbing = ("../up", "a/..", "/etc/passwd", "a//b", "a/./b", "", "nul\0", "dir/", ".", "..", "\ud800")
    for name in (*climbing, "x" * 256, "é" * 128, "d/" * 2047 + "ff", "d/" * 128 + "f", 7, None, ["x"]):
        kaggle.changes[:] = [lambda page, name=name: page["files"][0].update(name=name)]
        with pytest.raises(HostileError, match="a name that no file can have"):
            hub.locate(f"{URL}/1")


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("a", "a", "twice"),
        ("a", "a/b", "both a file and a directory"),
        ("a/b", "a", "both a file and a directory"),
        ("A", "a", "take for one"),
        ("d/x", "D/y", "take for one"),
        ("\u00e9", "e\u0301", "take for one"),
    ],
)
def test_names_that_clash(kaggle: KaggleServer, hub: Kaggle, one: str, other: str, words: str) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    for how in LoadFormat:
        kaggle.changes[:] = [
            lambda page: page.update(files=[{"name": name, "size": 1} for name in (one, other)])
        ]
        if how is LoadFormat.COMPRESSED:
            assert isinstance(hub.locate(f"{URL}/1", how), Archive)
        else:
            with pytest.raises(HostileError, match=words):
                hub.locate(f"{URL}/1", how)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda page: page.update(nextPageToken="MA=="), ProtocolError),
        (lambda page: page.update(files=[], nextPageToken="MjA="), ProtocolError),
        (lambda page: page.update(files=[]), ProtocolError),
        (lambda page: page.update(files="all"), ProtocolError),
        (lambda page: b"[" * 100_000, ProtocolError),
        (lambda page: b"<html>", ProtocolError),
        (lambda page: b"[]", ProtocolError),
        (lambda page: page.update(padding="x" * (5 << 20)), ProtocolError),
        (lambda page: page.update(files=["data"]), ProtocolError),
        (lambda page: page["files"][0].update(size=-1), ProtocolError),
        (lambda page: page["files"][0].update(size="10"), ProtocolError),
        (lambda page: page["files"][0].update(name=["data"]), HostileError),
        (lambda page: page["files"].append(page["files"][0]), HostileError),
        (lambda page: page["files"][0].update(size=1 << 21), TooLargeError),
        (lambda page: page["files"].extend({"name": f"f{i}", "size": 1} for i in range(300)), TooLargeError),
    ],
)
def test_listing_that_cannot_be(
    kaggle: KaggleServer, hub: Kaggle, change: Callable[[Any], None], error: type[HubfsError]
) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.changes.append(change)
    with pytest.raises(error):
        hub.locate(f"{URL}/1", LoadFormat.UNCOMPRESSED)
    assert len(kaggle.seen("api", "files")) <= 3


@pytest.mark.parametrize("number", [0, -1, "3", None, True])
def test_latest_version_that_cannot_be(kaggle: KaggleServer, hub: Kaggle, number: object) -> None:
    kaggle.publish(f"{HANDLE}/1", {"data": b"0123456789"})
    kaggle.changes.append(lambda answer: answer.update(versionNumber=number))
    with pytest.raises(ProtocolError, match="which version is the latest"):
        hub.locate(URL)
