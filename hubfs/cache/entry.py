"""One version: what is known of it, waiting for it, opening its files."""

from __future__ import annotations

import enum
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from hubfs.cache.arrival import Arrival
from hubfs.cache.manifest import FileInfo, Manifest
from hubfs.cache.transfer import Transfer
from hubfs.errors import (
    CacheError,
    ChangedError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    StalledError,
    StoppedError,
    from_os_error,
)

if TYPE_CHECKING:
    from hubfs.cache.store import Store
    from hubfs.hubs.base import Origin

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds between two looks at whether a waiting reader was interrupted.
POLL: Final = 0.05
#: Seconds to wait for the end of a rename that is under way.
RENAME_WAIT: Final = 2.0
#: Seconds between two notes of a model's last use.
USE_INTERVAL: Final = 60.0


class State(str, enum.Enum):
    """What `hubfs ls`, status.json and `user.hubfs.state` show."""

    ABSENT = "absent"
    LOCATED = "located"
    TRANSFERRING = "transferring"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True)
class Wait:
    """How long somebody waits.

    Attributes:
        timeout: seconds without any progress after which the wait ends.
        interrupted: tells that the waiting process was signalled; raises to end the wait for other reasons.
    """

    timeout: float
    interrupted: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class DirectoryInfo:
    """A directory of a version; `children` is `None` while they are not all known."""

    mtime: int
    children: int | None


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


