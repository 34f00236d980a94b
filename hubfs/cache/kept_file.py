"""One file of a version that is on its way into the cache, and those who read it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hubfs.cache.listed import Owner, lane_of
from hubfs.cache.readable import Readable, Wait, read_all
from hubfs.errors import CacheError, HubfsError
from hubfs.transfer.fetch import Fetcher, Remote
from hubfs.transfer.sink import Sink

if TYPE_CHECKING:
    from hubfs.cache.kept import Kept


class KeptFile(Sink):
    """A file whose chunks are written to the cache as they come.

    Attributes:
        remote: where they come from.
        readers: who has it open.
        whole: it was checked.
        error: what came of it was wrong: for those who had it open then.
    """

    def __init__(self, version: Kept, path: str, fetcher: Fetcher) -> None:
        self.path = path
        self.readers = 0
        self.whole = version.partial.is_verified(path)
        self.error: HubfsError | None = None
        self._version = version
        listing, file = version.listing, version.partial.file(path)
        self.size = file.size
        self.remote: Remote = fetcher.open(
            listing.handle, listing.source, file, self,
            host=lane_of(listing), present=version.partial.present(path),
        )  # fmt: skip

    @property
    def stored(self) -> int:
        """Bytes that are there, in whole chunks."""
        return self.size if self.whole else self.remote.present

    def write(self, start: int, data: bytes | memoryview) -> None:
        if self.remote.file.etag is None:
            declared = self.remote.source.declared(self.remote.file)
            if declared is not self.remote.file:
                self._version.partial.remember(self.path, declared)
        self._version.partial.write(self.path, start, data)

    def moved(self) -> None:
        self._version.moved(self)

    def failed(self, error: HubfsError) -> None:
        self._version.failed(self, error)

    def check(self) -> None:
        """
        Raises:
            HubfsError: no more of it can be read by those who have it open.
        """
        error = self.error or (None if self.whole else self._version.error)
        if error is not None:
            raise error.with_traceback(None)


class OpenKept(Readable):
    """Open for one reader."""

    def __init__(self, version: Kept, owner: Owner, file: KeptFile, descriptor: int, direct: bool) -> None:
        self.direct = direct
        self._version = version
        self._owner = owner
        self._file = file
        self._descriptor = descriptor

    @property
    def backing(self) -> int | None:
        return self._descriptor if self._file.whole else None

    def read_into(self, buffer: memoryview, offset: int, wait: Wait) -> int:
        file = self._file
        stop = min(offset + len(buffer), file.size)
        if offset >= stop:
            return 0
        file.check()
        if not file.whole and not file.remote.read(offset, stop):
            with file.remote.waiting(offset, stop) as awaited:
                self._owner.until_there(awaited, file.check, wait)
        done = read_all(self._descriptor, buffer[: stop - offset], offset)
        if done != stop - offset:
            raise CacheError(f"{self._owner.handle}: {file.path} was cut off in the cache directory")
        return done

    def close(self) -> None:
        os.close(self._descriptor)
        self._version.closed(self._file)
