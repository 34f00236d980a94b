"""From command to usable mount, and the daemon's memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hubfs import mounts
from scripts.bench.bench import NOWHERE, Bench, Mount, environment, hubfs_command, run_quietly, unmount
from scripts.bench.caches import Cache, caches
from scripts.bench.results import Result, single

#: Issue 2: seconds, and MB.
_USABLE, _RESIDENT = 0.5, 60.0


def startup(bench: Bench) -> Iterator[Result]:
    """`hubfs mount` as it is typed: with nothing cached, tensorflow_hub's cache, and hubfs's own."""
    empty = Cache("nothing cached", bench.fresh("cache"), ())
    for cache in (empty, *caches(bench)):
        times: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        for _ in range(bench.sizes.runs):
            cache.reset()
            for name, value in _start(bench, cache, memory).items():
                times.setdefault(name, []).append(value)
        for name, values in times.items():
            yield single("start-up", f"{name}, {cache.name}", "s", values, _USABLE)
        for name, values in memory.items():
            limit = _RESIDENT if name.endswith("RSS") else None
            yield single("memory", f"{name}, {cache.name}", "MB", values, limit)


def _start(bench: Bench, cache: Cache, memory: dict[str, list[float]]) -> dict[str, float]:
    """One start: seconds from the command on, by what had come true then."""
    path = bench.fresh("mnt")
    flags = ["--hub", NOWHERE, "--offline", "--cache-dir", str(cache.root), "--log-file", f"{path}.log"]
    command = [*hubfs_command(), "mount", *flags, str(path)]
    times: dict[str, float] = {}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())

    def wait() -> None:
        process.wait()
        times["command returns"] = time.perf_counter() - began

    waiter = threading.Thread(target=wait)
    waiter.start()
    try:
        while not (path / ".hubfs").exists():
            if process.poll() not in (None, 0):
                raise RuntimeError(f"{' '.join(command)} failed")
            time.sleep(0.002)
        times["mount answers stat"] = time.perf_counter() - began
        if cache.paths:
            os.stat(path / cache.paths[len(cache.paths) // 2] / "saved_model.pb")
            times["first stat in a cached model"] = time.perf_counter() - began
        waiter.join()
        mount = Mount(path, cache.root, mounts.status(path)["pid"])
        mount.wait_for_models(len(cache.paths))
        mount.wait_until_idle()
        _note_memory(mount, "idle", memory)
        if cache.paths:
            run_quietly("find", str(path), "-type", "f")
            _note_memory(mount, "after find", memory)
    finally:
        waiter.join()
        if path in mounts.find():
            unmount(path)
        Path(f"{path}.log").unlink(missing_ok=True)
    return times


def _note_memory(mount: Mount, when: str, memory: dict[str, list[float]]) -> None:
    for name, value in mount.memory().items():
        memory.setdefault(f"{when}, {name.upper()}", []).append(value)
