"""A fleet that starts cold on one model, simulated: with a shared tier, and without.

`python -m scripts.fleet` prints a table, and with `--write` it writes it into docs/fleet.md with its plot.
Nothing takes real time, and the same seed gives the same figures. When a machine looks, renews, and takes
over is decided by the policy that hubfs itself follows (hubfs/cache/lease.py). How long bytes take is a
model: all who use a server at a time have the same share, up to what one machine can take.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hubfs.cache.lease import Action, Policy, Seen, Term, Watch, content_of, new_token
from scripts.bench.plot import Point, dots

PAGE = Path(__file__).resolve().parents[1] / "docs/fleet.md"
PLOT = PAGE.with_name("fleet.svg")
BEGIN, END = "<!-- figures: written by scripts/fleet.py -->", "<!-- end of figures -->"
MIB, GBIT = 1 << 20, 1e9 / 8
#: What a machine asks for at a time, and uploads at a time.
RANGE, PART = 8 * MIB, 5 * MIB


@dataclass(frozen=True)
class World:
    """
    Attributes:
        size, files: of the model; bytes.
        arrival: seconds within which all machines start.
        hub, hub_each: bytes per second that the hub gives to all, and to one machine.
        bucket, bucket_each: the same for the bucket, in each direction.
        nic: of a machine, in bytes per second.
        copy: bytes per second of a copy on the bucket's side.
        hub_delay, bucket_delay: seconds of a request.
        deaths: how many owners of the lease die before they have published; when, is random.
    """

    size: int = 1_007_000_000
    files: int = 5
    arrival: float = 10.0
    hub: float = 10 * GBIT
    hub_each: float = 1 * GBIT
    bucket: float = 200 * GBIT
    bucket_each: float = 5 * GBIT
    nic: float = 10 * GBIT
    copy: float = 500e6
    hub_delay: float = 0.1
    bucket_delay: float = 0.03
    deaths: int = 0
    policy: Policy = Policy()


@dataclass
class Count:
    """What a server was asked for."""

    asked: int = 0
    requests: int = 0
    read: float = 0.0
    written: float = 0.0


@dataclass
class Outcome:
    """
    Attributes:
        ready: seconds from a machine's start until all of the model is on it, for each that lived.
        hub: `asked` is how many machines fetched the model there.
    """

    machines: int
    tier: bool
    deaths: int
    hub: Count = field(default_factory=Count)
    bucket: Count = field(default_factory=Count)
    ready: list[float] = field(default_factory=list)


class Clock:
    """Runs what is due, in the order of its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), do))

    def run(self) -> None:
        while self._due:
            self.now, _, do = heapq.heappop(self._due)
            do()


class Line:
    """What all share of a server's bandwidth: everybody gets the same, at most `each`."""

    def __init__(self, clock: Clock, total: float, each: float) -> None:
        self._clock = clock
        self._total, self._each = total, each
        self._served = 0.0  # bytes that one who was always there would have
        self._since = 0.0
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._plan = 0

    def carry(self, size: float, done: Callable[[], None]) -> None:
        self._advance()
        heapq.heappush(self._waiting, (self._served + size, next(self._order), done))
        self._replan()

    @property
    def _rate(self) -> float:
        return min(self._each, self._total / max(1, len(self._waiting)))

    def _advance(self) -> None:
        self._served += (self._clock.now - self._since) * self._rate
        self._since = self._clock.now

    def _replan(self) -> None:
        self._plan += 1
        if self._waiting:
            plan = self._plan
            left = max(0.0, (self._waiting[0][0] - self._served) / self._rate)
            self._clock.after(left, lambda: self._finish(plan))

    def _finish(self, plan: int) -> None:
        if plan != self._plan:
            return  # Others came or went since.
        self._advance()
        _, _, done = heapq.heappop(self._waiting)
        self._replan()
        done()


class Fleet:
    """Some machines, the hub, and the bucket."""

    def __init__(self, machines: int, world: World, seed: int, *, tier: bool) -> None:
        self.world = world
        self.outcome = Outcome(machines, tier, world.deaths)
        self.clock = Clock()
        self.random = random.Random(seed)
        self.hub = Line(self.clock, world.hub, min(world.nic, world.hub_each))
        each = min(world.nic, world.bucket_each)
        self.downloads = Line(self.clock, world.bucket, each)
        self.uploads = Line(self.clock, world.bucket, each)
        # In the bucket:
        self.lock: Seen | None = None
        self.published = False
        self.deaths_left = world.deaths
        for number in range(machines):
            machine = Machine(self, number)
            self.clock.after(self.random.uniform(0, world.arrival), machine.start)

    def run(self) -> Outcome:
        self.clock.run()
        return self.outcome

    def ask_bucket(self, requests: int, then: Callable[[], None]) -> None:
        """Requests one after the other; what they find or do is so when the last one is answered."""
        self.outcome.bucket.requests += requests
        self.clock.after(requests * self.world.bucket_delay, then)


