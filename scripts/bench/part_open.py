"""Opening, reading and closing a small file that was read before, beside the mounts of others.

Median of 2000 times. rclone mounts the model's directory, ratarmount an archive of it on disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from scripts.bench import reader
from scripts.bench.bench import NOWHERE, Bench
from scripts.bench.models import link_into_cache, transfer_model
from scripts.bench.others import ratarmount, rclone
from scripts.bench.results import Result, compared, compared_with_one_of

_SMALL: Final = "fingerprint.pb"
_COUNT: Final = 2000


def opens(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", 8 << 20)
    cache = bench.fresh("cache")
    local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model)
    with contextlib.ExitStack() as stack:
        ours, others = {}, {}
        for mode, settings in bench.read_modes.items():
            mount = stack.enter_context(bench.mounted(cache, **settings))
            ours[mode] = mount.path / model.handle / _SMALL
        with bench.optional("open: rclone"):
            others["rclone mount"] = stack.enter_context(rclone(bench, str(model.tree))) / _SMALL
        with bench.optional("open: ratarmount"):
            others["ratarmount"] = stack.enter_context(ratarmount(bench, str(model.archive.path))) / _SMALL
        paths = {**ours, **others, "native": local / _SMALL}
        times: dict[str, list[float]] = {name: [] for name in paths}
        for path in paths.values():
            path.read_bytes()
        for run in range(bench.sizes.runs):
            bench.say(f"opens {run + 1}")
            for name, path in paths.items():
                times[name].append(reader.opens(str(path), _COUNT))
    baselines = {name: times[name] for name in others}
    for mode in ours:
        name = f"open + read + close, {mode}"
        yield compared_with_one_of(min, name, "µs", times[mode], baselines, 1.0)
        yield compared(
            f"{name}, beside native", "µs", times[mode], times["native"], "the same file, natively"
        )
