"""What is measured of reading: in a process of its own, of this user or another one, or in this process.

An unprivileged mount is seen by its user alone, not even by root; so that user's process makes it, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hubfs import daemon, mounts
from hubfs.config import Settings
from scripts.bench.processes import CHECKOUT, Unavailable, environment, find_program

_BLOCK: Final = 1 << 20


def sequential(path: str, drop: bool = False) -> float:
    """Seconds to read a whole file in blocks of 1 MiB.

    Args:
        drop: afterwards the kernel forgets the pages that it has of this very path; those of the file
            behind a mount stay.
    """
    buffer, received = bytearray(_BLOCK), 0
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - pathlib would be measured as well
        while count := file.readinto(buffer):
            received += count
        took = time.perf_counter() - began
        if drop:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if received != os.fstat(file.fileno()).st_size:
            raise RuntimeError(f"{path}: only {received} bytes were read")
    return took


def scattered(path: str, each: int, count: int, seed: int) -> float:
    """Microseconds of one read of `each` bytes at a random place, on average."""
    source, blocks = random.Random(seed), Path(path).stat().st_size // each
    offsets = [source.randrange(blocks) * each for _ in range(count)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        for offset in offsets:
            os.pread(descriptor, each, offset)
        return (time.perf_counter() - began) / count * 1e6
    finally:
        os.close(descriptor)


def opens(path: str, count: int) -> float:
    """Median microseconds of opening, reading and closing a small file."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 4096)
        os.close(descriptor)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def first(path: str) -> float:
    """Seconds until a file's first byte is there."""
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - pathlib would be measured as well
        if len(file.read(1)) != 1:
            raise RuntimeError(f"{path}: it is empty")
        return time.perf_counter() - began


def stretch(path: str, start: int, count: int) -> float:
    """Seconds to read so many bytes of a file from a place on, in blocks of 1 MiB; from its beginning
    again when it ends."""
    buffer, at, left = bytearray(_BLOCK), start, count
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - pathlib would be measured as well
        size = os.fstat(file.fileno()).st_size
        while left:
            got = os.preadv(file.fileno(), [memoryview(buffer)[:left]], at % size)
            if not got:
                raise RuntimeError(f"{path}: nothing at {at % size}")
            at += got
            left -= got
    return time.perf_counter() - began


def tail(path: str) -> float:
    """Seconds until a file's last byte is there."""
    began = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)
    finally:
        os.close(descriptor)
    return time.perf_counter() - began


def mount(path: str, flags: dict[str, Any]) -> int:
    """Mount as `hubfs mount` does; gives the daemon's process id."""
    return daemon.start(Settings.load(flags, environ={}, config_file=Path(os.devnull)), Path(path))


def unmount(path: str) -> None:
    mounts.unmount(Path(path))


def status(path: str) -> dict[str, Any]:
    """A mount's status.json."""
    found: dict[str, Any] = json.loads((Path(path) / ".hubfs/status.json").read_text())
    return found


_ALL: Final[tuple[Callable[..., Any], ...]] = (
    sequential,
    first,
    stretch,
    scattered,
    opens,
    tail,
    mount,
    unmount,
    status,
)


class Reader:
    """Runs the functions above in another process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """
        Raises:
            RuntimeError: it failed there; the message is its last line.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function.__name__, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


@contextmanager
def reader(user: str | None = None) -> Iterator[Reader]:
    """A process that reads, for the length of a `with` block.

    Args:
        user: whose; None for the one that runs this.

    Raises:
        Unavailable: that user cannot run this program.
    """
    become = _become(user) if user is not None else []
    process = subprocess.Popen(
        [*become, sys.executable, "-m", "scripts.bench.reader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise Unavailable(f"{user or 'this user'} cannot run this checkout with its Python")
        yield Reader(process)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def _become(user: str) -> list[str]:
    """What makes a command another user's.

    It may read everything, or it could not run a checkout in root's home. That changes nothing of what its
    mounts may have.
    """
    entry, capability = pwd.getpwnam(user), "+dac_read_search"
    identity = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    return [find_program("setpriv"), *identity, f"--inh-caps={capability}", f"--ambient-caps={capability}"]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    functions = {function.__name__: function for function in _ALL}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"result": functions[name](*arguments)}
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            answer = {"error": traceback.format_exception_only(error)[-1].strip()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
