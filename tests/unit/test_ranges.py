"""Large archives come over several connections, in order, each range retried alone."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs import sharing
from hubfs.config import Settings
from hubfs.errors import AccessError, DamagedError, HubfsError, StoppedError, UnavailableError
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Archive
from hubfs.net import Net
from hubfs.transfer import ranges
from hubfs.transfer.download import Download
from hubfs.transfer.pace import SMALLEST
from hubfs.transfer.ranges import SEVERAL_FROM
from hubfs.transfer.stream import ChangedOriginError
from tests.faults import Answer
from tests.hub import Fault, FaultHub, Request

PATH = "google/m/1"
STORE = "signed/a.tar.gz"
BODY = random.Random(2).randbytes(24 << 20)
MakeNet = Callable[..., Net]


@pytest.fixture
def make_net() -> Iterator[MakeNet]:
    made: list[Net] = []

    def make(**settings: object) -> Net:
        flags = {
            "retry_delay": 0.01, "retries": 2, "connect_timeout": 5.0, "stall_timeout": 5.0,
            "connections": 4, **settings,
        }  # fmt: skip
        made.append(Net(Settings.load(flags, {}, Path("/dev/null"))))
        return made[-1]

    yield make
    for net in made:
        net.shut_down()
        net.close()


@pytest.fixture
def net(make_net: MakeNet) -> Net:
    return make_net()


def located(hub: FaultHub, net: Net) -> Archive:
    return probe(net, f"{hub.url}/{PATH}", f"{hub.url}/{PATH}?tf-hub-format=compressed")


def download(hub: FaultHub, net: Net, cancel: threading.Event | None = None) -> Download:
    origin = located(hub, net)
    hub.clear_log()
    return Download(net, origin, net._settings, cancel or threading.Event())


class Reading:
    """A download that is read to its end in another thread."""

    def __init__(self, source: Download) -> None:
        self.body = b""
        self.got = 0
        self.error: BaseException | None = None
        self.source = source
        self.thread = threading.Thread(target=self._run, name="test-reader")
        self.thread.start()

    def _run(self) -> None:
        chunks = []
        try:
            for chunk in self.source:
                chunks.append(chunk)
                self.got += len(chunk)
        except BaseException as error:
            self.error = error
        self.body = b"".join(chunks)

    def end(self) -> bytes:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.body


def asked(hub: FaultHub) -> list[str | None]:
    return [request.range for request in hub.body_requests()]


def span(request: Request) -> tuple[int, int]:
    """The first byte that a request asks for, and the one behind the last."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
    assert match, f"{request.range} is not a range with an end"
    return int(match[1]), int(match[2]) + 1


def begins_at(start: int) -> Callable[[FaultHub, Request], bool]:
    return lambda hub, request: (request.range or "").startswith(f"bytes={start}-")


def one_more_than(count: int) -> Callable[[FaultHub, Request], bool]:
    return lambda hub, request: sum(one.wants_archive for one in hub.answering()) > count


def both(*faults: Fault) -> Fault:
    """Several faults of one answer."""

    def act(answer: Answer) -> None:
        for fault in faults:
            fault.act(answer)

    return Fault("+".join(fault.kind for fault in faults), act)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def range_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hubfs-range"]


