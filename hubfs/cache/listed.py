"""A version whose files are read by range: what both kinds of it share.

`Kept` (hubfs.cache.kept) writes what comes into the cache, `Streamed` (hubfs.cache.streamed) holds some of
it in memory.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from hubfs.cache.manifest import FileInfo, Manifest
from hubfs.cache.readable import Readable, Wait
from hubfs.errors import AccessError, ChangedOriginError, HubfsError
from hubfs.hubs.base import Listing

if TYPE_CHECKING:
    from hubfs.transfer.fetch import Awaited


class Owner(Protocol):
    """The entry, as what brings its bytes in knows it."""

    handle: str
    changed: threading.Condition

    def until_there(self, awaited: Awaited, check: Callable[[], None], wait: Wait) -> None:
        """Wait for a range of a file. `check` raises if no more of it can be read."""

    def came(self) -> None:
        """Something came."""

    def told(self) -> None:
        """Who waits for the version is to look again."""

    def origin_failed(self, listed: Listed, error: HubfsError) -> None:
        """The listing is of no use any more: the version must be found anew."""

    def tainted(self, path: str) -> None:
        """Bytes of a file that were given to readers were not right."""

    def ended(self, listed: Listed, error: HubfsError | None) -> None:
        """No more comes of it. It was closed; with `error`, because of that."""

    def find_on_disk(self) -> Manifest | None: ...

    def waiting(self, grown: int) -> None: ...

    def kept_whole(self, manifest: Manifest, directory: Path) -> None:
        """All of it was published in the cache."""

    def note_closed(self) -> None: ...


class Listed(ABC):
    """A version's files while they are read by range. Safe to use from many threads.

    Attributes:
        listing: its origin.
        error: why nothing more of it can be read, for those who have files of it open.
    """

    listing: Listing
    error: HubfsError | None = None

    @abstractmethod
    def start(self) -> None:
        """The owner knows it from now on, and is told of its end (`Owner.ended`)."""

    @property
    def is_spare(self) -> bool:
        """Whether it only stands in for one that is kept in the cache, and nobody reads it."""
        return False

    @abstractmethod
    def open(self, path: str, *, direct: bool) -> Readable | None:
        """A file of the version; `None` if this is about to end. The owner is told when it is closed.

        Raises:
            HubfsError, OSError: it cannot be opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Bring in nothing more of it."""

    @abstractmethod
    def expect(self, path: str) -> None:
        """Whoever opened this file is going to want the rest of the version too: bring it in before it is
        asked for, as far as there is a place for it.
        """

    @abstractmethod
    def retire(self) -> None:
        """Another one takes its place: close it once nobody reads it any more."""

    @abstractmethod
    def stored(self, path: str) -> int:
        """Bytes of a file that are on disk."""

    @property
    def is_filling(self) -> bool:
        """Whether all of the version is being brought in."""
        return False

    @property
    def received(self) -> int:
        """Bytes of the version that are there."""
        return 0

    def check(self) -> None:
        """
        Raises:
            HubfsError: nothing more of it can be read.
        """
        if self.error is not None:
            # One instance is raised in many threads: without this it would collect all their frames.
            raise self.error.with_traceback(None)


def ends_listing(error: HubfsError) -> bool:
    """Whether a failed request shows that the listing is of no use any more."""
    return isinstance(error, (ChangedOriginError, AccessError))


def lane_of(listing: Listing) -> str:
    """Who gives a listing's bytes: connections are counted for each."""
    return urlsplit(listing.where).netloc


def manifest_of(listing: Listing) -> Manifest:
    """The manifest that a listing means. A directory's time is that of the newest file below it."""
    now = int(time.time())
    directories: dict[str, int] = {"": 0}
    files: dict[str, FileInfo] = {}
    for path, file in listing.files.items():
        mtime = file.mtime if file.mtime > 0 else now
        files[path] = FileInfo(file.size, mtime)
        parent = path
        while parent:
            parent = parent.rpartition("/")[0]
            directories[parent] = max(directories.get(parent, 0), mtime)
    newest = directories.pop("")
    return Manifest(listing.handle, files, directories, newest)
