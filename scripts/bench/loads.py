"""Loading real models with real TensorFlow, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.bench.bench import Bench
from scripts.bench.models import Model, saved_model
from scripts.bench.processes import CHECKOUT, Unavailable, environment

#: Bytes: the largest model as the cache's file, as pages of the mount and in TensorFlow, and some more.
_TOUCHED: Final = 4 << 30


def models(bench: Bench) -> Mapping[str, Model]:
    if importlib.util.find_spec("tensorflow") is None or importlib.util.find_spec("tensorflow_hub") is None:
        raise Unavailable("TensorFlow is not installed: pip install 'hubfs[tensorflow]'")
    sizes = {"large": bench.sizes.large, "embed": bench.sizes.embed}
    return {kind: saved_model(bench.work, kind, size) for kind, size in sizes.items()}


@dataclass(frozen=True)
class Load:
    """One load.

    Attributes:
        resolving: seconds of it that went by until there was a local path.
        ends: the last value of each variable; none if it was only resolved.
    """

    seconds: float
    resolving: float
    ends: list[float]


class Loader:
    """Loads models, each in a fresh process that has TensorFlow imported."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(
        self, how: str, handle: str, cache: Path | None = None, more: Mapping[str, str] | None = None
    ) -> Load:
        """
        Args:
            how: `saved_model` for a path or what is in a bucket, `hub` for a URL, `resolve` for one that is
                not loaded afterwards.
            cache: tensorflow_hub's cache directory.
            more: environment variables of that process.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        _touch_memory()
        order = {"how": how, "handle": handle, "cache": str(cache or ""), "environment": dict(more or {})}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"loading {handle} failed: {answer['error']}")
        return Load(**answer)


def _touch_memory() -> None:
    """Use as much memory for a moment as a load may need.

    A virtual machine may have given free pages back to its host, and to get each again takes longer than to
    write to it: a load that comes after much was freed would pay for that, and the next one would not.
    """
    available = re.findall(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[0]
    pages = min(_TOUCHED, int(available) * 1024 // 2) // mmap.PAGESIZE
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory[:: mmap.PAGESIZE] = bytes(pages)


@contextmanager
def loading() -> Iterator[Loader]:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.bench.loader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=CHECKOUT,
        env=environment(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1"),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("TensorFlow cannot be imported")
        yield Loader(process)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def check_same(*loads: Load) -> None:
    if not loads[0].ends or any(load.ends != loads[0].ends for load in loads):
        raise RuntimeError("two loads of one model gave different variables")
