"""Ranges over real connections: decided by the machine, retried alone, told to who waits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.config import Settings
from hubfs.errors import (
    AccessError,
    DamagedError,
    DiskFullError,
    HubfsError,
    StoppedError,
    UnavailableError,
)
from hubfs.hubs.base import RemoteFile
from hubfs.net import Net
from hubfs.transfer.chunks import CHUNK
from hubfs.transfer.fetch import Fetcher, Remote, policy
from hubfs.transfer.lane import FIRST
from hubfs.transfer.sink import Sink
from tests.hub import Fault, FaultHub
from tests.remote import Doubting, HttpSource, Ragged, Waiter

PATH = "m/variables.data.tar"  # FaultHub's faults are for archives
OTHER = "m/other.tar"
MiB = 1 << 20
BODY = random.Random(7).randbytes(24 * MiB + 12345)
HANDLE = "https://hub.example/google/m/1"


class Disk(Sink):
    """A file and how often each chunk of it was written to its end."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.waiter = Waiter()
        self.times: dict[int, int] = {}
        self.errors: list[HubfsError] = []
        self.before_write: Callable[[], None] = lambda: None
        self._file = path.open("wb+")
        self._file.truncate(size)

    def write(self, start: int, data: bytes | memoryview) -> None:
        self.before_write()
        with self.lock:
            self._file.seek(start)
            self._file.write(data)
            stop = start + len(data)
            for number in range(start // CHUNK, -(-stop // CHUNK) if stop == self.size else stop // CHUNK):
                self.times[number] = self.times.get(number, 0) + 1

    def moved(self) -> None:
        self.waiter.moved()

    def failed(self, error: HubfsError) -> None:
        self.errors.append(error)

    def read(self, start: int, stop: int) -> bytes:
        with self.lock:
            self._file.seek(start)
            return self._file.read(stop - start)

    def close(self) -> None:
        self._file.close()


class World:
    """A hub, a fetcher and the files that were opened."""

    def __init__(self, hub: FaultHub, directory: Path) -> None:
        self.hub = hub
        self.settings = Settings.load(
            {"retry_delay": 0.01, "retries": 2, "connections": 4, "stall_timeout": 20.0},
            {},
            Path("/dev/null"),
        )
        self.net = Net(self.settings)
        self.fetcher = Fetcher(policy(self.settings))
        self._directory = directory
        self._disks: list[Disk] = []

    def open(self, path: str = PATH, body: bytes = BODY, **options: object) -> tuple[Remote, Disk]:
        self.hub.add(path, body)
        etag = self.hub.republish(path, body).etag
        disk = Disk(self._directory / f"file-{len(self._disks)}", len(body))
        self._disks.append(disk)
        source = HttpSource(self.net, self.hub.url)
        file = RemoteFile(path, len(body), 0, etag)
        return self.fetcher.open(HANDLE, source, file, disk, **options), disk  # type: ignore[arg-type]

    def close(self) -> None:
        self.fetcher.close()
        self.net.shut_down()
        self.net.close()
        for disk in self._disks:
            disk.close()

    def ranges(self, path: str = PATH) -> list[tuple[int, int]]:
        found = [str(request.range).removeprefix("bytes=").split("-") for request in self.hub.requests(path)]
        return sorted((int(first), int(last) + 1) for first, last in found)


@pytest.fixture
def world(hub: FaultHub, tmp_path: Path) -> Iterator[World]:
    made = World(hub, tmp_path)
    yield made
    made.close()


def get(remote: Remote, disk: Disk, start: int, stop: int) -> bytes:
    if not remote.read(start, stop):
        with remote.waiting(start, stop) as awaited:
            disk.waiter.until(awaited)
    return disk.read(start, stop)


def until(disk: Disk, true: Callable[[], bool]) -> None:
    with disk.waiter.everything:
        assert disk.waiter.everything.wait_for(true, 30)


@pytest.mark.parametrize("room", [0, CHUNK, 3 * MiB, None])
def test_room_is_made_at_others_cost_only_for_what_somebody_waits_for(
    world: World, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    asked: list[tuple[int, int, bool]] = []

    def give(disk: Disk, start: int, stop: int, *, urgent: bool) -> int:
        asked.append((start, stop, urgent))
        return stop if urgent or room is None else min(stop, start + room)

    monkeypatch.setattr(Disk, "room", give)
    remote, disk = world.open()
    remote.expect(8 * MiB, 16 * MiB)  # a run that goes on there
    assert get(remote, disk, 8 * MiB, 8 * MiB + 10) == BODY[8 * MiB : 8 * MiB + 10]
    assert [range_ for *range_, urgent in asked if urgent] == ([] if room != 0 else [[8 * MiB, 9 * MiB]])
    assert all(start < stop for start, stop, _ in asked)
    assert get(remote, disk, len(BODY) - 5, len(BODY)) == BODY[-5:]


def test_file_is_read_in_order_and_each_byte_fetched_once(world: World) -> None:
    remote, disk = world.open()
    parts = [get(remote, disk, at, min(at + 128 * 1024, len(BODY))) for at in range(0, len(BODY), 128 * 1024)]
    assert b"".join(parts) == BODY
    assert remote.complete and remote.received == len(BODY)
    assert set(disk.times.values()) == {1}
    ranges = world.ranges()
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]


def test_random_read_fetches_one_mebibyte(world: World) -> None:
    remote, disk = world.open()
    assert get(remote, disk, 9 * MiB + 77, 9 * MiB + 99) == BODY[9 * MiB + 77 : 9 * MiB + 99]
    assert world.ranges() == [(9 * MiB, 9 * MiB + FIRST)]
    assert get(remote, disk, 10 * MiB - 5, 10 * MiB) == BODY[10 * MiB - 5 : 10 * MiB]
    assert len(world.ranges()) == 1


def test_what_is_present_at_the_start_is_not_fetched(world: World) -> None:
    remote, disk = world.open(present=range(1, 97))
    assert remote.has(CHUNK, 3 * CHUNK)
    get(remote, disk, 0, 10)
    assert world.ranges() == [(0, CHUNK)]


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_bytes_that_are_there_are_counted(world: World, size: int) -> None:
    remote, disk = world.open(OTHER, BODY[:size])
    assert remote.present == 0
    other, _ = world.open(OTHER, BODY[:size], present=[0])
    assert other.present == min(size, CHUNK)
    get(remote, disk, 0, size)
    assert remote.present == size


def test_what_many_readers_want_is_fetched_once(world: World) -> None:
    remote, disk = world.open()
    go_on = threading.Event()
    world.hub.fault(PATH, Fault.hang(go_on, times=None))
    with ThreadPoolExecutor(20) as pool:
        reads = [pool.submit(get, remote, disk, 5 * MiB + i, 5 * MiB + i + 5000) for i in range(20)]
        world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 1)
        go_on.set()
        assert [read.result() for read in reads] == [
            BODY[5 * MiB + i : 5 * MiB + i + 5000] for i in range(20)
        ]
    assert world.ranges() == [(5 * MiB, 6 * MiB)]


