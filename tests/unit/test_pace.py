"""How many connections and which parts: the policy on lines that exist only as arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hubfs.transfer import pace as pace_module
from hubfs.transfer.pace import LARGEST, LATER, QUICK, SMALLEST, Pace, Progress

MB = 1_000_000
ROOM = 64 << 20
STEP = 0.01
MOST = 8


@dataclass
class Line:
    """A transfer of which only figures exist.

    Attributes:
        rate: bytes a second that so many connections bring together.
        use: bytes a second that the reader can use.
        latency: seconds until a new connection brings something.
    """

    rate: Callable[[int], float]
    use: float = 1e12
    latency: float = 0.03
    most: int = MOST
    now: float = 100.0
    received: float = 0.0
    used: float = 0.0
    waited: float = 0.0
    counts: list[int] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pace = Pace(self.now)
        self.began = self.now

    def run(self, seconds: float) -> list[int]:
        """The number of connections at each moment of so many seconds."""
        first = len(self.counts)
        for _ in range(round(seconds / STEP)):
            self._step()
        return self.counts[first:]

    def _step(self) -> None:
        wanted = self.pace.connections
        self.opened = (self.opened + [self.now] * wanted)[:wanted]
        delivering = sum(self.now - opened >= self.latency for opened in self.opened)
        self.now += STEP
        # Not more may come than there is room for.
        self.received = min(self.received + self.rate(delivering) * STEP, self.used + ROOM)
        could_use = self.use * STEP
        used = min(could_use, self.received - self.used)
        self.used += used
        self.waited += STEP * (1 - used / could_use)
        self.pace.look(Progress(self.now, int(self.received), self.waited), delivering, self.most)
        self.counts.append(self.pace.connections)

    def seconds_until(self, count: int) -> float:
        """How long after its beginning the transfer had so many connections first."""
        return (self.counts.index(count) + 1) * STEP


def limited_each(rate: float) -> Callable[[int], float]:
    return lambda count: count * rate


def limited_in_sum(rate: float) -> Callable[[int], float]:
    return lambda count: rate if count else 0.0


@pytest.mark.parametrize("latency", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("rate", [MB, 25 * MB, 125 * MB])
@pytest.mark.parametrize("most", [2, 5, 8])
def test_grows_to_what_is_allowed_where_each_connection_is_limited(
    rate: float, latency: float, most: int
) -> None:
    line = Line(limited_each(rate), latency=latency, most=most)
    line.run(LATER)
    # Three doublings, the first not before the first answer.
    assert line.seconds_until(most) <= latency + 4 * QUICK
    assert max(line.counts) == most
    # Now and then fewer are tried, which costs little and changes nothing.
    later = line.run(120)
    assert later[-1] == most
    assert sum(later) >= 0.97 * most * len(later)


@pytest.mark.parametrize("rate", [MB, 25 * MB, 125 * MB])
def test_eases_back_where_the_sum_is_limited(rate: float) -> None:
    line = Line(limited_in_sum(rate))
    line.run(30)
    later = line.run(120)
    assert later[-1] == 1
    assert sum(later) <= 1.5 * len(later)


def test_keeps_as_many_as_the_line_needs() -> None:
    # Four fill it.
    line = Line(lambda count: min(25 * MB * count, 100 * MB))
    line.run(30)
    later = line.run(120)
    assert 4 <= sum(later) / len(later) <= 5
    assert sum(count < 4 for count in later) <= 0.05 * len(later)


@pytest.mark.parametrize(("use", "enough"), [(20 * MB, 1), (45 * MB, 2), (160 * MB, 7)])
def test_uses_no_more_than_the_reader_needs(use: float, enough: int) -> None:
    line = Line(limited_each(25 * MB), use=use)
    line.run(60)
    later = line.run(120)
    assert sum(later) / len(later) <= enough + 0.6
    assert line.used >= 0.97 * use * (line.now - line.began)


def test_one_connection_that_is_faster_than_the_reader_stays_alone() -> None:
    line = Line(limited_each(1000 * MB), use=370 * MB, latency=0.001)
    assert set(line.run(30)) == {1}


def test_short_wait_is_no_reason() -> None:
    """A reader that waited 30 ms of each 100 ms is not yet given more within the first moments."""
    pace = Pace(0.0)
    for tick in range(1, 25):
        pace.look(Progress(tick * 0.01, tick * MB, (tick // 10) * 0.03), 1, MOST)
    assert pace.connections == 1


def test_nothing_is_added_before_the_first_answer() -> None:
    pace = Pace(0.0)
    for tick in range(1, 500):
        pace.look(Progress(tick * 0.01, 0, tick * 0.01), 0, MOST)
    assert pace.connections == 1


@pytest.mark.parametrize(
    ("retry_after", "fruitful", "earliest", "latest"),
    [(None, False, 1.5, 6.0), (None, True, 0.9, 3.0), (20.0, False, 20.0, 30.0), (0.0, False, 1.5, 6.0)],
)
def test_refused_connection_is_tried_again_later(
    retry_after: float | None, fruitful: bool, earliest: float, latest: float
) -> None:
    line = Line(limited_each(25 * MB))
    line.run(1.0)
    assert line.pace.connections == MOST
    line.pace.refused(line.now, 3, retry_after, fruitful=fruitful)
    assert line.pace.connections == 3
    refused = line.now
    while line.pace.connections <= 3:
        assert line.now - refused < latest
        line.run(STEP)
    assert line.now - refused >= earliest


def test_connections_that_are_refused_again_and_again_are_tried_ever_more_seldom() -> None:
    line, times = Line(limited_each(25 * MB)), []
    for _ in range(30_000):
        line.run(STEP)
        if line.pace.connections > 1:
            times.append(line.now)
            line.pace.refused(line.now, 1, None, fruitful=False)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) <= 12
    assert gaps[0] < 6 < max(gaps) <= pace_module.SELDOM + 2


def test_last_connection_is_never_taken_away() -> None:
    pace = Pace(0.0)
    pace.refused(1.0, 0, None, fruitful=False)
    assert pace.connections == 1


def test_gives_way_when_others_come_and_grows_when_they_go() -> None:
    line = Line(limited_each(25 * MB))
    line.run(1.0)
    line.most = 3
    assert max(line.run(10)) == 3
    line.most = MOST
    line.run(10)
    assert line.pace.connections == MOST


def test_line_that_gets_better_is_noticed() -> None:
    line = Line(limited_in_sum(25 * MB))
    line.run(60)
    assert line.pace.connections <= 2
    line.rate = limited_each(25 * MB)
    line.run(120)
    assert line.pace.connections == MOST


@pytest.mark.parametrize(
    ("rate", "connections", "left", "room", "size"),
    [
        (None, 1, 1 << 40, ROOM, SMALLEST),
        (0.1 * MB, 1, 1 << 40, ROOM, SMALLEST),
        (10 * MB, 1, 1 << 40, ROOM, 6 * MB),
        (125 * MB, 1, 1 << 40, ROOM, LARGEST),
        (125 * MB, 8, 1 << 40, ROOM, 12 << 20),
        # With less room, less at a time.
        (125 * MB, 8, 1 << 40, ROOM // 4, 3 << 20),
        (125 * MB, 8, 1 << 40, 0, SMALLEST),
        # Towards the end all connections get something.
        (10 * MB, 8, 24 * MB, ROOM, 3 * MB),
        (10 * MB, 8, 4 * MB, ROOM, SMALLEST),
        (125 * MB, 8, 60 * MB, ROOM, 12.5 * MB),
        # Nothing small is left over.
        (10 * MB, 1, 6 * MB + 5, ROOM, 6 * MB + 5),
        (None, 8, 1, ROOM, 1),
        (None, 8, 2 * SMALLEST - 1, ROOM, 2 * SMALLEST - 1),
        (None, 8, 2 * SMALLEST, ROOM, SMALLEST),
    ],
)
def test_part_size(rate: float | None, connections: int, left: int, room: int, size: float) -> None:
    pace = Pace(0.0)
    pace.connections = connections
    if rate is not None:
        pace.part_done(100 * MB, 100 * MB / rate)
    assert pace.part_size(left, room) == int(size)


def test_rate_is_that_of_late() -> None:
    pace = Pace(0.0)
    pace.part_done(MB, 1.0)
    for _ in range(5):
        pace.part_done(10 * MB, 1.0)
    assert pace.rate is not None and 9 * MB < pace.rate <= 10 * MB
    rate = pace.rate
    pace.part_done(1000, 10.0)  # the rest of a part
    assert pace.rate == rate
