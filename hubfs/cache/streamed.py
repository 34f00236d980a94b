"""A version of which nothing is kept but blocks in memory: `UNCOMPRESSED`, or no cache to be used."""

from __future__ import annotations

import threading
from functools import partial
from typing import Final

from hubfs.cache.blocks import Memory, MemoryFile
from hubfs.cache.listed import Listed, Owner, ends_listing
from hubfs.cache.readable import Readable, Wait
from hubfs.errors import DamagedError, HubfsError
from hubfs.hubs.base import Listing
from hubfs.transfer.chunks import CHUNK
from hubfs.transfer.fetch import Awaited
from hubfs.transfer.lane import FIRST

#: Bytes of a checkpoint's data that are brought in when its index is opened: what 8 connections bring at
#: 1 Gbit/s while TensorFlow reads the index.
_BEGINNING: Final = 32 << 20
#: Small files of the version that are, too.
_SMALL: Final = 8


class Streamed(Listed):
    """Files of a listing, read through the memory that all versions share."""

    def __init__(self, listing: Listing, memory: Memory, owner: Owner, *, spare: bool = False) -> None:
        """
        Args:
            spare: the version is to be kept in the cache, which cannot be done at the moment.
        """
        self.listing = listing
        self._spare = spare
        self._memory = memory
        self._owner = owner
        self._lock = threading.Lock()  # protects what follows
        self._files: dict[str, MemoryFile] = {}
        self._readers: dict[str, int] = {}
        self._retired = False

    def open(self, path: str, *, direct: bool) -> Readable:
        with self._lock:
            self.check()
            file = self._file(path)
            self._readers[path] = self._readers.get(path, 0) + 1
        return _StreamedFile(self, self._owner, path, file, direct)

    def stored(self, path: str) -> int:
        return 0

    def closed(self, path: str) -> None:
        """A reader of a file went. Its blocks stay for the next one: TensorFlow opens files several times."""
        with self._lock:
            self._readers[path] -= 1
            file = self._files.get(path)
            if not self._readers[path] and file is not None:
                file.remote.leave()
            over = self._retired and not any(self._readers.values())
        if over:
            self.close()
        self._owner.note_closed()

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            over = not any(self._readers.values())
        if over:
            self.close()

    def close(self) -> None:
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()
        self._owner.ended(self, None)

    def start(self) -> None:
        """It has nothing to do by itself."""

    @property
    def is_spare(self) -> bool:
        with self._lock:
            return self._spare and not any(self._readers.values())

    def expect(self, path: str) -> None:
        """With a checkpoint's index, the beginning of its data, what stands at their end, and small files.

        While somebody makes sense of the index, the first bytes come. There is no place for all of it, so
        nothing is expected of other files: one megabyte may be all that somebody wants of a large one.
        """
        stem, _, kind = path.rpartition(".")
        if kind != "index":
            return
        sizes = {name: file.size for name, file in self.listing.files.items()}
        data = sorted(name for name in sizes if name.startswith(f"{stem}.data-"))[:1]
        small = sorted(name for name, size in sizes.items() if 0 < size <= CHUNK and name != path)[:_SMALL]
        # In this order: what is wanted first does not wait for a connection that brings data.
        expected = [
            (path, 0, FIRST),
            *((name, max(0, sizes[name] - CHUNK), FIRST) for name in data),
            *((name, 0, FIRST) for name in small),
            *((name, 0, _BEGINNING) for name in data),
        ]
        with self._lock:
            if self._retired or self.error is not None:
                return
            files = {name: self._file(name) for name, *_ in expected}
        for name, start, size in expected:
            files[name].remote.expect(start, size)

    def _file(self, path: str) -> MemoryFile:
        """A file, for all who read it. The lock must be held."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self._memory.file(
                self.listing, path, moved=self._owner.came, failed=partial(self._failed, path)
            )
        return file

    def _failed(self, path: str, error: HubfsError) -> None:
        if not ends_listing(error) and not isinstance(error, DamagedError):
            return
        self.error = self.error or error
        if isinstance(error, DamagedError):
            # Whoever opens it now must not be given pages that the kernel has of it.
            self._owner.tainted(path)
        self._owner.origin_failed(self, error)
        with self._lock:
            files = list(self._files.values())
        for file in files:
            file.remote.close()
        self.retire()


class _StreamedFile(Readable):
    """Open for one reader."""

    def __init__(self, version: Streamed, owner: Owner, path: str, file: MemoryFile, direct: bool) -> None:
        self.direct = direct
        self._version = version
        self._owner = owner
        self._path = path
        self._file = file

    def read_into(self, buffer: memoryview, offset: int, wait: Wait) -> int:
        self._version.check()

        def until(awaited: Awaited) -> None:
            self._owner.until_there(awaited, self._version.check, wait)

        return self._file.read_into(buffer, offset, until)

    def close(self) -> None:
        self._version.closed(self._path)