def test_several_connections_are_used_and_no_more_than_allowed(world: World) -> None:
    remote, disk = world.open()
    go_on = threading.Event()
    world.hub.fault(PATH, Fault.hang(go_on, times=None))
    with remote.waiting(0, len(BODY)) as awaited:
        world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 4)
        assert awaited.ready() is None
        assert len(world.ranges()) == 4
        go_on.set()
        disk.waiter.until(awaited)
    assert disk.read(0, len(BODY)) == BODY


def test_what_is_wanted_now_is_asked_for_before_what_comes_next(world: World) -> None:
    """What is read ahead could take all connections, and keep the reader waiting for their answers."""
    remote, disk = world.open()
    go_on = threading.Event()
    world.hub.fault(PATH, Fault.hang(go_on, times=None))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(get, remote, disk, 0, MiB)
        world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 4)
        assert world.ranges()[0][0] == 0
        go_on.set()
        assert reading.result() == BODY[:MiB]


def test_who_waits_is_woken_by_what_he_waits_for_only(world: World) -> None:
    remote, disk = world.open()
    go_on = threading.Event()
    with remote.waiting(0, 10) as one:
        disk.waiter.until(one)
        world.hub.fault(PATH, Fault.hang(go_on, times=None))
        with remote.waiting(8 * MiB, 8 * MiB + 10) as two, remote.waiting(16 * MiB, 16 * MiB + 10) as three:
            assert two.ready() is None and three.ready() is None
            world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 3)
            other, other_disk = world.open(OTHER, BODY[:1000])
            get(other, other_disk, 0, 10)
            assert not two.woken.is_set() and not three.woken.is_set()
            remote.close()
            assert two.woken.is_set() and three.woken.is_set()
            go_on.set()


