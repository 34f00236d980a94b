"""What every part of the benchmark needs: sizes, directories, mounts, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubfs import daemon, mounts
from hubfs.config import Settings
from hubfs.errors import HubfsError

#: A hub that is never asked: for mounts of cached models.
NOWHERE = "http://127.0.0.1:9"
_CREATED = re.compile(r"run-(\d+)-")


class Unavailable(Exception):
    """A part that cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured with.

    Attributes:
        large, embed: bytes of the variables of the two models.
        models: versions in the cache for start-up, `stat` and `find`.
        runs: how often each figure is measured.
    """

    large: int
    embed: int
    models: int
    runs: int


QUICK = Sizes(large=64 << 20, embed=32 << 20, models=1_000, runs=3)
FULL = Sizes(large=15 * (64 << 20), embed=996_000 * 128 * 4, models=10_000, runs=5)


@dataclass(frozen=True)
class Mount:
    """A running mount."""

    path: Path
    cache: Path
    pid: int

    def wait_for_models(self, count: int, timeout: float = 60.0) -> None:
        """Wait until the daemon has looked through its cache.

        Raises:
            RuntimeError: it does not get done.
        """
        deadline = time.monotonic() + timeout
        while (found := mounts.status(self.path)["cache"]["models"]) != count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the mount knows {found} models instead of {count}")
            time.sleep(0.05)

    def wait_until_idle(self, timeout: float = 60.0) -> None:
        """Wait until the daemon has done in the background what it does after its start."""
        deadline, before = time.monotonic() + timeout, -1
        while (now := self._cpu_ticks()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(0.25)

    def _cpu_ticks(self) -> int:
        """User and system time so far, of all its threads (proc(5))."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def memory(self) -> dict[str, float]:
        """Resident and proportional memory of the daemon, in MB."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        kib = {name: int(value) for name, value in re.findall(r"^(Rss|Pss):\s+(\d+)", text, re.MULTILINE)}
        return {name.lower(): value * 1024 / 1e6 for name, value in kib.items()}


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark.

    Attributes:
        work: directory of what is built once and kept.
        scratch: directory of this run; removed at its end.
        digests: whether servers declare checksums.
    """

    sizes: Sizes
    work: Path
    scratch: Path
    digests: bool

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def fresh(self, name: str) -> Path:
        """A new, empty directory."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))

    @contextmanager
    def fresh_cache(self) -> Iterator[Path]:
        """An empty cache directory; what comes into it is removed, and everything else is on disk."""
        directory = self.fresh("cache")
        os.sync()
        try:
            yield directory
        finally:
            shutil.rmtree(directory)
            os.sync()

    @contextmanager
    def mounted(self, cache: Path, hub: str = NOWHERE, **settings: Any) -> Iterator[Mount]:
        """A mount for the length of a `with` block, made as `hubfs mount` makes it, and idle at first."""
        path = self.fresh("mnt")
        flags = {
            "hub": hub,
            "cache_dir": str(cache),
            "log_file": str(path.with_suffix(".log")),
            "offline": hub == NOWHERE,
            **settings,
        }
        pid = daemon.start(Settings.load(flags, environ={}, config_file=Path(os.devnull)), path)
        try:
            mount = Mount(path, cache, pid)
            mount.wait_until_idle()
            yield mount
        finally:
            unmount(path, pid)


def unmount(path: Path, pid: int | None = None) -> None:
    """Unmount, whatever uses it, and see that the daemon is gone."""
    try:
        mounts.unmount(path)
    except HubfsError as error:
        print(f"  {error}", file=sys.stderr)
        if path in mounts.find():
            mounts.unmount(path, lazy=True)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def warm(path: Path) -> None:
    """Bring a file, or all files below a directory, into the page cache."""
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.read(1 << 22):
                pass


def drop_page_cache() -> None:
    """
    Raises:
        Unavailable: only root may do it, and not in every container.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise Unavailable(f"the page cache cannot be dropped: {error.strerror}") from error


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def environment(**more: str) -> dict[str, str]:
    """For processes that are measured: no setting or proxy of the machine reaches them."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HUBFS_", "TFHUB_")) and not name.lower().endswith("_proxy")
    }
    return {**kept, **more}


def hubfs_command() -> list[str]:
    """What runs `hubfs` as a user does."""
    script = Path(sys.executable).with_name("hubfs")
    return [str(script)] if script.exists() else [sys.executable, "-m", "hubfs"]


def run_quietly(*command: str, **more: str) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


@contextmanager
def scratch_directory(work: Path) -> Iterator[Path]:
    """A directory for one run; what killed runs have left is removed first."""
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("run-*"):
        creator = _CREATED.match(old.name)
        if creator and not Path("/proc", creator[1]).exists():
            _remove(old)
    directory = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=work))
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    for path in mounts.find():
        if directory in path.parents:
            with contextlib.suppress(HubfsError):
                unmount(path)
    if any(directory in path.parents for path in mounts.find()):
        print(f"  {directory} stays: something below it is still mounted", file=sys.stderr)
        return
    shutil.rmtree(directory, ignore_errors=True)


def status_of(path: Path) -> dict[str, Any]:
    """A mount's status.json."""
    found: dict[str, Any] = json.loads((path / ".hubfs/status.json").read_text())
    return found
