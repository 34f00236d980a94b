"""From the command `hubfs mount` to a usable mount, and the daemon's memory.

With nothing cached, with the cache of tensorflow_hub, and with the same cache once hubfs has noted what is in
it.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hubfs import mounts
from scripts.bench.bench import NOWHERE, Bench, Mount, unmount
from scripts.bench.caches import Cache, caches
from scripts.bench.processes import environment, hubfs_command, run_quietly
from scripts.bench.results import Result, single

#: Issue 2: seconds, and MB.
_USABLE, _RESIDENT = 0.5, 60.0


def startup(bench: Bench) -> Iterator[Result]:
    empty = Cache("nothing cached", bench.fresh("cache"), ())
    for cache in (empty, *caches(bench)):
        times: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        for _ in range(bench.sizes.runs):
            cache.reset()
            for name, value in _start(bench, cache, memory).items():
                times.setdefault(name, []).append(value)
        for name, values in times.items():
            yield single(f"{name}, {cache.name}", "s", values, _USABLE)
        for name, values in memory.items():
            yield single(f"memory {name}, {cache.name}", "MB", values, _RESIDENT)


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
        memory.setdefault("idle", []).append(mount.memory())
        if cache.paths:
            run_quietly("find", str(path), "-type", "f")
            memory.setdefault("after find", []).append(mount.memory())
    finally:
        waiter.join()
        if path in mounts.find():
            unmount(path)
        Path(f"{path}.log").unlink(missing_ok=True)
    return times
