"""What waiting readers are told of an arriving version, and that it costs little."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hubfs.cache.arrival import Arrival


class Counting(threading.Condition):
    """Counts how often those who wait are woken."""

    woken = 0

    def notify_all(self) -> None:
        self.woken += 1
        super().notify_all()


@pytest.fixture
def changed() -> Counting:
    return Counting(threading.Lock())


@pytest.fixture
def arrival(changed: Counting) -> Arrival:
    return Arrival(Path("/nowhere"), changed, verified_only=False)


def has(arrival: Arrival, path: str, end: int) -> bool:
    with arrival.changed:
        return arrival.has(arrival.files[path], end)


def test_names_are_told(arrival: Arrival, changed: Counting) -> None:
    arrival.directory("d", 1)
    arrival.file_started("d/f", 10, 1)
    assert changed.woken == 2


def test_growth_wakes_nobody_who_does_not_wait_for_it(arrival: Arrival, changed: Counting) -> None:
    for path in ("f", "g"):
        arrival.file_started(path, 100, 1)
    before = changed.woken
    assert not has(arrival, "g", 1)
    for written in range(1, 101):
        arrival.file_grew("f", written)
        arrival.on_bytes(written, 100)
    assert changed.woken == before
    assert has(arrival, "f", 100)


def test_readers_are_woken_when_the_nearest_end_is_there(arrival: Arrival, changed: Counting) -> None:
    arrival.file_started("f", 100, 1)
    before = changed.woken
    assert not has(arrival, "f", 60)
    assert not has(arrival, "f", 40)
    assert not has(arrival, "f", 80)
    arrival.file_grew("f", 39)
    assert changed.woken == before
    arrival.file_grew("f", 41)
    assert changed.woken == before + 1
    assert has(arrival, "f", 40)
    # The others wait on, which they say again.
    assert not has(arrival, "f", 60)
    assert not has(arrival, "f", 80)
    arrival.file_grew("f", 60)
    assert changed.woken == before + 2


def test_every_piece_counts_as_progress(arrival: Arrival) -> None:
    arrival.file_started("f", 100, 1)
    seen = [arrival.progress]
    for written in (10, 20):
        arrival.file_grew("f", written)
        seen.append(arrival.progress)
        arrival.on_bytes(written, None)
        seen.append(arrival.progress)
    assert seen == sorted(set(seen))
    assert arrival.written == 20


def test_reader_is_woken(arrival: Arrival, changed: Counting) -> None:
    arrival.file_started("f", 100, 1)
    asked = threading.Event()

    def wait() -> bool:
        with changed:
            file = arrival.files["f"]
            while not arrival.has(file, 50):
                asked.set()
                if not changed.wait(20):
                    return False
            return True

    results: list[bool] = []
    reader = threading.Thread(target=lambda: results.append(wait()))
    reader.start()
    assert asked.wait(20)
    arrival.file_grew("f", 50)
    reader.join(20)
    assert results == [True]
