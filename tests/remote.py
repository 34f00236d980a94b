"""A source over HTTP and somebody who waits, for tests of what fetches ranges."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from typing import Any

from hubfs.errors import DamagedError, StalledError, StoppedError, UnavailableError
from hubfs.hubs.base import RemoteFile, Source
from hubfs.net import Net
from hubfs.transfer.fetch import Awaited


def read(
    source: Source,
    handle: str,
    file: RemoteFile,
    start: int = 0,
    stop: int | None = None,
    cancel: threading.Event | None = None,
) -> bytes:
    """Bytes of a file, to its end if no `stop` is given."""
    stop = file.size if stop is None else stop
    return b"".join(map(bytes, source.pieces(handle, file, start, stop, cancel or threading.Event())))


class HttpSource:
    """Ranges of what a server has below `url`, by requests of their own."""

    def __init__(self, net: Net, url: str, piece: int = 200_000) -> None:
        """
        Args:
            piece: bytes of a piece at most.
        """
        self._net = net
        self._url = url
        self._piece = piece

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if file.etag is not None:
            headers["If-Range"] = file.etag
        with self._net.get(f"{self._url}/{file.location}", handle, headers) as response:
            if response.status_code != 206:
                raise DamagedError(f"{handle}: it is another file than when it was listed")
            if int(response.headers["Content-Length"]) != stop - start:
                raise UnavailableError(f"{handle}: the hub sends another range than it was asked for")
            while start < stop:
                data = self._take(handle, response, min(self._piece, stop - start), cancel)
                start += len(data)
                yield data

    def _take(self, handle: str, response: Any, size: int, cancel: threading.Event) -> bytes:
        try:
            data: bytes = response.raw.read1(size, decode_content=False)
        except Exception as error:
            if cancel.is_set():
                raise StoppedError(f"{handle}: stopped") from error
            raise UnavailableError(f"{handle}: the connection broke: {error}") from error
        if not data:
            raise UnavailableError(f"{handle}: the hub sent less than it was asked for")
        return data

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Doubting:
    """A source that finds at the end that what it gave was not what was declared."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes, None, None]:
        given = 0
        for data in self._source.pieces(handle, file, start, stop, cancel):
            given += len(data)
            if given == stop - start:
                raise DamagedError(f"{handle}: it is not what was declared")
            yield data

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Ragged:
    """A source whose pieces are all of one size, even if that is more than was asked for.

    Args:
        size: bytes of a piece.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes, None, None]:
        for _ in range(start, stop, self._size):
            yield bytes(self._size)

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Waiter:
    """Waits as an entry does, and counts what is told to it."""

    def __init__(self, longest: float = 30.0) -> None:
        self.everything = threading.Condition(threading.Lock())
        self.progress = 0
        self.longest = longest

    def moved(self) -> None:
        with self.everything:
            self.progress += 1
            self.everything.notify_all()

    def until(self, awaited: Awaited) -> None:
        end = time.monotonic() + self.longest
        while not awaited.ready():
            if time.monotonic() > end:
                raise StalledError("nothing came")
            awaited.pause(0.05)
