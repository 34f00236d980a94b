"""A source over HTTP and somebody who waits, for tests of what fetches ranges."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

from hubfs.errors import DamagedError, StalledError, StoppedError, UnavailableError
from hubfs.hubs.base import RemoteFile
from hubfs.net import Net
from hubfs.transfer.fetch import Awaited


class HttpSource:
    """Ranges of what a server has below `url`, by requests of their own."""

    def __init__(self, net: Net, url: str) -> None:
        self._net = net
        self._url = url

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if file.etag is not None:
            headers["If-Range"] = file.etag
        with self._net.get(f"{self._url}/{file.location}", handle, headers) as response:
            if response.status_code != 206:
                raise DamagedError(f"{handle}: it is another file than when it was listed")
            try:
                body: bytes = response.raw.read(decode_content=False)
            except Exception as error:
                if cancel.is_set():
                    raise StoppedError(f"{handle}: stopped") from error
                raise UnavailableError(f"{handle}: the connection broke: {error}") from error
            return body


    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event, piece: int
    ) -> Generator[bytes, None, None]:
        data = self.read(handle, file, start, stop, cancel)
        if len(data) != stop - start:
            raise UnavailableError(f"{handle}: the hub sent {len(data)} of {stop - start} bytes")
        for at in range(0, len(data), piece):
            yield data[at : at + piece]

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
