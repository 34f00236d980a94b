"""How the kernel reads each open file, and kernel passthrough where that is to be had.

With passthrough the kernel reads a complete file from the cache's own file system, without asking this
process: at that file system's speed, and with its pages in memory once instead of twice. It needs Linux 6.9,
libfuse 3.17.2 and CAP_SYS_ADMIN in the daemon. Where it is not to be had, files are read through the daemon
and kept in the kernel's page cache.

The kernel's rules (fs/fuse/iomode.c): while an inode is open in the page cache's way, opening it with
passthrough fails, and the reverse; opens with direct I/O go with both. All passthrough opens of an inode
must name the same backing id.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import logging
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hubfs.cache.readable import Readable

log = logging.getLogger(__name__)

#: FUSE_CAP_PASSTHROUGH of libfuse.
_CAPABILITY: Final = 1 << 29
#: FUSE_DEV_IOC_BACKING_OPEN and _CLOSE of linux/fuse.h.
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502
#: struct fuse_backing_map: int32 fd, uint32 flags, uint64 padding.
_MAP: Final = struct.Struct("=iIQ")

KERNEL: Final = (6, 9)
#: The releases before it had the fields in other places.
LIBFUSE: Final = (3, 17, 2)
_CAP_SYS_ADMIN: Final = 21

#: Errors after which there is no use in trying with other files, and what they mean.
_FOR_GOOD: Final = {
    errno.EPERM: "the kernel does not grant it",
    errno.ELOOP: "the cache is on a stacked file system, deeper than the kernel allows",
    errno.EOPNOTSUPP: "the cache's file system does not allow it",
    errno.ENOTTY: "this kernel lacks it",
}


class ReadMode(str, enum.Enum):
    """How the kernel reads a file.

    PASSTHROUGH: by itself, from the file in the cache.
    CACHED: through the daemon, and keeps what it has read in the page cache.
    DIRECT: through the daemon each time.
    """

    PASSTHROUGH = "passthrough"
    CACHED = "cached"
    DIRECT = "direct"


def obstacle(libfuse: tuple[int, ...]) -> str:
    """The one reason why this process cannot have passthrough, as far as can be told without a mount.

    Args:
        libfuse: its version.

    Returns:
        an empty string if nothing speaks against it.
    """
    release = os.uname().release
    if version(release)[:2] < KERNEL:
        return f"Linux {release} is older than 6.9"
    if libfuse < LIBFUSE:
        return f"libfuse {'.'.join(map(str, libfuse))} is older than 3.17.2"
    if not _may_administer():
        return "the daemon lacks CAP_SYS_ADMIN: mount as root"
    return ""


def version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `6.18.5-amd64` is (6, 18, 5)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else (0,)


@dataclass
class _Inode:
    """The opens of one inode. `count` has those that are not direct, which all have one mode."""

    mode: ReadMode
    backing_id: int = 0
    count: int = 0
    direct: int = 0


class ReadModes:
    """Decides how each file is opened. Safe to use from many threads."""

    def __init__(self, wanted: bool) -> None:
        """
        Args:
            wanted: passthrough may be used.
        """
        self._lock = threading.Lock()  # protects all below
        self._inodes: dict[str, _Inode] = {}
        self._device = -1
        self._reason = "not mounted yet" if wanted else "turned off with --no-passthrough"
        self._wanted = wanted

    def negotiate(self, conn: Any, libfuse: tuple[int, ...], device: int, cache: Path) -> None:
        """Ask the kernel for passthrough. Called from the init callback.

        Args:
            conn: libfuse's `fuse_conn_info`.
            libfuse: its version.
            device: descriptor of /dev/fuse.
            cache: the directory that files will be in.
        """
        if not self._wanted:
            return
        self._reason = obstacle(libfuse)
        if not self._reason and not conn.capable_ext & _CAPABILITY:
            self._reason = "this kernel was built without it"
        if self._reason:
            return
        conn.want_ext |= _CAPABILITY
        # What the cache lies on counts as so much less that others may stack on this mount.
        conn.max_backing_stack_depth = 1 if _is_stacked(cache) else 0
        self._device = device

    def probe(self, directory: Path) -> None:
        """Find out whether passthrough works with files in a directory, once the kernel has the mount."""
        with self._lock:
            if self._reason:
                return
        try:
            descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.debug("passthrough is not tried out in %s: %s", directory, error)
            return
        try:
            with self._lock:
                backing_id = self._register(descriptor)
                if backing_id:
                    self._forget(backing_id)
        finally:
            os.close(descriptor)

    def mode(self) -> tuple[ReadMode, str]:
        """What complete files are opened with, and why not with passthrough."""
        with self._lock:
            return (ReadMode.CACHED, self._reason) if self._reason else (ReadMode.PASSTHROUGH, "")

    def mode_of(self, path: str) -> tuple[ReadMode, str]:
        """The same for one file: how it is open, else how it would be opened."""
        with self._lock:
            inode = self._inodes.get(path)
            if inode is not None and inode.count:
                if inode.mode is ReadMode.PASSTHROUGH:
                    return inode.mode, ""
                return inode.mode, self._reason or "it is open since before it was complete"
            if inode is not None:
                return ReadMode.DIRECT, "the page cache may hold bytes of a failed transfer"
        return self.mode()

    def opened(self, path: str, file: Readable) -> tuple[ReadMode, int]:
        """Decide how a file is opened; the caller must call `closed` once for it.

        Returns:
            the mode, and the backing id for passthrough.
        """
        descriptor = file.backing
        with self._lock:
            inode = self._inodes.setdefault(path, _Inode(ReadMode.CACHED))
            if file.direct:
                mode = ReadMode.DIRECT
            elif inode.count:
                mode = inode.mode
                if mode is ReadMode.PASSTHROUGH and descriptor is None:
                    # It vanished from the cache and is being brought in once more.
                    mode = ReadMode.DIRECT
            else:
                # A direct open that is mapped counts as cached in the kernel.
                if descriptor is not None and not inode.direct and not self._reason:
                    inode.backing_id = self._register(descriptor)
                inode.mode = mode = ReadMode.PASSTHROUGH if inode.backing_id else ReadMode.CACHED
            if mode is ReadMode.DIRECT:
                inode.direct += 1
            else:
                inode.count += 1
            return mode, inode.backing_id if mode is ReadMode.PASSTHROUGH else 0

    def closed(self, path: str, mode: ReadMode) -> None:
        """A file that `opened` was told of is open no longer."""
        with self._lock:
            inode = self._inodes[path]
            if mode is ReadMode.DIRECT:
                inode.direct -= 1
            else:
                inode.count -= 1
                if not inode.count and inode.backing_id:
                    self._forget(inode.backing_id)
                    inode.backing_id = 0
            if not inode.count and not inode.direct:
                del self._inodes[path]

    def _register(self, descriptor: int) -> int:
        """A backing id for a file, 0 if there is none to be had."""
        request = bytearray(_MAP.pack(descriptor, 0, 0))
        try:
            # With a buffer that may be written to, the result is the call's own.
            return int(fcntl.ioctl(self._device, _BACKING_OPEN, request))
        except OSError as error:
            number = error.errno or errno.EIO
            if number in _FOR_GOOD:
                self._reason = _FOR_GOOD[number]
                log.info("no passthrough: %s", self._reason)
            else:
                log.warning("a file is opened without passthrough: %s", error)
            return 0

    def _forget(self, backing_id: int) -> None:
        try:
            fcntl.ioctl(self._device, _BACKING_CLOSE, struct.pack("=I", backing_id))
        except OSError as error:
            log.warning("backing id %d could not be released: %s", backing_id, error)


def set_backing_id(file_info: Any, backing_id: int) -> None:
    """Put a backing id where libfuse 3.17 has it: behind `poll_events`, which mfusepy takes for 64 bits."""
    place = ctypes.addressof(file_info) + type(file_info).poll_events.offset + 4
    ctypes.c_int32.from_address(place).value = backing_id


def _may_administer() -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(match and int(match[1], 16) >> _CAP_SYS_ADMIN & 1)


def _is_stacked(directory: Path) -> bool:
    """Whether a directory is on overlayfs, as in containers."""
    try:
        device = os.stat(directory).st_dev
    except (FileNotFoundError, NotADirectoryError):
        # Nothing is cached, and nothing is going to be.
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[2] == wanted:
            return fields[fields.index("-") + 1] == "overlay"
    return False
