"""Models whose files are read by range from a bucket, beside those who bring an archive, or read there too.

All have empty caches and share one server, whose limits are those of one connection; what it sends is in its
page cache. `AUTO` brings the files into the cache, in the background once TensorFlow has opened the data of
the variables; `UNCOMPRESSED` keeps nothing. TensorFlow's own `gs://` asks the same server for the same
objects, through TLS, which it insists on, with nothing taken for opening connections. rclone mounts the files
with its own defaults, with which it keeps nothing, and so that it keeps them on disk, as `AUTO` does. Each
load has a process of its own, which has imported TensorFlow before the clock starts; what memory it takes was
in use a moment before, so that a virtual machine need not get it from its host.

Bytes are those of bodies that the server has sent. They are in the connections' buffers when a daemon is
killed, and count. Readers of the memory's row read everything once, two of them each of four models.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from scripts.bench import reader as reading
from scripts.bench.bench import Bench, Mount, warm
from scripts.bench.loads import Loader, check_same, loading, models
from scripts.bench.models import DATA, Model, transfer_model
from scripts.bench.others import rclone
from scripts.bench.processes import Unavailable, run_quietly
from scripts.bench.results import Result, compared, single
from scripts.bench.server import BUCKET, GIGABIT, LOOPBACK, SLOW, Link, counts, serving
from tests.google import led_to

_FORMATS: Final = ("auto", "uncompressed")
#: The most that the times may be by others', of the large model; on the loopback for `AUTO` alone.
_FIRST_BYTE: Final = 0.02
_LIMITED: Final = {"hub.load, cold": 0.3, "TensorFlow's gs://": 0.2}
_UNLIMITED: Final = {"hub.load, cold": 0.35, "rclone mount": 0.6}
#: Percent of a model's bytes: to look at it, and twice if the daemon is killed.
_LOOK, _TWICE = 1.0, 2.0
#: MB: the default of `memory_limit`, and what the daemon may have besides.
_MEMORY: Final = 256 + 80
_READERS: Final = 8
_HANDLES: Final = 4
#: What a mount of rclone is called, and its options.
_RCLONE_MOUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "rclone mount": (),
    "rclone mount that keeps files": ("--vfs-cache-mode=full",),
}


def stream(bench: Bench) -> Iterator[Result]:
    kinds = models(bench)
    with loading() as load:
        yield from _first_byte(bench, load, kinds["large"])
        yield from _look(bench, kinds["large"])
        for kind, link in (("large", GIGABIT), ("large", LOOPBACK), ("embed", GIGABIT), ("embed", LOOPBACK)):
            yield from _cold(bench, load, kind, kinds[kind], link)
    copied = transfer_model(bench.work, "large", bench.sizes.large)
    yield _memory(bench, copied)
    yield _killed(bench, copied)


def _first_byte(bench: Bench, load: Loader, model: Model) -> Iterator[Result]:
    """Until something of the model can be read."""
    times: dict[str, list[float]] = {}
    resolving = []
    with serving({model.handle: model.archive}, SLOW, digests=bench.digests, bucket=[model]) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"first byte of {model.handle}, {SLOW.name}, {run + 1}")
            warm(model.archive.path)
            for how in _FORMATS:
                with _mounted(bench, url, how) as mount:
                    path = str(mount.path / model.handle / "saved_model.pb")
                    times.setdefault(how, []).append(reading.first(path))
            with bench.fresh_cache() as cache:
                resolving.append(load("resolve", f"{url}/{model.handle}", cache).seconds)
    for how, ours in times.items():
        name = f"first byte of saved_model.pb, {_size(model)}, {SLOW.name}, {how.upper()}"
        yield compared(name, "s", ours, resolving, "hub.resolve, cold", _FIRST_BYTE)


def _look(bench: Bench, model: Model) -> Iterator[Result]:
    """What `saved_model_cli show` brings in."""
    program = (sys.executable, "-m", "tensorflow.python.tools.saved_model_cli")
    with serving({}, LOOPBACK, bucket=[model]) as url:
        for how in _FORMATS:
            fetched, asked = [], []
            for run in range(bench.sizes.runs):
                bench.say(f"saved_model_cli show of {model.handle}, {how}, {run + 1}")
                with _mounted(bench, url, how) as mount:
                    before = counts(url)
                    path = str(mount.path / model.handle)
                    run_quietly(*program, "show", "--dir", path, "--all", CUDA_VISIBLE_DEVICES="-1")
                    mount.wait_until_idle()
                    found = counts(url).since(before)
                fetched.append(100 * found.bytes / model.size)
                asked.append(found.requests)
            name = f"saved_model_cli show --all, {_size(model)}, {how.upper()}: bytes fetched, by the model's"
            note = f"{statistics.median(asked):.0f} requests"
            yield single(name, "%", fetched, _LOOK, note)


def _cold(bench: Bench, load: Loader, kind: str, model: Model, link: Link) -> Iterator[Result]:
    ours: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    authority = bench.fresh("authority") / "ca.pem" if importlib.util.find_spec("trustme") else None
    archives = {model.handle: model.archive}
    with serving(
        archives, link, digests=bench.digests, trees=[model], bucket=[model], authority=authority
    ) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"cold load of {model.handle} by range, {link.name}, {run + 1}")
            warm(model.tree)
            loads = {}
            for how in _FORMATS:
                with _mounted(bench, url, how) as mount:
                    loads[how] = load("saved_model", str(mount.path / model.handle))
                ours.setdefault(how, []).append(loads[how].seconds)
            found = {}
            with bench.optional("stream: TensorFlow's gs://"):
                if authority is None:
                    raise Unavailable("trustme is not installed, and it insists on TLS")
                google = f"gs://{BUCKET}/{model.handle}"
                found["TensorFlow's gs://"] = load("saved_model", google, more=led_to(url, authority))
            if link is LOOPBACK:
                for other, more in _RCLONE_MOUNTS.items():
                    with bench.optional("stream: rclone"), rclone(bench, _remote(url, model), *more) as path:
                        found[other] = load("saved_model", str(path))
            warm(model.archive.path)
            with bench.fresh_cache() as cache:
                found["hub.load, cold"] = load("hub", f"{url}/{model.handle}", cache)
            check_same(*loads.values(), *found.values())
            for other, theirs in found.items():
                others.setdefault(other, []).append(theirs.seconds)
    for how, mine in ours.items():
        for other, times in others.items():
            name = f"cold load of {kind}, {_size(model)}, {link.name}, {how.upper()}, beside {other}"
            yield compared(name, "s", mine, times, other, _target(kind, link, how, other))


def _target(kind: str, link: Link, how: str, other: str) -> float | None:
    if kind != "large":
        return None
    if link is LOOPBACK:
        return _UNLIMITED.get(other) if how == "auto" else None
    return _LIMITED.get(other)


def _memory(bench: Bench, model: Model) -> Result:
    """The daemon's, while readers read far more than it may keep."""
    copies = [dataclasses.replace(model, handle=f"{model.handle[:-1]}{n}") for n in range(1, _HANDLES + 1)]
    size = (model.tree / DATA).stat().st_size
    each = size * _HANDLES // _READERS
    peaks, speeds = [], []
    with serving({}, LOOPBACK, bucket=copies) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"memory with {_READERS} readers, {run + 1}")
            warm(model.tree)
            with _mounted(bench, url, "uncompressed") as mount, ThreadPoolExecutor(_READERS) as pool:
                mount.forget_peak()
                began = time.perf_counter()
                reads = [
                    pool.submit(
                        reading.stretch,
                        str(mount.path / copies[n % _HANDLES].handle / DATA),
                        n // _HANDLES * each,
                        each,
                    )
                    for n in range(_READERS)
                ]
                for read in reads:
                    read.result()
                speeds.append(_READERS * each / (time.perf_counter() - began) / 1e6)
                peaks.append(mount.peak_memory())
    name = (
        f"the daemon's peak memory, UNCOMPRESSED, {_READERS * each / 1e6:.0f} MB read by {_READERS} readers"
    )
    return single(name, "MB", peaks, _MEMORY, f"{statistics.median(speeds):.0f} MB/s")


