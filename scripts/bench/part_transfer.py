"""What a transfer through a mount costs: the daemon's memory and CPU time, and others' speed meanwhile.

`read as it arrives` reads the large file from its beginning at once; `brought in` waits for its last byte
only, so that the daemon has nothing to do but the transfer. CPU is the daemon's user and system time by the
length of the transfer, so a number of cores. The other reader reads a cached model's file again and again, in
whole passes: what the kernel keeps of it (*again*), or what it must ask the daemon for each time (*first*,
without passthrough). On the loopback without a limit the transfer, the server and the reader share this
machine's CPUs; the slower line leaves some to the reader.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from scripts.bench import reader as reading
from scripts.bench.bench import Bench, Mount, warm
from scripts.bench.models import DATA, Model, link_into_cache, transfer_model
from scripts.bench.reader import reader
from scripts.bench.results import Result, compared, single
from scripts.bench.server import LOOPBACK, SLOW, serving

#: Issue 3: MB, cores, and the time of a pass by that without a transfer (80 % of the speed).
_PEAK, _CORES, _SLOWER = 150.0, 1.1, 1 / 0.8
_PASSES: Final = 5


def transfer(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", bench.sizes.large)
    cached = transfer_model(bench.work, "embed", bench.sizes.embed)
    warm(model.archive.path)
    warm(cached.tree)
    archives = {model.handle: model.archive}
    with serving(archives, LOOPBACK, digests=bench.digests) as url:
        yield from _costs(bench, url, model, cached)
    for link in (LOOPBACK, SLOW):
        with serving(archives, link, digests=bench.digests) as url:
            for when in ("again", "first"):
                name = f"a pass over a cached model's {cached.size / 1e6:.0f} MB, {when}, {link.name}"
                idle, busy = _beside(bench, url, model, cached, when)
                yield compared(name, "s", busy, idle, "the same without a transfer", _SLOWER)


def _costs(bench: Bench, url: str, model: Model, cached: Model) -> Iterator[Result]:
    for how, function in (("read as it arrives", reading.sequential), ("brought in", reading.tail)):
        peaks, cores = [], []
        for run in range(bench.sizes.runs):
            bench.say(f"{model.handle}, {how}, {run + 1}")
            with _mounted(bench, url, cached) as mount:
                mount.forget_peak()
                cpu, began = mount.cpu_seconds(), time.perf_counter()
                function(str(mount.path / model.handle / DATA))
                _wait_for_end(mount)
                cores.append((mount.cpu_seconds() - cpu) / (time.perf_counter() - began))
                peaks.append(mount.peak_memory())
        what = f"{model.size / 1e6:.0f} MB {how}"
        yield single(f"the daemon's peak memory, {what}", "MB", peaks, _PEAK)
        yield single(f"the daemon's CPU, {what}", "cores", cores, _CORES)


def _beside(
    bench: Bench, url: str, model: Model, cached: Model, when: str
) -> tuple[list[float], list[float]]:
    """Seconds of a pass without a transfer, and during one."""
    idle, busy = [], []
    settings: Mapping[str, Any] = {} if when == "again" else bench.read_modes["cached"]
    for run in range(bench.sizes.runs):
        bench.say(f"a reader beside a transfer, {when}, {run + 1}")
        with reader() as other, _mounted(bench, url, cached, **settings) as mount:
            path = str(mount.path / cached.handle / DATA)
            one_pass = (reading.sequential, path, when == "first")
            other(*one_pass)
            idle.append(statistics.median(other(*one_pass) for _ in range(_PASSES)))
            with _in_background(mount, mount.path / model.handle / DATA) as arrival:
                passes = []
                while not arrival.done():
                    passes.append(other(*one_pass))
            # The last one may have ended alone.
            busy.append(statistics.median(passes[:-1] or passes))
    return idle, busy


@contextmanager
def _mounted(bench: Bench, url: str, cached: Model, **settings: Any) -> Iterator[Mount]:
    with bench.fresh_cache() as cache:
        link_into_cache(cache, f"{url}/{cached.handle}", cached)
        with bench.mounted(cache, url, **settings) as mount:
            mount.wait_for_models(1)
            yield mount


@contextmanager
def _in_background(mount: Mount, path: Path) -> Iterator[Future[None]]:
    """Bring a model in, by reading its last byte."""

    def bring_in() -> None:
        reading.tail(str(path))
        _wait_for_end(mount)

    with ThreadPoolExecutor(1) as pool:
        yield (arrival := pool.submit(bring_in))
        arrival.result()


def _wait_for_end(mount: Mount, timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while mount.status()["transfers"]:
        if time.monotonic() > deadline:
            raise RuntimeError("the transfer does not end")
        time.sleep(0.05)
