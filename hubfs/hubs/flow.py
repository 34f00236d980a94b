"""What watches over bytes that come from a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

from hubfs.errors import StoppedError, UnavailableError

#: Slower than this over the stall timeout, a connection counts as stalled. In bytes per second.
_SLOWEST: Final = 1024

Piece = TypeVar("Piece", bytes, memoryview)


def watched(
    pieces: Iterable[Piece], handle: str, stopped: Callable[[], bool], stall_timeout: float
) -> Iterator[Piece]:
    """The same pieces.

    Args:
        pieces: each comes, or fails, within `stall_timeout` seconds by itself.
        stopped: tells whether no more are wanted; asked before each is given.

    Raises:
        StoppedError: no more are wanted.
        UnavailableError: they come too slowly.
    """
    window, came = time.monotonic(), 0
    for piece in pieces:
        if stopped():
            raise StoppedError(f"{handle}: the transfer was stopped")
        came += len(piece)
        yield piece
        elapsed = time.monotonic() - window
        if elapsed >= stall_timeout:
            if came < _SLOWEST * elapsed:
                raise UnavailableError(
                    f"{handle}: less than {_SLOWEST} bytes a second come from the server",
                    hint="try again later",
                )
            window, came = time.monotonic(), 0
