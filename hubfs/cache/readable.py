"""What everything that is open for reading has in common, whatever its bytes come from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Wait:
    """How long somebody waits.

    Attributes:
        timeout: seconds without any progress after which the wait ends.
        interrupted: tells that the one who waits was signalled.
    """

    timeout: float
    interrupted: Callable[[], bool] = lambda: False


class Readable(ABC):
    """Something open for reading.

    Attributes:
        direct: the kernel is to keep no pages of it, nor to use those that it has.
    """

    direct: bool

    @property
    def backing(self) -> int | None:
        """A descriptor of a file on disk that has all of the content, if there is one."""
        return None

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int, wait: Wait) -> int:
        """Fill `buffer` from `offset` on, as far as there is content; returns the bytes read.

        Raises:
            HubfsError: they cannot be had.
        """

    @abstractmethod
    def close(self) -> None:
        """Nobody reads it any more."""

    def read(self, size: int, offset: int, wait: Wait) -> bytes:
        """The same, for those who have no buffer."""
        buffer = bytearray(size)
        return bytes(buffer[: self.read_into(memoryview(buffer), offset, wait)])


def read_all(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from a file, as far as it goes; returns the bytes read.

    Raises:
        OSError: the file cannot be read.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done
