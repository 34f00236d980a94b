"""`stat` and `find` over thousands of cached models of 7 files each, beside the same natively and by rclone.

Each `first` is in a fresh mount: nothing of it is in the kernel's caches; the disk's are warm. rclone mounts
a tree of the same files in the same directories as the mount of hubfs shows, and may keep names and
attributes as hubfs does (`--attr-timeout 1h`; its default of 1 s makes it slower).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hubfs.cache.layout import Layout
from hubfs.handles import cache_key
from scripts.bench.bench import Bench, seconds
from scripts.bench.caches import Cache, caches, plain_tree
from scripts.bench.others import rclone
from scripts.bench.processes import run_quietly
from scripts.bench.results import Result, compared

_FINDS: Final[Mapping[str, Sequence[str]]] = {
    "find": (),
    "find with each file's size": ("-type", "f", "-size", "+9G"),
}
#: Issue 3, beside rclone.
_FIND: Final = 0.7


def metadata(bench: Bench) -> Iterator[Result]:
    theirs, ours = caches(bench)
    for cache in (theirs, ours):
        yield from _stat(bench, cache)
    for what, test in _FINDS.items():
        yield from _find(bench, ours, what, test)


def _stat(bench: Bench, cache: Cache) -> Iterator[Result]:
    place = Layout(cache.root)
    local = [place.model(cache_key(handle)) for handle in cache.handles]
    first, again, native = [], [], []
    for run in range(bench.sizes.runs):
        bench.say(f"stat, {cache.name}, {run + 1}")
        cache.reset()
        _stat_all(local)
        native.append(_stat_all(local))
        with bench.mounted(cache.root) as mount:
            mount.wait_for_models(len(cache.paths))
            paths = [mount.path / path for path in cache.paths]
            first.append(_stat_all(paths))
            again.append(_stat_all(paths))
    what = f"stat of the version directories, {cache.name}"
    baseline = "the same in the cache directory"
    yield compared(f"{what}, first", "s", first, native, baseline, note=_each(first, len(local)))
    yield compared(f"{what}, again", "s", again, native, baseline, note=_each(again, len(local)))


def _stat_all(paths: Sequence[Path]) -> float:
    names = [str(path) for path in paths]
    return seconds(lambda: [os.stat(name) for name in names])


def _find(bench: Bench, cache: Cache, what: str, test: Sequence[str]) -> Iterator[Result]:
    tree = plain_tree(cache)
    times: dict[str, list[float]] = {}

    def find(where: Path, kind: str) -> None:
        times.setdefault(kind, []).append(seconds(lambda: run_quietly("find", str(where), *test)))

    @contextmanager
    def ours() -> Iterator[Path]:
        with bench.mounted(cache.root) as mount:
            mount.wait_for_models(len(cache.paths))
            yield mount.path

    run_quietly("find", str(tree), *test)
    for run in range(bench.sizes.runs):
        bench.say(f"{what}, {run + 1}")
        find(tree, "native")
        with bench.optional("metadata: rclone"), rclone(bench, str(tree)) as path:
            find(path, "rclone first")
            find(path, "rclone again")
        with ours() as path:
            find(path, "first")
            find(path, "again")
    files = 7 * len(cache.paths)
    for when in ("first", "again"):
        name, note = f"{what}, {files:,} files, {when}", _each(times[when], files)
        if theirs := times.get(f"rclone {when}"):
            baseline = f"rclone mount of the same tree, {when}"
            yield compared(name, "s", times[when], theirs, baseline, _FIND, note)
        yield compared(
            f"{name}, beside native", "s", times[when], times["native"], "the tree itself", note=note
        )


def _each(times: Sequence[float], count: int) -> str:
    return f"{sorted(times)[len(times) // 2] / count * 1e6:.0f} µs each"
