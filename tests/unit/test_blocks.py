"""Memory for remote files: bounded whatever happens, and what was read ahead is not thrown away."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.cache.blocks import Blocks, MemoryFile, divide
from hubfs.config import Settings
from hubfs.errors import AccessError, DamagedError, StoppedError
from hubfs.hubs.base import RemoteFile
from hubfs.net import Net
from hubfs.transfer.chunks import CHUNK
from hubfs.transfer.fetch import Awaited, Fetcher, policy
from hubfs.transfer.lane import Policy
from hubfs.transfer.prefetch import Kind
from tests.hub import Fault, FaultHub
from tests.remote import Doubting, HttpSource, Waiter

PATH = "m/variables.data.tar"  # FaultHub's faults are for archives
MiB = 1 << 20
BODY = random.Random(8).randbytes(20 * MiB + 4321)
HANDLE = "https://hub.example/google/m/1"


class Memory:
    """A hub, and files that are read through blocks of `limit` bytes."""

    def __init__(self, hub: FaultHub, limit: int) -> None:
        settings = Settings.load({"retry_delay": 0.01, "retries": 2}, {}, Path("/dev/null"))
        self.hub = hub
        self.net = Net(settings)
        size, chosen = divide(limit, policy(settings))
        self.blocks = Blocks(size)
        self.fetcher = Fetcher(chosen)
        self.waiter = Waiter()

    def open(self, path: str = PATH, body: bytes = BODY) -> MemoryFile:
        self.hub.add(path, body)
        file = RemoteFile(path, len(body), 0)
        source = HttpSource(self.net, self.hub.url)
        return MemoryFile(self.blocks, self.fetcher, HANDLE, source, file, moved=self.waiter.moved)

    def read(self, file: MemoryFile, start: int, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: file.read_into(memoryview(buffer), start, self.waiter.until)])

    def close(self) -> None:
        self.fetcher.close()
        self.net.shut_down()
        self.net.close()


@pytest.fixture
def memory(hub: FaultHub) -> Iterator[Memory]:
    made = Memory(hub, 64 * MiB)
    yield made
    made.close()


@pytest.fixture
def small(hub: FaultHub) -> Iterator[Memory]:
    """Room for 6 MiB of a file of 20."""
    made = Memory(hub, 8 * MiB)
    yield made
    made.close()


def in_order(memory: Memory, file: MemoryFile, size: int = 128 * 1024) -> bytes:
    return b"".join(memory.read(file, at, size) for at in range(0, len(BODY), size))


@pytest.mark.parametrize("limit", [1, MiB, 16 * MiB, 256_000_000, 1 << 34])
def test_a_limit_covers_blocks_and_what_is_on_its_way(limit: int) -> None:
    blocks, chosen = divide(limit, Policy())
    assert chosen.largest % CHUNK == 0 and blocks >= CHUNK
    least = 9 * CHUNK  # one block, and one request for each connection
    assert blocks + chosen.connections * chosen.largest <= max(limit, least)
    assert chosen.budget <= blocks * 3 // 4


@pytest.mark.parametrize("size", [4096, 128 * 1024, MiB, 3 * MiB + 1])
def test_file_is_read_in_order(memory: Memory, size: int) -> None:
    file = memory.open()
    assert in_order(memory, file, size) == BODY
    assert sum(request.bytes_sent for request in memory.hub.requests(PATH)) == len(BODY)


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        (len(BODY), 10, 0), (len(BODY) + 5, 10, 0), (0, 0, 0), (len(BODY) - 3, 10, 3), (CHUNK - 1, 2, 2),
        (5 * MiB + 7, 2 * MiB, 2 * MiB),
    ],
)  # fmt: skip
def test_ranges_at_edges(memory: Memory, start: int, size: int, expected: int) -> None:
    file = memory.open()
    got = memory.read(file, start, size)
    assert len(got) == expected and got == BODY[start : start + size]


def test_what_was_read_is_not_fetched_again(memory: Memory) -> None:
    file = memory.open()
    in_order(memory, file)
    count = len(memory.hub.requests(PATH))
    assert in_order(memory, file) == BODY
    assert len(memory.hub.requests(PATH)) == count


def test_larger_than_memory_is_read_once_each_time(small: Memory) -> None:
    """Blocks that were read ahead are not dropped for others that are read ahead, nor for those behind."""
    file = small.open()
    for times in (1, 2):
        assert in_order(small, file) == BODY
        sent = sum(request.bytes_sent for request in small.hub.requests(PATH))
        assert sent <= len(BODY) * times
    assert small.blocks.used <= 8 * MiB


@pytest.mark.parametrize("limit", [1, 2 * CHUNK, MiB])
def test_tiny_limit_makes_it_slow_and_not_wrong(hub: FaultHub, limit: int) -> None:
    memory = Memory(hub, limit)
    try:
        file = memory.open()

        def read(mine: int) -> None:
            numbers = random.Random(mine)
            for _ in range(10):
                start, size = numbers.randrange(len(BODY)), numbers.randrange(1, 2 * MiB)
                assert memory.read(file, start, size) == BODY[start : start + size]

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(read, mine) for mine in range(4)]:
                done.result()
        assert memory.blocks.used <= max(limit, CHUNK)
    finally:
        memory.close()


def test_files_share_the_memory(small: Memory) -> None:
    bodies = [BODY[number:] for number in range(4)]
    files = [small.open(f"m/{number}.tar", body) for number, body in enumerate(bodies)]

    def read(number: int) -> None:
        for at in range(0, len(BODY), 700_000):
            assert small.read(files[number], at, 700_000) == bodies[number][at : at + 700_000]
            assert small.blocks.used <= 8 * MiB

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read, number) for number in range(4)]:
            done.result()


def test_closing_a_file_frees_its_blocks(memory: Memory) -> None:
    file, other = memory.open(), memory.open("m/other.tar", BODY[:MiB])
    memory.read(other, 0, MiB)
    in_order(memory, file)
    assert memory.blocks.used > 20 * MiB
    file.close()
    assert memory.blocks.used == MiB
    assert memory.read(other, 0, MiB) == BODY[:MiB]
    assert len(memory.hub.requests("m/other.tar")) == 1


def test_failed_range_keeps_no_room(memory: Memory) -> None:
    file = memory.open()
    memory.hub.fault(PATH, Fault.status(403))
    with pytest.raises(AccessError):
        memory.read(file, 5 * MiB, 10)
    assert memory.blocks.used == 0
    assert memory.read(file, 5 * MiB, 10) == BODY[5 * MiB : 5 * MiB + 10]


def test_range_that_is_retried_keeps_no_room_meanwhile(memory: Memory) -> None:
    file = memory.open()
    memory.hub.fault(PATH, Fault.status(503), Fault.cut(100))
    assert memory.read(file, 5 * MiB, 10) == BODY[5 * MiB : 5 * MiB + 10]
    assert memory.blocks.used == MiB


def test_file_whose_pieces_are_taken_back_is_read_no_more(memory: Memory) -> None:
    file, other = memory.open(), memory.open("m/other.tar")
    memory.fetcher._machine.lanes[""].rate = 1e9
    file.remote.source = Doubting(file.remote.source)
    with pytest.raises(DamagedError, match="not what was declared"):
        memory.read(file, 8 * MiB, 3 * MiB // 2)  # one request
    for start in (8 * MiB, 15 * MiB):
        with pytest.raises(DamagedError, match="open it again"):
            memory.read(file, start, 10)
    file.close()
    # What was on its way for it gives its room back when it comes.
    with memory.waiter.everything:
        assert memory.waiter.everything.wait_for(lambda: memory.blocks.used == 0, 30)
    assert memory.read(other, 0, 20 * MiB) == BODY[: 20 * MiB]
    assert memory.read(memory.open(), 8 * MiB, 4 * MiB) == BODY[8 * MiB : 12 * MiB]


def test_file_that_was_closed_tells_its_last_readers_so(memory: Memory) -> None:
    """Its blocks are gone, though they were there once: not even waiting would bring them."""
    file = memory.open()
    assert memory.read(file, 0, 10) == BODY[:10]
    file.close()
    waits = itertools.count()

    def until(awaited: Awaited) -> None:
        assert next(waits) < 3
        memory.waiter.until(awaited)

    for start in (0, 8 * MiB):
        with pytest.raises(StoppedError):
            file.read_into(memoryview(bytearray(10)), start, until)


# ---- who is dropped for whom


class Unread(MemoryFile):
    """A file of which nothing is fetched: its chunks are told by hand."""

    def __init__(self, blocks: Blocks) -> None:
        self.dropped_chunks: list[int] = []
        self.blocks = blocks

    def forget(self, number: int) -> None:
        self.dropped_chunks.append(number)

    def bring(self, *numbers: int, kind: Kind = Kind.DEMAND) -> None:
        for number in numbers:
            assert self.blocks.reserve(self, number, number + 1, urgent=kind is Kind.DEMAND)
            self.blocks.write(self, number * CHUNK, bytes([number]) * CHUNK)
            self.blocks.keep(self, number, number + 1)

    def see(self, number: int) -> bytes | None:
        buffer = bytearray(1)
        return bytes(buffer) if self.blocks.read_into(self, number, 7, memoryview(buffer)) else None


def test_least_recently_read_is_dropped_first_and_unread_ones_last() -> None:
    blocks = Blocks(6 * CHUNK)
    file = Unread(blocks)
    file.bring(1, 2, 3)
    assert [file.see(number) for number in (1, 2, 3, 1)] == [b"\1", b"\2", b"\3", b"\1"]
    file.bring(4, 5, 6)
    file.bring(7)
    assert file.dropped_chunks == [2]
    # 4 was the oldest of more than half that nobody had read; it is now after 3 and 1.
    file.bring(8, 9)
    assert file.dropped_chunks == [2, 3, 1]
    assert file.see(2) is None and file.see(8) == b"\x08"


def test_read_ahead_takes_no_block_that_waits_to_be_read() -> None:
    blocks = Blocks(4 * CHUNK)
    file = Unread(blocks)
    file.bring(1, 2)
    assert blocks.reserve(file, 3, 9, urgent=False) == 2
    assert blocks.reserve(file, 9, 10, urgent=False) == 0
    assert blocks.reserve(file, 9, 10, urgent=True) == 1
    assert file.dropped_chunks == [1]
    blocks.release(file, 3, 5)
    assert blocks.used == 2 * CHUNK


def test_block_that_is_being_read_is_not_dropped() -> None:
    blocks = Blocks(2 * CHUNK)
    file, seen = Unread(blocks), []

    file.bring(1, 2)
    # A copy under way, as another thread would see it.
    with blocks._lock:
        place = blocks._fresh.pop((file, 1)) if (file, 1) in blocks._fresh else blocks._used.pop((file, 1))
        blocks._pinned[file, 1] = place, 1
    assert blocks.reserve(file, 3, 5, urgent=True) == 1
    assert file.dropped_chunks == [2]
    seen.append(file.see(1))
    assert seen == [b"\1"] and blocks._pinned[file, 1] == (place, 1)


def test_readers_never_see_a_block_change_under_them() -> None:
    blocks = Blocks(3 * CHUNK)
    file, over = Unread(blocks), threading.Event()
    wrong: list[bytes] = []

    def look() -> None:
        buffer = bytearray(CHUNK)
        while not over.is_set():
            for number in range(8):
                if blocks.read_into(file, number, 0, memoryview(buffer)) and set(buffer) != {number}:
                    wrong.append(bytes(buffer[:1]))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        numbers = random.Random(1)
        here: set[int] = set()
        for _ in range(300):
            here -= set(file.dropped_chunks)
            file.dropped_chunks.clear()
            number = numbers.choice([n for n in range(8) if n not in here])
            if blocks.reserve(file, number, number + 1, urgent=True):
                blocks.write(file, number * CHUNK, bytes([number]) * CHUNK)
                blocks.keep(file, number, number + 1)
                here.add(number)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


# ---- what the kernel says

MEASURE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from hubfs.cache.blocks import Blocks, MemoryFile, divide
from hubfs.config import Settings
from hubfs.hubs.base import RemoteFile
from hubfs.net import Net
from hubfs.transfer.fetch import Fetcher, policy
from tests.remote import Doubting, HttpSource, Waiter

url, path, size, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))

settings = Settings.load({}, {}, Path("/dev/null"))
net = Net(settings)
net.prepare()
most, chosen = divide(limit, policy(settings))
blocks, fetcher, waiter = Blocks(most), Fetcher(chosen), Waiter()
files = [
    MemoryFile(blocks, fetcher, "m", HttpSource(net, url), RemoteFile(path, size, 0), moved=waiter.moved)
    for _ in range(4)
]
before = memory("VmRSS")

def read(file):
    buffer = memoryview(bytearray(131072))
    return sum(file.read_into(buffer, at, waiter.until) for at in range(0, size, 131072))

with ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(read, files)) == 4 * size
most, after = memory("VmHWM"), memory("VmRSS")
for file in files:
    file.close()
print(most - before, after - before, memory("VmRSS") - before)
fetcher.close()
"""


def test_process_stays_within_the_limit_and_gives_the_memory_back(hub: FaultHub) -> None:
    limit = 64 * MiB
    hub.add(PATH, BODY)
    arguments = [hub.url, PATH, str(len(BODY)), str(limit)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=100
    )
    most, after, closed = map(int, done.stdout.split())
    # Four files of 20 MiB went through. Beside the limit there are stacks, and what Python keeps.
    assert most < limit + 8 * MiB
    assert after < limit
    assert closed < 6 * MiB
