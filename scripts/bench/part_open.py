"""Opening, reading and closing a small file that was read before, beside the mounts of others.

A run is the median of 2000 times, in turns of 100, in fresh mounts: how far the CPU sleeps that a mount's
process answers on makes a difference of three times, and stays so for a while. rclone mounts the model's
directory, ratarmount an archive of it on disk.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from scripts.bench import reader
from scripts.bench.bench import NOWHERE, Bench
from scripts.bench.models import link_into_cache, transfer_model
from scripts.bench.others import ratarmount, rclone
from scripts.bench.results import Result, compared, compared_with_one_of

_SMALL: Final = "fingerprint.pb"
_TURNS: Final = 20
_EACH: Final = 100


def opens(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", 8 << 20)
    cache = bench.fresh("cache")
    local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model)
    times: dict[str, list[float]] = {}
    for run in range(bench.sizes.runs):
        bench.say(f"opens {run + 1}")
        with contextlib.ExitStack() as stack:
            paths = {"native": local / _SMALL}
            for mode, settings in bench.read_modes.items():
                mount = stack.enter_context(bench.mounted(cache, **settings))
                paths[mode] = mount.path / model.handle / _SMALL
            with bench.optional("open: rclone"):
                paths["rclone mount"] = stack.enter_context(rclone(bench, str(model.tree))) / _SMALL
            with bench.optional("open: ratarmount"):
                paths["ratarmount"] = stack.enter_context(ratarmount(bench, str(model.archive.path))) / _SMALL
            for name, value in _in_turns(paths).items():
                times.setdefault(name, []).append(value)
    native, modes = times.pop("native"), {mode: times.pop(mode) for mode in bench.read_modes}
    for mode, ours in modes.items():
        name = f"open + read + close, {mode}"
        yield compared_with_one_of(min, name, "µs", ours, times, 1.0)
        yield compared(f"{name}, beside native", "µs", ours, native, "the same file, natively")


def _in_turns(paths: Mapping[str, Path]) -> dict[str, float]:
    """Microseconds of each: the median of its turns' medians."""
    for path in paths.values():
        path.read_bytes()
    turns = [{name: reader.opens(str(path), _EACH) for name, path in paths.items()} for _ in range(_TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in paths}
