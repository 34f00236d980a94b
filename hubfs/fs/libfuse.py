"""Drives libfuse through mfusepy, and adds what mfusepy leaves out of it."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any, Final

# Before mfusepy is imported: it would take libfuse 2 where it finds one.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
import mfusepy

from hubfs.fs.passthrough import version

if TYPE_CHECKING:
    from hubfs.fs.operations import Operations
    from hubfs.fs.tree import Attributes

#: Requests of readers that wait for the network each hold a thread of libfuse, and the kernel lets only so
#: many background reads (readahead) be in flight. Both must exceed what a crowd of readers can hold, or a
#: cached model would wait behind them.
THREADS: Final = 512
BACKGROUND: Final = 2048

#: Of libfuse's fuse.h: the kernel wants attributes with the names; they come with a name.
_READDIR_PLUS: Final = 1 << 0
_FILL_DIR_PLUS: Final = 1 << 1

library: Final[Any] = mfusepy._libfuse
#: The same for calls that take no time: a thread that gives up the GIL for one waits until it gets it back.
_quick: Final[Any] = ctypes.PyDLL(library._name, handle=library._handle)
_quick.fuse_interrupted.restype = ctypes.c_int
_quick.fuse_get_context.restype = ctypes.POINTER(mfusepy.fuse_context)
library.fuse_pkgversion.restype = ctypes.c_char_p
library.fuse_get_session.restype = ctypes.c_void_p


def library_version() -> tuple[int, ...]:
    """libfuse's own, such as (3, 17, 2)."""
    return version(library.fuse_pkgversion().decode())


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """mfusepy's adapter, with some of its callbacks made anew."""

    operations: Operations

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known = threading.local()
        self._known.thread = True  # the main one
        # Only where threads stay: the state of one that ends would stay too, and never be used again.
        self._keeps_threads = "max_idle_threads" in options
        super().__init__(*args, **options)

    def _wrapper(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Called first in each callback.

        ctypes gives a thread of libfuse a Python thread state for the length of one callback. Making and
        removing it takes longer than most callbacks: a `stat` that is asked of the daemon took 45 µs, not 26.
        With one use more than that, it stays. It cannot be given back when the thread ends: by then glibc has
        cleared the place where Python looks for it.
        """
        if self._keeps_threads and not hasattr(self._known, "thread"):
            self._known.thread = True
            ctypes.pythonapi.PyGILState_Ensure()
        return super()._wrapper(func, *args, **kwargs)

    def getattr_fuse_3(self, path: bytes, buf: Any, fip: Any) -> int:
        """At once as libfuse's structure: mfusepy's way by a dictionary takes three times as long."""
        buf[0] = as_stat(self.operations.getattr(path.decode(self.encoding, self.errors)))
        return 0

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        """Straight into libfuse's buffer: mfusepy's own way by a bytes object costs an allocation and a copy
        of each byte more, and with that half of the speed.
        """
        buffer = (ctypes.c_char * size).from_address(ctypes.addressof(buf.contents))
        count: int = self.operations.read(memoryview(buffer).cast("B"), offset, fip.contents)
        return count

    def opendir(self, path: bytes, fip: Any) -> int:
        """With the flags that let the kernel keep a listing."""
        self.operations.opendir(path.decode(self.encoding, self.errors), fip.contents)
        return 0

    def readdir_fuse_3(
        self, path: bytes | None, buf: Any, filler: Any, offset: int, fip: Any, flags: int
    ) -> int:
        """From an offset on, and with all attributes if the kernel wants them and they are known: that saves
        it a look-up of each name.
        """
        rows, settled = self.operations.readdir(fip.contents)
        plus = _FILL_DIR_PLUS if settled and flags & _READDIR_PLUS else 0
        for number, (name, attributes) in enumerate(rows[offset:], offset + 1):
            if plus:
                stat = as_stat(attributes)
            else:
                stat = mfusepy.c_stat(st_mode=attributes.mode, st_ino=attributes.inode)
            if filler(buf, name.encode(self.encoding, self.errors), stat, number, plus):
                break
        return 0


def as_stat(attributes: Attributes) -> Any:
    """libfuse's `struct stat` of a node."""
    time = mfusepy.c_timespec(int(attributes.mtime), 0)
    return mfusepy.c_stat(
        st_ino=attributes.inode,
        st_mode=attributes.mode,
        st_nlink=attributes.links,
        st_size=attributes.size,
        st_blocks=-(-attributes.stored // 512),
        st_blksize=4096,
        st_uid=os.getuid(),
        st_gid=os.getgid(),
        st_atimespec=time,
        st_mtimespec=time,
        st_ctimespec=time,
    )


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
    if library_version() >= (3, 12):
        # Older ones do not know the option; they begin as many threads as there are requests.
        options["max_threads"] = THREADS
        options["max_idle_threads"] = THREADS
    _Fuse(operations, mountpoint, raw_fi=True, foreground=True, **options)


def end(session: int) -> None:
    """Make `serve` return. The main thread must be woken by a signal afterwards.

    Args:
        session: libfuse's handle of the mount, as `on_ready` was given it.
    """
    library.fuse_exit(ctypes.c_void_p(session))


def forget(session: int, path: str) -> None:
    """Have the kernel forget attributes and pages of a path. Waits for reads of it that are under way.

    Raises:
        OSError: the kernel does not know it.
    """
    code = library.fuse_invalidate_path(ctypes.c_void_p(session), os.fsencode(path))
    if code:
        raise OSError(-code, os.strerror(-code), path)


def session() -> int:
    """libfuse's handle of the mount; only within a callback."""
    return int(library.fuse_get_context().contents.fuse)


def caller() -> int:
    """Process id of the one whose request is answered; only within a callback."""
    return int(_quick.fuse_get_context().contents.pid)


def interrupted() -> bool:
    """Whether the kernel wants no answer any more; only within a callback."""
    return bool(_quick.fuse_interrupted())


def device_of(session: int) -> int:
    """The descriptor of /dev/fuse that a mount is served through."""
    inner = library.fuse_get_session(ctypes.c_void_p(session))
    return int(library.fuse_session_fd(ctypes.c_void_p(inner)))
