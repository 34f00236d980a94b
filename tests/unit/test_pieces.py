"""Bytes cut into pieces on their way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubfs.hubs.pieces import cut


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 16))
def test_the_same_bytes_in_multiples_of_a_step(chunks: list[bytes], step: int) -> None:
    pieces = [bytes(piece) for piece in cut(chunks, step)]
    assert b"".join(pieces) == b"".join(chunks)
    assert all(piece and len(piece) % step == 0 for piece in pieces[:-1])
    assert all(pieces)


def test_nothing_waits_for_what_comes_later() -> None:
    taken = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"abc", b"de", b"f"):
            taken.append(chunk)
            yield chunk

    pieces = cut(chunks(), 2)
    assert (bytes(next(pieces)), taken) == (b"ab", [b"abc"])
    assert (bytes(next(pieces)), taken) == (b"cd", [b"abc", b"de"])
    assert (bytes(next(pieces)), taken) == (b"ef", [b"abc", b"de", b"f"])
    assert list(pieces) == []


def test_errors_go_up_after_what_was_whole() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"abcde"
        raise OSError("broken")

    pieces = cut(chunks(), 2)
    assert bytes(next(pieces)) == b"abcd"
    with pytest.raises(OSError, match="broken"):
        next(pieces)


def test_large_chunks_are_not_copied() -> None:
    chunk = bytes(100)
    (piece,) = cut([chunk], 10)
    assert isinstance(piece, memoryview)
    assert piece.obj is chunk
