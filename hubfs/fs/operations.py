"""The mfusepy adapter: calls the tree, turns every exception into an errno, logs, counts."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

# Before mfusepy is imported: it would take libfuse 2 where it finds one.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
import mfusepy

from hubfs.cache.entry import Readable
from hubfs.cache.state import Wait
from hubfs.errors import HubfsError
from hubfs.fs.parallel import ParallelLookups
from hubfs.fs.signals import pending_signal
from hubfs.fs.tree import Tree

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

#: Requests of readers that wait for the network each hold a thread of libfuse, and the kernel lets only so
#: many background reads (readahead) be in flight. Both must exceed what a crowd of readers can hold, or a
#: cached model would wait behind them.
THREADS: Final = 512
BACKGROUND: Final = 2048
#: Threads that are kept for the next requests.
IDLE_THREADS: Final = 32
_BLOCK: Final = 4096


def answers(function: F) -> F:
    """Decorate an operation: what it raises becomes the errno that the caller sees."""

    @functools.wraps(function)
    def wrapper(self: Operations, *args: Any) -> Any:
        try:
            return function(self, *args)
        except HubfsError as error:
            log.debug("%s%r: %s", function.__name__, args[:1], error)
            raise OSError(error.errno, str(error)) from error
        except OSError as error:
            if not error.errno:
                raise OSError(errno.EIO, str(error)) from error
            log.debug("%s%r: %s", function.__name__, args[:1], error)
            raise
        except Exception as error:
            log.exception("internal error in %s%r", function.__name__, args[:1])
            raise OSError(errno.EIO, repr(error)) from error

    return wrapper  # type: ignore[return-value]


class Operations(mfusepy.Operations):  # type: ignore[misc]
    """The calls that the kernel makes. The mount is read-only: the kernel answers EROFS by itself."""

    use_ns = True

    def __init__(self, tree: Tree, read_timeout: float, on_ready: Callable[[int], None]) -> None:
        """
        Args:
            read_timeout: seconds without progress after which a waiting reader gets EIO.
            on_ready: called once the kernel has accepted the mount, with libfuse's handle of it.
        """
        self._tree = tree
        self._timeout = read_timeout
        self._on_ready = on_ready
        self._parallel = ParallelLookups(mfusepy._libfuse, mfusepy.get_fuse_version(mfusepy._libfuse))
        self._handles = itertools.count(1)
        self._lock = threading.Lock()  # protects the two below
        self._open: dict[int, Readable] = {}
        self._listings: dict[int, list[tuple[str, dict[str, int], int]]] = {}

    @property
    def open_files(self) -> int:
        with self._lock:
            return len(self._open)

    # Not decorated: mfusepy looks for the name, and an error here must stop the mount.
    def init_with_config(self, conn: Any, config: Any) -> None:
        if conn is not None:
            conn.max_background = BACKGROUND
            conn.congestion_threshold = BACKGROUND * 3 // 4
        session = mfusepy._libfuse.fuse_get_context().contents.fuse
        if conn is not None:
            self._parallel.enable(conn, session)
        self._on_ready(session)

    @answers
    def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
        found = self._tree.attributes(path, self._wait())
        time_ns = int(found.mtime) * 10**9
        return {
            "st_ino": found.inode,
            "st_mode": found.mode,
            "st_nlink": found.links,
            "st_size": found.size,
            "st_blocks": -(-found.stored // 512),
            "st_blksize": _BLOCK,
            "st_uid": os.getuid(),
            "st_gid": os.getgid(),
            "st_atime": time_ns,
            "st_mtime": time_ns,
            "st_ctime": time_ns,
        }

    @answers
    def readlink(self, path: str) -> str:
        return self._tree.link_target(path)

    @answers
    def opendir(self, path: str) -> int:
        rows = self._tree.list(path, self._wait())
        listing = [(name, {"st_mode": mode, "st_ino": ino}, 0) for name, mode, ino in rows]
        number = next(self._handles)
        with self._lock:
            self._listings[number] = listing
        return number

    @answers
    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        with self._lock:
            return self._listings[fh]

    @answers
    def releasedir(self, path: str, fh: int) -> int:
        with self._lock:
            del self._listings[fh]
        return 0

    @answers
    def open(self, path: str, fi: Any) -> int:
        if fi.flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        file = self._tree.open(path, self._wait())
        number = next(self._handles)
        with self._lock:
            self._open[number] = file
        fi.fh = number
        fi.keep_cache = not file.direct
        fi.direct_io = file.direct
        return 0

    @answers
    def read(self, buffer: memoryview, offset: int, fi: Any) -> int:
        """Called by `_Fuse`, with libfuse's own buffer."""
        with self._lock:
            file = self._open[fi.fh]
        return file.read_into(buffer, offset, self._wait())

    @answers
    def release(self, path: str, fi: Any) -> int:
        with self._lock:
            file = self._open.pop(fi.fh)
        file.close()
        return 0

    @answers
    def statfs(self, path: str) -> dict[str, int]:
        blocks, free, files = self._tree.space(_BLOCK)
        return {
            "f_bsize": _BLOCK,
            "f_frsize": _BLOCK,
            "f_blocks": blocks,
            "f_bfree": free,
            "f_bavail": free,
            "f_files": files,
            "f_namemax": 255,
        }

    @answers
    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        # Asked for every file that is run or copied: no tree walk for names that hubfs never has.
        if not name.startswith("user.hubfs."):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        value = self._tree.extended_attributes(path).get(name)
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return value

    @answers
    def listxattr(self, path: str) -> list[str]:
        return list(self._tree.extended_attributes(path))

    def _wait(self) -> Wait:
        """How the caller of this very request waits."""
        caller = mfusepy.fuse_get_context()[2]
        checks = itertools.count(1)

        def interrupted() -> bool:
            if mfusepy._libfuse.fuse_interrupted():
                return True
            # The kernel does not pass on signals to readers whose pages are read ahead for them.
            return next(checks) % 4 == 0 and pending_signal(caller)

        return Wait(self._timeout, interrupted)


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """mfusepy's adapter, except that files are read straight into libfuse's buffer: its own way by a bytes
    object costs an allocation and a copy of each byte more, and with that half of the speed.
    """

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        buffer = (ctypes.c_char * size).from_address(ctypes.addressof(buf.contents))
        count: int = self.operations.read(memoryview(buffer).cast("B"), offset, fip.contents)
        return count