class Entry:
    """One handle's version. Safe to use from many threads."""

    def __init__(self, handle: str, key: str, store: Store) -> None:
        self.handle = handle
        self.key = key
        self._store = store
        self._lock = threading.Lock()
        #: Notified at each change. Its lock protects all of the attributes below.
        self.changed = threading.Condition(self._lock)
        self._manifest: Manifest | None = None
        self._directory: Path | None = None
        self._origin: Origin | None = None
        self._arrival: Arrival | None = None
        self._transfer: Transfer | None = None
        self._locating = False
        self._error: HubfsError | None = None
        self._error_until = 0.0
        self._progress = 0
        self._waiting = 0
        self._opened = 0
        self._generation = 0
        self._last_generation: dict[str, int] = {}
        self._used = 0.0
        self.touched = time.monotonic()

    # ---- what readers ask

    def ensure_exists(self, wait: Wait) -> None:
        """Return once it is known that there is such a version; nothing is downloaded.

        Raises:
            HubfsError: there is none, or it could not be found out.
        """
        self._settle()

        def known() -> bool | None:
            if self._manifest or self._origin or self._arrival:
                return True
            self._raise_failure()
            if not self._locating and self._transfer is None:
                self._locating = True
                self._submit(self._store.locators.submit, self._locate)
            return None

        self._until(known, wait)

    def lookup(self, inner: str, wait: Wait) -> FileInfo | DirectoryInfo:
        """A file or directory of the version. Starts the transfer if nothing is known of it yet.

        Raises:
            NotFoundError: the version has no such path.
            HubfsError: the version could not be brought in.
        """
        self._settle()

        def find() -> FileInfo | DirectoryInfo | None:
            manifest = self._manifest
            if manifest is not None:
                return self._in_manifest(manifest, inner)
            self._ensure_transfer()
            arrival = self._arrival
            if arrival is None or not arrival.released():
                return None
            file = arrival.files.get(inner)
            if file is not None:
                return FileInfo(file.size, file.mtime)
            if inner in arrival.directories:
                return DirectoryInfo(arrival.directories[inner], None)
            return None

        return self._until(find, wait)

    def peek(self) -> Manifest | None:
        """The manifest if the version is in the cache. Starts nothing."""
        self._settle()
        with self.changed:
            return self._manifest

    def is_under_way(self) -> bool:
        """Whether its bytes are here or coming."""
        with self.changed:
            return self._manifest is not None or self._transfer is not None

    def root_info(self) -> DirectoryInfo:
        """The version's own directory, as far as it is known. Starts nothing."""
        with self.changed:
            if self._manifest is not None:
                found = self._in_manifest(self._manifest, "")
                assert isinstance(found, DirectoryInfo)
                return found
        return DirectoryInfo(int(self._store.started), None)

    def manifest(self, wait: Wait) -> Manifest:
        """The complete manifest, for listings. Starts the transfer if it is not known.

        Raises:
            HubfsError: the version could not be brought in.
        """
        self._settle()

        def find() -> Manifest | None:
            if self._manifest is None:
                self._ensure_transfer()
            return self._manifest

        return self._until(find, wait)

    def bring_in(self, wait: Wait) -> Path:
        """The version's directory in the cache, once it has been published there.

        Raises:
            HubfsError: the version could not be brought in.
        """
        self._settle()

        def published() -> Path | None:
            if self._manifest is None:
                self._ensure_transfer()
            return self._directory if self._transfer is None else None

        return self._until(published, wait)

    def open(self, inner: str, wait: Wait) -> OpenFile:
        """Open a file for reading.

        Raises:
            HubfsError: there is none, or it could not be brought in.
        """
        for _ in range(3):
            info = self.lookup(inner, wait)
            if isinstance(info, DirectoryInfo):
                raise CacheError(f"{self.handle}: {inner} is a directory")
            with self.changed:
                arrival, generation = self._arrival, self._generation
                directory = self._directory if self._manifest else arrival.directory_path if arrival else None
                complete = self._manifest is not None
            if directory is None:
                continue
            try:
                descriptor = os.open(directory / inner, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                # Renamed into place just now, or somebody cleans the cache directory.
                self._recheck(directory)
                continue
            except OSError as error:
                raise from_os_error(error, self.handle, "opening a cached file") from error
            if complete and os.fstat(descriptor).st_size != info.size:
                os.close(descriptor)
                self._recheck(directory)
                continue
            return self._opened_file(inner, descriptor, info, None if complete else arrival, generation)
        raise CacheError(
            f"{self.handle}: {inner} vanishes from the cache again and again", hint="is it being cleaned?"
        )

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
            running = arrival if state is State.TRANSFERRING else None
            return Snapshot(
                self.handle,
                state.value,
                running.received if running else 0,
                running.total if running else None,
                running.written if running else 0,
                running.rate() if running else 0.0,
                self._waiting,
                failed,
            )

    @property
    def is_idle(self) -> bool:
        """Whether the entry may be forgotten: nothing runs, waits or is open."""
        with self.changed:
            busy = self._transfer is not None or self._locating or self._waiting or self._opened
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
        with self.changed:
            self._set_complete(manifest, directory)
        return manifest

    def arriving(self, arrival: Arrival) -> None:
        with self.changed:
            self._arrival = arrival
            self._generation += 1
            self._moved()

    def arrived(self, manifest: Manifest, directory: Path) -> None:
        self._check_unchanged(manifest)
        with self.changed:
            if self._arrival is not None:
                self._arrival.verified = True
            self._set_complete(manifest, directory)

    def published(self, directory: Path) -> None:
        with self.changed:
            self._directory = directory
        self._store.note_published(self)

    def waiting(self, grown: int) -> None:
        with self.changed:
            if grown != self._progress:
                self._progress = grown
                self.changed.notify_all()

    # ---- within

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
            raise self._error

    def _ensure_transfer(self) -> None:
        if self._transfer is not None or self._locating:
            return
        self._raise_failure()
        if self._store.closed:
            raise StoppedError(f"{self.handle}: hubfs is being stopped")
        store = self._store
        transfer = Transfer(self.handle, self.key, store.layout, store.net, store.settings, self)
        self._transfer = transfer
        self._submit(store.carriers.submit, self._run_transfer, transfer)

    def _submit(self, submit: Callable[..., object], function: Callable[..., None], *args: object) -> None:
        self._error = None
        try:
            submit(function, *args)
        except RuntimeError as error:
            # The pool was shut down since `closed` was looked at.
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
                self._transfer = self._arrival = self._manifest = self._directory = None
                self._origin = None if isinstance(failure, NotFoundError) else self._origin
                self._fail(failure)
            return
        with self.changed:
            self._transfer = self._arrival = None
            self._moved()

    def _known_origin(self) -> Origin:
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
            log.log(logging.INFO if isinstance(error, NotFoundError) else logging.ERROR, "%s", error)
            self._store.note_failure(self.handle, error)
        self._moved()

    def _set_complete(self, manifest: Manifest, directory: Path) -> None:
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

    def _in_manifest(self, manifest: Manifest, inner: str) -> FileInfo | DirectoryInfo:
        file = manifest.files.get(inner)
        if file is not None:
            return file
        children = manifest.children(inner)
        if children is None:
            raise NotFoundError(f"{self.handle}: it has no {inner}")
        mtime = manifest.directories[inner] if inner else manifest.mtime
        return DirectoryInfo(mtime, sum(children.values()))

    def _recheck(self, directory: Path) -> None:
        """Forget what was known of the directory if it is still the one in use."""
        with self.changed:
            if self._transfer is not None:
                # It is between being renamed and telling so.
                self.changed.wait_for(lambda: self._directory != directory, RENAME_WAIT)
                return
            if self._manifest is None or self._directory != directory:
                return
            self._manifest = self._directory = None
        self._look_on_disk()

    def _opened_file(
        self, inner: str, descriptor: int, info: FileInfo, arrival: Arrival | None, generation: int
    ) -> OpenFile:
        with self.changed:
            self._opened += 1
            keep = self._last_generation.get(inner) == generation
            self._last_generation[inner] = generation
        now = time.monotonic()
        if now - self._used > USE_INTERVAL or not self._used:
            self._used = now
            self._store.note_use(self.key)
        return OpenFile(self, inner, descriptor, info.size, arrival, keep)

    def closed_file(self) -> None:
        with self.changed:
            self._opened -= 1

    def wait_written(self, file: OpenFile, arrival: Arrival, end: int, wait: Wait) -> bool:
        """Wait until a file has arrived up to `end`; False if its attempt failed before any byte was given."""
        arriving = arrival.files[file.inner]

        def there() -> bool | None:
            if arrival.error is not None:
                if arriving.delivered:
                    raise arrival.error
                return False
            if arriving.written >= end and arrival.released():
                arriving.delivered = True
                return True
            return None

        return self._until(there, wait)


class OpenFile:
    """A file of a version, open for reading; it may still be arriving.

    Attributes:
        size: bytes; known from the start.
        keep_cache: pages that the kernel holds of it are of this very content.
    """

    direct = False

    def __init__(
        self, entry: Entry, inner: str, descriptor: int, size: int, arrival: Arrival | None, keep_cache: bool
    ) -> None:
        self.entry = entry
        self.inner = inner
        self.size = size
        self.keep_cache = keep_cache
        self._lock = threading.Lock()  # protects the two below while they are exchanged
        self._descriptor = descriptor
        self._arrival = arrival

    def read(self, size: int, offset: int, wait: Wait) -> bytes:
        """Exactly `size` bytes from `offset` on, fewer only at the end of the file.

        Raises:
            HubfsError: they cannot be had.
        """
        expected = max(0, min(size, self.size - offset))
        if not expected:
            return b""
        arrival = self._arrival
        while arrival is not None and not self.entry.wait_written(self, arrival, offset + expected, wait):
            arrival = self._begin_again(arrival, wait)
        data = os.pread(self._descriptor, expected, offset)
        while len(data) < expected:
            more = os.pread(self._descriptor, expected - len(data), offset + len(data))
            if not more:
                raise CacheError(f"{self.entry.handle}: {self.inner} was cut off in the cache directory")
            data += more
        return data

    def close(self) -> None:
        os.close(self._descriptor)
        self.entry.closed_file()

    def _begin_again(self, failed: Arrival, wait: Wait) -> Arrival | None:
        """The attempt failed before anybody was given a byte of this file: go on with the next one."""
        other = self.entry.open(self.inner, wait)
        if other.size != self.size:
            other.close()
            raise CacheError(f"{self.entry.handle}: {self.inner} has another size now; open it again")
        with self._lock:
            # Another thread that reads the same file may have been here first.
            if self._arrival is failed:
                self._descriptor, other._descriptor = other._descriptor, self._descriptor
                self._arrival = other._arrival
        other.close()
        return self._arrival


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
