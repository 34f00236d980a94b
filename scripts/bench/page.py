"""`python -m scripts.bench.page JSON…`: docs/benchmarks.md and its plots, from what run.py has written.

Several files make one page: of different systems beside each other; of the same system, a part that is in
a later file takes the place of the earlier one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import plot
from scripts.bench.processes import CHECKOUT
from scripts.bench.reasons import reason
from scripts.bench.results import Result, Spread, number, spread, target, verdict
from scripts.bench.run import PARTS

_HEAD = """\
# Benchmarks

Written by `scripts/bench/run.sh {mode}`; do not edit. To repeat it on a machine of your own, run that. As
root it also measures what only root can have, and where the system's libfuse is too old for kernel
passthrough, it measures that in a Debian 13 of its own (`scripts/debian13.sh`).

Everything was measured beside a baseline on the same machine, in turns with it; a column is one machine with
one system. Figures are medians of {runs} runs, with least and greatest in brackets. **Less is better in
every line**: a ratio is hubfs's time by the baseline's, below 1 where hubfs is faster; in its brackets are
the ratios of neighbouring runs. Models:
`large` is {large} of floats as trained weights have them, which deflate hardly shrinks; `embed` is {embed}
that it makes a quarter.
"""
_QUICK = """
**This was a quick run**: its models are too small for the targets, which are those of a full one.
"""


#: Bars by heading and label.
_Groups = dict[str, dict[str, plot.Point]]


@dataclass(frozen=True)
class Environment:
    """One system's figures."""

    name: str
    mode: str
    machine: Mapping[str, str]
    results: Sequence[Result]
    left_out: Mapping[str, str]

    def find(self, key: tuple[str, str]) -> Result | None:
        return next((result for result in self.results if (result.part, result.name) == key), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--to", type=Path, default=CHECKOUT / "docs", metavar="DIR")
    arguments = parser.parse_args()
    environments = _combined([json.loads(file.read_text()) for file in arguments.files])
    plots = list(_plots(environments))
    for name, _, text in plots:
        (arguments.to / name).write_text(text)
    titles = {name: title for name, title, _ in plots}
    (arguments.to / "benchmarks.md").write_text(_page(environments, titles))
    print(f"{arguments.to / 'benchmarks.md'}", file=sys.stderr)


def _combined(files: Sequence[Mapping[str, Any]]) -> list[Environment]:
    found: dict[str, Environment] = {}
    for file in files:
        results = [Result.from_json(result) for result in file["results"]]
        name = file["machine"]["system"]
        left_out = file["left_out"]
        if before := found.get(name):
            parts = {result.part for result in results}
            results = [result for result in before.results if result.part not in parts] + results
            kept = {what: why for what, why in before.left_out.items() if what.partition(":")[0] not in parts}
            left_out = {**kept, **left_out}
        found[name] = Environment(name, file["mode"], file["machine"], results, left_out)
    return list(found.values())


def _page(environments: Sequence[Environment], plots: Mapping[str, str]) -> str:
    results = [result for environment in environments for result in environment.results]
    runs = sorted({result.ours.runs for result in results})
    head = _HEAD.format(
        mode=environments[0].mode,
        runs=" to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1]))),
        large="1007 MB" if environments[0].mode == "full" else "67 MB",
        embed="510 MB" if environments[0].mode == "full" else "34 MB",
    )
    sections = [
        head if environments[0].mode == "full" else head + _QUICK,
        "\n".join(f"![{title}]({name})\n" for name, title in plots.items()),
        "## Targets\n\n" + _targets(environments),
        "## What it ran on\n\n" + _machines(environments),
        *_parts(environments),
        *_left_out(environments),
    ]
    return "\n".join(sections)


def _keys(environments: Sequence[Environment], wanted: Callable[[Result], bool]) -> list[tuple[str, str]]:
    """Part and name of each row, in the order of the parts, then as they were measured."""
    keys = dict.fromkeys((r.part, r.name) for e in environments for r in e.results if wanted(r))
    return sorted(keys, key=lambda key: list(PARTS).index(key[0]))


def _targets(environments: Sequence[Environment]) -> str:
    rows = [["what", "beside", "at most", *(environment.name for environment in environments), "reason"]]
    for key in _keys(environments, lambda result: result.limit is not None):
        found = [environment.find(key) for environment in environments]
        one = next(result for result in found if result)
        missed = any(result and result.met is False for result in found)
        why = (reason(one) or "not known yet") if missed else ""
        rows.append(
            [f"{key[0]}: {key[1]}", one.baseline_name or "-", target(one), *map(_outcome, found), why]
        )
    return _table(rows)


def _outcome(result: Result | None) -> str:
    if result is None:
        return "-"
    measured = result.ours if result.absolute else result.ratio
    return f"{number(measured.median)}: {verdict(result)}" if measured else verdict(result)


def _machines(environments: Sequence[Environment]) -> str:
    names = dict.fromkeys(name for environment in environments for name in environment.machine)
    rows = [["", *(environment.name for environment in environments)]]
    rows += [[name, *(e.machine.get(name, "") for e in environments)] for name in names if name != "system"]
    return _table(rows)


def _parts(environments: Sequence[Environment]) -> Iterator[str]:
    for part, function in PARTS.items():
        here = [e for e in environments if any(result.part == part for result in e.results)]
        if not here:
            continue
        heads = [f"{e.name}: {column}" for e in here for column in ("hubfs", "baseline", "ratio")]
        rows = [["what", "unit", *heads, "baseline is; notes"]]
        for key in _keys(here, lambda result: result.part == part):  # noqa: B023
            found = [e.find(key) for e in here]
            one = next(result for result in found if result)
            figures = [
                spread(value) if result else ""
                for result in found
                for value in ((result.ours, result.baseline, result.ratio) if result else (None,) * 3)
            ]
            rows.append([key[1], one.unit, *figures, _notes(here, found)])
        about = inspect.getdoc(function) or sys.modules[function.__module__].__doc__ or ""
        yield f"## {part}\n\n{about.strip()}\n\n{_table(rows)}"


def _notes(environments: Sequence[Environment], results: Sequence[Result | None]) -> str:
    """What a row is compared with, and what is said of it in each environment."""
    names = {result.baseline_name for result in results if result}
    prefix = len(environments) > 1
    notes = [
        f"{e.name + ': ' if prefix else ''}{'; '.join(words)}"
        for e, result in zip(environments, results, strict=True)
        if result and (words := [w for w in (result.baseline_name * (len(names) > 1), result.note) if w])
    ]
    return "; ".join(filter(None, [*(names if len(names) == 1 else ()), *notes]))


def _left_out(environments: Sequence[Environment]) -> Iterator[str]:
    lines = [f"- {e.name}: {what}: {why}" for e in environments for what, why in e.left_out.items()]
    if lines:
        yield "## Left out\n\n" + "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def _plots(environments: Sequence[Environment]) -> Iterator[tuple[str, str, str]]:
    """Names, titles and texts of the plots that there are figures for."""
    if reads := {e.name: group for e in environments if (group := _read_speeds(e))}:
        title = "Sequential reads of a cached file: speed, in % of the file system's own"
        yield "benchmarks-reads.svg", title, plot.bars(title, "%", reads, "")
    if loads := _cold_loads(environments, "load-cold"):
        title = "tf.saved_model.load of a model that is not cached, from its archive: seconds"
        yield "benchmarks-cold-loads.svg", title, plot.bars(title, "s", loads, "hubfs")
    if loads := _cold_loads(environments, "stream", "cold load of "):
        title = "tf.saved_model.load of a model that is not cached, by range: seconds"
        yield "benchmarks-stream.svg", title, plot.bars(title, "s", loads, "hubfs")
    keys = _keys(environments, lambda result: result.met is not None)
    if keys:
        rows = {
            f"{part}: {name}": [_by_target(e.find((part, name))) for e in environments] for part, name in keys
        }
        title, below = (
            "All targets: what was measured, by the most that it may be",
            "← better; 1 is the target",
        )
        names = [environment.name for environment in environments]
        yield "benchmarks-targets.svg", title, plot.dots(title, below, rows, names)


def _read_speeds(environment: Environment) -> dict[str, plot.Point]:
    return {
        result.name.replace(": sequential", ""): plot.Point(
            100 / result.ratio.median, 100 / result.ratio.high, 100 / result.ratio.low
        )
        for result in environment.results
        if result.part == "read" and ": sequential" in result.name and result.ratio
    }


def _cold_loads(environments: Sequence[Environment], part: str, begin: str = "") -> _Groups:
    """hubfs and the others by model and link, of the first environment that measured them.

    Args:
        begin: how the names of the rows begin.
    """
    groups: _Groups = {}
    for environment in environments:
        for result in environment.results:
            if result.part == part and result.name.startswith(begin) and result.baseline:
                heading = result.name.removeprefix(begin).partition(", beside")[0]
                rest, _, last = heading.rpartition(", ")
                # The load format, where there are several.
                heading, ours = (rest, f"hubfs, {last}") if last.isupper() else (heading, "hubfs")
                group = groups.setdefault(heading, {})
                group[ours] = _point(result.ours)
                group[result.baseline_name] = _point(result.baseline)
        if groups:
            break
    # hubfs first: its rows are beside each other, and the others' come with each of them.
    return {
        heading: dict(sorted(group.items(), key=lambda item: not item[0].startswith("hubfs")))
        for heading, group in groups.items()
    }


def _by_target(result: Result | None) -> plot.Point | None:
    if result is None or result.limit is None:
        return None
    measured = result.ours if result.absolute else result.ratio
    return _point(measured, result.limit) if measured else None


def _point(values: Spread, unit: float = 1.0) -> plot.Point:
    return plot.Point(values.median / unit, values.low / unit, values.high / unit)


if __name__ == "__main__":
    main()