def test_filling_brings_in_all_without_a_reader(world: World) -> None:
    remote, disk = world.open()
    other, other_disk = world.open(OTHER, BODY[:1000])
    remote.fill()
    other.fill()
    until(disk, lambda: remote.complete)
    until(other_disk, lambda: other.complete)
    assert disk.read(0, len(BODY)) == BODY and other_disk.read(0, 1000) == BODY[:1000]


def test_demand_is_served_while_filling_goes_on(world: World) -> None:
    remote, _ = world.open()
    other, other_disk = world.open(OTHER, BODY[: 2 * MiB])
    never = threading.Event()
    world.hub.fault(PATH, Fault.hang(never, times=None))
    remote.fill()
    world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 3)
    assert get(other, other_disk, 0, 100) == BODY[:100]
    never.set()


@pytest.mark.parametrize(
    "fault",
    [Fault.status(503), Fault.cut(1000), Fault.reset(1000), Fault.hang_up(), Fault.status(429)],
    ids=lambda fault: fault.kind,
)
def test_range_that_breaks_is_retried_alone(world: World, fault: Fault) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, fault)
    with remote.waiting(0, 4 * MiB) as awaited:
        disk.waiter.until(awaited)
    assert disk.read(0, 4 * MiB) == BODY[: 4 * MiB]
    ranges = world.ranges()
    assert len(ranges) == 5 and len(set(ranges)) == 4
    assert disk.errors == []


def test_failure_is_told_to_who_waits_and_spoils_nothing(world: World) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, Fault.status(503, times=3))
    with pytest.raises(UnavailableError, match=HANDLE):
        get(remote, disk, 5 * MiB, 5 * MiB + 10)
    assert len(world.ranges()) == 3  # one and two retries
    assert [type(error) for error in disk.errors] == [UnavailableError]
    assert get(remote, disk, 5 * MiB, 5 * MiB + 10) == BODY[5 * MiB : 5 * MiB + 10]


def test_failure_of_one_range_is_not_told_to_who_waits_for_another(world: World) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, Fault.status(403, b"not for you"))
    with remote.waiting(0, 10) as one:
        until(disk, lambda: bool(disk.errors))
        with remote.waiting(8 * MiB, 8 * MiB + 10) as two:
            disk.waiter.until(two)
            with pytest.raises(AccessError, match="not for you"):
                one.ready()
    assert len(world.ranges()) == 2


def test_lasting_failure_is_not_retried(world: World) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, Fault.change(BODY[::-1]))
    with pytest.raises(DamagedError):
        get(remote, disk, 0, 10)
    assert len(world.ranges()) == 1 and disk.times == {}


def test_short_answer_is_never_taken_for_the_range(world: World) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, Fault.wrong_range())
    assert get(remote, disk, 5 * MiB, 5 * MiB + 10) == BODY[5 * MiB : 5 * MiB + 10]
    assert len(world.ranges()) == 2


def test_filling_goes_on_after_the_hub_was_away(world: World) -> None:
    remote, disk = world.open()
    world.hub.fault(PATH, Fault.status(503, times=5))
    remote.fill()
    until(disk, lambda: remote.complete)
    assert disk.read(0, len(BODY)) == BODY
    assert set(disk.times.values()) == {1}


