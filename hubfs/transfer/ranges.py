"""Ranges of one object, each retried alone, as one ordered stream of bytes."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from hubfs.errors import DamagedError, HubfsError, ProtocolError, StoppedError, UnavailableError
from hubfs.hubs.base import Archive
from hubfs.net import Net, content_length, strong_etag

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings

#: Most bytes taken from a connection at once.
CHUNK: Final = 1 << 20
#: Slower than this over `stall_timeout`, a connection counts as stalled. In bytes per second.
SLOWEST: Final = 1024
#: An attempt that brought at least so many bytes made progress: the count of failures starts anew.
PROGRESS: Final = 64 * 1024
#: Bytes of a range when an object comes over several connections.
PART: Final = 8 << 20
#: Connections for one object. With PART they bound the bytes that wait for their turn: 5 parts, 40 MiB.
CONNECTIONS: Final = 4
#: Smaller objects come over one connection: they would be through before several pay.
SEVERAL_FROM: Final = 4 * PART


class ChangedOriginError(DamagedError):
    """The archive at the hub is another one than when the transfer began: start from zero."""


class NoRangesError(HubfsError):
    """The hub answers a request for a range with the whole."""


class Stream:
    """Iterates over an object's bytes, or a range of them, resuming where a connection broke.

    Iterating raises `UnavailableError` after too many failures in a row, `ChangedOriginError` when the
    hub has another object meanwhile, `NoRangesError`, and `StoppedError` after `cancel` was set.

    Attributes:
        at: offset of the next byte.
        total: bytes of the object, once known.
        headers: of the first answer.
    """

    def __init__(
        self,
        net: Net,
        origin: Archive,
        settings: Settings,
        cancel: threading.Event,
        *,
        start: int = 0,
        stop: int | None = None,
        etag: str | None = None,
    ) -> None:
        """
        Args:
            start, stop: the range, `stop` exclusive; without `stop` all that there is.
            etag: the strong ETag that the object must have; needed for all but the whole.
        """
        self.at = start
        self.total = origin.size if etag else None
        self.headers: Mapping[str, str] | None = None
        self._net = net
        self._origin = origin
        self._settings = settings
        self._cancel = cancel
        self._stop = stop
        self._etag = etag
        self._response: requests.Response | None = None

    def abort(self) -> None:
        """Wake a thread that waits for this stream's connection. `cancel` must have been set before."""
        response = self._response
        if response is not None:
            # The thread that reads it may be closing it just now, in whatever state that is.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                response.raw.shutdown()

    def __iter__(self) -> Iterator[bytes]:
        failures = 0
        while True:
            before = self.at
            try:
                yield from self._one_connection()
                return
            except UnavailableError as error:
                if self.at - before >= PROGRESS:
                    failures = 0
                failures += 1
                if failures > self._settings.retries:
                    raise
                self._check_cancel()
                self._net.pause(failures, error, self._cancel)

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise StoppedError(f"{self._origin.handle}: the transfer was stopped")

    def _one_connection(self) -> Iterator[bytes]:
        handle = self._origin.handle
        self._check_cancel()
        with self._net.get(self._origin.url, handle, self._request_headers()) as response:
            self._response = response
            try:
                skip = self._accept(response)
                for chunk in self._chunks(response):
                    if skip >= len(chunk):
                        skip -= len(chunk)
                        continue
                    part = chunk[skip:] if skip else chunk
                    skip = 0
                    if self._stop is not None:
                        part = part[: self._stop - self.at]
                    self.at += len(part)
                    yield part
            finally:
                self._response = None
        end = self._stop if self._stop is not None else self.total
        if end is not None and self.at != end:
            raise UnavailableError(f"{handle}: the hub sent {self.at} of {end} bytes", hint="try again later")

    def _request_headers(self) -> dict[str, str]:
        last = "" if self._stop is None else str(self._stop - 1)
        if not self.at and not last:
            return {}
        if self._etag is None:
            # Without a strong validator a continuation could be another archive's.
            raise ChangedOriginError(
                f"{self._origin.handle}: the connection broke and the hub offers no way to resume"
            )
        return {"Range": f"bytes={self.at}-{last}", "If-Range": self._etag}

    def _accept(self, response: requests.Response) -> int:
        """Compare an answer with what is there already; returns how many of its bytes to leave out."""
        handle, etag = self._origin.handle, strong_etag(response.headers)
        if response.status_code == 416:
            if self.at:
                raise ChangedOriginError(f"{handle}: the archive at the hub became shorter")
            raise DamagedError(f"{handle}: the hub sent an empty archive")
        start, total = 0, content_length(response.headers)
        if response.status_code == 206:
            start, total = _content_range(response, handle)
            if start != self.at:
                raise UnavailableError(f"{handle}: the hub sent bytes from {start} instead of from {self.at}")
        if self.headers is None:
            self.headers = response.headers
        if self._stop is None and not self.at:
            self.total, self._etag, self.headers = total, etag, response.headers
            return 0
        if etag != self._etag or (total is not None and self.total not in (None, total)):
            raise ChangedOriginError(f"{handle}: the archive at the hub changed during the transfer")
        if self._stop is not None and response.status_code != 206:
            raise NoRangesError(f"{handle}: the hub does not give ranges")
        return self.at - start

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        handle = self._origin.handle
        window_start, window_bytes = time.monotonic(), 0
        while True:
            self._check_cancel()
            try:
                chunk: bytes = response.raw.read1(CHUNK, decode_content=False)
            except Exception as error:
                self._check_cancel()
                raise _broken(error, handle) from error
            if not chunk:
                return
            yield chunk
            window_bytes += len(chunk)
            elapsed = time.monotonic() - window_start
            if elapsed >= self._settings.stall_timeout:
                if window_bytes < SLOWEST * elapsed:
                    raise UnavailableError(f"{handle}: the hub sends less than {SLOWEST} bytes a second")
                window_start, window_bytes = time.monotonic(), 0


