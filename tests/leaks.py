"""A pytest plugin: a test that leaves something behind, or logs an error it did not announce, fails.

Looked at after each test: hubfs mounts, hubfs processes, threads, locks and temporary names in caches
below the test's `tmp_path`, ERROR lines of `hubfs` loggers in this process and in log files below
`tmp_path`. A test that means to cause errors says which: `@pytest.mark.logs("regular expression")`.
One that means to leave names behind says `@pytest.mark.leaves("glob")`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfs import mounts

LEFTOVERS = ("*.lock", "*.tmp", "*.tmp????????????????????????????????", "*.old")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "logs(pattern): ERROR lines that match are expected")
    config.addinivalue_line("markers", "leaves(glob): names that match may stay in the cache")


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


def hubfs_processes(world: Path) -> set[int]:
    """Daemons that were started by the test whose directory is `world` (its environment names it)."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if b"hubfs.daemon" not in (directory / "cmdline").read_bytes():
                continue
            if str(world).encode() in (directory / "environ").read_bytes():
                found.add(int(directory.name))
        except OSError:
            continue
    return found


def open_files(directory: Path) -> list[str]:
    """Paths of files below `directory` that this process has open, one for each descriptor, sorted.

    A mere count of descriptors takes in what belongs to others, as an earlier test's garbage.
    """
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(path for path in found if path.startswith(f"{directory}/") or path == str(directory))


def _settled(look: object, before: set[object], seconds: float = 5.0) -> set[object]:
    """What is there and was not before, after giving it a moment to go."""
    deadline = time.monotonic() + seconds
    while True:
        left = set(look()) - before  # type: ignore[operator]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    before_threads = set(threading.enumerate())
    errors = _Errors()
    logging.getLogger("hubfs").addHandler(errors)
    yield
    logging.getLogger("hubfs").removeHandler(errors)
    problems = [f"mount left: {path}" for path in mounts.find() if tmp_path in path.parents]
    problems += [f"process left: {pid}" for pid in _settled(lambda: hubfs_processes(tmp_path), set())]
    problems += [f"thread left: {t}" for t in _settled(threading.enumerate, set(before_threads))]
    expected = [mark.args[0] for mark in request.node.iter_markers("logs")]
    allowed = [mark.args[0] for mark in request.node.iter_markers("leaves")]
    lines = list(errors.lines)
    lines += [line for path in tmp_path.rglob("*.log") for line in _error_lines(path)]
    problems += [f"left in a cache: {p}" for p in _leftovers(tmp_path, allowed)]
    problems += [f"unexpected error: {x}" for x in lines if not any(re.search(e, x) for e in expected)]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def _leftovers(directory: Path, allowed: list[str]) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = Path(name)
            if (
                re.match(r"[0-9a-f]{40}\.", name)
                and any(path.match(glob) for glob in LEFTOVERS)
                and not any(path.match(glob) for glob in allowed)
            ):
                found.append(Path(folder) / name)
    return found


def _error_lines(path: Path) -> list[str]:
    text = path.read_text(errors="replace")
    return [line for line in text.splitlines() if re.search(r" (ERROR|CRITICAL) ", line)]
