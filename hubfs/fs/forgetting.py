"""Has the kernel forget what it knows of files that have changed at the hub.

It keeps names, sizes, times and pages for long, since versions never change; a directory of a bucket may all
the same. Without this, new readers would get the new bytes under the old size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)


class Forgetting:
    """Tells the kernel, in a thread of its own.

    The kernel waits for reads of such a file that are under way before it lets go of its pages. So nobody
    whose answer such a read needs may do this, nor hold a lock meanwhile; and it is done for files only
    whose reads all fail from then on.
    """

    def __init__(self, forget: Callable[[str], None]) -> None:
        """
        Args:
            forget: tells the kernel of one path below the mount point; may wait.
        """
        self._forget = forget
        self._pool = ThreadPoolExecutor(1, "hubfs-forget")
        self._closing = threading.Event()

    def tell(self, paths: Sequence[str]) -> None:
        """Have paths forgotten soon."""
        try:
            self._pool.submit(self._tell, paths)
        except RuntimeError:
            log.debug("the mount is being taken down: nothing needs to be forgotten")

    def close(self) -> None:
        """Tell the kernel nothing more, from the return of this on. Reads must have been let go before."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _tell(self, paths: Sequence[str]) -> None:
        for path in paths:
            if self._closing.is_set():
                return
            try:
                self._forget(path)
            except OSError as error:
                log.debug("%s is not known to the kernel: %s", path, error)
            except Exception:
                log.exception("internal error while the kernel was to forget %s", path)
