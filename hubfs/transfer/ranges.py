"""Ranges of one object over as many connections as help, each range retried alone, as one ordered stream.

Connections are threads that fetch one part of the object after the other. Whoever iterates is given the
bytes of the first part that is not through, the head, and starts connections as `Pace` says. One that fails
while others work leaves what is missing of its part to them: only the last one insists.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Final

from hubfs.errors import (
    AccessError,
    HubfsError,
    NotFoundError,
    ProtocolError,
    StoppedError,
    UnavailableError,
)
from hubfs.hubs.base import Archive
from hubfs.net import Net, Route
from hubfs.sharing import Seat
from hubfs.transfer.pace import Pace, Progress
from hubfs.transfer.part import Part
from hubfs.transfer.stream import PROGRESS, Stream

if TYPE_CHECKING:
    from hubfs.config import Settings

log = logging.getLogger(__name__)

#: Smaller objects come over one connection: they would be through before several pay.
SEVERAL_FROM: Final = 16 << 20
#: Seconds after which the reader, if it gets nothing, looks whether something can be done about it.
TICK: Final = 0.02
#: Seconds after which a connection that waits for memory looks for it: other transfers do not wake it.
POLL: Final = 0.1
#: Bytes of the head that may wait, whatever else does.
HEAD_ROOM: Final = 4 << 20
#: The head is asked for once more if, while it was waited for so many seconds, it came slower than this
#: fraction of what a connection usually brings.
PATIENCE: Final = 2.0
SLUGGISH: Final = 0.25
#: Seconds for which the end of a transfer waits for its threads. Only opening a connection takes longer.
FAREWELL: Final = 1.0

#: What an additional connection may be refused with though another one works.
_REFUSALS = (UnavailableError, AccessError, NotFoundError, ProtocolError)


class _Left(Exception):
    """A connection's part is not its own any more."""


