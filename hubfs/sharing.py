"""What the transfers of a process share: connections to a host, and memory for bytes that come early."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

#: Bytes that may wait for their turn, over all transfers. With all else the daemon stays below 150 MB.
MEMORY: Final = 64 << 20
#: Bytes of it for each connection of a transfer at most: what is in use stays nearer to the CPU.
EACH: Final = 8 << 20
#: Bytes of one block of it.
BLOCK: Final = 512 << 10
#: This fraction of its part must be free before a transfer goes on that had used all of it.
MARGIN: Final = 16


class Block:
    """A piece of the memory: bytes of one transfer in their order."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self.number = number
        self._memory = memory
        self._start = self._end = number * BLOCK

    def append(self, data: memoryview) -> int:
        """Store as much as there is space for; returns how many bytes that was."""
        size = min(len(data), self._start + BLOCK - self._end)
        self._memory[self._end : self._end + size] = data[:size]
        self._end += size
        return size

    def read(self) -> bytes:
        """All that was stored."""
        return self._memory[self._start : self._end]


class Seat:
    """One transfer's part in what is shared.

    Attributes:
        wanted: connections that it has use for; tells the others what is left for them.
    """

    def __init__(self, sharing: Sharing, host: Callable[[], str]) -> None:
        self.wanted = 1
        self._sharing = sharing
        self._host = host
        self._used = 0  # connections
        self._blocks: set[int] = set()

    def fair(self) -> int:
        """Connections that this transfer may have if it wants as many as it can get; at least one."""
        with self._sharing.lock:
            others = [seat.wanted for seat in self._neighbours() if seat is not self]
        return share(self._sharing.connections, others)

    def take(self, *, first: bool) -> bool:
        """Count a connection more, unless the host has all it may have. The first one is always granted."""
        with self._sharing.lock:
            granted = first or sum(seat._used for seat in self._neighbours()) < self._sharing.connections
            self._used += granted
        return granted

    def give_back(self) -> None:
        """Count a connection less."""
        with self._sharing.lock:
            self._used -= 1

    def room(self) -> int:
        """Bytes of this transfer that may wait: at most an equal part of the memory."""
        return min(self.wanted * EACH, MEMORY // max(1, len(self._sharing.seats)))

    def has_room(self, *, for_more: bool = False) -> bool:
        """Whether there is a block for this transfer.

        Args:
            for_more: and some more, so that who had to wait for one does not wait again at once.
        """
        wanted = 1 + (self.room() // BLOCK // MARGIN if for_more else 0)
        with self._sharing.lock:
            return min(self.room() // BLOCK - len(self._blocks), len(self._sharing.unused)) >= wanted

    def block(self) -> Block | None:
        """An empty block, if there is one."""
        with self._sharing.lock:
            if not self._sharing.unused:
                return None
            number = self._sharing.unused.pop()
            self._blocks.add(number)
            return Block(self._sharing.mapped(), number)

    def free(self, block: Block) -> None:
        """The bytes in a block are not needed any more."""
        with self._sharing.lock:
            self._blocks.remove(block.number)
            self._sharing.unused.append(block.number)

    def leave(self) -> None:
        """Give back all."""
        with self._sharing.lock:
            self._sharing.seats.remove(self)
            self._sharing.unused += self._blocks

    def _neighbours(self) -> Iterator[Seat]:
        host = self._host()
        return (seat for seat in self._sharing.seats if seat._host() == host)


class Sharing:
    """Gives seats to transfers.

    Attributes:
        connections: to one host at a time, but for the one that every transfer has.
        seats: those that are taken.
        unused: numbers of blocks; what was used last comes first, so that little memory is ever touched.
    """

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self.lock = threading.Lock()  # protects all of this, and the seats' counts
        self.seats: list[Seat] = []
        self.unused: list[int] = []
        self._memory: mmap.mmap | None = None

    @contextmanager
    def seat(self, host: Callable[[], str]) -> Iterator[Seat]:
        """Take part for the length of a `with` block.

        Args:
            host: tells which host the transfer uses; a redirect may change that.
        """
        seat = Seat(self, host)
        with self.lock:
            if not self.seats:
                self.unused = list(range(MEMORY // BLOCK))
            self.seats.append(seat)
        try:
            yield seat
        finally:
            seat.leave()
            self._give_memory_back()

    def mapped(self) -> mmap.mmap:
        """The memory of all blocks. `lock` must be held."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, MEMORY)
        return self._memory

    def _give_memory_back(self) -> None:
        with self.lock:
            if not self.seats and self._memory is not None:
                self._memory.close()
                self._memory = None


def share(whole: int, others: Sequence[int]) -> int:
    """What one more may have of `whole` who wants all, if nobody gets more than wanted or than is fair.

    At least 1, whatever the others want.
    """
    left = whole
    for served, want in enumerate(sorted(others)):
        left -= min(want, left // (len(others) + 1 - served))
    return max(1, left)
