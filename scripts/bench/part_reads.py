"""Reading a cached model's files through the mount, beside the same files where they are."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from scripts.bench.bench import NOWHERE, Bench, Unavailable, drop_page_cache, warm
from scripts.bench.models import link_into_cache, transfer_model
from scripts.bench.results import Result, compared

_NATIVE: Final = "the same file, natively"
_DATA: Final = "variables/variables.data-00000-of-00001"
_SMALL: Final = "fingerprint.pb"
_BLOCK: Final = 1 << 20
_OPENS: Final = 2000


def reads(bench: Bench) -> Iterator[Result]:
    """Of one model in the cache, its pages in the page cache unless it says cold."""
    model = transfer_model(bench.work, "large", bench.sizes.large)
    cache = bench.fresh("cache")
    local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model)
    kinds: dict[str, tuple[list[float], list[float]]] = {}

    def note(name: str, ours: float, native: float) -> None:
        mine, other = kinds.setdefault(name, ([], []))
        mine.append(ours)
        other.append(native)

    size = (local / _DATA).stat().st_size
    for run in range(bench.sizes.runs):
        bench.say(f"reads {run + 1}")
        warm(local)
        with bench.mounted(cache) as mount:
            path = mount.path / model.handle
            native = _sequential(local / _DATA)
            note("sequential, first in a mount, s", _sequential(path / _DATA), native)
            note("sequential, again, s", _sequential(path / _DATA), _sequential(local / _DATA))
        for name, each, count in (("4 KiB", 4096, 2000), ("1 MiB", _BLOCK, 40)):
            offsets = _offsets(size, each, count, run)
            with bench.mounted(cache) as mount:
                for when in ("first in a mount", "again"):
                    ours = _random(mount.path / model.handle / _DATA, each, offsets)
                    native = _random(local / _DATA, each, offsets)
                    note(f"random reads of {name}, {when}, µs", ours, native)
        with bench.mounted(cache) as mount:
            ours = _opens(mount.path / model.handle / _SMALL)
            note("open + read + close of a small file, µs", ours, _opens(local / _SMALL))
    for name, (mine, other) in kinds.items():
        what, unit = name.rsplit(", ", 1)
        speed = f"{size / statistics.median(mine) / 1e9:.2f} GB/s" if "sequential" in what else ""
        yield compared("read", what, unit, mine, other, _NATIVE, note=speed)
    yield _cold(bench, cache, local, model.handle)


def _cold(bench: Bench, cache: Path, local: Path, handle: str) -> Result:
    ours, native = [], []
    try:
        for _ in range(bench.sizes.runs):
            drop_page_cache()
            native.append(_sequential(local / _DATA))
            with bench.mounted(cache) as mount:
                (mount.path / handle / _DATA).stat()
                drop_page_cache()
                ours.append(_sequential(mount.path / handle / _DATA))
    except Unavailable as error:
        raise Unavailable(f"sequential, cold: {error}") from error
    return compared("read", "sequential, cold page cache", "s", ours, native, _NATIVE)


def _sequential(path: Path) -> float:
    """Seconds to read a whole file."""
    buffer, received = bytearray(_BLOCK), 0
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            received += count
    took = time.perf_counter() - began
    if received != path.stat().st_size:
        raise RuntimeError(f"{path}: {received} bytes were read of {path.stat().st_size}")
    return took


def _random(path: Path, each: int, offsets: Sequence[int]) -> float:
    """Microseconds of one read, on average."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        for offset in offsets:
            os.pread(descriptor, each, offset)
        return (time.perf_counter() - began) / len(offsets) * 1e6
    finally:
        os.close(descriptor)


def _opens(path: Path) -> float:
    """Median microseconds of opening, reading and closing a small file."""
    times = []
    for _ in range(_OPENS):
        began = time.perf_counter()
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 4096)
        os.close(descriptor)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _offsets(size: int, each: int, count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(size // each) * each for _ in range(count)]