class TestParts:
    def test_come_in_order_and_each_byte_once(self, hub: FaultHub, net: Net) -> None:
        hub.add(PATH, BODY)
        assert b"".join(download(hub, net)) == BODY
        spans = sorted(map(span, hub.requests(PATH)))
        assert len(spans) > 1
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == len(BODY)
        assert {request.headers.get("if-range") for request in hub.requests(PATH)} == {located(hub, net).etag}

    @pytest.mark.parametrize("connections", [1, 2, 4])
    def test_come_over_as_many_connections_as_are_allowed_if_the_reader_has_to_wait(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event, connections: int
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, make_net(connections=connections))
        hub.fault(PATH, *[Fault.stall(1, release)] * connections)
        reading = Reading(source)
        hub.wait_for(lambda hub: len(hub.answering()) == connections)
        # What follows is slow enough for more of them to be tempting.
        hub.rate = 20e6
        release.set()
        assert reading.end() == BODY
        # The probe's connection is used again.
        assert hub.busiest == connections

    @pytest.mark.parametrize("size", [1, SEVERAL_FROM - 1])
    def test_are_not_made_of_small_archives(self, hub: FaultHub, net: Net, size: int) -> None:
        hub.add(PATH, BODY[:size])
        assert b"".join(download(hub, net)) == BODY[:size]
        assert asked(hub) == [None]

    @pytest.mark.parametrize("size", [SEVERAL_FROM, SEVERAL_FROM + 1, 3 * SEVERAL_FROM - 1])
    def test_are_made_of_larger_ones(self, hub: FaultHub, net: Net, size: int) -> None:
        hub.add(PATH, BODY[:size])
        assert b"".join(download(hub, net)) == BODY[:size]
        assert None not in asked(hub)

    @pytest.mark.parametrize("how", ["no ranges", "weak", "no etag"])
    def test_need_ranges_and_a_strong_etag(self, hub: FaultHub, net: Net, how: str) -> None:
        options = {
            "no ranges": {"accept_ranges": False},
            "weak": {"etag": 'W/"1"'},
            "no etag": {"etag": None},
        }
        hub.add(PATH, BODY, **options[how])
        assert b"".join(download(hub, net)) == BODY
        assert asked(hub) == [None]

    def test_that_come_early_wait_in_bounded_memory(
        self, hub: FaultHub, net: Net, release: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing hangs when it is full, and all of it is free at the end."""
        monkeypatch.setattr(sharing, "MEMORY", 8 * sharing.BLOCK)
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.stall(1000, release))
        reading = Reading(source)
        until(lambda: net.sharing.seats and not net.sharing.unused, "the memory to be full")
        release.set()
        assert reading.end() == BODY
        assert len(net.sharing.unused) == 8
        assert net.sharing.seats == []

    def test_of_several_archives_share_the_connections(
        self, hub: FaultHub, net: Net, release: threading.Event
    ) -> None:
        hub.add(PATH, BODY)
        origin = located(hub, net)
        hub.clear_log()
        hub.fault(PATH, *[Fault.stall(1, release)] * 5)
        greedy = Reading(Download(net, origin, net._settings, threading.Event()))
        hub.wait_for(lambda hub: len(hub.answering()) == 4)
        late = Reading(Download(net, origin, net._settings, threading.Event()))
        hub.wait_for(lambda hub: len(hub.answering()) == 5, what="the one that each archive has")
        hub.rate = 20e6
        release.set()
        assert greedy.end() == late.end() == BODY
        # Never more than the first of each and those that are allowed.
        assert hub.busiest == 5


class TestBreaks:
    @pytest.mark.parametrize("fault", [Fault.cut(300_000), Fault.reset(300_000)])
    def test_part_is_resumed_alone(self, hub: FaultHub, net: Net, fault: Fault) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, fault)
        assert b"".join(source) == BODY
        assert (300_000, SMALLEST) in map(span, hub.requests(PATH))
        assert sum(request.bytes_sent for request in hub.requests(PATH)) == len(BODY)

    @pytest.mark.parametrize("fault", [Fault.status(503), Fault.hang_up(), Fault.wrong_range()])
    def test_only_connection_tries_again(self, hub: FaultHub, net: Net, fault: Fault) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, fault, fault)
        assert b"".join(source) == BODY
        assert [span(request) for request in hub.requests(PATH)][:3] == [(0, SMALLEST)] * 3

    @pytest.mark.parametrize(
        "refusal",
        [
            Fault.status(429, headers={"Retry-After": "600"}), Fault.status(503), Fault.status(403),
            Fault.status(404), Fault.status(400), Fault.hang_up(), Fault.reset(0), Fault.cut(10),
        ],
    )  # fmt: skip
    def test_refused_additional_connection_does_no_harm(
        self, hub: FaultHub, net: Net, release: threading.Event, refusal: Fault
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.stall(1000, release), Fault.when(one_more_than(1), refusal))
        reading = Reading(source)
        hub.wait_for(lambda hub: len(hub.log) > 1 and hub.log[1].done.is_set())
        release.set()
        assert reading.end() == BODY

    def test_head_that_nobody_fetches_comes_before_later_parts(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, make_net(connections=2))
        break_second, go_on_with_third = threading.Event(), threading.Event()
        hub.fault(
            PATH,
            Fault.stall(1000, release),
            both(Fault.stall(10, break_second), Fault.cut(10)),
            Fault.stall(1000, go_on_with_third),
        )
        reading = Reading(source)
        try:
            hub.wait_for(lambda hub: len(hub.answering()) == 2)
            release.set()
            hub.wait_for(lambda hub: len(hub.log) == 3)
            until(lambda: reading.got >= SMALLEST, "the second part to be the head")
            break_second.set()
            until(lambda: len(range_threads()) == 1, "the second connection to be given up")
            go_on_with_third.set()
            assert reading.end() == BODY
        finally:
            break_second.set()
            go_on_with_third.set()
        starts = [span(request)[0] for request in hub.log]
        # What is left of the second part, and then what is left of the third.
        assert starts[3] == SMALLEST + 10
        assert 2 * SMALLEST <= starts[4] < span(hub.log[2])[1]

    def test_hub_that_fails_for_good_is_given_up(self, hub: FaultHub, net: Net) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.status(500, times=None))
        with pytest.raises(UnavailableError):
            b"".join(source)
        assert len(asked(hub)) == 3

    def test_hub_that_fails_for_good_on_the_way_is_given_up(
        self, hub: FaultHub, net: Net, release: threading.Event
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, *[Fault.stall(1000, release)] * 4, Fault.status(500, times=None))
        reading = Reading(source)
        hub.wait_for(lambda hub: len(hub.answering()) == 4)
        release.set()
        with pytest.raises(UnavailableError):
            reading.end()
        # Three leave, and the last one insists.
        assert len([request for request in hub.log if request.status == 500]) <= 3 + 3

    def test_refused_access_ends_the_transfer(self, hub: FaultHub, net: Net) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.status(403, times=None))
        with pytest.raises(AccessError):
            b"".join(source)

    def test_head_on_a_stalled_connection_is_asked_for_again(
        self, hub: FaultHub, net: Net, release: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ranges, "PATIENCE", 0.2)
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.when(begins_at(SMALLEST), Fault.stall(1000, release)))
        assert b"".join(source) == BODY
        assert not release.is_set()
        again = [request for request in hub.requests(PATH) if span(request)[0] == SMALLEST + 1000]
        assert len(again) == 1

    def test_stall_of_all_is_left_to_the_deadline(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ranges, "PATIENCE", 0.05)
        hub.add(PATH, BODY)
        source = download(hub, make_net(connections=1, stall_timeout=0.5))
        hub.fault(PATH, Fault.when(lambda hub, request: len(hub.log) == 2, Fault.stall(1000, release)))
        assert b"".join(source) == BODY
        assert len(hub.log) == len({request.range for request in hub.log})


class TestOneObject:
    def test_hub_that_stops_giving_ranges_is_read_on_over_one_connection(
        self, hub: FaultHub, make_net: MakeNet
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, make_net(connections=1))
        hub.fault(PATH, Fault.cut(300_000), Fault.ignore_range(times=None))
        assert b"".join(source) == BODY
        assert hub.requests(PATH)[-1].range == "bytes=300000-"

    @pytest.mark.parametrize("after", [0, 300_000])
    def test_object_that_changes_on_the_way_is_never_mixed(self, hub: FaultHub, net: Net, after: int) -> None:
        hub.add(PATH, BODY)
        source, got = download(hub, net), []
        hub.fault(PATH, Fault.cut(after), Fault.change(BODY[::-1]))
        with pytest.raises(ChangedOriginError):
            for chunk in source:
                got.append(chunk)
        assert BODY.startswith(b"".join(got))

    def test_wrong_checksum_is_found(self, hub: FaultHub, net: Net) -> None:
        hub.add(PATH, BODY)
        source = download(hub, net)
        hub.fault(PATH, Fault.flip(SEVERAL_FROM + 5, times=None))
        with pytest.raises(DamagedError, match="crc32c"):
            b"".join(source)


class TestRedirects:
    @pytest.fixture
    def store(self, hub: FaultHub) -> Iterator[FaultHub]:
        """Where the archive is; `hub` redirects there."""
        with FaultHub() as store:
            store.add(STORE, BODY)
            hub.add_redirect(PATH, f"{store.url}/{STORE}?signature=1")
            yield store

    def test_are_followed_once(self, hub: FaultHub, store: FaultHub, net: Net) -> None:
        assert b"".join(download(hub, net)) == BODY
        assert len(hub.requests()) == 1
        assert len(store.body_requests()) > 2
        assert {request.query.get("signature") for request in store.body_requests()} == {"1"}

    def test_are_followed_once_however_many_connections_there_are(
        self, hub: FaultHub, store: FaultHub, net: Net, release: threading.Event
    ) -> None:
        source = download(hub, net)
        store.clear_log()
        store.fault(STORE, *[Fault.stall(1, release)] * 4)
        reading = Reading(source)
        store.wait_for(lambda store: len(store.answering()) == 4)
        release.set()
        assert reading.end() == BODY
        assert len(hub.requests()) == 1

    def test_are_followed_afresh_for_the_next_transfer(
        self, hub: FaultHub, store: FaultHub, net: Net
    ) -> None:
        origin = located(hub, net)
        hub.clear_log()
        for _ in range(2):
            assert b"".join(Download(net, origin, net._settings, threading.Event())) == BODY
        assert len(hub.requests()) == 2

    @pytest.mark.parametrize("status", [400, 403, 404, 410])
    def test_signature_that_expired_is_made_anew(
        self, hub: FaultHub, store: FaultHub, make_net: MakeNet, status: int
    ) -> None:
        net = make_net(connections=1)
        source = download(hub, net)
        store.clear_log()

        def location(signature: int) -> Fault:
            target = f"{store.url}/{STORE}?signature={signature}"
            return Fault.status(302, headers={"Location": target})

        def expired(store: FaultHub, request: Request) -> bool:
            return request.query["signature"] == "1" and len(store.log) > 1

        hub.fault(PATH, location(1), location(2))
        store.fault(STORE, Fault.when(expired, Fault.status(status)))
        assert b"".join(source) == BODY
        assert len(hub.requests()) == 2
        assert [(request.query["signature"], request.status) for request in store.log][:3] == [
            ("1", 206), ("1", status), ("2", 206),
        ]  # fmt: skip

    @pytest.mark.parametrize("fault", [Fault.status(503), Fault.cut(300_000), Fault.hang_up()])
    def test_are_followed_afresh_after_a_failure(
        self, hub: FaultHub, store: FaultHub, make_net: MakeNet, fault: Fault
    ) -> None:
        source = download(hub, make_net(connections=1))
        store.clear_log()
        store.fault(STORE, Fault.when(lambda store, request: len(store.log) == 2, fault))
        assert b"".join(source) == BODY
        assert len(hub.requests()) == 2

    def test_refusal_that_lasts_is_told(self, hub: FaultHub, store: FaultHub, make_net: MakeNet) -> None:
        source = download(hub, make_net(connections=1))
        store.clear_log()
        refused = Fault.status(403, b"SignatureDoesNotMatch")
        store.fault(STORE, Fault.when(lambda store, request: len(store.log) >= 2, refused))
        with pytest.raises(AccessError, match="SignatureDoesNotMatch"):
            b"".join(source)
        # Once where it had been, and once afresh.
        assert [request.status for request in store.log].count(403) == 2

    def test_connections_are_counted_where_they_lead(
        self, hub: FaultHub, store: FaultHub, net: Net, release: threading.Event
    ) -> None:
        source = download(hub, net)
        store.clear_log()
        store.fault(STORE, Fault.stall(1, release))
        reading = Reading(source)
        store.wait_for(lambda store: bool(store.answering()))
        until(lambda: [seat._host() for seat in net.sharing.seats] == [store.host], "the host to be known")
        release.set()
        assert reading.end() == BODY


class TestEnd:
    @pytest.mark.parametrize("fault", [Fault.stall, Fault.hang])
    def test_abort_ends_all_connections(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event, fault: Callable[..., Fault]
    ) -> None:
        hub.add(PATH, BODY)
        cancel = threading.Event()
        source = download(hub, make_net(stall_timeout=30.0), cancel)
        waits = Fault.stall(1000, release) if fault == Fault.stall else Fault.hang(release)
        # The first brings something, so that there are others.
        hub.fault(PATH, Fault.stall(1000, release), *[waits] * 3)
        reading = Reading(source)
        hub.wait_for(lambda hub: len(hub.answering()) == 4)
        cancel.set()
        source.abort()
        reading.thread.join(10)
        assert not reading.thread.is_alive()
        assert isinstance(reading.error, StoppedError)
        assert range_threads() == []
        assert not release.is_set()

    def test_error_ends_all_connections(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event
    ) -> None:
        hub.add(PATH, BODY)
        source = download(hub, make_net(stall_timeout=30.0))
        hub.fault(PATH, *[Fault.stall(1000, release)] * 3, Fault.change(BODY[::-1]))
        with pytest.raises(ChangedOriginError):
            b"".join(source)
        assert range_threads() == []
        assert not release.is_set()

    def test_reader_that_leaves_leaves_nothing(
        self, hub: FaultHub, make_net: MakeNet, release: threading.Event
    ) -> None:
        hub.add(PATH, BODY)
        net = make_net(stall_timeout=30.0)
        source = download(hub, net)
        never = threading.Event()
        hub.fault(PATH, Fault.stall(1000, release), *[Fault.stall(1000, never)] * 3)

        def read_until_released() -> None:
            chunks = iter(source)
            for _ in chunks:
                if release.is_set():
                    break
            chunks.close()

        thread = threading.Thread(target=read_until_released)
        thread.start()
        try:
            hub.wait_for(lambda hub: len(hub.answering()) == 4)
            release.set()
            thread.join(10)
            assert not thread.is_alive()
            assert range_threads() == []
            assert net.sharing.seats == []
        finally:
            never.set()
            thread.join(20)

    def test_leaves_nothing_at_its_end(self, hub: FaultHub, net: Net) -> None:
        hub.add(PATH, BODY)
        assert b"".join(download(hub, net)) == BODY
        assert range_threads() == []
        assert net.sharing.seats == []

    def test_bug_in_a_connection_is_not_swallowed(
        self, hub: FaultHub, net: Net, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(ranges.Parts, "put", fail)
        hub.add(PATH, BODY)
        with pytest.raises(ZeroDivisionError):
            b"".join(download(hub, net))
        assert range_threads() == []


def test_what_is_not_there_is_told(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    source = download(hub, net)
    hub.remove(PATH)
    with pytest.raises(HubfsError, match="HTTP 404"):
        b"".join(source)
