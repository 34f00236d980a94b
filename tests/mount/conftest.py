"""What tests through a real mount share: the command as a subprocess, whole trees, waiting."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs import mounts
from hubfs.handles import cache_key
from tests.models import Tree, write_tree


def read_tree(directory: Path) -> Tree:
    """All files below a directory, with their content."""
    found: Tree = {}
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            path = Path(folder) / name
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def _raise(error: OSError) -> None:
    raise error


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64), ("d_off", ctypes.c_int64), ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8), ("d_name", ctypes.c_char * 256),
    ]  # fmt: skip


def raw_listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What readdir(3) tells: a name's inode and type."""
    libc = ctypes.CDLL(None)
    libc.opendir.restype, libc.readdir.restype = ctypes.c_void_p, ctypes.POINTER(_Dirent)
    stream = ctypes.c_void_p(libc.opendir(bytes(folder)))
    found = {}
    while entry := libc.readdir(stream):
        found[os.fsdecode(entry[0].d_name)] = (entry[0].d_ino, entry[0].d_type)
    libc.closedir(stream)
    return found


def cached_keys(cache: Path) -> list[str]:
    """The versions that are in a cache directory."""
    return sorted(path.name for path in cache.iterdir() if path.is_dir() and len(path.name) == 40)


def put_into_cache(cache: Path, handle: str, tree: Tree) -> Path:
    """Put a version where tensorflow_hub would have put it."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"{cache_key(handle)}.descriptor.txt").write_text(f"Module: {handle}\nDownload Time: now\n")
    return write_tree(tree, cache / cache_key(handle))


def until(condition: Callable[[], object], what: str, timeout: float = 15.0) -> None:
    """Wait until something holds that only the outside world can tell."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def until_cached(cache: Path, versions: int = 1) -> None:
    """Wait until so many versions are published in a cache directory: readers do not wait for that."""

    def published() -> bool:
        names = [path.name for path in cache.iterdir()]
        return not any(name.endswith((".lock", ".tmp")) for name in names)

    until(published, "the end of all transfers")
    assert len(cached_keys(cache)) == versions


Hubfs = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = (sys.executable, "-m", "hubfs")


@pytest.fixture
def hubfs(tmp_path: Path) -> Iterator[Hubfs]:
    """Runs the command as a person does; what it leaves mounted below `tmp_path` is unmounted at the end."""

    def run(*arguments: object, code: int | None = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        """
        Args:
            code: the exit code that is expected, `None` for any.
            environ: further environment variables.
        """
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
            cwd=tmp_path, env={**os.environ, **environ},
        )  # fmt: skip
        said = f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert code is None or done.returncode == code, said
        assert "Traceback" not in done.stdout + done.stderr, said
        return done

    yield run
    for path in mounts.find():
        if tmp_path in path.parents:
            mounts.unmount(path, lazy=True)
