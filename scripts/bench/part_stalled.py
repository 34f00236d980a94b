"""What cached models notice of a hundred readers that wait for a model that does not arrive.

The first `stat` and the first 1 MiB read of cached models: no answer comes from the kernel's caches.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.bench.bench import Bench, Mount
from scripts.bench.models import DATA, add_to_cache, transfer_model
from scripts.bench.results import Result, compared
from scripts.bench.server import LOOPBACK, serving

READERS: Final = 100
_MODELS: Final = 64
#: Bytes of the model that stalls: large enough that half of it is more than all read-ahead.
_SIZE: Final = 64 << 20
_BASELINE: Final = "the same with nobody waiting"
#: Far enough from each other that each reader waits for a request of its own.
_READERS_SCRIPT: Final = """
import os, sys, threading
def read(number):
    with open(sys.argv[1], "rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, os.fstat(file.fileno()).st_size - (number + 1) * (256 << 10))
for number in range(int(sys.argv[2])):
    threading.Thread(target=read, args=(number,), daemon=True).start()
sys.stdin.read()
"""


def stalled(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", _SIZE)
    stall = {model.handle: model.archive.size // 2}
    with serving({model.handle: model.archive}, LOOPBACK, stall=stall) as url:
        cache = bench.fresh("cache")
        source = random.Random(7)
        paths = [f"bench/cached-{number:02}/1" for number in range(_MODELS)]
        for path in paths:
            tree = {"saved_model.pb": source.randbytes(1 << 20), "fingerprint.pb": source.randbytes(55)}
            add_to_cache(cache, f"{url}/{path}", tree)
        kinds: dict[str, tuple[list[float], list[float]]] = {}
        for run in range(bench.sizes.runs):
            bench.say(f"readers that wait, {run + 1}")
            with bench.mounted(cache, url) as mount:
                idle = _latencies(mount, paths[::2])
                with _waiting(mount, mount.path / model.handle / DATA):
                    busy = _latencies(mount, paths[1::2])
            for name, times in busy.items():
                for which, pick in (("median", statistics.median), ("worst", max)):
                    ours, baseline = kinds.setdefault(f"{name}, {which}", ([], []))
                    ours.append(pick(times))
                    baseline.append(pick(idle[name]))
    for name, (ours, baseline) in kinds.items():
        yield compared(f"{name}, {READERS} readers wait", "ms", ours, baseline, _BASELINE)


def _latencies(mount: Mount, paths: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each operation."""
    found: dict[str, list[float]] = {"stat": [], "open + 1 MiB read": []}
    for path in paths:
        began = time.perf_counter()
        os.stat(mount.path / path / "fingerprint.pb")
        found["stat"].append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        (mount.path / path / "saved_model.pb").read_bytes()
        found["open + 1 MiB read"].append((time.perf_counter() - began) * 1e3)
    return found


@contextmanager
def _waiting(mount: Mount, path: Path, timeout: float = 30.0) -> Iterator[None]:
    """Readers that wait for bytes that do not come, in a process of their own."""
    process = subprocess.Popen(
        [sys.executable, "-c", _READERS_SCRIPT, str(path), str(READERS)], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + timeout
        while sum(transfer["waiting"] for transfer in mount.status()["transfers"]) < READERS:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the readers do not come to wait: {mount.status()}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
