"""A stream of bytes, cut where its receiver wants to have it cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

#: Bytes of a piece, about, where its receiver leaves it open.
USUAL: Final = 1 << 20


def cut(chunks: Iterable[bytes], step: int) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces whose sizes are multiples of `step`, except the last one.

    Little is copied if the chunks are larger than a step. Holds no more than a step and a chunk.

    Args:
        chunks: of any size, also empty ones. What they raise goes up; the bytes before it that are no
            whole step are dropped then.
        step: bytes.
    """
    held: list[memoryview] = []
    have = 0
    for chunk in chunks:
        view = memoryview(chunk)
        if held and have + len(view) >= step:
            held.append(view[: step - have])
            view = view[step - have :]
            yield b"".join(held)
            held, have = [], 0
        whole = len(view) - len(view) % step if not held else 0
        if whole:
            yield view[:whole]
        if whole < len(view):
            held.append(view[whole:])
            have += len(view) - whole
    if held:
        yield b"".join(held)
