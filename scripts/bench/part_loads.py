"""TensorFlow loading real models: through the mount, from the local directory, and with hub.load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.bench import NOWHERE, Bench, Unavailable, environment, warm
from scripts.bench.models import Model, link_into_cache, saved_model
from scripts.bench.results import Result, compared
from scripts.bench.server import GIGABIT, LOOPBACK, Link, serving

#: Issue 2: the most that a load may take, as ratios.
_WARM, _COLD = 1.5, 1.0


def load_warm(bench: Bench) -> Iterator[Result]:
    """A cached model, its files in the page cache: a fresh process for each load."""
    for model in _models(bench):
        first, again, local_times = [], [], []
        cache = bench.fresh("cache")
        local = link_into_cache(cache, f"{NOWHERE}/{model.handle}", model)
        warm(local)
        for run in range(bench.sizes.runs):
            bench.say(f"warm load of {model.handle}, {run + 1}")
            local_load = _load("saved_model", str(local))
            with bench.mounted(cache) as mount:
                path = str(mount.path / model.handle)
                loads = [_load("saved_model", path) for _ in range(2)]
            _check_same(local_load, *loads)
            local_times.append(local_load.seconds)
            first.append(loads[0].seconds)
            again.append(loads[1].seconds)
        name = f"{_kind(model)}, {model.size / 1e6:.0f} MB"
        baseline = "saved_model.load of the local directory"
        yield compared(
            "warm load", f"{name}, first in a mount", "s", first, local_times, baseline, limit=_WARM
        )
        yield compared("warm load", f"{name}, again", "s", again, local_times, baseline, limit=_WARM)


def load_cold(bench: Bench) -> Iterator[Result]:
    """A model that is not cached: `saved_model.load` of its path, and `hub.load` of its URL, in turns.

    Each load has a process of its own that has imported TensorFlow before the clock starts, and an empty
    cache on the same file system; both use one server, which has the archive in its page cache.
    """
    for model in _models(bench):
        for link in (LOOPBACK, GIGABIT):
            yield _cold(bench, model, link)


def _cold(bench: Bench, model: Model, link: Link) -> Result:
    ours, theirs, parts = [], [], []
    with serving({model.handle: model.archive}, link, digests=bench.digests) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"cold load of {model.handle}, {link.name}, {run + 1}")
            warm(model.archive.path)
            with bench.fresh_cache() as cache, bench.mounted(cache, url) as mount:
                mine = _load("saved_model", str(mount.path / model.handle))
            with bench.fresh_cache() as cache:
                other = _load("hub", f"{url}/{model.handle}", TFHUB_CACHE_DIR=str(cache))
            _check_same(mine, other)
            ours.append(mine.seconds)
            theirs.append(other.seconds)
            parts.append(other.resolving)
    note = f"hub.load downloads for {sorted(parts)[len(parts) // 2]:.2f} s of it"
    name = f"{_kind(model)}, {model.size / 1e6:.0f} MB, {link.name}"
    return compared("cold load", name, "s", ours, theirs, "hub.load, cold", limit=_COLD, note=note)


def _models(bench: Bench) -> list[Model]:
    if importlib.util.find_spec("tensorflow") is None or importlib.util.find_spec("tensorflow_hub") is None:
        raise Unavailable("TensorFlow is not installed: pip install 'hubfs[tensorflow]'")
    sizes: Mapping[str, int] = {"large": bench.sizes.large, "embed": bench.sizes.embed}
    return [saved_model(bench.work, kind, size) for kind, size in sizes.items()]


def _kind(model: Model) -> str:
    return model.tree.parent.name.partition("-")[0]


@dataclass(frozen=True)
class _Load:
    """One load.

    Attributes:
        resolving: seconds of it that went by until there was a local path.
        ends: the last value of each variable.
    """

    seconds: float
    resolving: float
    ends: list[float]


def _load(how: str, handle: str, **variables: str) -> _Load:
    with _loader(**variables) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"how": how, "handle": handle}) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline() or '{"error": "the process ended"}')
    if "error" in answer:
        raise RuntimeError(f"loading {handle} failed: {answer['error']}")
    return _Load(**answer)


@contextmanager
def _loader(**variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has TensorFlow imported and waits for its order."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.bench.loader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=environment(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", **variables),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("TensorFlow cannot be imported")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _check_same(*loads: _Load) -> None:
    if not loads[0].ends or any(load.ends != loads[0].ends for load in loads):
        raise RuntimeError("two loads of one model gave different variables")
