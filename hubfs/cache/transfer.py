"""The one running effort that brings a version in: lock, download, extract, check, publish."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from hubfs.cache.arrival import Arrival
from hubfs.cache.landing import acquire, publish
from hubfs.cache.layout import DownloadLock
from hubfs.cache.manifest import Manifest
from hubfs.errors import DamagedError, DiskFullError, HostileError, HubfsError, StoppedError, from_os_error
from hubfs.hubs.base import Archive, Origin
from hubfs.transfer.archive import Limits, extract_any
from hubfs.transfer.download import Download, in_background
from hubfs.transfer.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

    from hubfs.cache.layout import Layout
    from hubfs.config import Settings
    from hubfs.net import Net

log = logging.getLogger(__name__)

#: Times the archive is brought in from zero before a damaged one is believed to be damaged at the hub.
ATTEMPTS = 2


class Outcome(Protocol):
    """Who is told of a transfer's steps (the entry). Called from the transfer's thread."""

    changed: threading.Condition

    def find_on_disk(self) -> Manifest | None: ...

    def arriving(self, arrival: Arrival) -> None: ...

    def arrived(self, manifest: Manifest, directory: Path) -> None: ...

    def published(self, directory: Path) -> None: ...

    def waiting(self, grown: int) -> None: ...


class Transfer:
    """Brings one version into the cache. `run` is called once, in a thread of its own."""

    def __init__(
        self, handle: str, key: str, layout: Layout, net: Net, settings: Settings, outcome: Outcome
    ) -> None:
        self.handle = handle
        self._key = key
        self._layout = layout
        self._net = net
        self._settings = settings
        self._outcome = outcome
        self._stopped = threading.Event()
        self._download: Download | None = None
        self._attempt_over = threading.Event()

    def stop(self) -> None:
        """Make `run` clean up and end soon."""
        self._stopped.set()
        self._end_attempt()

    def run(self, locate: Callable[[], Origin]) -> None:
        """Bring it in, unless it turns out to be in the cache, or to have a listing.

        Raises:
            HubfsError: nothing was brought in, and nothing of it is left on disk.
        """
        try:
            self._layout.create(self._settings.trust_cache_dir)
            lock = acquire(self.handle, self._key, self._layout, self._settings, self._outcome, self._stopped)
            if lock is None:
                return
            try:
                origin = locate()
                # A listing's files are brought in another way, without the lock.
                if isinstance(origin, Archive):
                    self._bring_in(lock, origin)
            finally:
                lock.release()
        except OSError as error:
            raise from_os_error(error, self.handle, "writing to the cache") from error

    def _bring_in(self, lock: DownloadLock, origin: Archive) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            if self._stopped.is_set():
                raise StoppedError(f"{self.handle}: the transfer was stopped")
            try:
                self._attempt(lock, origin)
                return
            except HostileError:
                raise
            except DamagedError as error:
                if attempt == ATTEMPTS:
                    raise
                log.warning("%s; starting again from zero", error)
                shutil.rmtree(lock.tmp)
                # What the hub said of size and ETag when it was asked may no longer hold.
                origin = dataclasses.replace(origin, size=None, etag=None)

    def _attempt(self, lock: DownloadLock, origin: Archive) -> None:
        """Bring all in, once, and publish it."""
        lock.tmp.mkdir(mode=0o755)
        arrival = Arrival(lock.tmp, self._outcome.changed, self._settings.verified_only)
        self._outcome.arriving(arrival)
        started = time.monotonic()
        with closing(Storage()) as storage:
            try:
                self._receive(origin, arrival, storage)
            except HubfsError as error:
                arrival.fail(error)
                raise
            except OSError as error:
                failure = from_os_error(error, self.handle, "writing to the cache")
                arrival.fail(failure)
                raise failure from error
            manifest = arrival.manifest(self.handle)
            self._outcome.arrived(manifest, lock.tmp)
            self._publish(lock, manifest, storage)
        log.info(
            "%s: %d bytes in %d files, %.1f s", self.handle, manifest.size, len(manifest.files),
            time.monotonic() - started,
        )  # fmt: skip

    def _receive(self, origin: Archive, arrival: Arrival, storage: Storage) -> None:
        """Download, inflate and write, each in a thread of its own, until all has arrived and was checked."""
        into = arrival.directory_path
        free = shutil.disk_usage(into).free
        if origin.size is not None and origin.size > free:
            raise DiskFullError(
                f"{self.handle}: {origin.size} bytes to download, {free} bytes free in {self._layout.root}",
                hint="free some space or choose another directory with --cache-dir",
            )
        over = self._attempt_over = threading.Event()
        if self._stopped.is_set():
            over.set()
        download = self._download = Download(self._net, origin, self._settings, over, self._progress(arrival))
        limits = Limits(self._settings.max_model_files, self._settings.max_model_size)
        # An archive that cannot be unpacked as it comes waits there: who watches the directory sees it grow.
        spool = into / f".hubfs-{uuid.uuid4().hex}"
        with closing(in_background(iter(download), self._end_attempt)) as chunks:
            extract_any(
                chunks, into, arrival, storage, limits,
                name=self.handle, spool=spool, stop=self._end_attempt,
            )  # fmt: skip

    def _end_attempt(self) -> None:
        self._attempt_over.set()
        download = self._download
        if download is not None:
            download.abort()

    def _progress(self, arrival: Arrival) -> Callable[[int, int | None], None]:
        last = time.monotonic()

        def on_bytes(received: int, total: int | None) -> None:
            nonlocal last
            arrival.on_bytes(received, total)
            if self._settings.download_progress and time.monotonic() - last > 5:
                last = time.monotonic()
                log.info("%s: %d of %s bytes", self.handle, received, "?" if total is None else total)

        return on_bytes

    def _publish(self, lock: DownloadLock, manifest: Manifest, storage: Storage) -> None:
        try:
            storage.sync(lock.tmp)
            model = publish(self._layout, self._key, self.handle, lock, lock.tmp, manifest)
        except OSError as error:
            raise from_os_error(error, self.handle, "publishing it in the cache") from error
        self._outcome.published(model)
