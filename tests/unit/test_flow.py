"""Bytes from a server are watched over while they come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hubfs.errors import StoppedError, UnavailableError
from hubfs.hubs import flow
from hubfs.hubs.flow import watched

HANDLE = "https://hub.example/google/m/1"


class Clock:
    """Seconds that pass while pieces come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(flow.time, "monotonic", lambda: self.now)

    def pieces(self, seconds: float, *sizes: int) -> Iterator[bytes]:
        for size in sizes:
            self.now += seconds
            yield bytes(size)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def never() -> bool:
    return False


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_what_comes_fast_enough_is_given_as_it_is(clock: Clock, seconds: float) -> None:
    sizes = [1024, 5000, 1024, 70_000, 1, 2048]
    given = [len(piece) for piece in watched(clock.pieces(seconds, *sizes), HANDLE, never, 10.0)]
    assert given == sizes


def test_slow_beginning_is_forgiven_and_a_slow_stretch_is_not(clock: Clock) -> None:
    sizes = [1_000_000, 10, 10, 10, 10, 10, 10, 10]
    given = []
    with pytest.raises(UnavailableError, match=r"google/m/1: less than 1024 bytes a second"):
        for piece in watched(clock.pieces(4.0, *sizes), HANDLE, never, 10.0):
            given.append(len(piece))
    assert given == sizes[:6], "twelve seconds that were good, and twelve that were not"


def test_nothing_is_given_to_who_wants_no_more(clock: Clock) -> None:
    stopped = iter([False, False, True])
    given = []
    with pytest.raises(StoppedError):
        for piece in watched(clock.pieces(0.1, 1, 2, 3, 4), HANDLE, lambda: next(stopped), 10.0):
            given.append(len(piece))
    assert given == [1, 2]


def test_own_errors_go_up_after_what_came(clock: Clock) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise OSError("broken")

    pieces = watched(broken(), HANDLE, never, 10.0)
    assert next(pieces) == b"abc"
    with pytest.raises(OSError, match="broken"):
        next(pieces)
