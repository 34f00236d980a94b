"""Which parts of a file are there: its chunks, each missing, asked for or present."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: Bytes of a chunk: what is there or is not, on disk and in memory. The kernel asks for 128 KiB to 1 MiB.
CHUNK: Final = 256 << 10

MISSING: Final = 0
ASKED: Final = 1
PRESENT: Final = 2


class Chunks:
    """A file's chunks. Ranges are bytes, `stop` exclusive.

    Attributes:
        size: bytes of the file.
        missing: chunks that are not present.
        filled: before this chunk none is missing that was not asked for.
    """

    def __init__(self, size: int, present: Iterable[int] = ()) -> None:
        """
        Args:
            present: numbers of the chunks that are there already.
        """
        self.size = size
        self._states = bytearray(-(-size // CHUNK))
        for number in present:
            self._states[number] = PRESENT
        self.missing = len(self._states) - self._states.count(PRESENT)
        self.filled = 0

    def has(self, start: int, stop: int) -> bool:
        """Whether all bytes of a range are present. Needs no lock."""
        first, last = span(start, min(stop, self.size))
        return self._states.count(PRESENT, first, last) == last - first

    def gap(self, start: int, stop: int) -> int | None:
        """Where the first chunk of a range begins that nobody has asked for."""
        first, last = span(start, min(stop, self.size))
        found = self._states.find(MISSING, first, last)
        return None if found < 0 else found * CHUNK

    def gap_end(self, start: int, most: int) -> int:
        """How far the gap that begins at `start` goes; at most `most` bytes, in whole chunks."""
        first = start // CHUNK
        last = min(first + most // CHUNK, len(self._states))
        while first < last and self._states[first] == MISSING:
            first += 1
        return min(first * CHUNK, self.size)

    def mark(self, start: int, stop: int, state: int) -> None:
        """Give all chunks of a range a state."""
        first, last = span(start, min(stop, self.size))
        self.missing += self._states.count(PRESENT, first, last)
        self._states[first:last] = bytes([state]) * (last - first)
        self.missing -= self._states.count(PRESENT, first, last)
        if state == MISSING:
            self.filled = min(self.filled, first)


def span(start: int, stop: int) -> tuple[int, int]:
    """The numbers of the chunks that a range touches, the last one exclusive."""
    first = start // CHUNK
    return first, max(first, -(-stop // CHUNK)) if stop > start else first


def whole(size: int) -> int:
    """Bytes of the chunks that so many bytes need."""
    return -(-size // CHUNK) * CHUNK