class TestPieces:
    """Requests of several MiB, as they are sent once a line is known to be quick."""

    @pytest.fixture(autouse=True)
    def quick_line(self, world: World) -> None:
        world.fetcher._machine.lanes[""].rate = 1e9

    def test_are_read_while_the_rest_is_on_its_way(self, world: World) -> None:
        remote, disk = world.open()
        go_on = threading.Event()
        world.hub.fault(PATH, Fault.stall(2 * MiB + 5, go_on, times=None))
        with remote.waiting(8 * MiB, 12 * MiB) as all_of_it:
            with remote.waiting(9 * MiB, 10 * MiB) as some:
                disk.waiter.until(some)
            assert disk.read(8 * MiB, 10 * MiB) == BODY[8 * MiB : 10 * MiB]
            assert remote.has(8 * MiB, 10 * MiB) and all_of_it.ready() is None
            assert world.ranges() == [(8 * MiB, 12 * MiB)]
            go_on.set()
            disk.waiter.until(all_of_it)
        assert world.ranges() == [(8 * MiB, 12 * MiB)]
        assert set(disk.times.values()) == {1}

    @pytest.mark.parametrize("kind", [Fault.cut, Fault.reset])
    @pytest.mark.parametrize("after", [0, MiB - 1, MiB, 3 * MiB + 77])
    def test_that_came_are_kept_when_the_line_breaks(self, world: World, kind, after: int) -> None:
        remote, disk = world.open()
        world.hub.fault(PATH, kind(after))
        with remote.waiting(8 * MiB, 12 * MiB) as awaited:
            disk.waiter.until(awaited)
        assert disk.read(8 * MiB, 12 * MiB) == BODY[8 * MiB : 12 * MiB]
        kept = after // CHUNK * CHUNK
        assert world.ranges() == [(8 * MiB, 12 * MiB), (8 * MiB + kept, 12 * MiB)]
        assert set(disk.times.values()) == {1}

    def test_that_come_make_a_line_that_breaks_again_and_again_good_enough(self, world: World) -> None:
        remote, disk = world.open()
        world.hub.fault(PATH, *[Fault.cut(MiB + 7)] * 5)  # there are two retries
        with remote.waiting(8 * MiB, 14 * MiB) as awaited:
            disk.waiter.until(awaited)
        assert disk.read(8 * MiB, 14 * MiB) == BODY[8 * MiB : 14 * MiB]
        assert len(world.ranges()) == 6 and disk.errors == []

    def test_that_came_are_there_for_others_though_the_rest_is_given_up(self, world: World) -> None:
        remote, disk = world.open()
        world.hub.fault(PATH, Fault.cut(2 * MiB), Fault.status(403, b"no more"))
        with pytest.raises(AccessError, match="no more"):
            get(remote, disk, 8 * MiB, 12 * MiB)
        assert get(remote, disk, 8 * MiB, 10 * MiB) == BODY[8 * MiB : 10 * MiB]
        assert len(world.ranges()) == 2

    @pytest.mark.parametrize("size", [1000, CHUNK - 1, CHUNK, CHUNK + 1, 5 * MiB])
    def test_may_be_of_any_size(self, world: World, size: int) -> None:
        remote, disk = world.open()
        remote.source = HttpSource(world.net, world.hub.url, size)
        assert get(remote, disk, 8 * MiB, len(BODY)) == BODY[8 * MiB :]
        assert set(disk.times.values()) == {1}

    def test_are_not_taken_if_they_are_more_than_was_asked_for(self, world: World) -> None:
        remote, disk = world.open()
        source = remote.source
        remote.source = Ragged(5 * MiB)
        with pytest.raises(HubfsError, match="more bytes than were asked for"):
            get(remote, disk, 8 * MiB, 12 * MiB)
        assert not remote.has(8 * MiB, 8 * MiB + 1)
        remote.source = source
        assert get(remote, disk, 8 * MiB, 12 * MiB) == BODY[8 * MiB : 12 * MiB]

    def test_are_taken_back_if_all_of_them_together_are_wrong(self, world: World) -> None:
        remote, disk = world.open()
        source = remote.source
        remote.source = Doubting(source)
        with pytest.raises(DamagedError, match="not what was declared"):
            get(remote, disk, 8 * MiB, 12 * MiB)
        assert not remote.has(8 * MiB, 8 * MiB + 1)
        remote.source = source
        assert get(remote, disk, 8 * MiB, 12 * MiB) == BODY[8 * MiB : 12 * MiB]

    def test_that_cannot_be_written_end_the_request(self, world: World) -> None:
        remote, disk = world.open()

        def full() -> None:
            if len(disk.times) == 2 * MiB // CHUNK:
                raise OSError(28, "No space left on device")

        disk.before_write = full
        with pytest.raises(DiskFullError):
            get(remote, disk, 8 * MiB, 12 * MiB)
        assert disk.read(8 * MiB, 10 * MiB) == BODY[8 * MiB : 10 * MiB]
        assert remote.has(8 * MiB, 10 * MiB) and not remote.has(10 * MiB, 10 * MiB + 1)

    def test_that_come_after_the_end_are_not_written(self, world: World) -> None:
        remote, disk = world.open()
        go_on = threading.Event()
        world.hub.fault(PATH, Fault.stall(2 * MiB + 5, go_on))
        with remote.waiting(8 * MiB, 12 * MiB) as awaited:
            until(disk, lambda: remote.has(8 * MiB, 10 * MiB))
            remote.close()
            written = dict(disk.times)
            with pytest.raises(StoppedError):
                disk.waiter.until(awaited)
        go_on.set()
        world.hub.wait_for(lambda hub: all(request.done.is_set() for request in hub.log))
        assert disk.times == written