class Parts:
    """Iterates over a whole object that comes over several connections. Raises what `Stream` does.

    Attributes:
        headers: of the first answer.
    """

    def __init__(self, net: Net, origin: Archive, settings: Settings, route: Route, seat: Seat) -> None:
        """
        Args:
            origin: with size and ETag.
            route: to `origin.url`.
            seat: this transfer's part of the connections and of the memory.
        """
        assert origin.size is not None
        self.headers: Mapping[str, str] | None = None
        self._net = net
        self._origin = origin
        self._settings = settings
        self._route = route
        self._seat = seat
        self._size = origin.size
        self._over = threading.Event()
        self._lock = threading.Lock()  # protects everything below
        self._arrived = threading.Condition(self._lock)  # the reader waits here
        self._moved = threading.Condition(self._lock)  # connections wait here, for memory or a part
        self._window: deque[Part] = deque()  # in order; the first is the head
        self._next = 0  # offset of the first byte that no part has
        self._connections: list[_Connection] = []
        self._threads: list[_Connection] = []  # with those that do not count any more
        self._spare = 0  # connections that wait for a part
        self._error: BaseException | None = None
        self._received = 0
        self._waited = 0.0
        self._pace = Pace(time.monotonic())
        self._watched: tuple[Part, Progress, int] | None = None

    def abort(self) -> None:
        """End all connections."""
        with self._lock:
            self._over.set()
            for part in self._window:
                if part.stream is not None:
                    part.stream.abort()
            self._arrived.notify_all()
            self._moved.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        try:
            while (chunk := self._next_chunk()) is not None:
                yield chunk
        finally:
            self.abort()
            for thread in self._threads:
                thread.join(FAREWELL)
            with self._lock:
                self._window.clear()
                while self._connections:
                    self._dismiss(self._connections[0])

    # ---- for the reader

    def _next_chunk(self) -> bytes | None:
        with self._lock:
            while True:
                if self._error is not None:
                    raise self._error
                if self._over.is_set():
                    raise StoppedError(f"{self._origin.handle}: the transfer was stopped")
                while self._window and self._window[0].given == self._window[0].stop:
                    self._window.popleft()
                    self._moved.notify_all()
                if not self._window and self._next == self._size:
                    return None
                self._steer()
                if self._window and self._window[0].waiting:
                    return self._take(self._window[0])
                began = time.monotonic()
                self._arrived.wait(TICK)
                self._waited += time.monotonic() - began

    def _take(self, head: Part) -> bytes:
        chunk = head.take(self._seat)
        if not head.waiting or self._seat.has_room(for_more=True):
            self._moved.notify_all()
        return chunk

    def _steer(self) -> None:
        """Have as many connections as the pace says, and a good one for the head."""
        at = Progress(time.monotonic(), self._received, self._waited)
        self._pace.look(at, sum(one.delivers for one in self._connections), self._seat.fair())
        self._seat.wanted = self._pace.connections
        if self._window:
            self._watch(self._window[0], at)
        # Until the first answer is there, nobody knows where the redirects lead.
        wanted = self._pace.connections if self.headers is not None else 1
        while len(self._connections) < wanted and not self._spare and (part := self._find_part()):
            if not self._seat.take(first=not self._connections):
                break
            connection = _Connection(self, part)
            self._connections.append(connection)
            self._threads = [thread for thread in self._threads if thread.is_alive()] + [connection]
            self._give(part, connection)
            connection.start()

    def _watch(self, head: Part, at: Progress) -> None:
        """Take the head from a connection that keeps the reader waiting while others are better."""
        if self._watched is None or self._watched[0] is not head:
            self._watched = head, at, head.at
            return
        _, since, start = self._watched
        waited, got = at.waited - since.waited, head.at - start
        usual = (self._pace.rate or 0.0) * waited
        if head.replaced or head.connection is None or waited < PATIENCE or got >= SLUGGISH * usual:
            return
        # If nothing comes over any connection, another one would not help.
        others = [part for part in self._window if part is not head]
        if at.received - since.received > 2 * got or (others and all(part.complete for part in others)):
            log.info("%s: a connection is too slow, its part is asked for again", self._origin.handle)
            head.replaced = True
            assert isinstance(head.connection, _Connection) and head.stream is not None
            self._dismiss(head.connection)
            head.stream.abort()
            self._take_back(head)

    # ---- for the connections

    def next_part(self, connection: _Connection) -> Part | None:
        """What to fetch next; `None` if the connection is not needed any more. Waits for memory."""
        with self._lock:
            while not self._over.is_set() and connection in self._connections:
                for part in self._window:
                    if part.connection is connection and not part.complete:
                        return part
                surplus = len(self._connections) > self._pace.connections
                found = None if surplus else self._find_part()
                if found is not None:
                    self._give(found, connection)
                    return found
                if surplus or self._next == self._size:
                    self._dismiss(connection)
                    break
                self._spare += 1
                self._moved.wait(POLL)
                self._spare -= 1
            return None

    def put(self, part: Part, connection: _Connection, chunk: bytes) -> None:
        """Take the next bytes of a part, as soon as there is room for them.

        Raises:
            _Left: the part is no longer the connection's.
        """
        with self._lock:
            self._check(part, connection)
            connection.delivers = True
            if self.headers is None:
                assert part.stream is not None
                self.headers = part.stream.headers
            waited = False
            while not self._has_room(part, waited):
                waited = True
                self._moved.wait(POLL)
                self._check(part, connection)
                self._help_head(part, connection)
            self._received += len(chunk)
            if part is self._window[0]:
                part.append(chunk)
                self._arrived.notify()
            else:
                part.store(chunk, self._seat)
                self._help_head(part, connection)

    def through(self, size: int, seconds: float) -> None:
        """A connection has brought `size` bytes, the rest of a part, in `seconds` of reading."""
        with self._lock:
            self._pace.part_done(size, seconds)

    def failed(self, part: Part, connection: _Connection, error: HubfsError, size: int) -> int:
        """A connection failed, after `size` bytes.

        Returns:
            how often in a row without bringing anything, if the connection is to try again.

        Raises:
            HubfsError: it is of no use to try again.
            _Left: the part is no longer the connection's.
        """
        fruitful = size >= PROGRESS
        with self._lock:
            if part.connection is not connection:
                raise _Left from error
            if self._over.is_set():
                raise StoppedError(f"{self._origin.handle}: the transfer was stopped") from error
            part.failures = 0 if fruitful else part.failures + 1
            part.breaks += fruitful
            connection.delivers = False
            if fruitful and part.breaks == 1:
                return 0  # lines break
            if len(self._connections) > 1 and isinstance(error, _REFUSALS):
                self._dismiss(connection)
                self._take_back(part)
                after = error.retry_after if isinstance(error, UnavailableError) else None
                left = len(self._connections)
                self._pace.refused(time.monotonic(), left, after, fruitful=fruitful)
                log.info("%s; going on with %d connections", error, left)
                raise _Left from error
            if not isinstance(error, UnavailableError) or part.failures > self._settings.retries:
                raise error
            return part.failures

    def give_up(self, error: BaseException) -> None:
        """The transfer cannot be brought to its end."""
        with self._lock:
            self._error = self._error or error
            self._arrived.notify_all()

    def pause(self, attempt: int, error: HubfsError) -> None:
        self._net.pause(attempt, error, self._over)

    # ---- with the lock held

    def _find_part(self) -> Part | None:
        """The first part that nobody fetches, or a new one if there is room for it."""
        for part in self._window:
            if part.idle:
                return part
        if self._next == self._size:
            return None
        full = len(self._window) >= 2 * self._pace.connections or not self._seat.has_room(for_more=True)
        if self._window and full:
            return None
        size = self._pace.part_size(self._size - self._next, self._seat.room())
        part = Part(self._next, self._next + size)
        self._next = part.stop
        self._window.append(part)
        return part

    def _give(self, part: Part, connection: _Connection) -> None:
        part.connection = connection
        part.stream = Stream(
            self._net, self._origin, self._settings, self._over, self._route,
            start=part.at, stop=part.stop, etag=self._origin.etag,
        )  # fmt: skip

    def _take_back(self, part: Part) -> None:
        part.connection = part.stream = None
        self._moved.notify_all()

    def _dismiss(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        self._seat.give_back()

    def _has_room(self, part: Part, waited: bool) -> bool:
        if part is self._window[0]:
            return part.waiting < HEAD_ROOM
        return self._seat.has_room(for_more=waited)

    def _check(self, part: Part, connection: _Connection) -> None:
        """See that a connection may go on with its part."""
        if part.connection is not connection:
            raise _Left
        if self._over.is_set():
            raise StoppedError(f"{self._origin.handle}: the transfer was stopped")

    def _help_head(self, part: Part, connection: _Connection) -> None:
        """Leave a part if everybody waits for the head, and nobody fetches that."""
        if self._window[0].idle and not self._spare and not part.complete:
            self._take_back(part)
            self._give(self._window[0], connection)
            raise _Left


class _Connection(threading.Thread):
    """Fetches parts until it is not needed any more.

    Attributes:
        delivers: whether bytes have come over it. Protected by the lock of `parts`.
    """

    def __init__(self, parts: Parts, first: Part) -> None:
        super().__init__(name="hubfs-range", daemon=True)
        self.delivers = False
        self._parts = parts
        self._first = first

    def run(self) -> None:
        part: Part | None = self._first
        try:
            while part is not None:
                try:
                    self._fetch(part)
                except _Left:
                    pass
                part = self._parts.next_part(self)
        except BaseException as error:  # noqa: BLE001 - raised again in the reading thread
            self._parts.give_up(error)

    def _fetch(self, part: Part) -> None:
        stream = part.stream
        if stream is None:  # it was taken away again
            return
        start = stream.at
        while True:
            before = stream.at
            try:
                with closing(stream.once()) as chunks:
                    for chunk in chunks:
                        self._parts.put(part, self, chunk)
            except HubfsError as error:
                failures = self._parts.failed(part, self, error, stream.at - before)
                if failures:
                    self._parts.pause(failures, error)
            else:
                self._parts.through(stream.at - start, stream.busy)
                return
