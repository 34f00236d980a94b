"""The mfusepy adapter: calls the tree, turns every exception into an errno, logs, counts."""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from hubfs.cache.readable import Readable, Wait
from hubfs.errors import HubfsError
from hubfs.fs import libfuse
from hubfs.fs.forgetting import Forgetting
from hubfs.fs.parallel import ParallelLookups
from hubfs.fs.passthrough import ReadMode, ReadModes, set_backing_id
from hubfs.fs.signals import pending_signal
from hubfs.fs.tree import Attributes, Listing, Rows, Tree

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

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


@dataclass(frozen=True)
class _Opened:
    """An open file, as `open` answered it."""

    path: str
    file: Readable
    mode: ReadMode


class Operations:
    """The calls that the kernel makes; mfusepy finds them by their names.

    The mount is read-only: the kernel answers EROFS by itself.
    """

    use_ns = True

    def __init__(
        self,
        tree: Tree,
        read_modes: ReadModes,
        cache: Path,
        read_timeout: float,
        on_ready: Callable[[int], None],
    ) -> None:
        """
        Args:
            cache: the directory that files are read from.
            read_timeout: seconds without progress after which a waiting reader gets EIO.
            on_ready: called once the kernel has accepted the mount, with libfuse's handle of it.
        """
        self._tree = tree
        self._read_modes = read_modes
        self._cache = cache
        self._timeout = read_timeout
        self._on_ready = on_ready
        self._session = 0
        self._forgetting = Forgetting(lambda path: libfuse.forget(self._session, path))
        self._parallel = ParallelLookups(libfuse.library, libfuse.library_version())
        self._handles = itertools.count(1)
        self._lock = threading.Lock()  # protects the two below
        self._open: dict[int, _Opened] = {}
        self._listings: dict[int, Listing] = {}

    @property
    def open_files(self) -> int:
        with self._lock:
            return len(self._open)

    def outdated(self, paths: Sequence[str]) -> None:
        """Files have changed at the hub: have the kernel forget what it knows of these paths."""
        self._forgetting.tell(paths)

    def end(self) -> None:
        """No more is told to the kernel: the session ends."""
        self._forgetting.close()

    # When libfuse ends by itself. mfusepy looks for the name.
    def destroy(self, path: str) -> None:
        self.end()

    # Not decorated: mfusepy looks for the name, and an error here must stop the mount.
    def init_with_config(self, conn: Any, config: Any) -> None:
        session = self._session = libfuse.session()
        if conn is not None:
            conn.max_background = libfuse.BACKGROUND
            conn.congestion_threshold = libfuse.BACKGROUND * 3 // 4
            device = libfuse.device_of(session)
            self._parallel.enable(conn, session)
            self._read_modes.negotiate(conn, libfuse.library_version(), device, self._cache)
        self._on_ready(session)

    @answers
    def getattr(self, path: str) -> Attributes:
        return self._tree.attributes(path, self._wait())

    @answers
    def readlink(self, path: str) -> str:
        return self._tree.link_target(path)

    @answers
    def opendir(self, path: str, fi: Any) -> int:
        listing = self._tree.list(path, self._wait())
        number = next(self._handles)
        with self._lock:
            self._listings[number] = listing
        fi.fh = number
        fi.cache_readdir = fi.keep_cache = listing.settled
        return 0

    @answers
    def readdir(self, fi: Any) -> tuple[Rows, bool]:
        """The rows, and whether their attributes are whole."""
        with self._lock:
            listing = self._listings[fi.fh]
        # Here, as this may be when they are put together, and fail.
        return listing.rows, listing.settled

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
        mode, backing_id = self._read_modes.opened(path, file)
        number = next(self._handles)
        with self._lock:
            self._open[number] = _Opened(path, file, mode)
        fi.fh = number
        # The kernel refuses passthrough together with either.
        fi.keep_cache = mode is ReadMode.CACHED
        fi.direct_io = mode is ReadMode.DIRECT
        if backing_id:
            set_backing_id(fi, backing_id)
        return 0

    @answers
    def read(self, buffer: memoryview, offset: int, fi: Any) -> int:
        """With libfuse's own buffer."""
        with self._lock:
            file = self._open[fi.fh].file
        return file.read_into(buffer, offset, self._wait())

    @answers
    def release(self, path: str, fi: Any) -> int:
        with self._lock:
            opened = self._open.pop(fi.fh)
        self._read_modes.closed(opened.path, opened.mode)
        opened.file.close()
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
        caller = libfuse.caller()
        checks = itertools.count(1)

        def interrupted() -> bool:
            if libfuse.interrupted():
                return True
            # The kernel does not pass on signals to readers whose pages are read ahead for them.
            return next(checks) % 4 == 0 and pending_signal(caller)

        return Wait(self._timeout, interrupted)
