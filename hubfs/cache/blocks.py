"""Files of which nothing is kept but some blocks in memory (`UNCOMPRESSED`)."""

from __future__ import annotations

import dataclasses
import mmap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cachetools import LRUCache

from hubfs.cache.listed import lane_of
from hubfs.errors import DamagedError, HubfsError, StoppedError
from hubfs.transfer.chunks import CHUNK, span
from hubfs.transfer.fetch import Awaited, Fetcher, Remote, policy
from hubfs.transfer.lane import Policy
from hubfs.transfer.sink import Sink

if TYPE_CHECKING:
    from hubfs.config import Settings
    from hubfs.hubs.base import Listing, RemoteFile, Source

#: Bytes of a request at most: 8 connections bind a third of the default limit. At 1 Gbit/s and 30 ms they
#: bring something three quarters of the time.
LARGEST: Final = 12 << 20
#: Quarters of the blocks that may hold what was read ahead and not read yet.
FRESH: Final = 3
#: Sixteenths of the limit that blocks may take.
BLOCKS: Final = 9
#: Part of the limit that requests on their way may take.
ON_THEIR_WAY: Final = 3
_Key = tuple["MemoryFile", int]


def divide(limit: int, policy: Policy) -> tuple[int, Policy]:
    """How to use a memory limit: bytes for blocks, and a policy that keeps requests within the rest.

    What is read ahead may take most of the blocks; the rest are those that were read. Besides there are the
    answers to readers, and pieces between the line and the blocks, for which a part is left.
    """
    largest = min(LARGEST, limit // (ON_THEIR_WAY * policy.connections)) // CHUNK * CHUNK
    largest = max(CHUNK, largest)
    blocks = max(CHUNK, min(limit * BLOCKS // 16, limit - policy.connections * largest))
    return blocks, dataclasses.replace(
        policy, largest=largest, quick=0, budget=min(policy.budget, blocks * FRESH // 4)
    )


class Blocks:
    """Memory for chunks of files: so many bytes for all of them together, never more.

    It is one mapping, so that it can neither grow nor be scattered, of which only what was used once takes
    memory. Blocks that came and were not read yet are kept before those that were read, as long as they are
    no more than three quarters: to drop them would mean to fetch them twice.
    """

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes; at least one chunk.
        """
        self._lock = threading.Lock()  # protects all below, but not the bytes of pinned and arriving blocks
        self._total = max(1, limit // CHUNK)
        self._memory = mmap.mmap(-1, self._total * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._unused = list(range(self._total - 1, -1, -1))
        self._arriving: dict[_Key, int] = {}
        self._fresh: LRUCache[_Key, int] = LRUCache(self._total)
        self._used: LRUCache[_Key, int] = LRUCache(self._total)
        self._pinned: dict[_Key, tuple[int, int]] = {}  # its place, and how many keep it there
        self._expected: Counter[_Key] = Counter()

    @property
    def used(self) -> int:
        """Bytes of the blocks that hold something, or are going to."""
        with self._lock:
            return (self._total - len(self._unused)) * CHUNK

    def reserve(self, file: MemoryFile, first: int, last: int, *, urgent: bool) -> int:
        """Make room for chunks `first` to `last` (exclusive); returns for how many there is some.

        Others are dropped for that, of which their file is told.

        Args:
            urgent: at the cost of blocks that were read ahead, too.
        """
        with self._lock:
            for number in range(first, last):
                place = self._place(urgent)
                if place is None:
                    return number - first
                self._arriving[file, number] = place
            return last - first

    def write(self, file: MemoryFile, start: int, data: bytes | memoryview) -> None:
        """Fill chunks for which there was made room, from byte `start` of the file on."""
        source = memoryview(data)
        while source:
            number, offset = divmod(start, CHUNK)
            with self._lock:
                at = self._arriving[file, number] * CHUNK + offset
            part = source[: CHUNK - offset]
            self._view[at : at + len(part)] = part
            start, source = start + len(part), source[len(part) :]

    def keep(self, file: MemoryFile, first: int, last: int) -> None:
        """Chunks have come: from now on they can be read."""
        with self._lock:
            for key in ((file, number) for number in range(first, last)):
                place = self._arriving.pop(key)
                if key in self._expected:
                    self._pinned[key] = place, self._expected[key]
                else:
                    self._fresh[key] = place
            while len(self._fresh) > self._total * FRESH // 4:
                key, place = self._fresh.popitem()
                self._used[key] = place

    def release(self, file: MemoryFile, first: int, last: int) -> None:
        """Room that was made for chunks is not needed."""
        with self._lock:
            for number in range(first, last):
                self._unused.append(self._arriving.pop((file, number)))

    def read_into(self, file: MemoryFile, number: int, start: int, buffer: memoryview) -> bool:
        """Copy bytes of a chunk, from its byte `start` on. Returns whether it is there."""
        key = (file, number)
        with self._lock:
            place = self._pin(key)
        if place is None:
            return False
        at = place * CHUNK + start
        buffer[:] = self._view[at : at + len(buffer)]
        with self._lock:
            self._unpin(key)
        return True

    @contextmanager
    def expecting(self, file: MemoryFile, number: int) -> Iterator[None]:
        """Keep a chunk, once it has come, until the end of the `with` block.

        Whoever waits for it could be too late otherwise, again and again.
        """
        key = (file, number)
        with self._lock:
            self._expected[key] += 1
            self._pin(key)
        try:
            yield
        finally:
            with self._lock:
                self._expected[key] -= 1
                if not self._expected[key]:
                    del self._expected[key]
                if key in self._pinned:
                    self._unpin(key)

    def drop(self, file: MemoryFile) -> None:
        """Nothing of a file is needed any more, and nobody reads it."""
        with self._lock:
            for cache in (self._fresh, self._used):
                for key in [key for key in cache if key[0] is file]:
                    place = cache.pop(key)
                    self._unused.append(place)
                    self._memory.madvise(mmap.MADV_DONTNEED, place * CHUNK, CHUNK)

    def close(self) -> None:
        """Give all memory back. Nobody may use it any more."""
        self._view.release()
        self._memory.close()

    def _pin(self, key: _Key) -> int | None:
        if key in self._pinned:
            place, count = self._pinned[key]
        else:
            found = self._fresh.pop(key, None)
            found = self._used.pop(key, None) if found is None else found
            if found is None:
                return None
            place, count = found, 0
        self._pinned[key] = place, count + 1
        return place

    def _unpin(self, key: _Key) -> None:
        place, count = self._pinned.pop(key)
        if count > 1:
            self._pinned[key] = place, count - 1
        else:
            self._used[key] = place

    def _place(self, urgent: bool) -> int | None:
        if self._unused:
            return self._unused.pop()
        for cache in (self._used, self._fresh) if urgent else (self._used,):
            if cache:
                (file, number), place = cache.popitem()
                file.forget(number)
                return place
        return None


class MemoryFile(Sink):
    """A remote file, read through blocks that all files share. Safe to use from many threads.

    Attributes:
        remote: where its bytes come from.
    """

    def __init__(
        self,
        blocks: Blocks,
        fetcher: Fetcher,
        handle: str,
        source: Source,
        file: RemoteFile,
        *,
        host: str = "",
        moved: Callable[[], None],
        failed: Callable[[HubfsError], None] = lambda error: None,
    ) -> None:
        """
        Args:
            fetcher: one for all files of these blocks, with the policy that `divide` gave.
            moved, failed: as in `Sink`.
        """
        self._blocks = blocks
        self._on_moved = moved
        self._on_failed = failed
        self._size = file.size
        self._spoilt = False
        self.remote: Remote = fetcher.open(handle, source, file, self, host=host)

    def read_into(self, buffer: memoryview, offset: int, until: Callable[[Awaited], object]) -> int:
        """Fill `buffer` from `offset` on, as far as there is content; returns the bytes read.

        Args:
            until: returns once `Awaited.ready` does, or raises.

        Raises:
            HubfsError: they cannot be had.
        """
        stop = min(offset + len(buffer), self._size)
        if offset >= stop:
            return 0
        if self._spoilt:
            raise DamagedError(f"{self.remote.handle}: what came of a file was wrong; open it again")
        self.remote.read(offset, stop)
        at = self._read_there(buffer, offset, stop)
        if at == stop:
            return stop - offset
        with self.remote.waiting(at, stop) as awaited:
            while at < stop:
                # Chunk by chunk: nobody holds on to a block while waiting for the next.
                with self._blocks.expecting(self, at // CHUNK):
                    awaited.begin_with(at, min(at - at % CHUNK + CHUNK, stop))
                    until(awaited)
                    if self.remote.cancel.is_set():
                        # What is known to have come may be gone by now.
                        raise StoppedError(f"{self.remote.handle}: hubfs stopped fetching it")
                    at = self._read_there(buffer[at - offset :], at, awaited.enough)
                at = self._read_there(buffer[at - offset :], at, stop)
        return stop - offset

    def _read_there(self, buffer: memoryview, offset: int, stop: int) -> int:
        """Fill `buffer` with bytes `offset` to `stop`, as far as they are there; returns up to where."""
        at = offset
        while at < stop:
            number, start = divmod(at, CHUNK)
            end = min(at - start + CHUNK, stop)
            if not self._blocks.read_into(self, number, start, buffer[at - offset : end - offset]):
                break
            at = end
        return at

    def close(self) -> None:
        """Nobody reads it any more, and nobody will."""
        self.remote.close()
        self._blocks.drop(self)

    def forget(self, number: int) -> None:
        """One of its blocks was dropped for another (`Sink.room`)."""
        self.remote.forget(number * CHUNK, min((number + 1) * CHUNK, self._size))

    def room(self, start: int, stop: int, *, urgent: bool) -> int:
        if self._spoilt:
            return start
        first, last = span(start, stop)
        count = self._blocks.reserve(self, first, last, urgent=urgent)
        return min((first + count) * CHUNK, stop)

    def write(self, start: int, data: bytes | memoryview) -> None:
        self._blocks.write(self, start, data)

    def kept(self, start: int, stop: int) -> None:
        self._blocks.keep(self, *span(start, stop))

    def dropped(self, start: int, stop: int) -> None:
        self._blocks.release(self, *span(start, stop))

    def lost(self, start: int, stop: int) -> None:
        # Somebody may be reading these blocks: no other ones take their places before `close`.
        self._spoilt = self._spoilt or start < stop

    def moved(self) -> None:
        self._on_moved()

    def failed(self, error: HubfsError) -> None:
        self._on_failed(error)


class Memory:
    """The blocks of a process and what fills them. Nothing is taken before the first file is opened."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # protects the two
        self._blocks: Blocks | None = None
        self._fetcher: Fetcher | None = None

    def file(
        self,
        listing: Listing,
        path: str,
        *,
        moved: Callable[[], None],
        failed: Callable[[HubfsError], None],
    ) -> MemoryFile:
        """A file of a listing, for all who read it.

        Args:
            moved, failed: as in `Sink`.

        Raises:
            StoppedError: hubfs is being stopped.
        """
        with self._lock:
            if self._blocks is None or self._fetcher is None:
                size, chosen = divide(self._settings.memory_limit, policy(self._settings))
                self._blocks, self._fetcher = Blocks(size), Fetcher(chosen)
        return MemoryFile(
            self._blocks, self._fetcher, listing.handle, listing.source, listing.files[path],
            host=lane_of(listing), moved=moved, failed=failed,
        )  # fmt: skip

    @property
    def used(self) -> int:
        """Bytes of blocks that hold something."""
        with self._lock:
            return 0 if self._blocks is None else self._blocks.used

    def close(self) -> None:
        """Fetch nothing more. Who waits is told so."""
        with self._lock:
            fetcher = self._fetcher
        if fetcher is not None:
            fetcher.close()
