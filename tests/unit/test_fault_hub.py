"""The hub of the test-suite does what its faults say, seen by an ordinary HTTP client."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import ssl
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest
import requests
import trustme

from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree, write_tree

PATH = "google/model/1"
BODY = make_archive(make_tree(size=300_000))
COMPRESSED = {"tf-hub-format": "compressed"}
BROKEN = (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)


@pytest.fixture
def hub() -> Iterator[FaultHub]:
    with FaultHub() as hub:
        hub.add(PATH, BODY)
        yield hub


def get(hub: FaultHub, path: str = PATH, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.get(f"{hub.url}/{path}", params=COMPRESSED, headers=named, timeout=20)


def read_until_it_breaks(hub: FaultHub) -> tuple[bytes, Exception | None]:
    """What arrives of the body, and what ended it."""
    connection = http.client.HTTPConnection(hub.host, timeout=20)
    connection.request("GET", f"/{PATH}?tf-hub-format=compressed")
    answer, got = connection.getresponse(), b""
    try:
        while piece := answer.read1(65536):
            got += piece
    except (OSError, http.client.HTTPException) as error:
        return got, error
    finally:
        answer.close()
        connection.close()
    return got, None


def test_serves_like_a_storage_bucket(hub: FaultHub) -> None:
    answer = get(hub)
    md5 = hashlib.md5(BODY)
    crc32c = google_crc32c.value(BODY).to_bytes(4, "big")
    assert answer.status_code == 200
    assert answer.content == BODY
    assert answer.headers["Content-Length"] == str(len(BODY))
    assert answer.headers["ETag"] == f'"{md5.hexdigest()}"'
    assert answer.headers["Accept-Ranges"] == "bytes"
    encoded = [base64.b64encode(digest).decode() for digest in (crc32c, md5.digest())]
    assert answer.headers["x-goog-hash"] == f"crc32c={encoded[0]},md5={encoded[1]}"


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        ("bytes=0-0", 206, BODY[:1]),
        ("bytes=1000-", 206, BODY[1000:]),
        ("bytes=10-19", 206, BODY[10:20]),
        ("bytes=-7", 206, BODY[-7:]),
        (f"bytes=10-{10 * len(BODY)}", 206, BODY[10:]),
        (f"bytes={len(BODY)}-", 416, b""),
    ],
)
def test_range(hub: FaultHub, asked: str, status: int, content: bytes) -> None:
    answer = get(hub, Range=asked)
    assert (answer.status_code, answer.content) == (status, content)
    if status == 206:
        start = BODY.index(content) if len(content) > 1 else 0
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(content) - 1}/{len(BODY)}"
    else:
        assert answer.headers["Content-Range"] == f"bytes */{len(BODY)}"


def test_if_range_guards_against_another_body(hub: FaultHub) -> None:
    etag, date = (get(hub).headers[name] for name in ("ETag", "Last-Modified"))
    assert get(hub, Range="bytes=5-", If_Range=etag).status_code == 206
    assert get(hub, Range="bytes=5-", If_Range=date).status_code == 206
    hub.add(PATH, BODY + b"more")
    assert get(hub, Range="bytes=5-", If_Range=etag).content == BODY + b"more"
    assert get(hub, Range="bytes=5-", If_Range=date).status_code == 200


def test_archive_names_need_no_format_and_other_paths_do(hub: FaultHub, tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(BODY)
    hub.add("models/x.tar", file, etag=None, digests=False, accept_ranges=False)
    answer = requests.get(f"{hub.url}/models/x.tar", headers={"Range": "bytes=0-0"}, timeout=20)
    assert (answer.status_code, answer.content) == (200, BODY)
    assert not {"ETag", "x-goog-hash", "Accept-Ranges"} & set(answer.headers)
    assert requests.get(f"{hub.url}/{PATH}", timeout=20).headers["Content-Type"] == "text/html"
    assert requests.get(f"{hub.url}/{PATH}?tf-hub-format=uncompressed", timeout=20).status_code == 404
    assert requests.head(f"{hub.url}/models/x.tar", timeout=20).headers["Content-Length"] == str(len(BODY))
    assert requests.post(f"{hub.url}/models/x.tar", data=b"x", timeout=20).status_code == 405
    hub.remove(PATH)
    assert get(hub).status_code == 404


def test_log_tells_requests_apart(hub: FaultHub) -> None:
    get(hub, Range="bytes=0-0")
    get(hub, X_Token="secret")
    get(hub, "google/other/1")
    assert [request.range for request in hub.requests(PATH)] == ["bytes=0-0", None]
    (body,) = hub.body_requests(PATH)
    assert body.done.wait(10)
    assert (body.method, body.path, body.query) == ("GET", PATH, COMPRESSED)
    assert (body.status, body.bytes_sent, body.headers["x-token"]) == (200, len(BODY), "secret")
    assert [request.status for request in hub.requests("google/other/1")] == [404]
    hub.clear_log()
    assert hub.log == []


def test_redirect(hub: FaultHub) -> None:
    hub.add_redirect("google/old/1", f"{hub.url}/{PATH}?tf-hub-format=compressed&signature=1", status=303)
    assert get(hub, "google/old/1").content == BODY
    assert [request.status for request in hub.requests()] == [303, 200]


def test_script_is_played_in_order_and_by_kind(hub: FaultHub) -> None:
    hub.fault(
        PATH,
        Fault.status(503, b"busy", {"Retry-After": "3"}, times=2),
        Fault.status(403, on="probe"),
        Fault.status(404),
    )
    statuses = [get(hub).status_code, get(hub, Range="bytes=0-0").status_code]
    busy = get(hub)
    assert (busy.content, busy.headers["Retry-After"]) == (b"busy", "3")
    statuses += [get(hub).status_code, get(hub).status_code, get(hub, Range="bytes=0-0").status_code]
    assert statuses == [503, 403, 404, 200, 206]
    faults = [request.fault for request in hub.requests()]
    assert faults == ["status", "status", "status", "status", None, None]


def test_fault_for_ever_until_cleared(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.status(500, on="any", times=None))
    assert {get(hub).status_code for _ in range(3)} == {500}
    assert requests.get(f"{hub.url}/{PATH}", timeout=20).status_code == 200, "not a request for the archive"
    hub.clear_faults()
    assert get(hub).status_code == 200


def test_cut_ends_early_and_the_rest_can_be_asked_for(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.cut(1000))
    got, error = read_until_it_breaks(hub)
    assert got == BODY[:1000]
    assert error is None, "a closed connection looks like an end; only Content-Length tells"
    assert got + get(hub, Range="bytes=1000-").content == BODY
    assert hub.body_requests(PATH)[0].bytes_sent == 1000


def test_reset_is_a_reset(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.reset(1000))
    got, error = read_until_it_breaks(hub)
    assert got == BODY[:1000]
    assert isinstance(error, ConnectionResetError)


def test_stall_waits_for_the_event_and_goes_on(hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(1000, go_on))
    with requests.get(f"{hub.url}/{PATH}", params=COMPRESSED, stream=True, timeout=20) as answer:
        assert answer.raw.read(1000) == BODY[:1000]
        (request,) = hub.body_requests(PATH)
        assert (request.bytes_sent, request.done.is_set()) == (1000, False)
        go_on.set()
        assert answer.raw.read() == BODY[1000:]


def test_hang_waits_before_the_head(hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.hang(go_on))
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.get(f"{hub.url}/{PATH}", params=COMPRESSED, timeout=0.2)
    go_on.set()
    assert get(hub).content == BODY


@pytest.mark.parametrize("kind", [Fault.hang, lambda event: Fault.stall(10, event)])
def test_close_releases_those_who_wait(kind) -> None:  # type: ignore[no-untyped-def]
    before = threading.active_count()
    hub = FaultHub()
    hub.add(PATH, BODY)
    hub.fault(PATH, kind(threading.Event()))
    failures = []

    def ask() -> None:
        with pytest.raises(BROKEN):
            get(hub)
        failures.append(1)

    client = threading.Thread(target=ask)
    client.start()
    hub.wait_for(lambda hub: hub.body_requests(PATH))
    hub.close()
    client.join(10)
    assert failures == [1]
    assert threading.active_count() == before


def test_drip_sends_a_little_at_a_time(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.drip(2, 30.0))
    with requests.get(f"{hub.url}/{PATH}", params=COMPRESSED, stream=True, timeout=20) as answer:
        assert answer.raw.read(2) == BODY[:2]
        assert hub.requests()[-1].bytes_sent == 2


def test_rate_and_latency(hub: FaultHub) -> None:
    hub.latency = 0.1
    assert get(hub).elapsed.total_seconds() >= 0.1
    hub.latency, hub.rate = 0.0, 1000.0
    with requests.get(f"{hub.url}/{PATH}", params=COMPRESSED, stream=True, timeout=20) as answer:
        assert answer.raw.read(1) == BODY[:1]
        assert hub.requests()[-1].bytes_sent < len(BODY)


def test_wrong_and_ignored_ranges(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.wrong_range(), Fault.wrong_range(), Fault.ignore_range())
    wrong = get(hub, Range="bytes=100-")
    assert (wrong.status_code, wrong.content) == (206, BODY[:-1])
    assert wrong.headers["Content-Range"] == f"bytes 0-{len(BODY) - 2}/{len(BODY)}"
    assert get(hub, Range="bytes=0-99").headers["Content-Range"].startswith("bytes 1-")
    ignored = get(hub, Range="bytes=100-")
    assert (ignored.status_code, ignored.content) == (200, BODY)


def test_change_republishes_for_good(hub: FaultHub) -> None:
    etag = get(hub).headers["ETag"]
    hub.fault(PATH, Fault.change(b"another body"))
    changed = get(hub, Range="bytes=100-", If_Range=etag)
    assert (changed.status_code, changed.content) == (200, b"another body")
    assert changed.headers["ETag"] != etag
    assert get(hub).content == b"another body"


def test_flip_is_one_bit_at_an_offset_of_the_whole(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.flip(500), Fault.flip(500))
    whole = get(hub).content
    assert [i for i in range(len(BODY)) if whole[i] != BODY[i]] == [500]
    assert get(hub, Range="bytes=400-").content == whole[400:]


def test_truncate_agrees_with_its_length_but_not_with_its_checksum(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.truncate(1000))
    answer = get(hub)
    assert (answer.content, answer.headers["Content-Length"]) == (BODY[:1000], "1000")
    assert answer.headers["x-goog-hash"] == get(hub).headers["x-goog-hash"]


def test_wrong_lengths(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.short_length(10), Fault.long_length(10), Fault.no_length())
    assert get(hub).content == BODY[:-10]
    with pytest.raises(BROKEN):
        get(hub)
    chunked = get(hub)
    assert (chunked.content, "Content-Length" in chunked.headers) == (BODY, False)
    assert get(hub).content == BODY


def test_wrong_checksums(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.wrong_md5(), Fault.wrong_crc32c())
    answers = [get(hub).headers for _ in range(3)]
    wrong_md5, wrong_crc32c, right = (answer["x-goog-hash"].split(",") for answer in answers)
    assert [part.partition("=")[0] for part in wrong_md5] == ["md5"]
    assert wrong_md5[0] != right[1]
    assert wrong_crc32c[0] != right[0]
    assert wrong_crc32c[1] == right[1]
    assert len({answer["ETag"] for answer in answers}) == 1


def test_html_and_hang_up(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.html(), Fault.hang_up())
    page = get(hub, Range="bytes=0-9")
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    with pytest.raises(BROKEN):
        get(hub)
    assert [request.status for request in hub.requests()] == [200, None]


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with FaultHub(tls=context) as hub:
        hub.add(PATH, BODY)
        hub.fault(PATH, Fault.cut(100))
        url = f"{hub.url}/{PATH}?tf-hub-format=compressed"
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(url, timeout=20)
        with pytest.raises(BROKEN):
            requests.get(url, timeout=20, verify=str(tmp_path / "ca.pem"))
        assert requests.get(url, timeout=20, verify=str(tmp_path / "ca.pem")).content == BODY


def test_nothing_is_left_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with FaultHub() as hub, requests.Session() as session:
        hub.add(PATH, bytes(20 << 20))
        session.get(f"{hub.url}/{PATH}", timeout=20)  # stays open
        session.get(f"{hub.url}/{PATH}", params=COMPRESSED, stream=True, timeout=20).close()  # goes away
    assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_trees_and_archives_are_what_they_say(tmp_path: Path) -> None:
    tree = make_tree(3, {"extra.bin": b"x"}, size=10, empty_directory=True)
    assert tree == make_tree(3, {"extra.bin": b"x"}, size=10, empty_directory=True)
    assert tree["saved_model.pb"] != make_tree(4)["saved_model.pb"]
    link = tarfile.TarInfo("./link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive = make_archive(tree, extra_members=[link, (tarfile.TarInfo("./late"), b"late")])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = tar.getnames()
        assert names[:4] == [".", "./assets.extra", "./assets", "./assets/vocab.txt"]
        assert names[-2:] == ["./link", "./late"]
        assert tar.getmember("./assets.extra").isdir()
        assert tar.extractfile("./late").read() == b"late"  # type: ignore[union-attr]
    order = ["variables/variables.index", "saved_model.pb"]
    with tarfile.open(
        fileobj=io.BytesIO(make_archive(tree, order=order, dirs=False, prefix="", gzip=False))
    ) as tar:
        assert tar.getnames() == order
    write_tree(tree, tmp_path / "model")
    found = {path.relative_to(tmp_path / "model").as_posix() for path in tmp_path.glob("model/**/*")}
    assert {name.rstrip("/") for name in tree} | {"assets", "variables"} == found


def test_when_is_for_some_requests_only(hub: FaultHub) -> None:
    hub.fault(PATH, Fault.when(lambda hub, request: request.range == "bytes=5-", Fault.status(503)))
    assert [get(hub, Range=asked).status_code for asked in ("bytes=4-", "bytes=5-", "bytes=5-")] == [
        206,
        503,
        503,
    ]


def test_counts_what_goes_on_at_a_time(hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.hang(go_on), Fault.hang(go_on))
    threads = [threading.Thread(target=get, args=(hub,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    hub.wait_for(lambda hub: len(hub.answering()) == 2)
    go_on.set()
    for thread in threads:
        thread.join()
    get(hub)
    assert hub.busiest == 2
    hub.wait_for(lambda hub: not hub.answering())
