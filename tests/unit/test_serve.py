"""The local hub: what it serves, how it answers, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import logging
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin

import google_crc32c
import pytest
import requests

from hubfs.errors import ConfigError, HubfsError, NotFoundError, StoppedError, UnavailableError
from hubfs.serve import Catalog, LocalHub, RequestRecord
from tests.models import make_tree, write_tree

COMPRESSED = "?tf-hub-format=compressed"
TREE = make_tree(size=200_000, empty_directory=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for handle in ("google/bert/1", "google/bert/9", "google/bert/10", "google/a/b/c/3"):
        write_tree({**TREE, "name.txt": handle.encode()}, root / handle)
    (root / "google/bert/11").mkdir()
    write_tree(TREE, root / "google/bert/draft")
    return root


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def hub(root: Path, tmp_path: Path, records: list[RequestRecord]) -> Iterator[LocalHub]:
    with LocalHub(root, archive_dir=tmp_path / "archives", on_request=records.append) as hub:
        yield hub


def get(hub: LocalHub, target: str, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.get(hub.url + target, headers=named, timeout=20)


def talk(hub: LocalHub, request: bytes) -> bytes:
    """What the hub answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def unpacked(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        assert tar.getnames()[0] == "."
        found = {}
        for member in tar.getmembers()[1:]:
            assert member.isdir() or member.isfile()
            file = tar.extractfile(member)
            name = member.name.removeprefix("./") + ("/" if member.isdir() else "")
            found[name] = file.read() if file else b""
        return found


def test_archive_holds_the_model(hub: LocalHub) -> None:
    answer = get(hub, f"/google/bert/9{COMPRESSED}")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/gzip"
    expected = {**TREE, "name.txt": b"google/bert/9", "assets/": b"", "variables/": b""}
    assert unpacked(answer.content) == expected
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames()[1:] == sorted(tar.getnames()[1:], key=lambda name: name.split("/"))


def test_headers_tell_size_and_checksums(hub: LocalHub) -> None:
    answer = get(hub, f"/google/bert/9{COMPRESSED}")
    head = requests.head(f"{hub.url}/google/bert/9{COMPRESSED}", timeout=20)
    md5 = hashlib.md5(answer.content)
    crc32c = google_crc32c.value(answer.content).to_bytes(4, "big")
    encoded = [base64.b64encode(digest).decode() for digest in (crc32c, md5.digest())]
    for headers in (answer.headers, head.headers):
        assert headers["Content-Length"] == str(len(answer.content))
        assert headers["ETag"] == f'"{md5.hexdigest()}"'
        assert headers["Accept-Ranges"] == "bytes"
        assert headers["x-goog-hash"] == f"crc32c={encoded[0]},md5={encoded[1]}"
        assert headers["Last-Modified"].endswith(" GMT")
    assert head.content == b""


def test_without_a_version_it_is_the_latest_by_number(hub: LocalHub) -> None:
    for target in (f"/google/bert{COMPRESSED}", "/google/bert.tar.gz", f"/google/bert/{COMPRESSED}&x=1"):
        assert unpacked(get(hub, target).content)["name.txt"] == b"google/bert/10"
    assert unpacked(get(hub, "/google/a/b/c/3.tar.gz?x=1").content)["name.txt"] == b"google/a/b/c/3"


def test_pages(hub: LocalHub) -> None:
    page = get(hub, "/google/bert/9?lang=en")
    assert page.headers["Content-Type"].startswith("text/html")
    assert f"{hub.url}/google/bert/9?tf-hub-format=compressed" in page.text
    assert get(hub, "/").text.split()[-4:] == [
        "google/a/b/c/3",
        "google/bert/1",
        "google/bert/9",
        "google/bert/10",
    ]


@pytest.mark.parametrize(
    "target",
    [
        "/google/bert/2",
        "/google/bert/11",
        "/google/bert/draft",
        "/google/bert/9/variables",
        "/google/bert/9/variables/1",
        "/google",
        "/google/9",
        "/other/model/1",
        "//google/bert/9",
        "/google//bert/9",
        "/google/bert/9//",
        "/google/./bert/9",
        "/google/../google/bert/9",
        "/google/%2e%2e/google/bert/9",
        "/google/%2E%2E%2Fgoogle/bert/9",
        "/%252e%252e/bert/9",
        "/%2fetc/passwd/1",
        "/google/bert%00/9",
        "/.hidden/model/1",
        "/google/bert/%D9%A9",
        f"/google/{'x' * 300}/1",
        "http://elsewhere/google/bert/9",
        "*",
    ],
)
def test_other_paths_are_not_found(hub: LocalHub, root: Path, target: str) -> None:
    write_tree(TREE, root / ".hidden/model/1")
    for query in ("", COMPRESSED):
        answer = talk(hub, f"GET {target}{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 "), head
        assert b"Content-Type: text/plain" in head
        assert len(body) > 10


def test_other_formats_are_not_offered(hub: LocalHub) -> None:
    answer = get(hub, "/google/bert/9?tf-hub-format=zip")
    assert (answer.status_code, "not offered" in answer.text) == (404, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_changed(hub: LocalHub, method: str) -> None:
    answer = requests.request(method, f"{hub.url}/google/bert/9{COMPRESSED}", data=b"x" * 1000, timeout=20)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_ranges(hub: LocalHub) -> None:
    target = f"/google/bert/9{COMPRESSED}"
    body = get(hub, target).content
    size = len(body)
    for asked, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, size),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", size - 5, size),
        (f"bytes=-{2 * size}", 0, size),
        (f"bytes=10-{2 * size}", 10, size),
    ]:
        answer = get(hub, target, Range=asked)
        assert (answer.status_code, answer.content) == (206, body[start:stop]), asked
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert answer.headers["Content-Length"] == str(stop - start)
    for asked in (f"bytes={size}-", "bytes=-0"):
        answer = get(hub, target, Range=asked)
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{size}"), asked
    for asked in ("bytes=0-0,5-6", "bytes=9-3", "bytes=-", "bytes=x-", "lines=1-2"):
        answer = get(hub, target, Range=asked)
        assert (answer.status_code, answer.content) == (200, body), asked
    head = requests.head(hub.url + target, headers={"Range": "bytes=0-0"}, timeout=20)
    assert head.status_code == 200, "a range is defined for GET only"


