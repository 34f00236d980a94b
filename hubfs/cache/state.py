"""What is known of one version, who waits for more, and the jobs that find it and bring it in."""

from __future__ import annotations

import enum
import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from hubfs.cache.arrival import Arrival
from hubfs.cache.manifest import DirectoryInfo, Manifest
from hubfs.cache.transfer import Transfer
from hubfs.errors import (
    ChangedError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    OfflineError,
    StalledError,
    StoppedError,
    from_os_error,
)

if TYPE_CHECKING:
    from hubfs.cache.store import Store
    from hubfs.hubs.base import Archive

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds between two looks at whether a waiting reader was interrupted.
POLL: Final = 0.05


@dataclass(frozen=True)
class Wait:
    """How long somebody waits.

    Attributes:
        timeout: seconds without any progress after which the wait ends.
        interrupted: tells that the one who waits was signalled.
    """

    timeout: float
    interrupted: Callable[[], bool] = lambda: False


class State(str, enum.Enum):
    """What `hubfs ls`, status.json and `user.hubfs.state` show."""

    ABSENT = "absent"
    LOCATED = "located"
    TRANSFERRING = "transferring"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Snapshot:
    """An entry's state at one moment, for people."""

    handle: str
    state: str
    received: int
    total: int | None
    written: int
    rate: float
    waiting: int
    error: HubfsError | None


