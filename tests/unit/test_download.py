"""One archive's bytes in order, whatever the connection does meanwhile."""

from __future__ import annotations

import base64
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from requests.structures import CaseInsensitiveDict

from hubfs.config import Settings
from hubfs.errors import DamagedError, NotFoundError, StoppedError, UnavailableError
from hubfs.handles import compressed_url
from hubfs.hubs.base import Archive
from hubfs.net import Net, strong_etag
from hubfs.transfer.download import QUEUE, Digests, Download, declared_digests, in_background
from hubfs.transfer.stream import PROGRESS, ChangedOriginError
from tests.faults import Answer
from tests.hub import Fault, FaultHub

PATH = "google/m/1"
BODY = random.Random(1).randbytes(300_000)
Start = Callable[..., Download]


@pytest.fixture
def start(hub: FaultHub) -> Iterator[Start]:
    """Begins a download of PATH from the hub."""
    nets: list[Net] = []

    def begin(cancel: threading.Event | None = None, on_bytes: Any = None, **settings: Any) -> Download:
        flags = {"retry_delay": 0.01, "retries": 2, "connect_timeout": 5.0, "stall_timeout": 5.0, **settings}
        loaded = Settings.load(flags, {}, Path("/dev/null"))
        nets.append(Net(loaded))
        handle = f"{hub.url}/{PATH}"
        origin = Archive(handle, compressed_url(handle))
        more = {"on_bytes": on_bytes} if on_bytes else {}
        return Download(nets[-1], origin, loaded, cancel or threading.Event(), **more)

    yield begin
    for net in nets:
        net.close()


def both(*faults: Fault, on: str = "body") -> Fault:
    """Several faults of one answer."""

    def act(answer: Answer) -> None:
        for fault in faults:
            fault.act(answer)

    return Fault("+".join(fault.kind for fault in faults), act, on)


def ranges(hub: FaultHub) -> list[str | None]:
    return [request.range for request in hub.requests(PATH)]


# ---- what arrives


