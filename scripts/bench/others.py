"""The mounts of others that hubfs is compared with, as far as they are installed."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.bench import Bench
from scripts.bench.processes import environment, find_program

#: It may keep what it knows of names, as hubfs does: the files do not change.
_RCLONE = ("--read-only", "--dir-cache-time=24h", "--attr-timeout=1h", f"--config={os.devnull}", "--quiet")


@contextmanager
def rclone(bench: Bench, remote: str, *more: str) -> Iterator[Path]:
    """A `rclone mount` of a directory or other remote, for the length of a `with` block.

    Args:
        more: options besides what all have.

    Raises:
        Unavailable: it is not installed.
    """
    path = bench.fresh("rclone")
    cache = f"--cache-dir={bench.fresh('rclone-cache')}"
    with _running(path, find_program("rclone"), "mount", remote, str(path), cache, *_RCLONE, *more):
        yield path


@contextmanager
def ratarmount(bench: Bench, archive: str) -> Iterator[Path]:
    """A `ratarmount` of an archive's path or URL; its index is made anew, before the block begins.

    Raises:
        Unavailable: it is not installed.
    """
    path = bench.fresh("ratarmount")
    with _running(path, find_program("ratarmount"), "-f", "--index-file", ":memory:", archive, str(path)):
        yield path


@contextmanager
def _running(path: Path, *command: str) -> Iterator[None]:
    """A mount that its program serves in the foreground."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environment()
        )
        try:
            while not os.path.ismount(path):
                if process.poll() is not None:
                    words.seek(0)
                    said = words.read().decode(errors="replace").strip()
                    raise RuntimeError(f"{' '.join(command)} ended: {said[-500:]}")
                time.sleep(0.01)
            yield
        finally:
            if os.path.ismount(path):
                subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
