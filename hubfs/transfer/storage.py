"""Written files on their way to stable storage: the large ones while they grow, all of them at the end.

And room for files before they are written.

What a disk takes 0.4 s for after 1 GB was inflated, it does beside the inflating, so that some 20 ms are
left. `fdatasync` in a thread does as well there as `sync_file_range`, which has no effect on overlayfs and
on ext4 with a journal left a twenty times longer rest.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

#: Bytes of a growing file that are worth a call of their own, which commits the file system's journal.
STEP: Final = 32 << 20
#: Bytes that are worth it once a file is complete. The end's pass takes the smaller files: there one commit
#: does for many.
REST: Final = 1 << 20
#: Calls that wait for the disk at a time. Each holds a descriptor.
BACKLOG: Final = 4

_libc = ctypes.CDLL(None)
#: musl has it under its plain name only, with the same 64 bits.
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)


class Storage:
    """What one attempt has written. `begin` and `sync` are called from one thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hubfs-storage")
        self._jobs: deque[Future[None]] = deque()
        self._over = False

    def begin(self, descriptor: int) -> bool:
        """Have a file's content, as far as it is written, brought to stable storage in the background.

        Returns:
            False if the disk is busy with enough of that; `sync` does the rest in any case.

        Raises:
            OSError: the storage failed, for this or an earlier file.
        """
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        if len(self._jobs) >= BACKLOG:
            return False
        self._jobs.append(self._pool.submit(self._sync_content, os.dup(descriptor)))
        return True

    def sync(self, into: Path) -> None:
        """Bring every file and directory below `into`, and itself, to stable storage, contents first.

        Raises:
            OSError: the storage failed; nothing may be taken for stored.
        """
        # First: an error that was told to one of these is not told again to who opens the file anew.
        while self._jobs:
            self._jobs.popleft().result()
        directories = [str(into)]
        for directory in directories:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    else:
                        _sync_one(entry.path, os.O_RDONLY)
        for directory in reversed(directories):
            _sync_one(directory, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """End the thread. What it has not begun stays undone."""
        self._over = True
        self._pool.shutdown()

    def _sync_content(self, descriptor: int) -> None:
        try:
            if not self._over:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Claim the room of a file's `size` bytes, so that each write into it is less work for the file system.

    It is a help only: where it cannot be had, whoever writes is told what is wrong. Not `os.posix_fallocate`:
    that one writes to each block where the file system knows no better, beside others who write there.
    """
    if _fallocate is not None:
        _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))


def _sync_one(path: str, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