def test_bytes_arrive_in_order_with_one_request(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    assert b"".join(start()) == BODY
    assert ranges(hub) == [None]


def test_progress_is_told(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    told: list[tuple[int, int | None]] = []
    received = sum(len(chunk) for chunk in start(on_bytes=lambda *now: told.append(now)))
    assert told[-1] == (received, len(BODY))
    assert [now for now, _ in told] == sorted(now for now, _ in told)


def test_unknown_length_is_told_as_unknown(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.no_length())
    told: list[tuple[int, int | None]] = []
    assert b"".join(start(on_bytes=lambda *now: told.append(now))) == BODY
    assert told[-1] == (len(BODY), None)


def test_missing_archive(hub: FaultHub, start: Start) -> None:
    with pytest.raises(NotFoundError):
        list(start())
    assert len(hub.requests()) == 1


# ---- resuming


@pytest.mark.parametrize("fault", [Fault.cut, Fault.reset])
def test_resumes_where_the_connection_broke(
    hub: FaultHub, start: Start, fault: Callable[[int], Fault]
) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, fault(100_000), fault(50_000))
    assert b"".join(start()) == BODY
    assert ranges(hub) == [None, "bytes=100000-", "bytes=150000-"]
    etag = f'"{hashlib.md5(BODY).hexdigest()}"'
    assert [request.headers.get("if-range") for request in hub.requests()] == [None, etag, etag]
    assert sum(request.bytes_sent for request in hub.requests()) == len(BODY)


def test_resumes_after_a_cut_between_two_chunks_of_unknown_length(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, both(Fault.no_length(), Fault.cut(100_000)))
    assert b"".join(start()) == BODY
    assert ranges(hub) == [None, "bytes=100000-"]


def test_resumes_after_statuses_that_pass(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.status(503), Fault.status(429, headers={"Retry-After": "0"}))
    assert b"".join(start(retries=3)) == BODY
    assert ranges(hub) == [None, *["bytes=100000-"] * 3]


def test_resumes_after_a_hang_up(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.hang_up())
    assert b"".join(start()) == BODY


def test_skips_what_it_has_if_the_server_sends_the_same_archive_from_the_start(
    hub: FaultHub, start: Start
) -> None:
    hub.add(PATH, BODY, accept_ranges=False)
    hub.fault(PATH, Fault.cut(100_000))
    assert b"".join(start()) == BODY
    assert [request.status for request in hub.requests()] == [200, 200]


def test_skips_across_a_break_within_what_is_skipped(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY, accept_ranges=False)
    hub.fault(PATH, Fault.cut(100_000), Fault.cut(50_000))
    assert b"".join(start()) == BODY


def test_server_that_ignores_the_range_for_once(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(200_000), Fault.ignore_range())
    assert b"".join(start()) == BODY


def test_changed_etag_is_not_mixed_in(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.change(BODY[::-1]))
    arrived = []
    with pytest.raises(ChangedOriginError):
        arrived.extend(start())
    assert all(chunk in BODY for chunk in arrived)


def test_another_length_under_the_same_etag_is_a_change(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY, etag='"fixed"')
    hub.fault(PATH, Fault.cut(100_000), Fault.change(BODY + b"more", etag='"fixed"'))
    with pytest.raises(ChangedOriginError):
        list(start())


@pytest.mark.parametrize("etag", [None, 'W/"weak"', "unquoted"])
def test_nothing_is_appended_without_a_strong_etag(hub: FaultHub, start: Start, etag: str | None) -> None:
    hub.add(PATH, BODY, etag=etag)
    hub.fault(PATH, Fault.cut(100_000))
    with pytest.raises(ChangedOriginError):
        list(start())
    assert ranges(hub) == [None]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_break_before_the_first_byte_needs_no_etag(hub: FaultHub, start: Start, etag: str | None) -> None:
    hub.add(PATH, BODY, etag=etag)
    hub.fault(PATH, Fault.cut(0), Fault.hang_up())
    assert b"".join(start()) == BODY


def test_wrong_range_is_never_used(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.wrong_range())
    assert b"".join(start()) == BODY


def test_server_that_gives_wrong_ranges_for_ever_is_given_up(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.wrong_range(times=None))
    with pytest.raises(UnavailableError, match="instead of from 100000"):
        list(start())


def test_archive_that_became_shorter_is_a_change(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.truncate(90_000))
    with pytest.raises(ChangedOriginError, match="shorter"):
        list(start())


def test_416_to_the_first_request_means_an_empty_archive(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.status(416))
    with pytest.raises(DamagedError, match="empty"):
        list(start())


# ---- lengths and checksums


def test_length_that_is_too_small_is_found_by_the_checksum(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.short_length(1000))
    with pytest.raises(DamagedError, match=r"md5|crc32c"):
        list(start())


def test_length_that_is_too_large_is_damage_and_never_success(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY, digests=False)
    hub.fault(PATH, Fault.long_length(1000, times=None))
    with pytest.raises((DamagedError, UnavailableError)):
        list(start())


def test_truncated_body_with_a_matching_length_is_found_by_the_checksum(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.truncate(200_000))
    with pytest.raises(DamagedError):
        list(start())


@pytest.mark.parametrize(
    ("fault", "name"),
    [(Fault.wrong_md5(), "md5"), (Fault.wrong_crc32c(), "crc32c"), (Fault.flip(5), "crc32c")],
)
def test_wrong_checksum_is_damage(hub: FaultHub, start: Start, fault: Fault, name: str) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, fault)
    with pytest.raises(DamagedError, match=name):
        list(start())
    assert len(hub.requests()) == 1


def test_flipped_bit_after_a_resume_is_found(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(100_000), Fault.flip(200_000))
    with pytest.raises(DamagedError):
        list(start())


def test_flipped_bit_in_what_is_skipped_does_no_harm(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY, accept_ranges=False)
    hub.fault(PATH, Fault.cut(100_000), Fault.flip(50_000))
    assert b"".join(start()) == BODY