class EntryState:
    """One version's state. Safe to use from many threads; `Entry` adds what readers do with it."""

    def __init__(self, handle: str, key: str, store: Store) -> None:
        self.handle = handle
        self.key = key
        self._store = store
        #: Notified at each change. Its lock protects all of the attributes below.
        self.changed = threading.Condition(threading.Lock())
        self._manifest: Manifest | None = None
        self._directory: Path | None = None
        self._origin: Archive | None = None
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

    def is_under_way(self) -> bool:
        """Whether its bytes are here or coming."""
        with self.changed:
            return self._manifest is not None or self._transfer is not None

    def snapshot(self) -> Snapshot:
        """For status and extended attributes."""
        with self.changed:
            arrival = self._arrival
            failed = self._error if time.monotonic() < self._error_until else None
            if self._manifest is not None:
                state = State.COMPLETE
            elif self._transfer is not None:
                state = State.TRANSFERRING
            elif failed is not None:
                state = State.FAILED
            else:
                state = State.LOCATED if self._origin else State.ABSENT
            return Snapshot(
                self.handle,
                state.value,
                arrival.received if arrival else 0,
                arrival.total if arrival else None,
                arrival.written if arrival else 0,
                arrival.rate() if arrival else 0.0,
                self._waiting,
                failed,
            )

    @property
    def is_idle(self) -> bool:
        """Whether the entry may be forgotten: nothing runs, waits or is open."""
        with self.changed:
            busy = self._transfer or self._locating or self._waiting or self._opened or self._tainted
            return not busy and time.monotonic() >= self._error_until

    def stop(self) -> None:
        """End the running transfer, if there is one."""
        with self.changed:
            transfer = self._transfer
            self.changed.notify_all()
        if transfer is not None:
            transfer.stop()

    # ---- what the transfer tells (hubfs.cache.transfer.Outcome)

    def find_on_disk(self) -> Manifest | None:
        found = self._store.find_on_disk(self)
        if found is None:
            return None
        manifest, directory = found
        self._check_unchanged(manifest)
        self._become_complete(manifest, directory)
        self._store.index.add(directory.name, self.handle)
        return manifest

    def arriving(self, arrival: Arrival) -> None:
        with self.changed:
            self._retire_arrival()
            self._arrival = arrival
            self._moved()

    def arrived(self, manifest: Manifest, directory: Path) -> None:
        self._check_unchanged(manifest)
        self._become_complete(manifest, directory)

    def published(self, directory: Path) -> None:
        with self.changed:
            self._directory = directory
            self._moved()
        self._store.note_use(self.key)
        self._store.index.add(self.key, self.handle)

    def waiting(self, grown: int) -> None:
        with self.changed:
            if grown != self._grown_elsewhere:
                self._grown_elsewhere = grown
                self._moved()

    # ---- waiting and jobs, for Entry

    def _settle(self) -> None:
        """See whether the version is in the cache, if that is not known yet."""
        self.touched = time.monotonic()
        with self.changed:
            if self._manifest is not None or self._transfer is not None:
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

    def _until(self, ready: Callable[[], T | None], wait: Wait) -> T:
        """Call `ready` (under the lock) until it gives something."""
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
                    self.changed.wait(POLL)
            finally:
                self._waiting -= 1

    def _raise_failure(self) -> None:
        if self._error is not None and time.monotonic() < self._error_until:
            # One instance is raised in many threads: without this it would collect all their frames.
            raise self._error.with_traceback(None)

    def _ensure_transfer(self) -> None:
        if self._transfer is not None or self._locating:
            return
        self._raise_failure()
        if self._store.closed:
            raise StoppedError(f"{self.handle}: hubfs is being stopped")
        store = self._store
        transfer = Transfer(self.handle, self.key, store.layout, store.net, store.settings, self)
        self._transfer = transfer
        store.note_running(self, True)
        self._submit(store.carriers.submit, self._run_transfer, transfer)

    def _submit(self, submit: Callable[..., object], function: Callable[..., None], *args: object) -> None:
        self._error = None
        try:
            submit(function, *args)
        except RuntimeError as error:
            # The pool was shut down since `closed` was looked at.
            self._locating = False
            self._end_transfer()
            raise StoppedError(f"{self.handle}: hubfs is being stopped") from error

    def _locate(self) -> None:
        try:
            origin = self._store.locate(self.handle)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            with self.changed:
                self._locating = False
                self._fail(_expected(error, self.handle))
            return
        with self.changed:
            self._locating = False
            self._origin = origin
            self._moved()

    def _run_transfer(self, transfer: Transfer) -> None:
        try:
            transfer.run(self._known_origin)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            failure = _expected(error, self.handle)
            with self.changed:
                self._end_transfer()
                self._manifest = self._directory = None
                self._origin = None if isinstance(failure, NotFoundError) else self._origin
                self._fail(failure)
            return
        with self.changed:
            self._end_transfer()
            self._moved()

    def _end_transfer(self) -> None:
        self._retire_arrival()
        self._transfer = self._arrival = None
        self._store.note_running(self, False)

    def _retire_arrival(self) -> None:
        """Remember which files the attempt before this one has spoilt in the kernel's page cache."""
        arrival = self._arrival
        if arrival is not None and arrival.error is not None:
            self._tainted.update(path for path, file in arrival.files.items() if file.delivered)

    def _known_origin(self) -> Archive:
        with self.changed:
            origin = self._origin
        if origin is None:
            origin = self._store.locate(self.handle)
            with self.changed:
                self._origin = origin
                self._moved()
        return origin

    def _fail(self, error: HubfsError) -> None:
        self._error = error
        self._error_until = time.monotonic() + error.remember
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
            self._moved()

    def _check_unchanged(self, manifest: Manifest) -> None:
        """An unversioned handle keeps its meaning while it is mounted: kernel caches hold its bytes."""
        first = self._store.first_served(self.handle, manifest)
        if not first.same_content(manifest):
            raise ChangedError(
                f"{self.handle}: the hub has another version now than when this mount first served it",
                hint="mount again to see it, or use a path with a version",
            )

    def _moved(self) -> None:
        self._progress += 1
        self.changed.notify_all()


def _expected(error: Exception, handle: str) -> HubfsError:
    """The error for readers; a bug is logged with its traceback."""
    if isinstance(error, HubfsError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return from_os_error(error, handle, "writing to the cache")
    log.error("%s: internal error", handle, exc_info=error)
    return HubfsError(
        f"{handle}: internal error: {error!r}", hint="this is a bug in hubfs; the log has details"
    )