class Machine:
    """One of them: what hubfs/cache/tier.py and publish.py do, in their order."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self._fleet = fleet
        self._number = number
        self._token = new_token(f"{number:032x}")
        self._watch = Watch(fleet.world.policy, fleet.random.random)
        self._term = Term(fleet.world.policy, 0)
        self._renewals = 0
        self._started = 0.0
        self._owns = False
        self._dead = False
        self._waited = False

    def start(self) -> None:
        self._started = self._fleet.clock.now
        if not self._fleet.outcome.tier:
            self._fetch_from_hub(self._ready)
        else:
            self._fleet.ask_bucket(2, self._look)

    def _look(self) -> None:
        """It has asked for the manifest, and what else there may be."""
        if self._fleet.published:
            self._fetch_from_bucket()
        else:
            self._fleet.ask_bucket(1 if not self._waited else 2, self._look_at_lock)

    def _look_at_lock(self) -> None:
        fleet, waited = self._fleet, self._waited
        seen = fleet.lock
        action = self._watch.look(fleet.clock.now, seen)
        if fleet.published and waited:
            self._fetch_from_bucket()
            return
        self._waited = True
        if action is Action.WAIT:
            fleet.clock.after(self._watch.pause(), self._poll)
        else:
            fleet.ask_bucket(1, lambda: self._acquire(seen))

    def _poll(self) -> None:
        # The lock, and the manifest.
        self._fleet.ask_bucket(2, self._look_at_lock)

    def _acquire(self, instead_of: Seen | None) -> None:
        fleet = self._fleet
        if fleet.lock != instead_of:  # Another one was faster.
            fleet.clock.after(self._watch.pause(), self._poll)
            return
        self._owns = True
        self._write_lock()
        self._term = Term(fleet.world.policy, fleet.clock.now)
        self._plan_renewal()
        fleet.ask_bucket(2, self._look_again)

    def _look_again(self) -> None:
        if self._fleet.published:
            self._release()
            self._fetch_from_bucket()
            return
        if self._fleet.deaths_left:
            self._fleet.deaths_left -= 1
            world = self._fleet.world
            job = world.size * (1 / world.hub_each + 1 / world.bucket_each + 1 / world.copy)
            self._fleet.clock.after(self._fleet.random.uniform(0, job), self._die)
        self._fetch_from_hub(self._upload)

    def _die(self) -> None:
        self._dead = True

    def _plan_renewal(self) -> None:
        self._fleet.clock.after(self._term.due - self._fleet.clock.now, self._renew)

    def _renew(self) -> None:
        if self._owns and not self._dead:
            self._renewals += 1
            self._fleet.outcome.bucket.requests += 1
            self._write_lock()
            self._term.renewed(self._fleet.clock.now)
            self._plan_renewal()

    def _write_lock(self) -> None:
        self._fleet.lock = Seen(content_of(f"machine{self._number}", 1, self._token, self._renewals))

    def _release(self) -> None:
        self._owns = False
        self._fleet.outcome.bucket.requests += 2
        self._fleet.lock = None

    def _fetch_from_hub(self, then: Callable[[], None]) -> None:
        fleet, size = self._fleet, self._fleet.world.size
        fleet.outcome.hub.asked += 1
        fleet.outcome.hub.requests += 1 + math.ceil(size / RANGE)
        fleet.outcome.hub.read += size
        fleet.clock.after(fleet.world.hub_delay, lambda: fleet.hub.carry(size, then))

    def _upload(self) -> None:
        if self._dead:
            return
        self._ready()
        fleet, size = self._fleet, self._fleet.world.size
        fleet.outcome.bucket.requests += fleet.world.files * 2 + math.ceil(size / PART) + 2
        fleet.outcome.bucket.written += size
        fleet.uploads.carry(size, lambda: fleet.clock.after(size / fleet.world.copy, self._publish))

    def _publish(self) -> None:
        if not self._dead:
            # Removals, copies, listings, descriptor, manifest.
            self._fleet.ask_bucket(10 + self._fleet.world.files, self._end)

    def _end(self) -> None:
        if not self._dead:
            self._fleet.published = True
            self._release()

    def _fetch_from_bucket(self) -> None:
        fleet, size = self._fleet, self._fleet.world.size
        fleet.outcome.bucket.asked += 1
        fleet.outcome.bucket.requests += 1 + math.ceil(size / RANGE)
        fleet.outcome.bucket.read += size
        fleet.downloads.carry(size, self._ready)

    def _ready(self) -> None:
        self._fleet.outcome.ready.append(self._fleet.clock.now - self._started)


def simulate(machines: int, world: World, seed: int, *, tier: bool) -> Outcome:
    """One fleet's start."""
    return Fleet(machines, world, seed, tier=tier).run()


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    heads = (
        "machines", "models come from", "owners that die", "fetched from the hub", "requests to the hub",
        "GB from the hub", "requests to the bucket", "GB to the bucket", "GB from the bucket",
        "median has it after", "last has it after",
    )  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "| ---: | --- |" + " ---: |" * (len(heads) - 2)]
    for one in outcomes:
        cells = [
            f"{one.machines:,}",
            "hub and bucket" if one.tier else "hub",
            str(one.deaths) if one.tier else "",
            f"{one.hub.asked:,}",
            f"{one.hub.requests:,}",
            f"{one.hub.read / 1e9:,.0f}",
            f"{one.bucket.requests:,}" if one.tier else "",
            f"{one.bucket.written / 1e9:,.0f}" if one.tier else "",
            f"{one.bucket.read / 1e9:,.0f}" if one.tier else "",
            f"{statistics.median(one.ready):,.0f} s",
            f"{max(one.ready):,.0f} s",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(outcomes: Sequence[Outcome]) -> str:
    """Median, first and last machine, for each size of the fleet."""
    rows: dict[str, list[Point | None]] = {}
    for one in outcomes:
        label = f"{one.machines:,} machine" + ("s" if one.machines != 1 else "")
        at = 0 if not one.tier else 1 if not one.deaths else 2
        point = Point(statistics.median(one.ready), min(one.ready), max(one.ready))
        rows.setdefault(label, [None, None, None])[at] = point
    deaths = max((one.deaths for one in outcomes), default=0)
    series = ["hub only", "hub and bucket", *([f"{deaths} owners die"] if deaths else [])]
    title = "Seconds until a machine has the model: median, and from the first to the last machine"
    return dots(title, "seconds", {k: v[: len(series)] for k, v in rows.items()}, series)


def described(world: World, seed: int) -> str:
    return (
        f"A model of {world.size / 1e6:,.0f} MB in {world.files} files; all machines start within "
        f"{world.arrival:g} s, with {world.nic / GBIT:g} Gbit/s each. The hub gives {world.hub / GBIT:g} "
        f"Gbit/s to all and {world.hub_each / GBIT:g} to one machine, the bucket {world.bucket / GBIT:g} and "
        f"{world.bucket_each / GBIT:g}; it copies {world.copy / 1e6:,.0f} MB/s on its own side. A request "
        f"takes {world.hub_delay * 1000:.0f} ms at the hub and {world.bucket_delay * 1000:.0f} ms at the "
        f"bucket. Seed {seed}."
    )


def write_page(text: str, picture: str) -> None:
    page = PAGE.read_text(encoding="utf8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    PAGE.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.S), encoding="utf8")
    PLOT.write_text(picture, encoding="utf8")


def main(arguments: Sequence[str] | None = None) -> int:
    usual = World()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 10, 50, 1000, 10_000])
    parser.add_argument("--deaths", type=int, default=3, help="owners that die, in the last of each group")
    parser.add_argument("--seed", type=int, default=1)
    for name in ("hub", "hub_each", "bucket", "bucket_each", "nic"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=getattr(usual, name) / GBIT, help="Gbit/s"
        )
    parser.add_argument("--size", type=int, default=usual.size, help="bytes of the model")
    parser.add_argument("--arrival", type=float, default=usual.arrival, help="seconds")
    parser.add_argument("--write", action="store_true", help="write docs/fleet.md and its plot")
    chosen = parser.parse_args(arguments)
    rates = {
        name: getattr(chosen, name) * GBIT for name in ("hub", "hub_each", "bucket", "bucket_each", "nic")
    }
    world = dataclasses.replace(usual, size=chosen.size, arrival=chosen.arrival, **rates)
    outcomes = []
    for machines in chosen.machines:
        outcomes.append(simulate(machines, world, chosen.seed, tier=False))
        outcomes.append(simulate(machines, world, chosen.seed, tier=True))
        if 0 < chosen.deaths < machines:
            dying = dataclasses.replace(world, deaths=chosen.deaths)
            outcomes.append(simulate(machines, dying, chosen.seed, tier=True))
    print(table(outcomes))
    if chosen.write:
        write_page(f"{described(world, chosen.seed)}\n\n{table(outcomes)}", plot(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