MD5 = hashlib.md5(BODY).digest()
CRC32C = google_crc32c.value(BODY).to_bytes(4, "big")


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, {}),
        ({"x-goog-hash": f"crc32c={b64(CRC32C)},md5={b64(MD5)}"}, {"crc32c": CRC32C, "md5": MD5}),
        ({"X-Goog-Hash": f"crc32c={b64(CRC32C)}, md5={b64(MD5)}"}, {"crc32c": CRC32C, "md5": MD5}),
        ({"x-goog-hash": f"crc32c={b64(CRC32C)}"}, {"crc32c": CRC32C}),
        ({"x-goog-hash": "sha512=AAAA,,x"}, {}),
        ({"x-goog-hash": "md5=not base64,crc32c=AAAA"}, {}),
        ({"x-goog-hash": "md5=é"}, {}),
        ({"Content-MD5": b64(MD5)}, {"md5": MD5}),
        ({"Content-MD5": b64(MD5), "Content-Range": "bytes 0-1/2"}, {}),
        ({"ETag": f'"{MD5.hex()}"'}, {}),
        ({"ETag": f'"{MD5.hex()}"', "x-goog-generation": "1"}, {"md5": MD5}),
        ({"ETag": f'"{MD5.hex()}"', "x-amz-request-id": "1"}, {"md5": MD5}),
        ({"ETag": f'W/"{MD5.hex()}"', "x-amz-request-id": "1"}, {}),
        ({"ETag": f'"{MD5.hex()}-2"', "x-amz-request-id": "1"}, {}),
        ({"ETag": f'"{MD5.hex()}"', "x-amz-server-side-encryption": "aws:kms"}, {}),
        ({"ETag": f'"{"0" * 32}"', "x-goog-hash": f"md5={b64(MD5)}"}, {"md5": MD5}),
    ],
)
def test_declared_checksums(headers: dict[str, str], expected: dict[str, bytes]) -> None:
    assert declared_digests(CaseInsensitiveDict(headers)) == expected


@pytest.mark.parametrize(
    ("declared", "name", "digest"),
    [
        (f"md5={b64(MD5)}", "md5", MD5),
        (f"crc32c={b64(CRC32C)}", "crc32c", CRC32C),
        # An MD5 beside a CRC-32C is not even computed.
        (f"crc32c={b64(CRC32C)},md5={b64(MD5)}", "crc32c", CRC32C),
        (f"crc32c={b64(CRC32C)},md5={b64(bytes(16))}", "crc32c", CRC32C),
    ],
)
def test_checksums_of_what_arrived(declared: str, name: str, digest: bytes) -> None:
    digests = Digests(CaseInsensitiveDict({"x-goog-hash": declared}))
    assert set(digests.expected) == {name}
    for start_at in range(0, len(BODY), 7777):
        digests.update(BODY[start_at : start_at + 7777])
    digests.verify("h")
    digests.update(b"x")
    with pytest.raises(DamagedError, match=f"h: the archive's {name} is .* declared {digest.hex()}"):
        digests.verify("h")


@pytest.mark.parametrize(
    ("value", "etag"), [('"a"', '"a"'), ('W/"a"', None), ("", None), ("a", None), ('w/"a"', None)]
)
def test_strong_etag(value: str, etag: str | None) -> None:
    assert strong_etag({"ETag": value}) == etag
    assert strong_etag({}) is None


# ---- giving up


def test_failures_in_a_row_are_bounded(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.status(503, times=None))
    with pytest.raises(UnavailableError):
        list(start(retries=3))
    assert len(hub.requests()) == 4


def test_connection_that_brings_little_each_time_is_given_up(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.cut(10, times=None))
    with pytest.raises(UnavailableError):
        list(start(retries=3))
    assert len(hub.requests()) == 4


def test_count_of_failures_starts_anew_after_progress(hub: FaultHub, start: Start) -> None:
    body = random.Random(2).randbytes(PROGRESS * 8)
    hub.add(PATH, body)
    hub.fault(PATH, Fault.cut(PROGRESS, times=None))
    assert b"".join(start(retries=1)) == body
    assert len(hub.requests()) == 8


def test_slow_drip_is_given_up(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.drip(2, 0.02, times=None))
    with pytest.raises(UnavailableError, match="less than 1024 bytes a second"):
        list(start(retries=1, stall_timeout=0.2))
    assert len(hub.requests()) == 2


def test_slow_drip_is_left_for_a_better_connection(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.drip(2, 0.02))
    assert b"".join(start(stall_timeout=0.2)) == BODY
    assert hub.requests()[1].status == 206


