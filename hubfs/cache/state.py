"""What is known of one version, and who waits for more."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from hubfs.cache.arrival import Arrival
from hubfs.cache.listed import Listed
from hubfs.cache.manifest import DirectoryInfo, Manifest
from hubfs.cache.readable import Wait
from hubfs.cache.transfer import Transfer
from hubfs.errors import (
    ChangedError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    OfflineError,
    StalledError,
    StoppedError,
)
from hubfs.handles import version_of
from hubfs.hubs.base import Listing

if TYPE_CHECKING:
    from hubfs.cache.store import Store
    from hubfs.hubs.base import Origin
    from hubfs.transfer.fetch import Awaited

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds for what has come of a version to reach the disk, when hubfs is stopped.
END_TIMEOUT: Final = 20.0
_BUCKETS: Final = ("gs://", "s3://")
#: Seconds between two looks at whether a waiting reader was interrupted.
POLL: Final = 0.05


class State(str, enum.Enum):
    """What `hubfs ls`, status.json and `user.hubfs.state` show."""

    ABSENT = "absent"
    LOCATED = "located"
    TRANSFERRING = "transferring"
    PARTIAL = "partial"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Snapshot:
    """An entry's state at one moment, for people.

    Attributes:
        origin: where its bytes come from, as far as that is known: a place in a bucket, or `archive`.
    """

    handle: str
    state: str
    origin: str | None
    received: int
    total: int | None
    written: int
    rate: float
    waiting: int
    error: HubfsError | None


class EntryState:
    """One version's state. Safe to use from many threads.

    `EntryJobs` adds what finds it and brings it in, `Entry` what readers do with it.
    """

    def __init__(self, handle: str, key: str, store: Store) -> None:
        self.handle = handle
        self.key = key
        self._store = store
        #: Notified at each change. Its lock protects all of the attributes below.
        self.changed = threading.Condition(threading.Lock())
        self._manifest: Manifest | None = None
        self._directory: Path | None = None
        self._origin: Origin | None = None
        #: What a listing says, from the moment that it is the origin.
        self._listed_manifest: Manifest | None = None
        #: It had a listing, even if that is of no use any more: what was below its path is so still.
        self._was_listed = False
        self._listed: Listed | None = None
        self._beginning = False
        self._arrival: Arrival | None = None
        self._transfer: Transfer | None = None
        self._locating = False
        self._error: HubfsError | None = None
        self._error_until = 0.0
        self._progress = 0
        self._grown_elsewhere = 0
        self._waiting = 0
        self._opened = 0
        #: What was told of directories before all was known of them. It stays so: tools take a directory
        #: whose times change while they read it for one that is being written to.
        self._shown_early: dict[str, DirectoryInfo] = {}
        #: Files of which somebody was given bytes by an attempt that failed: the kernel may hold such bytes.
        self._tainted: set[str] = set()
        self._used = 0.0
        self.touched = time.monotonic()

    def peek(self) -> Manifest | None:
        """The manifest if the version is in the cache. Starts nothing."""
        self._settle()
        with self.changed:
            return self._manifest

    def known_manifest(self) -> Manifest | None:
        """The manifest if it is known, be the version in the cache or not. Starts nothing."""
        self._settle()
        with self.changed:
            return self._manifest or self._listed_manifest

    def is_under_way(self) -> bool:
        """Whether its bytes are here or coming."""
        with self.changed:
            return bool(self._manifest or self._transfer or self._listed_manifest or self._was_listed)

    def snapshot(self) -> Snapshot:
        """For status and extended attributes."""
        with self.changed:
            arrival, listed, listing = self._arrival, self._listed, self._listed_manifest
            failed = self._error if time.monotonic() < self._error_until else None
            received = arrival.received if arrival else 0
            total = arrival.total if arrival else None
            if listed is not None and listing is not None:
                received, total = listed.received, listing.size
            return Snapshot(
                self.handle,
                self._state(failed).value,
                self._origin_in_words(),
                received,
                total,
                arrival.written if arrival else received,
                arrival.rate() if arrival else 0.0,
                self._waiting,
                failed,
            )

    def _origin_in_words(self) -> str | None:
        if self._origin is None:
            return None
        return self._origin.where if isinstance(self._origin, Listing) else "archive"

    def _state(self, failed: HubfsError | None) -> State:
        if self._manifest is not None:
            return State.COMPLETE
        if self._transfer is not None or (self._listed is not None and self._listed.is_filling):
            return State.TRANSFERRING
        if self._listed is not None and self._listed.received:
            return State.PARTIAL
        if failed is not None:
            return State.FAILED
        return State.LOCATED if self._origin else State.ABSENT

    @property
    def is_idle(self) -> bool:
        """Whether the entry may be forgotten: nothing runs, waits or is open."""
        with self.changed:
            busy = self._transfer or self._locating or self._waiting or self._opened or self._tainted
            busy = busy or self._beginning or (self._listed is not None and self._listed.is_filling)
            # By what is known of an unversioned model, paths in it are told from models.
            busy = busy or (self._listed_manifest is not None and version_of(self.handle) is None)
            return not busy and time.monotonic() >= self._error_until

    def stop(self) -> None:
        """End what runs for it."""
        with self.changed:
            transfer, listed = self._transfer, self._listed
            self.changed.notify_all()
        if transfer is not None:
            transfer.stop()
        if listed is not None:
            listed.close()

    def wait_ended(self) -> None:
        """Wait until nothing of it runs any more, after `stop`."""
        with self.changed:
            self.changed.wait_for(lambda: not self._listed and not self._beginning, END_TIMEOUT)

    def find_on_disk(self) -> Manifest | None:
        found = self._store.find_on_disk(self)
        if found is None:
            return None
        manifest, directory = found
        self._check_unchanged(manifest)
        self._become_complete(manifest, directory)
        self._store.index.add(directory.name, self.handle)
        return manifest

    # ---- within, for those who build on this

    def _settle(self) -> None:
        """See whether the version is in the cache, if that is not known yet."""
        self.touched = time.monotonic()
        with self.changed:
            if self._manifest or self._transfer or self._listed:
                return
            if time.monotonic() < self._error_until and isinstance(self._error, ChangedError):
                return
        self._look_on_disk()

    def _look_on_disk(self) -> None:
        try:
            self.find_on_disk()
        except ChangedError as error:
            with self.changed:
                self._fail(error)

    def until_there(self, awaited: Awaited, check: Callable[[], None], wait: Wait) -> None:
        """Wait for a range of a file.

        Args:
            check: raises if no more of it can be read.

        Raises:
            HubfsError: what `check` raises, or why the range cannot be had, or why the wait ended.
        """

        def ready() -> bool | None:
            check()
            return awaited.ready()

        def pause(seconds: float) -> None:
            # Woken alone: many read at the same time, and something comes a thousand times a second.
            self.changed.release()
            try:
                awaited.pause(seconds)
            finally:
                self.changed.acquire()

        self.until(ready, wait, pause)

    def until(
        self, ready: Callable[[], T | None], wait: Wait, pause: Callable[[float], object] | None = None
    ) -> T:
        """Call `ready` (under the lock) until it gives something.

        Args:
            pause: waits for a change, so many seconds at most; by default for one of the entry.

        Raises:
            HubfsError: what `ready` raises, or why the wait ended.
        """
        with self.changed:
            self._waiting += 1
            try:
                seen, deadline = -1, 0.0
                while True:
                    found = ready()
                    if found is not None:
                        return found
                    if wait.interrupted():
                        raise InterruptedWait(f"{self.handle}: the reader was interrupted")
                    if self._store.closed:
                        raise StoppedError(f"{self.handle}: hubfs is being stopped")
                    progress = self._progress + (self._arrival.progress if self._arrival else 0)
                    if progress != seen:
                        seen, deadline = progress, time.monotonic() + wait.timeout
                    elif time.monotonic() > deadline:
                        raise StalledError(
                            f"{self.handle}: nothing arrived for {wait.timeout:g} s",
                            hint="see `hubfs status`",
                        )
                    (pause or self.changed.wait)(POLL)
            finally:
                self._waiting -= 1

    def _raise_failure(self) -> None:
        if self._error is not None and time.monotonic() < self._error_until:
            # One instance is raised in many threads: without this it would collect all their frames.
            raise self._error.with_traceback(None)

    def _fail(self, error: HubfsError) -> None:
        self._error = error
        self._error_until = time.monotonic() + error.remember
        if isinstance(error, NotFoundError):
            self._was_listed = False
        if not isinstance(error, StoppedError):
            asked_for = isinstance(error, (NotFoundError, OfflineError))
            log.log(logging.INFO if asked_for else logging.ERROR, "%s", error)
            self._store.note_failure(self.handle, error)
        self._moved()

    def _become_complete(self, manifest: Manifest, directory: Path) -> None:
        with self.changed:
            if self._arrival is not None:
                self._arrival.verified = True
            self._manifest, self._directory, self._error = manifest, directory, None
            self._listed_manifest = None
            self._moved()

    def _check_unchanged(self, manifest: Manifest) -> None:
        """An unversioned handle keeps its meaning while it is mounted: kernel caches hold its bytes.

        A directory of a bucket has no versions, so it may change; whoever has it open is told.
        """
        if self.handle.startswith(_BUCKETS):
            return
        first = self._store.first_served(self.handle, manifest)
        if not first.same_content(manifest):
            raise ChangedError(
                f"{self.handle}: the hub has another version now than when this mount first served it",
                hint="mount again to see it, or use a path with a version",
            )

    def _moved(self) -> None:
        self._progress += 1
        self.changed.notify_all()