def serve(operations: Operations, mountpoint: str, *, source: str, allow_other: bool) -> None:
    """Mount and answer the kernel until unmounted. Returns when the mount is gone.

    Raises:
        RuntimeError: libfuse could not mount; it has written why to standard error.
    """
    options: dict[str, Any] = {
        "subtype": "hubfs",
        # A comma would begin the next mount option.
        "fsname": source.replace(",", "_"),
        "ro": True,
        "nosuid": True,
        "nodev": True,
        "default_permissions": True,
        "use_ino": True,
        "attr_timeout": 3600,
        "entry_timeout": 3600,
        "negative_timeout": 1,
    }
    if allow_other:
        options["allow_other"] = True
    if mfusepy.get_fuse_version(mfusepy._libfuse) >= (3, 12):
        # Older ones do not know the option; they begin as many threads as there are requests.
        options["max_threads"] = THREADS
        options["max_idle_threads"] = IDLE_THREADS
    mfusepy._libfuse.fuse_interrupted.restype = ctypes.c_int
    _Fuse(operations, mountpoint, raw_fi=True, foreground=True, **options)


def end(session: int) -> None:
    """Make `serve` return. The main thread must be woken by a signal afterwards.

    Args:
        session: libfuse's handle of the mount, as `on_ready` was given it.
    """
    mfusepy._libfuse.fuse_exit(ctypes.c_void_p(session))
