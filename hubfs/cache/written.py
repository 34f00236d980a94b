"""Which chunks were written, whether or not they are on stable storage: what survives a killed process.

What a process has written is the kernel's, and stays when the process is killed. So the next one may go on
with it, as long as that kernel runs and the file system has stayed mounted: else it may be lost. This costs
no system call a chunk, since it is kept in memory that is shared with a file.

    written     a line that tells the version and the mount, then a bit for each chunk of each file
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from hubfs.transfer.chunks import CHUNK

#: Bytes of the first line, with what fills it up.
_HEAD: Final = 256


class Written:
    """The file of one version. To be used by one thread at a time."""

    def __init__(self, path: Path, identity: str, sizes: Mapping[str, int]) -> None:
        """Go on with what is at `path`, if that is of the same version and mount; else begin anew.

        Args:
            identity: of the version, in printable characters.
            sizes: of all its files, in bytes.

        Raises:
            OSError: it cannot be made.
        """
        self._places: dict[str, tuple[int, int]] = {}
        at = _HEAD
        for name in sorted(sizes):
            chunks = -(-sizes[name] // CHUNK)
            length = -(-chunks // 8)
            self._places[name] = at, at + length
            at += length
        head = f"{identity} {_kernel()} {_mount(path.parent)}\n".encode().ljust(_HEAD, b".")
        descriptor = _opened(path, head, at)
        try:
            self._bits = mmap.mmap(descriptor, at)
        finally:
            os.close(descriptor)

    def numbers(self, name: str) -> set[int]:
        """Numbers of the chunks of a file that were written."""
        start, stop = self._places[name]
        bits = self._bits[start:stop]
        if not any(bits):
            return set()
        return {number for number in range(8 * len(bits)) if bits[number >> 3] >> (number & 7) & 1}

    def add(self, name: str, numbers: Iterable[int]) -> None:
        """Chunks were written just now."""
        start, _ = self._places[name]
        for number in numbers:
            self._bits[start + (number >> 3)] |= 1 << (number & 7)

    def clear(self, name: str) -> None:
        """What was written of a file does not count any more."""
        start, stop = self._places[name]
        self._bits[start:stop] = bytes(stop - start)

    def close(self) -> None:
        self._bits.close()


def _opened(path: Path, head: bytes, size: int) -> int:
    """A descriptor of the file, which has its name only once it is right."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        descriptor = -1
    if descriptor >= 0:
        if os.pread(descriptor, _HEAD, 0) == head and os.fstat(descriptor).st_size == size:
            return descriptor
        os.close(descriptor)
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, flags | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # Space is claimed: where a file system is full, writing to shared memory would end the process.
        os.pwrite(descriptor, head + bytes(size - _HEAD), 0)
        os.posix_fallocate(descriptor, 0, size)
        temporary.replace(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _kernel() -> str:
    """Another one after each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _mount(directory: Path) -> str:
    """Another one after each mount of the file system that a directory is on (proc(5), fdinfo)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
    finally:
        os.close(descriptor)
    match = re.search(r"^mnt_id:\s*(\d+)$", text, re.MULTILINE)
    return match[1] if match else "unknown"
