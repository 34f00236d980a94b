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


class HttpSource:
    """Ranges of what a server has below `url`, by requests of their own."""

    def __init__(self, net: Net, url: str) -> None:
        self._net = net
        self._url = url

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        return b"".join(self.pieces(handle, file, start, stop, cancel, max(1, stop - start)))

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event, piece: int
    ) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if file.etag is not None:
            headers["If-Range"] = file.etag
        with self._net.get(f"{self._url}/{file.location}", handle, headers) as response:
            if response.status_code != 206:
                raise DamagedError(f"{handle}: it is another file than when it was listed")
            if int(response.headers["Content-Length"]) != stop - start:
                raise UnavailableError(f"{handle}: the hub sends another range than it was asked for")
            for at in range(start, stop, piece):
                yield self._take(handle, response, min(piece, stop - at), cancel)

    def _take(self, handle: str, response: Any, size: int, cancel: threading.Event) -> bytes:
        try:
            data: bytes = response.raw.read(size, decode_content=False)
        except Exception as error:
            if cancel.is_set():
                raise StoppedError(f"{handle}: stopped") from error
            raise UnavailableError(f"{handle}: the connection broke: {error}") from error
        if len(data) != size:
            raise UnavailableError(f"{handle}: the hub sent less than it was asked for")
        return data

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Doubting:
    """A source that finds at the end that what it gave was not what was declared."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        return b"".join(self.pieces(handle, file, start, stop, cancel, max(1, stop - start)))

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event, piece: int
    ) -> Generator[bytes | memoryview, None, None]:
        given = 0
        for data in self._source.pieces(handle, file, start, stop, cancel, piece):
            given += len(data)
            if given == stop - start:
                raise DamagedError(f"{handle}: it is not what was declared")
            yield data

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Ragged:
    """A source that breaks the rule for pieces: all of them are of one size.

    Args:
        size: bytes of a piece.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        raise AssertionError("it is asked for pieces")

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event, piece: int
    ) -> Generator[bytes, None, None]:
        for _ in range(start, stop, self._size):
            yield bytes(self._size)

    def declared(self, file: RemoteFile) -> RemoteFile:
        return file


class Waiter:
    """Waits as an entry does: a condition that is notified, and a look now and then."""

    def __init__(self, longest: float = 30.0) -> None:
        lock = threading.Lock()
        self.changed = threading.Condition(lock)
        self.everything = threading.Condition(lock)  # notified whether somebody waits or not
        self.progress = 0
        self.notified = 0
        self.longest = longest

    def moved(self, awaited: bool) -> None:
        with self.changed:
            self.progress += 1
            self.everything.notify_all()
            if awaited:
                self.notified += 1
                self.changed.notify_all()

    def until(self, awaited: Awaited) -> None:
        end = time.monotonic() + self.longest
        with self.changed:
            while not awaited.ready():
                if time.monotonic() > end:
                    raise StalledError("nothing came")
                self.changed.wait(0.05)
