#!/usr/bin/env python3
"""Benchmarks of hubfs: everything on one machine, with servers of its own, against baselines of the same run.

    scripts/bench/run.py                     quick: small models, 3 runs; about 5 minutes
    scripts/bench/run.py full --json FILE    the sizes of the figures in the docs, 5 runs; about 45 minutes
    scripts/bench/run.py full --markdown docs/benchmarks.md
    scripts/bench/run.py --only read pull    some parts (the beginning of a name is enough)

It needs hubfs in the running Python (`pip install -e '.[tensorflow]'`), FUSE, and for single parts TensorFlow
with tensorflow_hub, curl, and root (cold page cache). What is missing is left out and said so.

Parts, each in the module that its name tells:

    server      the bench's own hub: is it fast enough to measure with?
    startup     `hubfs mount` until it answers, and the daemon's memory; nothing and many models cached
    read        sequential and random reads and opens of a cached file, beside the same file natively
    load-warm   tf.saved_model.load of a cached model through the mount, beside the local directory
    load-cold   tf.saved_model.load of a model that is not cached, beside hub.load of its URL
    metadata    stat and find over many cached models, beside the cache directory
    pull        `hubfs pull` beside `curl | tar xz`
    stalled     stat and reads of cached models while 100 readers wait for another one

Models are built once below $HUBFS_BENCH_DIR (default ~/.cache/hubfs-bench; 6 GB in full mode) and kept.
Caches and mounts of a run are below its `run-…` and go with it; what is compared shares that file system.

Progress goes to standard error, the table to standard output: medians, least and greatest in brackets. Ratios
are hubfs's median by the baseline's; in brackets those of neighbouring runs. Less is better everywhere.
Exit codes: 0 done, 1 a part failed; a target that is not met is no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import bench as benches
from scripts.bench import machine, report
from scripts.bench.bench import Bench, Unavailable
from scripts.bench.part_loads import load_cold, load_warm
from scripts.bench.part_metadata import metadata
from scripts.bench.part_pull import pull
from scripts.bench.part_reads import reads
from scripts.bench.part_server import server
from scripts.bench.part_stalled import stalled
from scripts.bench.part_startup import startup
from scripts.bench.results import Result, number, spread, verdict

PARTS: Mapping[str, Callable[[Bench], Iterator[Result]]] = {
    "server": server,
    "startup": startup,
    "read": reads,
    "load-warm": load_warm,
    "load-cold": load_cold,
    "metadata": metadata,
    "pull": pull,
    "stalled": stalled,
}


def main() -> int:
    arguments = _parser().parse_args()
    chosen = [name for name in PARTS if not arguments.only or name.startswith(tuple(arguments.only))]
    if not chosen:
        print(f"no part has such a name; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    # `with` blocks and `finally` run for these too.
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    work = Path(os.environ.get("HUBFS_BENCH_DIR") or "~/.cache/hubfs-bench").expanduser().absolute()
    sizes = benches.FULL if arguments.mode == "full" else benches.QUICK
    if arguments.runs:
        sizes = dataclasses.replace(sizes, runs=arguments.runs)
    about = machine.describe(work)
    with benches.scratch_directory(work) as scratch:
        bench = Bench(sizes, work, scratch, digests=not arguments.no_digests)
        results, problems, failed = _measure(bench, chosen)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    print(report.table(results))
    for part, problem in problems.items():
        print(f"\n{part}: {problem}")
    if arguments.json:
        arguments.json.write_text(report.as_json(about, arguments.mode, results, problems))
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(about, arguments.mode, results, problems))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    first, rest = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", nargs="?", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these parts")
    parser.add_argument("--runs", type=int, metavar="N", help="runs of each figure (3 or 5)")
    parser.add_argument("--no-digests", action="store_true", help="servers that declare no checksums")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of the docs there")
    return parser


def _measure(bench: Bench, chosen: list[str]) -> tuple[list[Result], dict[str, str], bool]:
    """The results, what could not be measured and why, and whether that is a failure."""
    results: list[Result] = []
    problems: dict[str, str] = {}
    failed = False
    for name in chosen:
        print(f"{name} …", file=sys.stderr)
        began = time.monotonic()
        try:
            for result in PARTS[name](bench):
                results.append(result)
                print(f"  {_line(result)}", file=sys.stderr, flush=True)
        except Unavailable as error:
            problems[name] = f"left out: {error}"
        except Exception as error:  # noqa: BLE001 - the other parts are still worth measuring
            traceback.print_exc()
            problems[name] = f"FAILED: {error}"
            failed = True
        print(f"  {name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return results, problems, failed


def _line(result: Result) -> str:
    ratio = "" if result.ratio is None else f" = {number(result.ratio.median)} of {spread(result.baseline)}"
    return f"{result.name}: {spread(result.ours)} {result.unit}{ratio}  {verdict(result)}"


if __name__ == "__main__":
    sys.exit(main())
