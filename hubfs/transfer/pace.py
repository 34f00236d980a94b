"""How many connections an archive comes over and in which parts: a policy that knows no clock and no network.

It begins with one connection and doubles while whoever uses the bytes has to wait for them. From then on
it tries fewer or more now and then, and keeps what did as well with fewer, or better with more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Bytes of a part at least, and while nothing is known about the rate of a connection.
SMALLEST: Final = 1 << 20
#: Bytes of a part at most: what is lost of it when the transfer ends, and what a slow one makes others wait.
LARGEST: Final = 12 << 20
#: Seconds that a connection should need for a part: many times what a request costs.
PART_SECONDS: Final = 0.6
#: The same for the last parts, so that all connections end at about the same time.
LAST_SECONDS: Final = 0.1

#: Seconds after which one more doubling is considered. Requests on their way over a line of 30 ms do not
#: bring anything sooner, and to be cautious costs nothing: connections that are not needed go again.
QUICK: Final = 0.04
#: Waiting for so much of the time since the last doubling calls for the next one.
STARVED: Final = 0.5
#: Seconds over which a rate is measured at least, and bytes that must have come, unless it takes LONG.
WINDOW: Final = 0.3
ENOUGH: Final = 1 << 20
LONG: Final = 3.0
#: Waiting for so much of a window calls for more connections; for so little of it, for fewer.
THIRSTY: Final = 0.05
SATED: Final = 0.02
#: More connections must bring so much of what they would bring if each of them were as good as the old ones.
WORTH: Final = 0.25
#: With fewer connections so much of the rate must remain.
AS_GOOD: Final = 0.9
#: Seconds until more connections are tried (again), or fewer where they are not needed; each disappointment
#: doubles them.
SOON: Final = 1.0
#: Seconds until fewer are tried though bytes are waited for, which costs a little where each one counts.
LATER: Final = 10.0
SELDOM: Final = 60.0


@dataclass(frozen=True)
class Progress:
    """How far a transfer is.

    Attributes:
        now: seconds of a monotonic clock.
        received: bytes, over all connections.
        waited: seconds in which whoever uses the bytes had none to use.
    """

    now: float
    received: int = 0
    waited: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A change that has yet to show whether it was good.

    Attributes:
        connections: before it.
        rate: bytes a second before it; `None` if it was more than there was use for.
    """

    connections: int
    rate: float | None


class Pace:
    """Decides for one transfer. All times are seconds of the same clock.

    Attributes:
        connections: to use from now on.
        rate: bytes a second of one connection, once known.
    """

    def __init__(self, began: float) -> None:
        self.connections = 1
        self.rate: float | None = None
        self._ramping = True
        self._doubled = Progress(began)
        self._changed = began
        self._window: Progress | None = None
        self._trial: Trial | None = None
        self._more_from = self._fewer_from = began + SOON
        self._more_pause = self._fewer_pause = self._refused_pause = SOON

    def part_done(self, size: int, seconds: float) -> None:
        """A connection brought so many bytes, and spent so much time on reading them."""
        if size < SMALLEST // 2:
            return  # the rest of a part, too little to tell
        rate = size / max(seconds, 1e-3)
        self.rate = rate if self.rate is None else (self.rate + rate) / 2

    def part_size(self, left: int, room: int) -> int:
        """Bytes of the next part.

        Args:
            left: bytes that no part has yet, more than 0.
            room: bytes that may wait for their turn.
        """
        rate = self.rate or 0.0
        # When parts begin one after the other, those behind the first are half full on average.
        size = min(rate * PART_SECONDS, LARGEST, room * 1.5 / self.connections)
        size = min(size, max(left / self.connections, rate * LAST_SECONDS))
        size = max(size, SMALLEST)
        return left if left < size + SMALLEST else int(size)

    def refused(self, now: float, working: int, retry_after: float | None, *, fruitful: bool) -> None:
        """An additional connection was not granted, or broke.

        Args:
            working: connections that are left.
            retry_after: seconds that the hub asked to wait.
            fruitful: it had brought something before.
        """
        pause = SOON
        if not fruitful:
            self._refused_pause = min(2 * self._refused_pause, SELDOM)
            pause = self._refused_pause
        self._ramping, self._trial = False, None
        self._more_from = max(self._more_from, now + max(pause, retry_after or 0.0))
        self._to(max(1, min(working, self.connections)), now)

    def look(self, at: Progress, delivering: int, most: int) -> None:
        """Take notice of how far the transfer is. To be called often.

        Args:
            delivering: connections that bring bytes.
            most: connections that the transfer may have.
        """
        if self.connections > most:
            self._trial = None
            self._to(most, at.now)
        if self._ramping and delivering:
            self._ramp(at, most)
        if self._window is None:
            if delivering == self.connections or at.now - self._changed >= LONG:
                self._window = at
            return
        seconds, size = at.now - self._window.now, at.received - self._window.received
        if seconds < WINDOW or (size < ENOUGH and seconds < LONG):
            return
        starved = (at.waited - self._window.waited) / seconds
        self._window = at
        if self._judge(size / seconds, starved, at.now):
            self._consider(size / seconds, starved, at.now, most)

    def _ramp(self, at: Progress, most: int) -> None:
        seconds = at.now - self._doubled.now
        if seconds < QUICK:
            return
        if at.waited - self._doubled.waited >= STARVED * seconds:
            self._to(min(2 * self.connections, most), at.now)
            if self.connections == most:
                self._ramping = False
                self._fewer_from = at.now + LATER
        elif seconds < 3 * QUICK:
            return
        self._doubled = at

    def _judge(self, rate: float, starved: float, now: float) -> bool:
        """Look at what the last change did; False if it is taken back."""
        trial, self._trial = self._trial, None
        if trial is None:
            return True
        more = self.connections > trial.connections
        wanted = 1 + WORTH * (self.connections / trial.connections - 1) if more else AS_GOOD
        if starved <= SATED or (trial.rate is not None and rate >= trial.rate * wanted):
            if more:
                self._fewer_pause = min(2 * self._fewer_pause, SELDOM)
                self._fewer_from = now + self._fewer_pause
            elif trial.rate is not None:
                self._more_from = now + self._more_pause
                self._more_pause = min(2 * self._more_pause, SELDOM)
            return True
        self._to(trial.connections, now)
        if more:
            self._more_pause = min(2 * self._more_pause, SELDOM)
            self._more_from = now + self._more_pause
        else:
            self._fewer_pause = min(4 * self._fewer_pause, SELDOM)
            self._fewer_from = now + self._fewer_pause
        return False

    def _consider(self, rate: float, starved: float, now: float, most: int) -> None:
        count = self.connections
        if starved >= THIRSTY:
            if now >= self._more_from and count < most and not self._ramping:
                self._try(min(count + (count + 1) // 2, most), rate, now)
            elif now >= self._fewer_from and count > 1 and not self._ramping:
                self._try(count * 3 // 4, rate, now)
        elif starved < SATED and now >= self._fewer_from and count > 1:
            self._ramping = False
            self._fewer_from = now + self._fewer_pause
            self._try(count - 1, None, now)

    def _try(self, connections: int, rate: float | None, now: float) -> None:
        self._trial = Trial(self.connections, rate)
        self._to(connections, now)

    def _to(self, connections: int, now: float) -> None:
        if connections != self.connections:
            self.connections = connections
            self._changed = now
            self._window = None
