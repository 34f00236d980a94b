"""Figures: several runs' values, compared with a baseline and a target. Less is better in all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
class Target:
    """The most that a figure may be.

    Attributes:
        of: `ratio` to the baseline, or `value`, in the result's unit.
    """

    limit: float
    of: str = "ratio"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        part: which part of the benchmark measured it.
        baseline: None where there is nothing to compare with, and then `ratio` is None too.
        ratio: its median is that of the medians; least and greatest are those of the pairs of runs that
            were made next to each other.
    """

    part: str
    name: str
    unit: str
    ours: Spread
    baseline: Spread | None = None
    baseline_name: str = ""
    ratio: Spread | None = None
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        if self.target.of == "value":
            return self.ours.median <= self.target.limit
        return self.ratio is not None and self.ratio.median <= self.target.limit


def single(
    part: str, name: str, unit: str, values: Sequence[float], limit: float | None = None, note: str = ""
) -> Result:
    """A figure without a baseline; `limit` is the most that it may be."""
    target = None if limit is None else Target(limit, "value")
    return Result(part, name, unit, Spread.of(values), target=target, note=note)


def compared(
    part: str,
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
    target = None if limit is None else Target(limit)
    return Result(part, name, unit, mine, other, baseline_name, ratio, target, note)


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


def verdict(result: Result) -> str:
    """The target and whether it is met."""
    if result.target is None:
        return ""
    unit = "" if result.target.of == "ratio" else f" {result.unit}"
    what = number(result.target.limit) + unit
    return f"≤ {what}: {'met' if result.met else 'NOT met'}"