def test_full_disk_is_told_to_the_reader(world: World) -> None:
    remote, disk = world.open()

    def full() -> None:
        raise OSError(28, "No space left on device")

    disk.before_write = full
    with pytest.raises(DiskFullError):
        get(remote, disk, 0, 10)
    disk.before_write = lambda: None
    assert get(remote, disk, 0, 10) == BODY[:10]


@pytest.mark.logs("internal error")
def test_bug_reaches_the_reader_as_an_error(world: World) -> None:
    remote, disk = world.open()

    def bug() -> None:
        raise KeyError("x")

    disk.before_write = bug
    with pytest.raises(HubfsError, match="bug in hubfs"):
        get(remote, disk, 0, 10)


def test_reader_that_stops_waiting_leaves_no_trace(world: World) -> None:
    remote, disk = world.open()
    go_on = threading.Event()
    world.hub.fault(PATH, Fault.hang(go_on))
    with remote.waiting(0, 10) as awaited:
        world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 1)
        assert awaited.ready() is None
    assert remote.awaited == []
    go_on.set()
    assert get(remote, disk, 0, 10) == BODY[:10]
    assert len(world.ranges()) == 1


def test_closing_ends_the_wait_and_nothing_is_written_afterwards(world: World) -> None:
    remote, disk = world.open()
    go_on = threading.Event()
    world.hub.fault(PATH, Fault.hang(go_on, times=None))
    with remote.waiting(0, 10) as awaited:
        world.hub.wait_for(lambda hub: len(hub.requests(PATH)) == 1)
        remote.close()
        with pytest.raises(StoppedError):
            disk.waiter.until(awaited)
    go_on.set()
    until(disk, lambda: disk.waiter.progress == 1)
    assert disk.times == {} and disk.errors == []
    remote.close()


def test_closing_waits_for_a_write_that_has_begun(world: World) -> None:
    remote, disk = world.open()
    began, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        assert go_on.wait(30)

    disk.before_write = slow
    remote.fill()
    assert began.wait(30)
    closing = threading.Thread(target=remote.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    written = dict(disk.times)
    world.fetcher.close()
    assert disk.times == written


def test_bytes_that_were_wrong_are_fetched_again(world: World) -> None:
    remote, disk = world.open()
    get(remote, disk, 0, len(BODY))
    remote.lose(0, len(BODY))
    assert not remote.complete
    get(remote, disk, MiB, MiB + 1)
    assert disk.times[4] == 2


def test_nothing_is_opened_after_the_end(world: World) -> None:
    world.fetcher.close()
    with pytest.raises(StoppedError):
        world.open()


@pytest.mark.parametrize("seed", range(4))
def test_everybody_gets_right_bytes_whatever_breaks(world: World, seed: int) -> None:
    numbers = random.Random(seed)
    remote, disk = world.open()
    faults = [Fault.status(503), Fault.cut(5), Fault.reset(70_000), Fault.hang_up(), Fault.wrong_range()]
    for _ in range(8):
        world.hub.fault(PATH, numbers.choice(faults))

    def reader(mine: int) -> None:
        own = random.Random(seed * 100 + mine)
        at = own.randrange(len(BODY)) if mine % 2 else 0
        for _ in range(40):
            stop = min(len(BODY), at + own.randrange(1, 400_000))
            for _ in range(20):
                try:
                    got = get(remote, disk, at, stop)
                    break
                except UnavailableError:
                    continue  # as `cp` would be told; the next read is none the worse
            assert got == BODY[at:stop]
            at = stop if stop < len(BODY) and own.random() < 0.9 else own.randrange(len(BODY))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(reader, mine) for mine in range(6)]:
            done.result()
    assert set(disk.times.values()) == {1}
