"""Reading complete files through the mount in each of its read modes, beside the same files natively.

The files are in the page cache before; `first` is the first time in a mount, when nothing of them is in the
kernel's cache of the mount. *Passthrough* is what a mount does where kernel, libfuse and rights allow it;
*root* and *unprivileged* are mounts without it, made by root and by an ordinary user (`nobody`), who cannot
raise the kernel's readahead. *Cold* is an empty page cache, so the disk's speed.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.bench import reader
from scripts.bench.bench import NOWHERE, Bench, drop_page_cache, warm
from scripts.bench.models import DATA, Model, link_into_cache, transfer_model
from scripts.bench.results import Result, compared

_NATIVE: Final = "the same file, natively"
#: What each file of a mount is read by: a function of `reader.py`, and its arguments.
_KINDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "sequential, s": (reader.sequential,),
    "random 4 KiB, µs": (reader.scattered, 4096, 2000),
    "random 1 MiB, µs": (reader.scattered, 1 << 20, 40),
}
#: Issue 3 gives speeds by native ones; here are times by native times.
_AGAIN: Final = 1 / 0.6


@dataclass(frozen=True)
class _Way:
    """A mount to read through.

    Attributes:
        limits: targets by the beginning of a row's name.
    """

    name: str
    limits: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    user: str | None = None


def reads(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", bench.sizes.large)
    for way in _ways(bench):
        with bench.optional(f"read: {way.name}"):
            yield from _warm(bench, model, way)
    with bench.optional("read: cold"):
        yield _cold(bench, model)


def _ways(bench: Bench) -> Iterator[_Way]:
    passthrough = 1 / 0.9
    if "passthrough" in bench.read_modes:
        yield _Way("passthrough", {"sequential": passthrough, "random": passthrough})
    off = bench.read_modes["cached"]
    again = {f"{kind}, again": _AGAIN for kind in ("sequential", "random 4 KiB", "random 1 MiB")}
    unprivileged = {"sequential, first": 1 / 0.15, **again}
    if os.geteuid() == 0:
        yield _Way("root", {"sequential, first": 1 / 0.35, **again}, off)
        yield _Way("unprivileged", unprivileged, user="nobody")
    else:
        bench.left_out["read: root"] = "not root"
        yield _Way("unprivileged", unprivileged)


def _warm(bench: Bench, model: Model, way: _Way) -> Iterator[Result]:
    cache = bench.fresh("cache", way.user)
    # One file for each kind of reading, so that each has its first time; behind them are the same pages.
    local = [link_into_cache(cache, f"{NOWHERE}/bench/read/{n}", model) / DATA for n in range(len(_KINDS))]
    times: dict[str, tuple[list[float], list[float]]] = {}
    warm(local[0])
    for run in range(bench.sizes.runs):
        bench.say(f"reads, {way.name}, {run + 1}")
        with bench.mounted(cache, user=way.user, **way.settings) as mount:
            for number, (kind, (function, *arguments)) in enumerate(_KINDS.items()):
                seed = [run] if arguments else []
                for when in ("first", "again"):
                    pair = [(mount.path / f"bench/read/{number}" / DATA, 0), (local[number], 1)]
                    found = times.setdefault(kind.replace(",", f", {when},"), ([], []))
                    # Neither is always the first of two.
                    for path, which in pair if run % 2 else reversed(pair):
                        found[which].append(mount.do(function, str(path), *arguments, *seed))
            mode = mount.status()["read_mode"]
    for name, (ours, native) in times.items():
        what, unit = name.rsplit(", ", 1)
        limit = next((limit for start, limit in way.limits.items() if what.startswith(start)), None)
        note = f"{model.size / statistics.median(ours) / 1e9:.2f} GB/s" if "sequential" in what else ""
        if mode not in way.name:
            note = f"{mode}{note and ', '}{note}"
        yield compared(f"{way.name}: {what}", unit, ours, native, _NATIVE, limit, note)


def _cold(bench: Bench, model: Model) -> Result:
    cache = bench.fresh("cache")
    local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model) / DATA
    ours, native = [], []
    for _ in range(bench.sizes.runs):
        drop_page_cache()
        native.append(reader.sequential(str(local)))
        with bench.mounted(cache) as mount:
            path = mount.path / model.handle / DATA
            path.stat()
            drop_page_cache()
            ours.append(reader.sequential(str(path)))
    return compared("sequential, cold page cache", "s", ours, native, _NATIVE)