def test_conditions(hub: LocalHub) -> None:
    target = f"/google/bert/9{COMPRESSED}"
    known = get(hub, target).headers
    for validator in (known["ETag"], known["Last-Modified"]):
        assert get(hub, target, Range="bytes=5-", If_Range=validator).status_code == 206
    for validator in ('"other"', f"W/{known['ETag']}", "Fri, 14 Jul 2017 02:40:01 GMT"):
        assert get(hub, target, Range="bytes=5-", If_Range=validator).status_code == 200
    for validator in (known["ETag"], f'"x", W/{known["ETag"]}', "*"):
        unchanged = get(hub, target, If_None_Match=validator)
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["ETag"] == known["ETag"]
    assert get(hub, target, If_None_Match='"x"').status_code == 200


def test_one_connection_serves_many_requests(hub: LocalHub) -> None:
    request = f"GET /google/bert/9{COMPRESSED} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n\r\n".encode()
    lost = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    assert talk(hub, request + lost + request).count(b"HTTP/1.1 206 ") == 2


def test_requests_are_recorded(hub: LocalHub, records: list[RequestRecord]) -> None:
    target = f"/google/bert/9{COMPRESSED}"
    with requests.Session() as session:  # one connection, hence one thread and one order
        size = len(session.get(hub.url + target, timeout=20).content)
        session.get(hub.url + target, headers={"Range": "bytes=0-9"}, timeout=20)
        session.get(f"{hub.url}/nothing", timeout=20)
    hub.stop()  # a record comes after its answer
    assert records[:2] == [
        RequestRecord("GET", target, 200, size, None),
        RequestRecord("GET", target, 206, 10, "bytes=0-9"),
    ]
    assert records[2].status == 404


def test_archives_outlive_a_restart_and_follow_the_tree(root: Path, tmp_path: Path) -> None:
    archives = tmp_path / "archives"

    def etag_and_time() -> tuple[str, str, int]:
        with LocalHub(root, archive_dir=archives) as hub:
            answer = get(hub, f"/google/bert/9{COMPRESSED}")
            (file,) = archives.glob("*.tar.gz")
            return answer.headers["ETag"], answer.headers["Last-Modified"], file.stat().st_mtime_ns

    first = etag_and_time()
    assert archives.stat().st_mode & 0o777 == 0o700
    assert etag_and_time() == first
    (root / "google/bert/9/more.txt").write_text("more")
    changed = etag_and_time()
    assert changed[0] != first[0]
    assert changed[1] != first[1], "a date must not stand for two archives"
    (root / "google/bert/9/more.txt").unlink()
    assert etag_and_time()[0] == first[0], "the same tree gives the same bytes"