class Part:
    """One range on its way, fetched in a thread of a pool and read in another."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        # At most PART bytes, and the end or an error.
        self._items: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()

    def fetch(self) -> None:
        try:
            for chunk in self.stream:
                self._items.put(chunk)
            self._items.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._items.put(error)

    def __iter__(self) -> Iterator[bytes]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class Parts:
    """Iterates over a whole object that comes over several connections. Raises what `Stream` does."""

    def __init__(self, net: Net, origin: Archive, settings: Settings) -> None:
        """
        Args:
            origin: with size and ETag.
        """
        self._net = net
        self._origin = origin
        self._settings = settings
        self._over = threading.Event()
        self._window: deque[Part] = deque()
        self.headers: Mapping[str, str] | None = None

    def abort(self) -> None:
        """End all connections."""
        self._over.set()
        for part in list(self._window):
            part.stream.abort()

    def __iter__(self) -> Iterator[bytes]:
        assert self._origin.size is not None
        starts = iter(range(0, self._origin.size, PART))
        with ThreadPoolExecutor(CONNECTIONS, "hubfs-range") as pool:
            try:
                for start in starts:
                    self._begin(pool, start)
                    if len(self._window) > CONNECTIONS:
                        yield from self._first()
                while self._window:
                    yield from self._first()
            finally:
                self.abort()
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, start: int) -> None:
        origin = self._origin
        assert origin.size is not None
        stop = min(start + PART, origin.size)
        part = Part(
            Stream(self._net, origin, self._settings, self._over, start=start, stop=stop, etag=origin.etag)
        )
        self._window.append(part)
        pool.submit(part.fetch)

    def _first(self) -> Iterator[bytes]:
        part = self._window[0]
        for chunk in part:
            if self.headers is None:
                self.headers = part.stream.headers
            yield chunk
        self._window.popleft()


def _content_range(response: requests.Response, handle: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not match:
        raise UnavailableError(f"{handle}: the hub sent a part of the archive without saying which")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _broken(error: Exception, handle: str) -> HubfsError:
    """The error for a body that could not be read on."""
    import urllib3

    if isinstance(error, (urllib3.exceptions.HTTPError, OSError, ValueError)):
        return UnavailableError(f"{handle}: the connection broke: {error}", hint="try again later")
    return ProtocolError(f"{handle}: the body could not be read: {error!r}")
