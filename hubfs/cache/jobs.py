"""The jobs that find a version and bring it in, and what they tell of it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hubfs.cache.arrival import Arrival
from hubfs.cache.listed import Listed, manifest_of
from hubfs.cache.manifest import Manifest
from hubfs.cache.state import EntryState
from hubfs.cache.transfer import Transfer
from hubfs.errors import (
    AccessError,
    ChangedError,
    ChangedOriginError,
    DiskFullError,
    HubfsError,
    NotFoundError,
    StoppedError,
    from_os_error,
    internal_error,
)
from hubfs.hubs.base import Listing

if TYPE_CHECKING:
    from hubfs.hubs.base import Origin

log = logging.getLogger(__name__)


class EntryJobs(EntryState):
    """One version's state, and what brings it in. What is called from jobs is told from their threads."""

    # ---- what the transfer tells (hubfs.cache.transfer.Outcome)

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
            self._directory, manifest = directory, self._manifest
            self._moved()
        if manifest is not None:
            self._store.note_published(self, manifest, directory)

    def waiting(self, grown: int) -> None:
        with self.changed:
            if grown != self._grown_elsewhere:
                self._grown_elsewhere = grown
                self._moved()

    # ---- what a listed version tells (hubfs.cache.listed.Owner)

    def came(self) -> None:
        with self.changed:
            self._progress += 1

    def told(self) -> None:
        with self.changed:
            self._moved()

    def kept_whole(self, manifest: Manifest, directory: Path) -> None:
        self._become_complete(manifest, directory)
        self._store.note_published(self, manifest, directory)

    def tainted(self, path: str) -> None:
        with self.changed:
            self._tainted.add(path)

    def origin_failed(self, listed: Listed, error: HubfsError) -> None:
        changed = isinstance(error, ChangedOriginError)
        with self.changed:
            if self._listed is not listed:
                return
            manifest, self._listed_manifest = self._listed_manifest, None
            self._listed = self._origin = None
            self._store.note_running(self, False)
            if changed and manifest is not None:
                # The kernel may hold pages of any of them.
                self._tainted.update(manifest.files)
            if isinstance(error, DiskFullError):
                self._fail(error)
            else:
                log.warning("%s", error)
                self._moved()
        self._store.note_failure(self.handle, error)
        if changed and manifest is not None:
            self._store.outdated(self.handle, manifest)

    def ended(self, listed: Listed, error: HubfsError | None) -> None:
        with self.changed:
            if self._listed is listed:
                self._listed = None
                self._store.note_running(self, False)
                if error is not None:
                    self._fail(error)
            self._moved()

    def note_closed(self) -> None:
        """One of the files that were opened was closed."""
        with self.changed:
            self._opened -= 1

    # ---- jobs

    def _advance(self) -> None:
        """See to it that the version's files become known, and can be opened. The lock must be held."""
        if self._transfer or self._locating or self._listed_manifest:
            return
        self._raise_failure()
        if self._store.closed:
            raise StoppedError(f"{self.handle}: hubfs is being stopped")
        if self._origin is None and self._store.locates_first:
            self._begin_locating()
            return
        store = self._store
        transfer = Transfer(self.handle, self.key, store.layout, store.net, store.settings, self)
        self._transfer = transfer
        store.note_running(self, True)
        self._submit(store.carriers.submit, self._run_transfer, transfer)

    def _begin_locating(self) -> None:
        """Find out where the version is. The lock must be held."""
        self._locating = True
        self._submit(self._store.locators.submit, self._locate)

    def _begin_listed(self) -> None:
        """See to it that files can be opened of a version that has a listing. The lock must be held."""
        if self._listed or self._beginning or not isinstance(self._origin, Listing):
            return
        self._raise_failure()
        if self._store.closed:
            raise StoppedError(f"{self.handle}: hubfs is being stopped")
        self._beginning = True
        self._submit(self._store.locators.submit, self._make_listed, self._origin, self._listed_manifest)

    def _make_listed(self, listing: Listing, manifest: Manifest) -> None:
        try:
            # Another process may have published it since it was found.
            listed = None if self.find_on_disk() else self._store.make_listed(self, listing, manifest)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            with self.changed:
                self._beginning = False
                self._fail(expected(error, self.handle))
            return
        with self.changed:
            self._beginning = False
            self._listed = listed
            self._store.note_running(self, listed is not None)
            self._moved()
        if listed is not None:
            self._start(listed)

    def _start(self, listed: Listed) -> None:
        """Once the entry has it: it may end at once."""
        listed.start()
        if self._store.closed:
            listed.close()

    def _submit(self, submit: Callable[..., object], function: Callable[..., None], *args: object) -> None:
        self._error = None
        try:
            submit(function, *args)
        except RuntimeError as error:
            # The pool was shut down since `closed` was looked at.
            self._locating = self._beginning = False
            self._end_transfer()
            raise StoppedError(f"{self.handle}: hubfs is being stopped") from error

    def _locate(self) -> None:
        try:
            origin = self._store.locate(self.handle, self.key, self.waiting)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            with self.changed:
                self._locating = False
                self._fail(expected(error, self.handle))
            return
        self._found(origin)

    def _found(self, origin: Origin) -> None:
        """The origin is known now."""
        manifest, failure = None, None
        if isinstance(origin, Listing):
            manifest = manifest_of(origin)
            try:
                self._check_unchanged(manifest)
            except ChangedError as error:
                failure = error
        with self.changed:
            self._locating = False
            if failure is not None:
                self._fail(failure)
                return
            self._origin, self._listed_manifest = origin, manifest
            self._was_listed = self._was_listed or manifest is not None
            self._moved()

    def _run_transfer(self, transfer: Transfer) -> None:
        try:
            transfer.run(self._known_origin)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            failure = expected(error, self.handle)
            with self.changed:
                self._end_transfer()
                self._manifest = self._directory = None
                if isinstance(failure, (NotFoundError, AccessError, ChangedOriginError)):
                    self._origin = None
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

    def _known_origin(self) -> Origin:
        with self.changed:
            origin = self._origin
        if origin is None:
            origin = self._store.locate(self.handle, self.key, self.waiting)
            self._found(origin)
        return origin


def expected(error: Exception, handle: str) -> HubfsError:
    """The error for readers; a bug is logged with its traceback."""
    if isinstance(error, HubfsError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return from_os_error(error, handle, "writing to the cache")
    log.error("%s: internal error", handle, exc_info=error)
    return internal_error(error, handle)
