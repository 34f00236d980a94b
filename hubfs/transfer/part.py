"""One range of an object on its way: what has come of it and waits for its turn."""

from __future__ import annotations

import threading
from collections import deque

from hubfs.sharing import Block, Seat
from hubfs.transfer.stream import Stream


class Part:
    """A range, from `start` to `stop`, exclusive.

    Attributes:
        at: offset of the first byte that has not come.
        given: offset of the first byte that was not taken.
        connection: the thread that fetches it; `None` while nobody does.
        stream: by what means.
        failures: attempts in a row that brought nothing.
        breaks: attempts that brought something and ended too early.
        replaced: whether it was taken from a connection that was too slow.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.at = self.given = start
        self.stop = stop
        self.connection: threading.Thread | None = None
        self.stream: Stream | None = None
        self.failures = 0
        self.breaks = 0
        self.replaced = False
        self._waiting: deque[bytes | Block] = deque()

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return self.at == self.stop

    @property
    def idle(self) -> bool:
        """Whether somebody should fetch it."""
        return self.connection is None and not self.complete

    @property
    def waiting(self) -> int:
        """Bytes that have come and were not taken."""
        return self.at - self.given

    def append(self, chunk: bytes) -> None:
        """Bytes have come, and will soon be taken."""
        self.at += len(chunk)
        self._waiting.append(chunk)

    def store(self, chunk: bytes, seat: Seat) -> None:
        """Bytes have come before their turn. On the heap they would scatter it, and make it grow for good."""
        self.at += len(chunk)
        view = memoryview(chunk)
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, Block):
            view = view[last.append(view) :]
        while view:
            block = seat.block()
            if block is None:  # another transfer was quicker
                self._waiting.append(bytes(view))
                return
            self._waiting.append(block)
            view = view[block.append(view) :]

    def take(self, seat: Seat) -> bytes:
        """The next bytes that wait, some of them."""
        first = self._waiting.popleft()
        if isinstance(first, Block):
            block, first = first, first.read()
            seat.free(block)
        self.given += len(first)
        return first
