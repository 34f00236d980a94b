"""One archive's bytes in order, over one connection that resumes where it broke, checked at the end."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import google_crc32c

from hubfs.errors import DamagedError, HubfsError, ProtocolError, StoppedError, UnavailableError
from hubfs.hubs.base import Archive
from hubfs.net import Net

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings

#: Most bytes taken from a connection at once.
CHUNK: Final = 1 << 20
#: Chunks between the connection and the inflating thread: bounds the memory of a transfer.
QUEUE: Final = 8
#: Slower than this over `stall_timeout`, a connection counts as stalled. In bytes per second.
SLOWEST: Final = 1024
#: An attempt that brought at least so many bytes made progress: the count of failures starts anew.
PROGRESS: Final = 64 * 1024


class ChangedOriginError(DamagedError):
    """The archive at the hub is another one than when the transfer began: start from zero."""


class Download:
    """Iterates over an archive's bytes.

    Iterating raises `UnavailableError` after too many failures in a row, `ChangedOriginError` when the
    hub has another archive meanwhile, `DamagedError` when length or checksum are not what the hub said,
    and `StoppedError` after `cancel` was set.
    """

    def __init__(
        self,
        net: Net,
        origin: Archive,
        settings: Settings,
        cancel: threading.Event,
        on_bytes: Callable[[int, int | None], None] = lambda received, total: None,
    ) -> None:
        """
        Args:
            on_bytes: called with the bytes received so far and the archive's size, if known.
        """
        self._net = net
        self._origin = origin
        self._settings = settings
        self._cancel = cancel
        self._on_bytes = on_bytes
        self._received = 0
        self._total: int | None = None
        self._etag: str | None = None
        self._digests: Digests | None = None
        self._response: requests.Response | None = None

    def abort(self) -> None:
        """Wake a thread that waits for this download's connection. `cancel` must have been set before."""
        response = self._response
        if response is not None:
            # The thread that reads it may be closing it just now, in whatever state that is.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                response.raw.shutdown()

    def __iter__(self) -> Iterator[bytes]:
        failures = 0
        while True:
            before = self._received
            try:
                yield from self._one_connection()
                break
            except UnavailableError as error:
                if self._received - before >= PROGRESS:
                    failures = 0
                failures += 1
                if failures > self._settings.retries:
                    raise
                self._check_cancel()
                self._net.pause(failures, error, self._cancel)
        assert self._digests is not None
        self._digests.verify(self._origin.handle)

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise StoppedError(f"{self._origin.handle}: the transfer was stopped")

    def _one_connection(self) -> Iterator[bytes]:
        handle, offset = self._origin.handle, self._received
        self._check_cancel()
        headers = {}
        if offset and self._etag:
            headers = {"Range": f"bytes={offset}-", "If-Range": self._etag}
        elif offset:
            # Without a strong validator a continuation could be another archive's.
            raise ChangedOriginError(f"{handle}: the connection broke and the hub offers no way to resume")
        with self._net.get(self._origin.url, handle, headers) as response:
            self._response = response
            try:
                skip = self._accept(response, offset)
                for chunk in self._chunks(response):
                    if skip >= len(chunk):
                        skip -= len(chunk)
                        continue
                    if skip:
                        chunk, skip = chunk[skip:], 0
                    assert self._digests is not None
                    self._digests.update(chunk)
                    self._received += len(chunk)
                    self._on_bytes(self._received, self._total)
                    yield chunk
            finally:
                self._response = None
        if self._total is not None and self._received != self._total:
            raise UnavailableError(
                f"{handle}: the hub sent {self._received} of {self._total} bytes", hint="try again later"
            )

    def _accept(self, response: requests.Response, offset: int) -> int:
        """Compare an answer with what is there already; returns how many of its bytes to leave out."""
        handle, etag = self._origin.handle, strong_etag(response.headers)
        if response.status_code == 416:
            if offset:
                raise ChangedOriginError(f"{handle}: the archive at the hub became shorter")
            raise DamagedError(f"{handle}: the hub sent an empty archive")
        start, total = 0, _content_length(response)
        if response.status_code == 206:
            start, total = _content_range(response, handle)
            if start != offset:
                raise UnavailableError(f"{handle}: the hub sent bytes from {start} instead of from {offset}")
        if not offset:
            self._total, self._etag = total, etag
            self._digests = Digests(response.headers)
            return 0
        if etag != self._etag or (total is not None and self._total not in (None, total)):
            raise ChangedOriginError(f"{handle}: the archive at the hub changed during the transfer")
        return offset - start

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


class Digests:
    """The checksums that a hub declares for an archive, and those of what arrived."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.expected = declared_digests(headers)
        self._md5 = hashlib.md5(usedforsecurity=False) if "md5" in self.expected else None
        self._crc32c = google_crc32c.Checksum() if "crc32c" in self.expected else None

    def update(self, chunk: bytes) -> None:
        if self._md5 is not None:
            self._md5.update(chunk)
        if self._crc32c is not None:
            self._crc32c.update(chunk)

    def verify(self, handle: str) -> None:
        """
        Raises:
            DamagedError: a checksum differs.
        """
        for name, digest in (("md5", self._md5), ("crc32c", self._crc32c)):
            if digest is not None and digest.digest() != self.expected[name]:
                raise DamagedError(
                    f"{handle}: the archive's {name} is {digest.digest().hex()}, "
                    f"the hub declared {self.expected[name].hex()}"
                )


def declared_digests(headers: Mapping[str, str]) -> dict[str, bytes]:
    """`md5` and `crc32c` from `x-goog-hash`, `Content-MD5`, or an ETag that is known to be an MD5."""
    found: dict[str, bytes] = {}
    for part in headers.get("x-goog-hash", "").split(","):
        name, _, value = part.strip().partition("=")
        if name in ("md5", "crc32c"):
            _add_base64(found, name, value)
    if "md5" not in found and "Content-MD5" in headers and "Content-Range" not in headers:
        _add_base64(found, "md5", headers["Content-MD5"])
    # Only object stores use the MD5 as ETag; elsewhere 32 hex digits may be the hash of anything.
    store = any(name.lower().startswith(("x-goog-", "x-amz-")) for name in headers)
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    if (
        store
        and etag
        and "md5" not in found
        and "aws:kms" not in headers.get("x-amz-server-side-encryption", "")
    ):
        found["md5"] = bytes.fromhex(etag[1])
    return found


def _add_base64(found: dict[str, bytes], name: str, value: str) -> None:
    try:
        raw = base64.b64decode(value, validate=True)
    except ValueError:
        return
    if len(raw) == {"md5": 16, "crc32c": 4}[name]:
        found[name] = raw


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """The ETag if it may be used with If-Range (RFC 9110 §13.1.5 allows strong ones only)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else None


def _content_length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]+", text) else None


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


def in_background(chunks: Iterator[bytes], stop: Callable[[], None]) -> Generator[bytes, None, None]:
    """Run `chunks` in a thread of its own, at most `QUEUE` items ahead.

    Args:
        stop: makes `chunks` end soon; called when the reader leaves early.
    """
    items: queue.Queue[bytes | BaseException | None] = queue.Queue(QUEUE)

    def produce() -> None:
        try:
            for chunk in chunks:
                items.put(chunk)
            items.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            items.put(error)

    thread = threading.Thread(target=produce, name="hubfs-download", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if thread.is_alive():
            stop()
            while thread.is_alive():
                # The producer may be waiting for room.
                try:
                    items.get(timeout=0.05)
                except queue.Empty:
                    continue
        thread.join()
