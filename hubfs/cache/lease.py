"""When the machines of a fleet look at a lease of the shared tier, renew it, and take it over.

A lease is a lock object whose owner writes it anew while it is alive. Here are the rules only: no clock, no
thread, no network. The tier and the simulation of a fleet (`scripts/fleet.py`) both follow them.

All times are seconds of the own clock of the machine that calls: two machines' clocks are never compared.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

#: What the uid of a lease begins with, by which others know that its owner renews it.
_MARK = "hubfs"
#: Longer locks are nobody's; in bytes.
MAX_LOCK = 4096


@dataclass(frozen=True)
class Policy:
    """
    Attributes:
        renew: pause between two renewals of a lease.
        retry: pause after a renewal that failed.
        safe: an owner whose last renewal is older than this stops, since others may take over soon.
        stale: a lease of hubfs that was not seen to change for so long is taken over.
        foreign: the same for a lock of tensorflow_hub, which is not renewed: its upload may grow instead.
        first, longest, growth: pauses between two looks at somebody else's lease.
    """

    renew: float = 10.0
    retry: float = 2.0
    safe: float = 45.0
    stale: float = 60.0
    foreign: float = 600.0
    first: float = 0.5
    longest: float = 15.0
    growth: float = 1.6


@dataclass(frozen=True)
class Seen:
    """A lock as it was found.

    Attributes:
        content: `<host>.<pid>.<uid>`.
        tmp: objects and bytes that its owner has uploaded, where that was looked at.
    """

    content: str
    tmp: tuple[int, int] = (0, 0)


class Action(enum.Enum):
    """What somebody who wants a lease does next."""

    WAIT = enum.auto()
    CREATE = enum.auto()  # there is no lock
    TAKE_OVER = enum.auto()  # its owner is dead


class Watch:
    """One machine's view of a lease that another one has.

    Args:
        jitter: gives numbers from 0 to 1, so that machines that began together do not stay so.
    """

    def __init__(self, policy: Policy, jitter: Callable[[], float]) -> None:
        self._policy = policy
        self._jitter = jitter
        self._base = policy.first
        self._seen: Seen | None = None
        self._since = 0.0
        #: Grows whenever something has moved since the look before.
        self.moved = 0

    def look(self, now: float, seen: Seen | None) -> Action:
        """What to do about the lock that was found, or was not."""
        if seen != self._seen:
            self.moved += 1
            self._seen, self._since = seen, now
        if seen is None:
            return Action.CREATE
        limit = self._policy.foreign if token_of(seen.content) is None else self._policy.stale
        return Action.TAKE_OVER if now - self._since >= limit else Action.WAIT

    def pause(self) -> float:
        """Seconds until the next look."""
        base = self._base
        self._base = min(base * self._policy.growth, self._policy.longest)
        return base * (0.5 + 0.5 * self._jitter())


class Term:
    """How long the owner of a lease may believe in it.

    Args:
        started: when the request that got the lease was sent.
    """

    def __init__(self, policy: Policy, started: float) -> None:
        self._policy = policy
        self._confirmed = started
        #: When to renew it next.
        self.due = started + policy.renew

    def renewed(self, started: float) -> None:
        """A renewal that was sent then has succeeded: others may have seen it from then on."""
        self._confirmed = started
        self.due = started + self._policy.renew

    def failed(self, now: float) -> None:
        """A renewal had no answer."""
        self.due = now + self._policy.retry

    def is_over(self, now: float) -> bool:
        """Whether others may soon take it for dead."""
        return now - self._confirmed >= self._policy.safe


def lock_of(key: str) -> str:
    return f"{key}.lock"


def tmp_of(key: str, uid: str) -> str:
    return f"{key}.{uid}.tmp"


def content_of(host: str, pid: int, token: str, renewals: int) -> str:
    """What the lock holds. The uid changes with each renewal: tensorflow_hub looks for changed content."""
    return f"{host}.{pid}.{token}n{renewals}"


def new_token(uid: str) -> str:
    """The part of the uid that stays.

    Args:
        uid: 32 hex digits, never used before.
    """
    return _MARK + uid


def token_of(content: str) -> str | None:
    """The token of a lock's owner; `None` if it is not hubfs."""
    match = re.fullmatch(rf".*\.\d+\.({_MARK}[0-9a-f]{{32}})n\d+", content.strip(), re.DOTALL)
    return match[1] if match else None


def uid_of(content: str) -> str | None:
    """The uid that the owner of a lock names its `<key>.<uid>.tmp/` by; `None` if that cannot be told."""
    match = re.fullmatch(r".*\.\d+\.([0-9a-zA-Z]+)", content.strip(), re.DOTALL)
    return token_of(content) or (match[1] if match else None)