def _killed(bench: Bench, model: Model) -> Result:
    """What is asked for again by the next daemon."""
    twice, shares = [], []
    with serving({}, GIGABIT, bucket=[model]) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"a daemon killed in the middle of {model.handle}, {run + 1}")
            warm(model.tree)
            with bench.fresh_cache() as cache:
                before = counts(url)
                with bench.mounted(cache, url, load_format="auto") as mount:
                    reading.first(str(mount.path / model.handle / DATA))
                    _wait_for_bytes(url, before.bytes + model.size // 2)
                    os.kill(mount.pid, signal.SIGKILL)
                shares.append(counts(url).since(before).bytes / model.size)
                with bench.mounted(cache, url, load_format="auto") as mount:
                    reading.sequential(str(mount.path / model.handle / DATA))
                    for path in sorted(model.tree.rglob("*")):
                        if path.is_file():
                            reading.tail(str(mount.path / model.handle / path.relative_to(model.tree)))
                    mount.wait_until_idle()
                twice.append(100 * (counts(url).since(before).bytes / model.size - 1))
    what = f"daemon killed in the middle of {_size(model)}, AUTO, {GIGABIT.name}"
    name = f"{what}: bytes fetched twice, by the model's"
    note = f"killed when {100 * statistics.median(shares):.0f} % had been sent"
    return single(name, "%", twice, _TWICE, note)


@contextmanager
def _mounted(bench: Bench, url: str, load_format: str) -> Iterator[Mount]:
    """A mount with an empty cache."""
    with bench.fresh_cache() as cache, bench.mounted(cache, url, load_format=load_format) as mount:
        yield mount


def _wait_for_bytes(url: str, count: int, timeout: float = 120.0) -> None:
    """Wait until a hub has sent so many bytes.

    Raises:
        RuntimeError: it does not get done.
    """
    deadline = time.monotonic() + timeout
    while (found := counts(url).bytes) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {found} of {count} bytes were asked for")
        time.sleep(0.01)


def _remote(url: str, model: Model) -> str:
    """What rclone calls the files of a model."""
    return f":http,url='{url}/files/{model.handle}/':"


def _size(model: Model) -> str:
    return f"{model.size / 1e6:.0f} MB"