def test_stalled_connection_is_left_for_another(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    never = threading.Event()
    hub.fault(PATH, Fault.stall(100_000, never))
    assert b"".join(start(stall_timeout=0.2)) == BODY
    never.set()
    assert ranges(hub) == [None, "bytes=100000-"]


# ---- stopping


def consume(download: Download) -> tuple[threading.Thread, list[BaseException]]:
    """Read to the end in another thread; the list is how it ended."""
    ended: list[BaseException] = []

    def run() -> None:
        try:
            for _ in download:
                pass
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def test_abort_wakes_a_thread_that_waits(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    never = threading.Event()
    hub.fault(PATH, Fault.stall(100_000, never))
    cancel = threading.Event()
    arrived: list[int] = []
    download = start(cancel, lambda received, total: arrived.append(received), stall_timeout=30.0)
    thread, ended = consume(download)
    try:
        hub.wait_for(lambda hub: hub.requests(PATH))
        deadline = time.monotonic() + 5
        while (not arrived or arrived[-1] < 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        cancel.set()
        download.abort()
        thread.join(5)
        assert not thread.is_alive(), "it still waits for the hub"
        assert [type(error) for error in ended] == [StoppedError]
    finally:
        never.set()
        thread.join(20)


def test_cancelled_before_it_began_sends_nothing(hub: FaultHub, start: Start) -> None:
    cancel = threading.Event()
    cancel.set()
    download = start(cancel)
    download.abort()
    with pytest.raises(StoppedError):
        list(download)
    assert hub.requests() == []


def test_cancel_ends_a_pause(hub: FaultHub, start: Start) -> None:
    hub.fault(PATH, Fault.status(503, headers={"Retry-After": "50"}))
    cancel = threading.Event()
    thread, ended = consume(start(cancel))
    hub.wait_for(lambda hub: hub.requests(PATH) and hub.requests(PATH)[0].done.is_set())
    cancel.set()
    thread.join(5)
    assert not thread.is_alive()
    assert [type(error) for error in ended] == [StoppedError]


# ---- in the background


def test_background_passes_all_on_in_order() -> None:
    chunks = [bytes([number]) * 10 for number in range(100)]
    assert list(in_background(iter(chunks), lambda: None)) == chunks


def test_background_passes_on_what_was_raised() -> None:
    def fail() -> Iterator[bytes]:
        yield b"one"
        raise DamagedError("broken")

    chunks = in_background(fail(), lambda: None)
    assert next(chunks) == b"one"
    with pytest.raises(DamagedError, match="broken"):
        next(chunks)


def test_background_runs_only_so_far_ahead() -> None:
    made: list[int] = []
    full = threading.Event()

    def produce() -> Iterator[bytes]:
        for number in range(100):
            made.append(number)
            if number == QUEUE + 1:
                full.set()
            yield b"x"

    chunks = in_background(produce(), lambda: None)
    next(chunks)
    assert full.wait(5)
    # One was taken, QUEUE wait in the queue, one waits for room there.
    assert len(made) == QUEUE + 2
    assert len(list(chunks)) == 99


def test_background_leaves_no_thread_when_the_reader_leaves() -> None:
    stopped = threading.Event()

    def endless() -> Iterator[bytes]:
        while not stopped.is_set():
            yield b"x"

    before = set(threading.enumerate())
    chunks = in_background(endless(), stopped.set)
    next(chunks)
    chunks.close()
    assert stopped.is_set()
    assert set(threading.enumerate()) == before


def test_background_that_was_never_read_starts_nothing() -> None:
    before = set(threading.enumerate())
    in_background(iter([b"x"]), lambda: None).close()
    assert set(threading.enumerate()) == before


def test_background_ends_a_stalled_download(hub: FaultHub, start: Start) -> None:
    hub.add(PATH, BODY)
    never, cancel = threading.Event(), threading.Event()
    hub.fault(PATH, Fault.stall(100_000, never))
    download = start(cancel, stall_timeout=30.0)

    def stop() -> None:
        cancel.set()
        download.abort()

    chunks = in_background(iter(download), stop)
    assert next(chunks)
    closer = threading.Thread(target=chunks.close)
    closer.start()
    closer.join(5)
    ended = not closer.is_alive()
    never.set()
    closer.join(20)
    assert ended
