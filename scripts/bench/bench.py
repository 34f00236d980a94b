"""What every part of the benchmark needs: sizes, directories, mounts, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hubfs import mounts
from hubfs.errors import HubfsError
from scripts.bench import reader as reading
from scripts.bench.processes import Unavailable
from scripts.bench.reader import Reader

#: A hub that is never asked: for mounts of cached models.
NOWHERE = "http://127.0.0.1:9"


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
    """A running mount.

    Attributes:
        reader: the process of its user; None if that is this one.
    """

    path: Path
    cache: Path
    pid: int
    reader: Reader | None = None

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one of the functions of `reader.py` where the mount can be seen."""
        return self.reader(function, *arguments) if self.reader else function(*arguments)

    def status(self) -> dict[str, Any]:
        """Its status.json."""
        found: dict[str, Any] = self.do(reading.status, str(self.path))
        return found

    def wait_for_models(self, count: int, timeout: float = 60.0) -> None:
        """Wait until the daemon has looked through its cache.

        Raises:
            RuntimeError: it does not get done.
        """
        deadline = time.monotonic() + timeout
        while (found := self.status()["cache"]["models"]) != count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the mount knows {found} models instead of {count}")
            time.sleep(0.05)

    def wait_until_idle(self, timeout: float = 60.0) -> None:
        """Wait until the daemon has done in the background what it does after its start."""
        deadline, before = time.monotonic() + timeout, -1.0
        while (now := self.cpu_seconds()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(0.25)

    def cpu_seconds(self) -> float:
        """User and system time so far, of all its threads (proc(5))."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """What of the daemon is resident, in MB."""
        return self._memory("VmRSS")

    def forget_peak(self) -> None:
        """`peak_memory` is what is reached from now on (proc(5): clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_memory(self) -> float:
        """The most that was resident at one time, in MB."""
        return self._memory("VmHWM")

    def _memory(self, which: str) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(rf"^{which}:\s+(\d+)", status, re.MULTILINE)[0]) * 1024 / 1e6


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark.

    Attributes:
        work: directory of what is built once and kept.
        scratch: directory of this run; removed at its end.
        digests: whether servers declare checksums.
        left_out: what could not be measured, and why.
    """

    sizes: Sizes
    work: Path
    scratch: Path
    digests: bool
    left_out: dict[str, str] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """What is in the `with` block is left out where it cannot be measured."""
        try:
            yield
        except Unavailable as error:
            if what not in self.left_out:
                self.say(f"{what} is left out: {error}")
            self.left_out[what] = str(error)

    def fresh(self, name: str, user: str | None = None) -> Path:
        """A new, empty directory, of this or another user."""
        directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))
        if user is not None:
            directory.chmod(0o755)
            shutil.chown(directory, user)
        return directory

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
    def mounted(
        self, cache: Path, hub: str = NOWHERE, user: str | None = None, **settings: Any
    ) -> Iterator[Mount]:
        """A mount for the length of a `with` block, made as `hubfs mount` makes it, and idle at first.

        Args:
            user: whose it is; None for the user that runs this.

        Raises:
            Unavailable: that user cannot run this.
        """
        # Another user may not pass all directories on the way to the scratch directory.
        home = Path(tempfile.mkdtemp(prefix="hubfs-bench-")) if user else self.fresh("mount")
        path = home / "mnt"
        flags = {
            "hub": hub,
            "cache_dir": str(cache),
            "log_file": str(home / "log"),
            "offline": hub == NOWHERE,
            **settings,
        }
        with contextlib.ExitStack() as stack:
            reader = None
            if user is not None:
                stack.callback(shutil.rmtree, home, ignore_errors=True)
                shutil.chown(home, user)
                stack.enter_context(_device_for_everybody())
                reader = stack.enter_context(reading.reader(user))
            pid = reader(reading.mount, str(path), flags) if reader else reading.mount(str(path), flags)
            stack.callback(unmount, path, pid, reader)
            mount = Mount(path, cache, pid, reader)
            mount.wait_until_idle()
            yield mount

    @cached_property
    def read_modes(self) -> Mapping[str, Mapping[str, Any]]:
        """hubfs's ways to read complete files that there are here, and the settings that choose them."""
        with self.fresh_cache() as cache, self.mounted(cache) as mount:
            status = mount.status()
        cached: dict[str, Mapping[str, Any]] = {"cached": {"passthrough": False}}
        if status["read_mode"] == "passthrough":
            return {"passthrough": {}, **cached}
        self.left_out["passthrough"] = status["read_mode_reason"]
        return cached


def unmount(path: Path, pid: int | None = None, reader: Reader | None = None) -> None:
    """Unmount, whatever uses it, and see that the daemon is gone."""
    try:
        if reader:
            reader(reading.unmount, str(path))
        else:
            mounts.unmount(path)
    except (HubfsError, RuntimeError) as error:
        print(f"  {error}", file=sys.stderr)
        if path in mounts.find():
            mounts.unmount(path, lazy=True)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _device_for_everybody() -> Iterator[None]:
    """Anybody may mount, as on distributions; some machines keep that for root."""
    device = Path("/dev/fuse")
    mode = device.stat().st_mode & 0o777
    if mode & 0o006 != 0o006:
        device.chmod(0o666)
    try:
        yield
    finally:
        if mode & 0o006 != 0o006:
            device.chmod(mode)


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


@contextmanager
def scratch_directory(work: Path) -> Iterator[Path]:
    """A directory for one run; what killed runs have left is removed first.

    A run holds a lock of its directory: its process id would mean nothing in a container that shares it.
    """
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("run-*"):
        with _locked(old) as is_ours:
            if is_ours:
                _remove(old)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    with _locked(directory):
        try:
            yield directory
        finally:
            _remove(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    for path in _mounts_below(directory):
        subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False)
    if left := _mounts_below(directory):
        print(f"  {directory} stays: {left[0]} is still mounted", file=sys.stderr)
        return
    shutil.rmtree(directory, ignore_errors=True)


def _mounts_below(directory: Path) -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [path for line in lines for path in [Path(line.split(" ")[4])] if directory in path.parents]
