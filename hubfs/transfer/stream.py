"""One object's bytes, or a range of them, over one connection at a time, resumed where it broke."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from hubfs.errors import (
    ChangedOriginError,
    DamagedError,
    HubfsError,
    ProtocolError,
    StoppedError,
    UnavailableError,
)
from hubfs.hubs.base import Archive
from hubfs.net import Call, Net, Route, content_length, strong_etag

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings

#: Most bytes taken from a connection at once. Half of it costs 0.1 s of CPU more a GB; twice as much, memory.
CHUNK: Final = 512 << 10
#: Where bytes come in packets, so many of them may gather before they are taken, for a few milliseconds at
#: most: to be woken for each packet costs more than all the rest.
GATHER: Final = 128 << 10
GATHER_SECONDS: Final = 0.004
#: Slower than this over `stall_timeout`, a connection counts as stalled. In bytes per second.
SLOWEST: Final = 1024
#: An attempt that brought at least so many bytes made progress: the count of failures starts anew.
PROGRESS: Final = 64 * 1024


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
        busy: seconds spent on reading bodies.
    """

    def __init__(
        self,
        net: Net,
        origin: Archive,
        settings: Settings,
        cancel: threading.Event,
        route: Route,
        *,
        start: int = 0,
        stop: int | None = None,
        etag: str | None = None,
    ) -> None:
        """
        Args:
            route: to `origin.url`, shared by all streams of a transfer.
            start, stop: the range, `stop` exclusive; without `stop` all that there is.
            etag: the strong ETag that the object must have; needed for all but the whole.
        """
        self.at = start
        self.total = origin.size if etag else None
        self.headers: Mapping[str, str] | None = None
        self.busy = 0.0
        self._net = net
        self._origin = origin
        self._settings = settings
        self._cancel = cancel
        self._route = route
        self._stop = stop
        self._etag = etag
        self._call = Call()

    def abort(self) -> None:
        """Wake a thread that waits for this stream's connection; it fails with `UnavailableError`.

        `StoppedError` if `cancel` was set before. Bytes that the stream gives afterwards are not to be used.
        """
        self._call.end()

    def __iter__(self) -> Iterator[bytes]:
        failures = 0
        while True:
            before = self.at
            try:
                yield from self.once()
                return
            except UnavailableError as error:
                if self.at - before >= PROGRESS:
                    failures = 0
                failures += 1
                if failures > self._settings.retries:
                    raise
                self._check_cancel()
                self._net.pause(failures, error, self._cancel)

    def once(self) -> Generator[bytes, None, None]:
        """What one connection brings of what is missing. Raises `UnavailableError` if that is not all."""
        handle = self._origin.handle
        self._check_cancel()
        with self._net.get(self._route, handle, self._request_headers(), self._call) as response:
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
            end = self._stop if self._stop is not None else self.total
            if end is not None and self.at != end:
                raise UnavailableError(
                    f"{handle}: the hub sent {self.at} of {end} bytes", hint="try again later"
                )

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise StoppedError(f"{self._origin.handle}: the transfer was stopped")

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
        # Only the hub's part of the time counts: whoever uses the bytes may be slow.
        window_start, window_bytes = self.busy, 0
        pause = 0.0
        while True:
            self._check_cancel()
            began = time.monotonic()
            if pause:
                time.sleep(pause)
            try:
                chunk: bytes = response.raw.read1(CHUNK, decode_content=False)
            except Exception as error:
                self._check_cancel()
                raise _broken(error, handle) from error
            took = time.monotonic() - began
            self.busy += took
            self._check_cancel()
            if not chunk:
                return
            yield chunk
            more = self.at not in (self._stop, self.total)
            pause = min(took * GATHER / len(chunk), GATHER_SECONDS) if more and len(chunk) < GATHER else 0.0
            window_bytes += len(chunk)
            elapsed = self.busy - window_start
            if elapsed >= self._settings.stall_timeout:
                if window_bytes < SLOWEST * elapsed:
                    raise UnavailableError(f"{handle}: the hub sends less than {SLOWEST} bytes a second")
                window_start, window_bytes = self.busy, 0


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
