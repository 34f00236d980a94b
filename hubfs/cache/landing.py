"""How a version gets its name in the cache: under tensorflow_hub's lock, by one rename."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from hubfs.cache.layout import DownloadLock, LockWatch, is_present, remove, write_descriptor
from hubfs.cache.manifest import Manifest
from hubfs.errors import StoppedError

if TYPE_CHECKING:
    from hubfs.cache.layout import Layout
    from hubfs.config import Settings

log = logging.getLogger(__name__)

#: Seconds between two looks at somebody else's lock.
LOCK_POLL: Final = 0.2


class Waiting(Protocol):
    """Who wants the lock (the entry)."""

    def find_on_disk(self) -> Manifest | None:
        """The version, if somebody has published it; it is taken as it is then."""

    def waiting(self, grown: int) -> None:
        """Somebody else has the lock, and so much of the version."""


class Seeker:
    """Tries to get the lock of a key, again and again, and tells when the version is there instead.

    Attributes:
        found: the version turned out to be in the cache.
    """

    def __init__(self, handle: str, key: str, layout: Layout, settings: Settings, who: Waiting) -> None:
        self.found = False
        self._handle = handle
        self._key = key
        self._layout = layout
        self._who = who
        self._watch = LockWatch(layout, key, settings.lock_timeout)
        self._announced = False

    def look(self) -> DownloadLock | None:
        """The lock, if nobody else has it and the version is not there. To be called every `LOCK_POLL`.

        Raises:
            OSError: the cache cannot be written.
        """
        if self._is_there():
            return None
        lock = DownloadLock(self._layout, self._key)
        if lock.try_acquire():
            # Somebody may have finished between the look and the lock.
            if not self._is_there():
                return lock
            lock.release()
            return None
        if not self._announced:
            log.info("%s: another process is downloading it; waiting for that", self._handle)
            self._announced = True
        if self._watch.is_stale():
            log.warning("%s: its lock was abandoned, taking it over", self._handle)
            self._watch.break_lock()
        self._who.waiting(self._watch.size)
        return None

    def _is_there(self) -> bool:
        self.found = self._who.find_on_disk() is not None
        return self.found


def acquire(
    handle: str, key: str, layout: Layout, settings: Settings, who: Waiting, stopped: threading.Event
) -> DownloadLock | None:
    """The lock of a key, waited for; `None` if the version turned out to be in the cache.

    Raises:
        StoppedError: `stopped` was set meanwhile.
        OSError: the cache cannot be written.
    """
    seeker = Seeker(handle, key, layout, settings, who)
    while True:
        lock = seeker.look()
        if lock is not None or seeker.found:
            return lock
        if stopped.wait(LOCK_POLL):
            raise StoppedError(f"{handle}: stopped while another process was downloading it")


def set_times(directory: Path, manifest: Manifest) -> None:
    """Give files and directories the publisher's times, the directories last."""
    for path, info in manifest.files.items():
        os.utime(directory / path, (info.mtime, info.mtime), follow_symlinks=False)
    for path in sorted(manifest.directories, reverse=True):
        mtime = manifest.directories[path]
        os.utime(directory / path, (mtime, mtime), follow_symlinks=False)
    os.utime(directory, (manifest.mtime, manifest.mtime))


def publish(
    layout: Layout, key: str, handle: str, lock: DownloadLock, directory: Path, manifest: Manifest
) -> Path:
    """Make a version appear in the cache, whole, by one rename; returns its directory there.

    Args:
        directory: has all of it, on stable storage.

    Raises:
        StoppedError: another process took the lock over.
        OSError: it could not be done; nothing of it is seen.
    """
    model = layout.model(key)
    write_descriptor(layout.descriptor(key), handle)
    if not lock.is_ours:
        # Another process thought us dead and took over: it publishes the same files.
        raise StoppedError(f"{handle}: another process took the download over")
    if is_present(model):
        aside = layout.outgoing(key)
        model.rename(aside)
        directory.rename(model)
        remove(aside)
    else:
        directory.rename(model)
    _sync_directory(layout.root)
    # After the rename: a manifest must never speak for another directory than it was made of.
    try:
        manifest.save(layout.manifest(key), model)
    except OSError as error:
        log.warning("%s: its manifest cannot be kept: %s", handle, error)
    return model


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
