"""TensorFlow loading real models: through the mount, from the local directory, and as others do it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Final

from scripts.bench.bench import NOWHERE, Bench, warm
from scripts.bench.loads import Load, Loader, check_same, loading, models
from scripts.bench.models import Model, link_into_cache
from scripts.bench.others import ratarmount, rclone
from scripts.bench.results import Result, compared
from scripts.bench.server import GIGABIT, LOOPBACK, SLOW, Link, serving

#: Pairs of warm loads that are not counted: the mount and the machine's memory settle.
_UNMEASURED: Final = 2
#: The most that a load may take, as ratios: issue 2's, and where there are any, issue 3's.
_WARM: Final = {("passthrough", "large"): 1.05}
_WARM_ELSE: Final = 1.5
_COLD: Final = {("large", LOOPBACK): 0.6, ("large", SLOW): 0.2, ("embed", LOOPBACK): 0.45}
_COLD_ELSE: Final = 1.0


def load_warm(bench: Bench) -> Iterator[Result]:
    """`tf.saved_model.load` of a cached model, its files in the page cache.

    Loads through one settled mount and of the local directory alternate, each in a process of its own that
    has imported TensorFlow before the clock starts.
    """
    kinds = models(bench)
    with loading() as load:
        for kind, model in kinds.items():
            yield from _warm(bench, load, kind, model)


def _warm(bench: Bench, load: Loader, kind: str, model: Model) -> Iterator[Result]:
    cache = bench.fresh("cache")
    local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model)
    warm(local)
    for mode, settings in bench.read_modes.items():
        ours, native = [], []
        with bench.mounted(cache, **settings) as mount:
            path = str(mount.path / model.handle)
            for run in range(_UNMEASURED + 2 * bench.sizes.runs):
                bench.say(f"warm load of {model.handle}, {mode}, {run + 1}")
                # Neither is always the first of two.
                pair = [path, str(local)] if run % 2 else [str(local), path]
                loads = {place: load("saved_model", place) for place in pair}
                check_same(*loads.values())
                ours.append(loads[path].seconds)
                native.append(loads[str(local)].seconds)
        name = f"{kind}, {model.size / 1e6:.0f} MB, {mode}"
        limit = _WARM.get((mode, kind), _WARM_ELSE)
        times = (ours[_UNMEASURED:], native[_UNMEASURED:])
        yield compared(name, "s", *times, "saved_model.load of the local directory", limit)


def load_cold(bench: Bench) -> Iterator[Result]:
    """`tf.saved_model.load` of the mount path of a model that is not cached, beside `hub.load` of its URL.

    Both download the archive; files that are read by range are the part `stream`. Each has an empty cache,
    and a process of its own that has imported TensorFlow before the clock starts. The server, which all
    share, has the archive in its page cache; its limits are those of one connection. rclone mounts the
    unpacked files, which that server has as well; ratarmount mounts the archive's URL, and making its index
    counts.
    """
    kinds = models(bench)
    with loading() as load:
        for kind, model in kinds.items():
            for link in (LOOPBACK, GIGABIT, SLOW) if kind == "large" else (LOOPBACK, GIGABIT):
                yield from _cold(bench, load, kind, model, link)


def _cold(bench: Bench, load: Loader, kind: str, model: Model, link: Link) -> Iterator[Result]:
    times: dict[str, list[float]] = {}
    parts = []
    with serving({model.handle: model.archive}, link, digests=bench.digests, trees=[model]) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"cold load of {model.handle}, {link.name}, {run + 1}")
            warm(model.archive.path)
            archives = {"load_format": "compressed"}
            with bench.fresh_cache() as cache, bench.mounted(cache, url, **archives) as mount:
                mine = load("saved_model", str(mount.path / model.handle))
            with bench.fresh_cache() as cache:
                other = load("hub", f"{url}/{model.handle}", cache)
            check_same(mine, other)
            parts.append(other.resolving)
            found = {"hubfs": mine.seconds, "hub.load, cold": other.seconds}
            if link is LOOPBACK:
                found.update(_load_by_others(bench, load, model, url, mine))
            for name, value in found.items():
                times.setdefault(name, []).append(value)
    name = f"{kind}, {model.size / 1e6:.0f} MB, {link.name}"
    ours = times.pop("hubfs")
    for other_name, theirs in times.items():
        if other_name.startswith("hub.load"):
            note = f"hub.load downloads for {statistics.median(parts):.2f} s of it"
            limit = _COLD.get((kind, link), _COLD_ELSE)
            yield compared(name, "s", ours, theirs, other_name, limit, note)
        else:
            yield compared(f"{name}, beside {other_name}", "s", ours, theirs, other_name)


def _load_by_others(
    bench: Bench, load: Loader, model: Model, url: str, expected: Load
) -> Iterator[tuple[str, float]]:
    with bench.optional("load-cold: rclone"):
        warm(model.tree)
        with rclone(bench, f":http,url='{url}/files/{model.handle}/':") as path:
            found = load("saved_model", str(path))
        check_same(found, expected)
        yield "rclone mount", found.seconds
    with bench.optional("load-cold: ratarmount"):
        began = time.perf_counter()
        with ratarmount(bench, f"{url}/{model.handle}.tar.gz") as path:
            mounting = time.perf_counter() - began
            found = load("saved_model", str(path))
        check_same(found, expected)
        yield "ratarmount", mounting + found.seconds
