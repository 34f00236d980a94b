"""`stat` and `find` over thousands of cached models, beside the same on the cache directory itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hubfs.cache.layout import Layout
from hubfs.handles import cache_key
from scripts.bench.bench import Bench, run_quietly, seconds
from scripts.bench.caches import Cache, caches
from scripts.bench.results import Result, compared

_NATIVE = "the same over the cache directory"


def metadata(bench: Bench) -> Iterator[Result]:
    """Each `first` is in a fresh mount: nothing of it is in the kernel's caches; the disk's are warm."""
    for cache in caches(bench):
        yield from _stat(bench, cache)
        yield from _find(bench, cache)


def _stat(bench: Bench, cache: Cache) -> Iterator[Result]:
    place = Layout(cache.root)
    local = [place.model(cache_key(handle)) for handle in cache.handles]
    first, again, native = [], [], []
    for _ in range(bench.sizes.runs):
        cache.reset()
        _stat_all(local)
        native.append(_stat_all(local))
        with bench.mounted(cache.root) as mount:
            mount.wait_for_models(len(cache.paths))
            paths = [mount.path / path for path in cache.paths]
            first.append(_stat_all(paths))
            again.append(_stat_all(paths))
    what = f"stat of {cache.name}: version directories"
    yield compared("metadata", f"{what}, first", "s", first, native, _NATIVE, note=_each(first, local))
    yield compared("metadata", f"{what}, again", "s", again, native, _NATIVE, note=_each(again, local))


def _stat_all(paths: Sequence[Path]) -> float:
    names = [str(path) for path in paths]
    return seconds(lambda: [os.stat(name) for name in names])


def _find(bench: Bench, cache: Cache) -> Iterator[Result]:
    kinds = {"find -type f": ["-type", "f"], "find with each file's size": ["-type", "f", "-size", "+9G"]}
    for what, test in kinds.items():
        first: list[float] = []
        again: list[float] = []
        native: list[float] = []
        for _ in range(bench.sizes.runs):
            cache.reset()
            run_quietly("find", str(cache.root), *test)
            native.append(seconds(lambda: run_quietly("find", str(cache.root), *test)))  # noqa: B023
            with bench.mounted(cache.root) as mount:
                mount.wait_for_models(len(cache.paths))
                for times in (first, again):
                    times.append(seconds(lambda: run_quietly("find", str(mount.path), *test)))  # noqa: B023
        name = f"{what}, {cache.name}"
        files = range(7 * len(cache.paths))
        yield compared("metadata", f"{name}, first", "s", first, native, _NATIVE, note=_each(first, files))
        yield compared("metadata", f"{name}, again", "s", again, native, _NATIVE, note=_each(again, files))


def _each(times: Sequence[float], things: Sequence[object]) -> str:
    return f"{sorted(times)[len(times) // 2] / len(things) * 1e6:.0f} µs each"