def test_damaged_archive_directory_is_repaired(hub: LocalHub, tmp_path: Path) -> None:
    target = f"/google/bert/9{COMPRESSED}"
    etag = get(hub, target).headers["ETag"]
    (archive,) = (tmp_path / "archives").glob("*.tar.gz")
    (description,) = (tmp_path / "archives").glob("*.json")
    damages: list[Callable[[], object]] = [
        archive.unlink,
        lambda: os.truncate(archive, 10),
        description.unlink,
        lambda: description.write_text("{"),
        lambda: description.write_text('{"old": 1}'),
    ]
    for damage in damages:
        damage()
        answer = get(hub, target)
        assert answer.headers["ETag"] == etag
        assert f'"{hashlib.md5(answer.content).hexdigest()}"' == etag


def test_many_at_once_share_one_build(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds, together = [], threading.Barrier(8)
    build = Catalog._build

    def counted(catalog: Catalog, *args: object) -> object:
        builds.append(args)
        return build(catalog, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "_build", counted)
    # Two catalogs on one directory stand for two processes.
    catalogs = [Catalog(root, tmp_path / "archives") for _ in range(2)]
    contents = []

    def ask(catalog: Catalog) -> None:
        together.wait()
        _, file = catalog.open_archive(catalog.find("google/bert"))
        with file:
            contents.append(file.read())

    threads = [threading.Thread(target=ask, args=(catalogs[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(contents) == 8
    assert len(set(contents)) == 1


def test_links_inside_the_model_are_stored_as_files(hub: LocalHub, root: Path) -> None:
    model = root / "google/bert/9"
    (model / "inside").symlink_to("assets/vocab.txt")
    assert unpacked(get(hub, f"/google/bert/9{COMPRESSED}").content)["inside"] == TREE["assets/vocab.txt"]


@pytest.mark.logs("google/bert/9: strange is")
@pytest.mark.parametrize("kind", ["outside", "dangling", "directory", "fifo"])
def test_what_an_archive_cannot_hold_is_an_error(
    hub: LocalHub, root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    strange = root / "google/bert/9/strange"
    if kind == "fifo":
        os.mkfifo(strange)
    else:
        strange.symlink_to({"outside": "../1/name.txt", "dangling": "none", "directory": "assets"}[kind])
    answer = get(hub, f"/google/bert/9{COMPRESSED}")
    assert answer.status_code == 500
    assert "google/bert/9: strange is " in answer.text
    assert answer.text.strip() in caplog.text
    assert get(hub, f"/google/bert/10{COMPRESSED}").status_code == 200


def test_linked_directories_are_not_models(hub: LocalHub, root: Path, tmp_path: Path) -> None:
    write_tree(TREE, tmp_path / "secret/model/1")
    (root / "linked").symlink_to(tmp_path / "secret")
    (root / "google/bert/12").symlink_to(tmp_path / "secret/model/1")
    assert get(hub, f"/linked/model/1{COMPRESSED}").status_code == 404
    assert get(hub, f"/google/bert/12{COMPRESSED}").status_code == 404
    assert "google/bert/12" not in [version.handle for version in hub.catalog.models()]
    assert hub.catalog.find("google/bert").number == "10"


def test_files_that_change_meanwhile_are_not_published(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(root, tmp_path / "archives")
    write = Catalog._write

    def write_and_change(*args: object) -> object:
        (root / "google/bert/9/name.txt").write_text("changed")
        return write(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_write", write_and_change)
        with pytest.raises(UnavailableError, match="changing"):
            catalog.open_archive(catalog.find("google/bert/9"))
    assert not list((tmp_path / "archives").glob("*.tar.gz")) + list((tmp_path / "archives").glob("*.tmp"))
    _, file = catalog.open_archive(catalog.find("google/bert/9"))
    with file:
        assert unpacked(file.read())["name.txt"] == b"changed"


def test_large_and_long_names(root: Path, tmp_path: Path) -> None:
    name = f"{'d' * 120}/{'ü' * 100}"
    write_tree({"saved_model.pb": b"x" * 511, name: b"y" * 512, "empty": b""}, root / "g/m/1")
    catalog = Catalog(root, tmp_path / "archives")
    _, file = catalog.open_archive(catalog.find("g/m/1"))
    with file:
        packed = file.read()
    assert unpacked(packed)[name] == b"y" * 512
    assert len(gzip.decompress(packed)) % tarfile.RECORDSIZE == 0


def test_client_that_goes_away_is_no_error(
    hub: LocalHub, root: Path, records: list[RequestRecord], caplog: pytest.LogCaptureFixture
) -> None:
    write_tree({"saved_model.pb": os.urandom(30 << 20)}, root / "big/model/1")
    caplog.set_level(logging.INFO, "hubfs.serve")
    requests.get(f"{hub.url}/big/model/1{COMPRESSED}", stream=True, timeout=20).close()
    hub.stop()
    assert records[0].status == 200
    assert 0 <= records[0].bytes_sent < 30 << 20
    assert [record.levelname for record in caplog.records] == ["INFO"], "the archive that was built"


def test_stop_ends_idle_connections_and_all_threads(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    hub = LocalHub(root, archive_dir=tmp_path / "archives")
    foreground = threading.Thread(target=hub.serve_forever)
    foreground.start()
    with requests.Session() as session:
        assert session.get(hub.url, timeout=20).status_code == 200
        hub.stop()
        hub.stop()
        foreground.join(10)
        assert threading.active_count() == before
        with pytest.raises(requests.exceptions.ConnectionError):
            session.get(hub.url, timeout=20)
    assert capfd.readouterr().err == ""


def test_stop_ends_a_download_that_stands_still(root: Path, tmp_path: Path) -> None:
    write_tree({"saved_model.pb": os.urandom(30 << 20)}, root / "big/model/1")
    before = threading.active_count()
    hub = LocalHub(root, archive_dir=tmp_path / "archives")
    hub.start()
    with requests.get(f"{hub.url}/big/model/1{COMPRESSED}", stream=True, timeout=20) as answer:
        hub.stop()
        assert threading.active_count() == before
        with pytest.raises((requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            assert answer.content


def test_too_many_connections_are_refused(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubfs.serve.server._MAX_CONNECTIONS", 1)
    with requests.Session() as session:
        assert session.get(hub.url, timeout=20).status_code == 200
        busy = get(hub, "/")
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
        assert session.get(hub.url, timeout=20).status_code == 200, "the open one goes on"


def test_closed_catalog_builds_nothing(root: Path, tmp_path: Path) -> None:
    catalog = Catalog(root, tmp_path / "archives")
    catalog.close()
    with pytest.raises(StoppedError):
        catalog.open_archive(catalog.find("google/bert/9"))
    assert not list((tmp_path / "archives").glob("*.t*"))


def test_bad_settings(root: Path, tmp_path: Path) -> None:
    file = root / "file"
    file.touch()
    for wrong in (root / "none", file):
        with pytest.raises(ConfigError, match="is not a directory"):
            LocalHub(wrong, archive_dir=tmp_path / "archives")
    with pytest.raises(ConfigError, match="cannot be used"):
        LocalHub(root, archive_dir=file)
    (tmp_path / "public").mkdir()
    (tmp_path / "public").chmod(0o777)
    with pytest.raises(ConfigError, match="everybody"):
        LocalHub(root, archive_dir=tmp_path / "public")
    with pytest.raises(ConfigError, match="not a port"):
        LocalHub(root, archive_dir=tmp_path / "archives", port=70000)
    with pytest.raises(NotFoundError):
        Catalog(root, tmp_path / "archives").find("")


def test_port_in_use(hub: LocalHub, root: Path, tmp_path: Path) -> None:
    port = int(hub.url.rpartition(":")[2])
    with pytest.raises(HubfsError, match=f"port {port} of 127.0.0.1 is in use"):
        LocalHub(root, archive_dir=tmp_path / "archives", port=port)


def test_default_archive_dir_is_in_the_users_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    catalog = Catalog(root)
    assert catalog.archive_dir.parent == tmp_path / "cache/hubfs/serve"
    assert catalog.archive_dir.stat().st_mode & 0o777 == 0o700


LITE = "/tensorflow/lite-model/m/1/default/1"


@pytest.fixture
def kinds(root: Path) -> Path:
    """Models of TF Lite and TF.js, whose names have numbers in them."""
    write_tree({"a b.tflite": b"TFL3", "doc/labels.txt": b"x"}, root / LITE[1:])
    write_tree({"a.tflite": b"2"}, root / "tensorflow/lite-model/m/1/default/2")
    write_tree({"model.json": b"{}", "group1/7/shard.bin": b"x"}, root / "google/tfjs-model/m/1/default/3")
    return root


def test_numbers_in_the_middle_of_a_name(hub: LocalHub, kinds: Path) -> None:
    listed = get(hub, "/").text.split()
    assert [LITE[1:], "tensorflow/lite-model/m/1/default/2"] == [name for name in listed if "lite" in name]
    assert "google/tfjs-model/m/1/default/3" in listed
    tar = unpacked(get(hub, f"{LITE}{COMPRESSED}").content)
    assert tar == {"a b.tflite": b"TFL3", "doc/": b"", "doc/labels.txt": b"x"}
    for target in (LITE.rpartition("/")[0], f"{LITE.rpartition('/')[0]}/2"):
        assert "default, version 2" in get(hub, target).text
    for target in ("/tensorflow/lite-model/m/1", "/tensorflow/lite-model/m", f"{LITE}/doc", f"{LITE}/3"):
        assert get(hub, target).status_code == 404
    # What lies below a version belongs to it, be it called like one.
    assert get(hub, "/google/tfjs-model/m/1/default/3/group1/7").status_code == 404
    handles = [version.handle for version in hub.catalog.models("tensorflow/lite-model/m/1")]
    assert handles == [LITE[1:], "tensorflow/lite-model/m/1/default/2"]
    for nothing in ("tensorflow/none", "../models", "google/bert/9/name.txt", "/"):
        assert hub.catalog.models(nothing) == (hub.catalog.models() if nothing == "/" else [])


def test_tf_lite_leads_to_the_only_file(hub: LocalHub, kinds: Path) -> None:
    for target in (LITE, f"{LITE}/"):
        answer = requests.get(f"{hub.url}{target}?lite-format=tflite", timeout=20)
        assert (answer.status_code, answer.content) == (200, b"TFL3")
        assert answer.url == f"{hub.url}/{hub.bucket}{LITE}/a%20b.tflite"
        assert [r.status_code for r in answer.history] == [302]
        assert "x-goog-hash" in answer.headers
    assert get(hub, "/tensorflow/lite-model/m/1/default?lite-format=tflite").content == b"2"
    write_tree({"b.tflite": b"3"}, kinds / LITE[1:])
    for target in (LITE, "/google/bert/9"):
        assert get(hub, f"{target}?lite-format=tflite").status_code == 404
    assert get(hub, f"{LITE}?lite-format=compressed").status_code == 404


def test_tf_js_is_the_archive(hub: LocalHub, kinds: Path) -> None:
    answer = get(hub, "/google/tfjs-model/m/1/default/3?tfjs-format=compressed")
    assert unpacked(answer.content)["model.json"] == b"{}"
    assert get(hub, "/google/tfjs-model/m/1/default/3?tfjs-format=uncompressed").status_code == 404


def test_archive_by_name_and_format(hub: LocalHub) -> None:
    # tensorflow_hub appends the format to the URL of any archive.
    answer = get(hub, f"/google/bert/9.tar.gz{COMPRESSED}")
    assert unpacked(answer.content)["name.txt"] == b"google/bert/9"
    assert get(hub, "/google/bert/9.tar.gz?tf-hub-format=uncompressed").status_code == 404


def test_it_says_that_the_bucket_is_its_own(hub: LocalHub) -> None:
    for target in ("/google/bert/9", "/google/bert", "/google/bert/9/"):
        answer = requests.get(
            f"{hub.url}{target}?tf-hub-format=uncompressed", timeout=20, allow_redirects=False
        )
        assert (answer.status_code, answer.text.rpartition("/")[0]) == (303, "gs://hubfs-serve/google/bert")
        assert urljoin(answer.url, answer.headers["X-Hubfs-Storage"]) == f"{hub.url}/"
