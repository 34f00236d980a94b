"""Figures: several runs' values, compared with a baseline and a target. Less is better in all of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """What several runs gave: their median, least and greatest."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        name: what was measured; the same in every environment.
        baseline: None where there is nothing to compare with, and then `ratio` is None too.
        ratio: its median is that of the medians; least and greatest are those of the pairs of runs that
            were made next to each other.
        limit: the most that the ratio may be, or that the figure itself may be if `absolute`.
        part: which part of the benchmark measured it.
    """

    name: str
    unit: str
    ours: Spread
    baseline: Spread | None = None
    baseline_name: str = ""
    ratio: Spread | None = None
    limit: float | None = None
    absolute: bool = False
    note: str = ""
    part: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or nothing to compare with."""
        measured = self.ours if self.absolute else self.ratio
        if self.limit is None or measured is None:
            return None
        return measured.median <= self.limit

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        """What `dataclasses.asdict` made of one."""
        spreads = {
            name: Spread(**found[name]) for name in ("ours", "baseline", "ratio") if found[name] is not None
        }
        return cls(**{**found, **spreads})


def single(
    name: str, unit: str, values: Sequence[float], limit: float | None = None, note: str = ""
) -> Result:
    """A figure without a baseline; `limit` is the most that it may be."""
    return Result(name, unit, Spread.of(values), limit=limit, absolute=True, note=note)


def compared(
    name: str,
    unit: str,
    ours: Sequence[float],
    baseline: Sequence[float],
    baseline_name: str,
    limit: float | None = None,
    note: str = "",
) -> Result:
    """A figure beside its baseline, run by run; `limit` is the greatest ratio that is wanted."""
    pairs = [mine / other for mine, other in zip(ours, baseline, strict=True)]
    mine, other = Spread.of(ours), Spread.of(baseline)
    ratio = Spread(mine.median / other.median, min(pairs), max(pairs), len(pairs))
    return Result(name, unit, mine, other, baseline_name, ratio, limit, note=note)


def compared_with_one_of(
    pick: Callable[..., str],
    name: str,
    unit: str,
    ours: Sequence[float],
    baselines: Mapping[str, Sequence[float]],
    limit: float | None,
) -> Result:
    """A figure beside the slowest (`pick=max`) or fastest (`pick=min`) of several baselines, by medians.

    Without any it stands alone, and its target is open.
    """
    if not baselines:
        return dataclasses.replace(single(name, unit, ours), limit=limit, absolute=False)
    medians = {other: statistics.median(values) for other, values in baselines.items()}
    which = pick(medians, key=medians.__getitem__)
    others = [f"{other}: {number(median)} {unit}" for other, median in medians.items() if other != which]
    return compared(name, unit, ours, baselines[which], which, limit, "; ".join(others))


def number(value: float) -> str:
    """Three digits that mean something."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def spread(values: Spread | None) -> str:
    """A median with the range it comes from."""
    if values is None:
        return "-"
    return f"{number(values.median)} ({number(values.low)}–{number(values.high)})"  # noqa: RUF001


def target(result: Result) -> str:
    """The most that is wanted."""
    if result.limit is None:
        return ""
    return f"≤ {number(result.limit)}{f' {result.unit}' if result.absolute else ''}"


def verdict(result: Result) -> str:
    """Whether the target is met."""
    if result.limit is None:
        return ""
    return {True: "met", False: "**missed**", None: "not measured"}[result.met]
