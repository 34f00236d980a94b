"""One archive's bytes in order, from one or several connections, checked as a whole."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import google_crc32c

from hubfs.errors import DamagedError, StoppedError
from hubfs.hubs.base import Archive
from hubfs.hubs.checksums import declared_digests
from hubfs.net import Net, Route
from hubfs.sharing import Seat
from hubfs.transfer.ranges import SEVERAL_FROM, Parts
from hubfs.transfer.stream import NoRangesError, Stream

if TYPE_CHECKING:
    from hubfs.config import Settings

#: Chunks between the connection and the inflating thread: bounds the memory of a transfer.
QUEUE: Final = 8


class Download:
    """Iterates over an archive's bytes.

    Iterating raises what `hubfs.transfer.stream.Stream` does, and `DamagedError` when length or checksum
    are not what the hub said.
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
            origin: comes over several connections if it is large and has an ETag.
            on_bytes: called with the bytes received so far and the archive's size, if known.
        """
        self._net = net
        self._origin = origin
        self._settings = settings
        self._cancel = cancel
        self._on_bytes = on_bytes
        self._route = Route(origin.url)
        self._source: Stream | Parts = Stream(net, origin, settings, cancel, self._route)
        self._received = 0

    def abort(self) -> None:
        """Wake the threads that wait for this download's connections. `cancel` must have been set before."""
        self._source.abort()

    def __iter__(self) -> Iterator[bytes]:
        digests = None
        with self._net.sharing.seat(lambda: self._route.host) as seat:
            for chunk in self._ordered(seat):
                if digests is None:
                    digests = Digests(self._source.headers or {})
                digests.update(chunk)
                self._received += len(chunk)
                total = self._source.total if isinstance(self._source, Stream) else self._origin.size
                self._on_bytes(self._received, total)
                yield chunk
        if digests is not None:
            digests.verify(self._origin.handle)

    def _ordered(self, seat: Seat) -> Iterator[bytes]:
        origin, settings = self._origin, self._settings
        if origin.etag is not None and origin.size is not None and origin.size >= SEVERAL_FROM:
            self._source = Parts(self._net, origin, settings, self._route, seat)
            if self._cancel.is_set():
                raise StoppedError(f"{origin.handle}: the transfer was stopped")
            try:
                yield from self._source
                return
            except NoRangesError:
                self._source = Stream(
                    self._net, origin, settings, self._cancel, self._route,
                    start=self._received, etag=origin.etag,
                )  # fmt: skip
        seat.take(first=True)
        yield from self._source


class Digests:
    """The checksums that a hub declares for an archive, and those of what arrived."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.expected = declared_digests(headers)
        if "crc32c" in self.expected:
            # An MD5 takes as long as the line does, and finds no accident that this and gzip's do not.
            self.expected.pop("md5", None)
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


def in_background(
    chunks: Iterator[bytes], stop: Callable[[], None], *, name: str = "hubfs-download"
) -> Generator[bytes, None, None]:
    """Run `chunks` in a thread of its own, at most `QUEUE` items ahead.

    Args:
        stop: makes `chunks` end soon; called when the reader leaves early.
        name: of the thread.
    """
    items: queue.Queue[bytes | BaseException | None] = queue.Queue(QUEUE)

    def produce() -> None:
        try:
            for chunk in chunks:
                items.put(chunk)
            items.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            items.put(error)

    thread = threading.Thread(target=produce, name=name, daemon=True)
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
