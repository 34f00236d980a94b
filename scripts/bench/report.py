"""What the benchmark says at its end: a table for people, JSON for programs, a page for the docs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

from scripts.bench.results import Result, number, spread, verdict

_HEADS = ("part", "what", "unit", "hubfs", "baseline", "ratio", "target", "baseline is; notes")
_PLOT_REACH = 6  # the plot goes from 1/64 to 64 times the baseline
_PLOT_STEP = 3  # columns for a factor of two


def _cells(result: Result) -> tuple[str, ...]:
    notes = "; ".join(filter(None, (result.baseline_name, result.note)))
    return (
        result.part,
        result.name,
        result.unit,
        spread(result.ours),
        spread(result.baseline),
        spread(result.ratio),
        verdict(result),
        notes,
    )


def table(results: Sequence[Result]) -> str:
    """Medians and ratios with their range in brackets, in columns."""
    rows = [_HEADS, *map(_cells, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_json(
    machine: Mapping[str, str], mode: str, results: Sequence[Result], problems: Mapping[str, str]
) -> str:
    rows = [{**dataclasses.asdict(result), "met": result.met} for result in results]
    found = {"mode": mode, "machine": dict(machine), "results": rows, "problems": dict(problems)}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def markdown(
    machine: Mapping[str, str], mode: str, results: Sequence[Result], problems: Mapping[str, str]
) -> str:
    """The page docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        f"Written by `scripts/bench/run.py {mode} --markdown docs/benchmarks.md`; do not edit.",
        "",
        "Everything ran on one machine, beside baselines measured in the same run. Figures are medians, with",
        "least and greatest in brackets; less is better in every line, and a ratio below 1 means faster than",
        "the baseline. What each line measures is told in `scripts/bench/`, one module a part.",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
    ]
    for part in dict.fromkeys(result.part for result in results):
        lines += [f"## {part}", "", _markdown_row(_HEADS[1:]), _markdown_row(["---"] * (len(_HEADS) - 1))]
        lines += [_markdown_row(_cells(result)[1:]) for result in results if result.part == part]
        lines.append("")
    lines += ["## Ratios at a glance", "", "```text", plot(results), "```"]
    for part, problem in problems.items():
        lines += ["", f"`{part}` is missing: {problem}"]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plot(results: Sequence[Result]) -> str:
    """The ratios on a logarithmic scale; bars to the left of the line are faster than the baseline."""
    ratios = [(f"{r.part}: {r.name}", r.ratio.median) for r in results if r.ratio is not None]
    if not ratios:
        return "(no ratios were measured)"
    half, width = _PLOT_REACH * _PLOT_STEP, max(len(name) for name, _ in ratios)
    lines = [f"{'':{width}}  {'faster':>{half}}│{'slower':<{half}}"]
    for name, ratio in ratios:
        length = min(half, round(abs(math.log2(ratio)) * _PLOT_STEP))
        left, right = ("█" * length, "") if ratio < 1 else ("", "█" * length)
        lines.append(f"{name:{width}}  {left:>{half}}│{right:<{half}} {number(ratio)}")
    return "\n".join(lines)
