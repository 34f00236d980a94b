"""What a store does with the shared tier: looks there first, and puts there what it brought in itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

from hubfs.cache.holder import Lease
from hubfs.cache.manifest import Manifest
from hubfs.cache.tier import SharedTier
from hubfs.config import LoadFormat, Settings
from hubfs.errors import HubfsError, StoppedError
from hubfs.hubs.base import Archive, Origin
from hubfs.hubs.object_store import ObjectStores

log = logging.getLogger(__name__)

#: Versions that are put into the tier at the same time.
UPLOADS: Final = 2
#: Seconds between two looks at whether somebody still waits for them.
POLL: Final = 0.2
#: Seconds for which a lease is held of a version that somebody only looked at: others may want it now.
IDLE_LEASE: Final = 10.0


class Fleet:
    """This machine's part. Safe to use from many threads; nothing here waits for the network but `locate`."""

    def __init__(self, settings: Settings, *, keeps: bool) -> None:
        """
        Args:
            keeps: versions are brought into this machine's cache, and so can be put into the tier.
        """
        self.url = settings.shared_cache
        self._leads = keeps and (settings.read_ahead or settings.load_format is LoadFormat.COMPRESSED)
        self._stores = ObjectStores(settings)
        self._tier = SharedTier(self.url, self._stores, settings)
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(UPLOADS, "hubfs-share")
        self._lock = threading.Lock()  # protects what follows
        self._leases: dict[str, Lease] = {}
        self._timers: dict[str, threading.Timer] = {}
        self._shared: set[str] = set()
        self._uploads: set[Future[None]] = set()

    @property
    def uploads(self) -> int:
        """Versions that are being put into the tier, or wait for that."""
        with self._lock:
            return len(self._uploads)

    def locate(
        self, handle: str, key: str, ask_hub: Callable[[], Origin], waiting: Callable[[int], None]
    ) -> Origin:
        """Where the version is: in the tier, or at its hub.

        Args:
            waiting: told a number that changes while another machine brings it in.

        Raises:
            HubfsError: from `ask_hub`, or because hubfs is being stopped.
        """
        located = self._tier.locate(
            handle, key, ask_hub, lease=self._leads, cancel=self._stopping, waiting=waiting
        )
        with self._lock:
            (self._shared.add if located.shared else self._shared.discard)(key)
            if located.lease is not None:
                self._leases[key] = located.lease
                timer = self._timers[key] = threading.Timer(IDLE_LEASE, self._let_go, (key,))
                timer.daemon = True
                timer.start()
        return located.origin

    def note_running(self, key: str, runs: bool) -> None:
        """A version is being brought in, or not any more, whole or not."""
        with self._lock:
            timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if not runs:
            self._let_go(key)

    def note_published(self, handle: str, key: str, directory: Path, manifest: Manifest) -> None:
        """A version is whole in this machine's cache: put it into the tier, unless it came from there."""
        with self._lock:
            lease = self._leases.pop(key, None)
            shared = key in self._shared
            self._shared.discard(key)
        if shared or not self._leads:
            return
        self._submit(self._put, handle, key, lease, directory, manifest)

    def finish(self, stop: threading.Event) -> None:
        """Wait until all that this machine brought in is in the tier, or could not be put there.

        Args:
            stop: ends the wait.
        """
        while not stop.is_set():
            with self._lock:
                uploads = list(self._uploads)
            if not uploads:
                return
            wait(uploads, POLL, FIRST_COMPLETED)

    def begin_close(self) -> None:
        """Give up what is being put into the tier: nothing of it stays there."""
        self._stopping.set()
        with self._lock:
            timers, self._timers = list(self._timers.values()), {}
        for timer in timers:
            timer.cancel()

    def close(self) -> None:
        """Give all leases back, and wait for that."""
        self.begin_close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tier.close()
        self._stores.close()

    # ---- within

    def _submit(self, function: Callable[..., None], *args: object) -> None:
        try:
            upload = self._pool.submit(function, *args)
        except RuntimeError:
            log.debug("hubfs is being stopped: the shared tier is left as it is")
            return
        with self._lock:
            self._uploads.add(upload)
        upload.add_done_callback(self._forget)

    def _forget(self, upload: Future[None]) -> None:
        with self._lock:
            self._uploads.discard(upload)

    def _let_go(self, key: str) -> None:
        """Others may bring it in."""
        with self._lock:
            lease = self._leases.pop(key, None)
        if lease is not None:
            self._submit(lease.release)

    def _put(self, handle: str, key: str, lease: Lease | None, directory: Path, manifest: Manifest) -> None:
        try:
            if lease is None:
                lease = self._lease_for(handle, key)
            if lease is not None:
                self._tier.put(lease, directory, manifest.files, self._stopping)
        except StoppedError:
            log.info("%s: it is not in the shared tier yet: hubfs is being stopped", handle)
        except HubfsError as error:
            log.warning("%s: it could not be put into the shared tier: %s", handle, error)
        except Exception:
            log.exception("%s: internal error while it was put into the shared tier", handle)

    def _lease_for(self, handle: str, key: str) -> Lease | None:
        """A lease for a version that is here already; `None` if it is in the tier by now."""
        # Nobody is asked where it is, so what stands for that says nothing.
        here = Archive(handle, "")
        located = self._tier.locate(
            handle, key, lambda: here, lease=True, cancel=self._stopping, waiting=lambda moved: None
        )
        return located.lease
