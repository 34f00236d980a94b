"""The connections to one host: how many are worth having, and how much each is asked for at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from hubfs.transfer.chunks import CHUNK

#: Bytes of a request at least, where so much is missing. At 1 Gbit/s it takes 8 ms, a fraction of what
#: the way to the hub and back takes, so less would be no quicker; random readers are not given more.
FIRST: Final = 1 << 20
#: Bytes of a request at most. At 1 Gbit/s and 30 ms a connection brings something two thirds of the time;
#: more would bind memory and delay what is wanted meanwhile.
LARGEST: Final = 8 << 20
#: The same on a line that brings so much in QUICK_SECONDS. Each request takes the processors a millisecond,
#: here and at the hub together: a tenth of the time that 8 MiB take at 800 MB/s.
QUICK: Final = 32 << 20
QUICK_SECONDS: Final = 0.06
#: Seconds that a request should not exceed on a slow line: so long may others have to wait behind it.
REQUEST_SECONDS: Final = 0.5
#: Bytes that are read ahead at most, over all readers.
BUDGET: Final = 128 << 20
#: Bytes a second that a processor can fetch, store and hand to a reader. Where a few connections bring that
#: for each processor, more of them would only take the processors from those who read.
PER_PROCESSOR: Final = 400e6
#: So much of the best rate of a connection counts after the next request; a line may become slower.
FADING: Final = 0.95


@dataclass(frozen=True)
class Policy:
    """
    Attributes:
        connections: requests on their way to one host at most.
        budget: bytes to read ahead, over all readers; 0 turns it off.
        largest: bytes of a request at most.
        quick: the same where they take no more than `QUICK_SECONDS`, if it is more.
        processors: of the machine.
        retries: attempts in a row that may fail without any progress.
        retry_delay: seconds before the first repetition; they double with each further one.
    """

    connections: int = 8
    budget: int = BUDGET
    largest: int = LARGEST
    quick: int = 0
    processors: int = 8
    retries: int = 5
    retry_delay: float = 0.5


@dataclass
class Lane:
    """The connections to one host.

    Attributes:
        busy: requests on their way.
        rate: bytes a second of one connection, with all that a request costs; `None` while unknown.
        best: the same, of the best ones lately.
        failures: times in a row that requests failed; those that were on their way together count once.
        failed: when that was last.
        rest: until when nothing is asked for that nobody waits for.
    """

    busy: int = 0
    rate: float | None = None
    best: float = 0.0
    failures: int = 0
    failed: float = float("-inf")
    rest: float = 0.0

    def learn(self, rate: float) -> None:
        """A request brought so many bytes a second, with all that it cost."""
        self.rate = rate if self.rate is None else (self.rate + rate) / 2
        self.best = max(rate, self.best * FADING)

    def enough(self, policy: Policy) -> int:
        """Connections for what nobody waits for yet: as many as keep the processors busy."""
        if not self.best:
            return policy.connections
        wanted = math.ceil(policy.processors * PER_PROCESSOR / self.best)
        return min(policy.connections, max(2, wanted))

    def request_size(self, most: int, quick: int) -> int:
        """Bytes of a request: `most` at most, or `quick` where they take no more than `QUICK_SECONDS`."""
        rate = self.rate or 0.0
        most = max(most, int(min(quick, rate * QUICK_SECONDS)))
        return max(CHUNK, int(min(most, max(rate * REQUEST_SECONDS, FIRST))) // CHUNK * CHUNK)
