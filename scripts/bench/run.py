#!/usr/bin/env python3
"""Benchmarks of hubfs on this machine, with servers of their own, against baselines of the same run.

    scripts/bench/run.py                     quick: small models, 3 runs
    scripts/bench/run.py full --json FILE    the sizes of the figures in the docs, 5 runs
    scripts/bench/run.py --only read pull    some parts (the beginning of a name is enough)

`scripts/bench/run.sh` does all of it, from an empty machine to docs/benchmarks.md. This program needs hubfs
in the running Python (`pip install -e '.[tensorflow]'`) and FUSE, and for single parts TensorFlow with
tensorflow_hub, curl, rclone, ratarmount, and root (cold page cache, kernel passthrough, the mount of an
unprivileged user). What is missing is left out and said so.

Parts, each in the module that its name tells:

    server      the bench's own hub: is it fast enough to measure with?
    startup     `hubfs mount` until it answers, and the daemon's memory; nothing and many models cached
    read        sequential and random reads of a cached file in each read mode, beside the same file natively
    open        open + read + close of a small cached file, beside rclone and ratarmount
    load-warm   tf.saved_model.load of a cached model through the mount, beside the local directory
    load-cold   tf.saved_model.load of a model that is not cached, beside hub.load of its URL
    metadata    stat and find over many cached models, beside rclone and the cache directory
    pull        `hubfs pull` beside `curl | tar xz`, and beside the slowest resource that it needs
    transfer    memory and CPU of the daemon during a transfer, and another reader's speed
    stream      models read by range from a bucket, beside hub.load, TensorFlow's own gs:// and rclone
    stalled     stat and reads of cached models while 100 readers wait for another one

Models are built once below $HUBFS_BENCH_DIR (default .bench in the checkout; 6 GB in full mode) and kept.
Caches and mounts of a run are below its `run-…` and go with it; what is compared shares that file system.

Progress goes to standard error, the table to standard output: medians, least and greatest in brackets. Ratios
are hubfs's median by the baseline's; in brackets those of neighbouring runs. Less is better everywhere.
Exit codes: 0 done, 1 a part failed; a target that is not met is no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import bench as benches
from scripts.bench import machine
from scripts.bench.bench import Bench
from scripts.bench.part_loads import load_cold, load_warm
from scripts.bench.part_metadata import metadata
from scripts.bench.part_open import opens
from scripts.bench.part_pull import pull
from scripts.bench.part_reads import reads
from scripts.bench.part_server import server
from scripts.bench.part_stalled import stalled
from scripts.bench.part_startup import startup
from scripts.bench.part_stream import stream
from scripts.bench.part_transfer import transfer
from scripts.bench.processes import CHECKOUT
from scripts.bench.results import Result, number, spread, target, verdict

PARTS: Mapping[str, Callable[[Bench], Iterator[Result]]] = {
    "server": server,
    "startup": startup,
    "read": reads,
    "open": opens,
    "load-warm": load_warm,
    "load-cold": load_cold,
    "metadata": metadata,
    "pull": pull,
    "transfer": transfer,
    "stream": stream,
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
    work = Path(os.environ.get("HUBFS_BENCH_DIR") or CHECKOUT / ".bench").absolute()
    sizes = benches.FULL if arguments.mode == "full" else benches.QUICK
    if arguments.runs:
        sizes = dataclasses.replace(sizes, runs=arguments.runs)
    about = machine.describe(work)
    with benches.scratch_directory(work) as scratch:
        bench = Bench(sizes, work, scratch, digests=not arguments.no_digests)
        results, failed = _measure(bench, chosen)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    print(_table(results))
    for what, why in bench.left_out.items():
        print(f"\nleft out: {what}: {why}")
    if arguments.json:
        found = {
            "mode": arguments.mode,
            "machine": about,
            "results": [{**dataclasses.asdict(result)} for result in results],
            "left_out": bench.left_out,
        }
        arguments.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
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
    return parser


def _measure(bench: Bench, chosen: list[str]) -> tuple[list[Result], bool]:
    """The results, and whether a part failed."""
    results: list[Result] = []
    failed = False
    for name in chosen:
        print(f"{name} …", file=sys.stderr)
        began = time.monotonic()
        try:
            with bench.optional(name):
                for result in PARTS[name](bench):
                    results.append(dataclasses.replace(result, part=name))
                    print(f"  {_line(result)}", file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001 - the other parts are still worth measuring
            traceback.print_exc()
            bench.left_out[name] = f"FAILED: {error}"
            failed = True
        print(f"  {name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return results, failed


def _line(result: Result) -> str:
    ratio = "" if result.ratio is None else f" = {number(result.ratio.median)} of {spread(result.baseline)}"
    return f"{result.name}: {spread(result.ours)} {result.unit}{ratio}  {target(result)} {verdict(result)}"


def _table(results: list[Result]) -> str:
    """All figures in columns."""
    rows = [("part", "what", "unit", "hubfs", "baseline", "ratio", "target", "", "baseline is; notes")]
    for r in results:
        notes = "; ".join(filter(None, (r.baseline_name, r.note)))
        figures = (spread(r.ours), spread(r.baseline), spread(r.ratio))
        rows.append((r.part, r.name, r.unit, *figures, target(r), verdict(r), notes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
