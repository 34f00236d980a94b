"""Ranges of remote files, fetched as `hubfs.transfer.prefetch` decides, each retried alone."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from hubfs.errors import (
    DamagedError,
    HubfsError,
    StoppedError,
    UnavailableError,
    from_os_error,
    internal_error,
)
from hubfs.transfer.chunks import CHUNK, whole
from hubfs.transfer.lane import QUICK, Policy
from hubfs.transfer.prefetch import File, Prefetch, Request, Want
from hubfs.transfer.sink import Sink

if TYPE_CHECKING:
    from hubfs.config import Settings
    from hubfs.hubs.base import RemoteFile, Source

log = logging.getLogger(__name__)
#: Requests of no more bytes are given to nobody before all checks of their source.
_CHECKED: Final = 1 << 20
#: Changes something; False if there cannot be anything to send because of that.
_Change = Callable[[Prefetch, float], bool | None]


class Awaited:
    """Somebody waits for a range (`Remote.waiting`)."""

    def __init__(self, remote: Remote, want: Want) -> None:
        self.want = want
        # All of them protected by the fetcher's lock.
        self.enough = want.stop
        self.error: HubfsError | None = None
        self.woken = threading.Event()
        self._remote = remote

    def begin_with(self, start: int, stop: int) -> None:
        """From now on these bytes are enough to be ready; those before them were read."""
        self._remote._begin_with(self, start, stop)

    def ready(self) -> bool | None:
        """True once the bytes are there, `None` before: to be looked at now and after each `pause`.

        Raises:
            HubfsError: they could not be had. To wait anew is to try anew.
        """
        return self._remote._ready(self)

    def pause(self, seconds: float) -> None:
        """Returns when it may be ready, at the latest after so many seconds."""
        self.woken.wait(seconds)


class Remote:
    """A file at a hub, of which ranges are fetched as they are needed. Safe to use from many threads.

    Attributes:
        file: what the listing says of it.
        received: bytes that came so far.
    """

    def __init__(
        self, fetcher: Fetcher, handle: str, source: Source, file: RemoteFile, sink: Sink, state: File
    ) -> None:
        self.handle = handle
        self.source = source
        self.file = file
        self.sink = sink
        self.state = state
        self.cancel = threading.Event()
        self.received = 0
        # Both protected by the fetcher's lock.
        self.awaited: list[Awaited] = []
        self.writing = 0
        self._fetcher = fetcher

    def has(self, start: int, stop: int) -> bool:
        """Whether all of a range is there."""
        return self.state.has(start, stop)

    @property
    def complete(self) -> bool:
        return not self.state.missing

    @property
    def present(self) -> int:
        """Bytes that are there, in whole chunks."""
        return min(self.file.size, whole(self.file.size) - self.state.missing * CHUNK)

    def read(self, start: int, stop: int) -> bool:
        """Somebody reads a range: what comes next is read ahead. Returns whether the range is there.

        If it is not, nothing is asked for before `waiting`: what is read ahead would take the connections.
        """

        def begin(machine: Prefetch, now: float) -> bool:
            return machine.read(self.state, start, stop, now) and self.has(start, stop)

        if self.state.missing and not self.cancel.is_set():
            self._fetcher._run_all(self._while_open(begin))
        return self.has(start, stop)

    def expect(self, start: int, size: int) -> None:
        """Somebody is going to read it from `start` on: so many bytes are read ahead."""
        self._fetcher._run_all(
            self._while_open(lambda machine, now: machine.expect(self.state, start, size, now))
        )

    @contextmanager
    def waiting(self, start: int, stop: int) -> Iterator[Awaited]:
        """Ask for a range for the length of a `with` block, before all that is only read ahead."""
        want = Want(self.state, start, min(stop, self.file.size))
        awaited = Awaited(self, want)

        def begin(machine: Prefetch, now: float) -> None:
            self.awaited.append(awaited)
            if not self.cancel.is_set():
                machine.want(want)

        def end(machine: Prefetch, now: float) -> None:
            self.awaited.remove(awaited)
            machine.unwant(want)

        self._fetcher._run_all(begin)
        try:
            yield awaited
        finally:
            self._fetcher._run_all(end)

    def fill(self) -> None:
        """Bring in all of it in the background, after those files for which that was said before."""
        self._fetcher._run_all(self._while_open(lambda machine, now: machine.fill(self.state)))

    def stop_filling(self) -> None:
        """Bring in only what is read from now on."""
        self._fetcher._run_all(lambda machine, now: machine.stop_filling(self.state))

    @property
    def is_filling(self) -> bool:
        """Whether all of it is being brought in."""
        return self._fetcher._machine.is_filling(self.state)

    @property
    def failures(self) -> int:
        """Times in a row that requests to its host failed; those that were under way together count once."""
        return self._fetcher._machine.failures(self.state)

    def leave(self) -> None:
        """Nobody has it open any more: nothing is read ahead of it. `fill` goes on."""
        self._fetcher._run_all(lambda machine, now: machine.leave(self.state))

    def forget(self, start: int, stop: int) -> None:
        """Bytes that were there are not any more. For `Sink.room` only, which is called at the right time."""
        self._fetcher._machine.forget(self.state, start, stop)

    def lose(self, start: int, stop: int) -> None:
        """The same for everybody else: bytes that came turned out to be wrong."""
        self._fetcher._run_all(lambda machine, now: machine.forget(self.state, start, stop))

    def close(self) -> None:
        """Fetch no more of it. Who waits is told so; nothing is given to the sink any more."""
        self._fetcher._remove(self)

    def _while_open(self, change: _Change) -> _Change:
        # Closed under the same lock: the machine must not come to know a file again that was removed.
        return lambda machine, now: None if self.cancel.is_set() else change(machine, now)

    def _begin_with(self, awaited: Awaited, start: int, stop: int) -> None:
        with self._fetcher._lock:
            awaited.want.start, awaited.enough = start, stop

    def _ready(self, awaited: Awaited) -> bool | None:
        with self._fetcher._lock:
            awaited.woken.clear()
            if self.state.has(awaited.want.start, awaited.enough):
                return True
            if self.cancel.is_set():
                raise StoppedError(f"{self.handle}: hubfs stopped fetching it")
            if awaited.error is not None:
                # One instance is raised in many threads: without this it would collect all their frames.
                raise awaited.error.with_traceback(None)
        # There may be room now that was not there before.
        self._fetcher._run_all(lambda machine, now: None)
        return None


class Fetcher:
    """Runs the decisions over all remote files of a process, in threads that live while there is work."""

    def __init__(self, policy: Policy) -> None:
        self._lock = threading.Lock()  # protects all of this, and what remotes say is protected by it
        self._machine = Prefetch(policy)
        self._remotes: dict[File, Remote] = {}
        self._settled = threading.Condition(self._lock)  # a write has ended, or the time to wake changed
        self._wake: float | None = None
        self._sleeping = False
        self._closed = False

    def open(
        self,
        handle: str,
        source: Source,
        file: RemoteFile,
        sink: Sink,
        *,
        host: str = "",
        present: Iterable[int] = (),
    ) -> Remote:
        """A file to fetch ranges of. One file is to be opened once, for all who read it.

        Args:
            handle: named in errors.
            host: where it comes from: connections are counted for each.
            present: numbers of the chunks (`hubfs.transfer.chunks`) that are there already.

        Raises:
            StoppedError: the fetcher is closed.
        """
        remote = Remote(self, handle, source, file, sink, File(file.size, host, present))
        with self._lock:
            if self._closed:
                raise StoppedError(f"{handle}: hubfs is being stopped")
            self._remotes[remote.state] = remote
        return remote

    def close(self) -> None:
        """Close all files. Sources end what they are at when they notice."""
        with self._lock:
            self._closed = True
            remotes = list(self._remotes.values())
            self._settled.notify_all()
        for remote in remotes:
            remote.close()

    # ---- deciding

    def _run_all(self, change: _Change) -> None:
        """Change something, and send what the machine wants to be sent then."""
        with self._lock:
            taken = [] if change(self._machine, time.monotonic()) is False else self._take()
        self._start(taken)

    def _take(self) -> list[tuple[Remote, Request]]:
        """The requests to send now. The lock must be held."""
        now, taken = time.monotonic(), []
        while not self._closed and (request := self._machine.next(now)) is not None:
            remote = self._remotes[request.file]
            room = request.urgent
            if request.start < room:
                room = remote.sink.room(request.start, room, urgent=True)
            if room == request.urgent < request.stop:
                room = remote.sink.room(room, request.stop, urgent=False)
            if room < request.stop:
                self._machine.shorten(request, room)
                if room <= request.start:
                    break
            taken.append((remote, request))
        wake = self._machine.wake(now)
        if wake != self._wake:
            self._wake = wake
            self._settled.notify_all()
        if wake is not None and not self._sleeping and not self._closed:
            self._sleeping = True
            threading.Thread(target=self._sleep, name="hubfs-fetch-pause", daemon=True).start()
        return taken

    def _sleep(self) -> None:
        """Goes on when a pause is over, though nothing else happens."""
        while True:
            with self._lock:
                if self._closed or self._wake is None:
                    self._sleeping = False
                    return
                self._settled.wait(max(0.0, self._wake - time.monotonic()))
                taken = self._take()
            self._start(taken)

    def _start(self, taken: list[tuple[Remote, Request]]) -> None:
        for remote, request in taken:
            thread = threading.Thread(
                target=self._work, args=(remote, request), name="hubfs-fetch", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                failure = UnavailableError(f"{remote.handle}: no thread to fetch it: {error}")
                self._start(self._land(remote, request, failure))

    # ---- fetching

    def _work(self, remote: Remote, request: Request) -> None:
        while True:
            taken = self._land(remote, request, self._fetch(remote, request))
            if not taken:
                return
            # One for this thread, which has its connection; others for new ones.
            self._start(taken[1:])
            remote, request = taken[0]

    def _fetch(self, remote: Remote, request: Request) -> HubfsError | None:
        """Bring a range to its sink, piece by piece; returns why that failed."""
        handle, at, stop = remote.handle, request.start, request.stop
        failure: HubfsError | None = None
        try:
            with closing(remote.source.pieces(handle, remote.file, at, stop, remote.cancel)) as pieces:
                for data in pieces:
                    if at + len(data) > stop:
                        failure = HubfsError(f"{handle}: more bytes than were asked for, {at} to {stop}")
                    else:
                        failure = self._write(remote, at, data)
                    if failure is not None:
                        break
                    at += len(data)
                    if at < stop and stop - request.start > _CHECKED:
                        self._arrive(remote, request, at)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            failure = expected(error, handle)
        if failure is None and at != stop:
            failure = UnavailableError(
                f"{handle}: the hub sent {at - request.start} of {stop - request.start} bytes"
            )
        if failure is not None and not isinstance(failure, DamagedError):
            self._arrive(remote, request, at)
        return failure

    def _write(self, remote: Remote, start: int, data: bytes | memoryview) -> HubfsError | None:
        with self._lock:
            if remote.cancel.is_set():
                return StoppedError(f"{remote.handle}: hubfs stopped fetching it")
            remote.writing += 1
        try:
            remote.sink.write(start, data)
        except OSError as error:
            return from_os_error(error, remote.handle, "writing to the cache")
        finally:
            with self._lock:
                remote.writing -= 1
                self._settled.notify_all()
        return None

    def _arrive(self, remote: Remote, request: Request, upto: int) -> None:
        """Some of a request's bytes are there; readers are told of whole chunks."""
        upto -= upto % CHUNK
        if upto <= request.at:
            return
        with self._lock:
            if request.file not in self._remotes:
                return
            start = request.at
            remote.sink.kept(start, upto)
            remote.received += upto - start
            self._machine.arrived(request, upto)
            self._wake_ready(remote, start, upto)
        remote.sink.moved()

    def _land(
        self, remote: Remote, request: Request, error: HubfsError | None
    ) -> list[tuple[Remote, Request]]:
        """A request has ended; returns what to send now."""
        with self._lock:
            start, stop = request.at, request.stop
            now = time.monotonic()
            given_up = False
            if isinstance(error, DamagedError):
                # It takes back what was given before it.
                self._machine.forget(request.file, request.start, start)
                remote.sink.lost(request.start, start)
                request.at = request.start
            if error is None and request.file in self._remotes:
                remote.sink.kept(start, stop)
                remote.received += stop - start
                self._machine.done(request, now)
            else:
                given_up = self._machine.failed(
                    request, now,
                    temporary=error is not None and error.temporary,
                    pause=getattr(error, "retry_after", None) or 0.0,
                    factor=random.uniform(0.75, 1.25),
                )  # fmt: skip
                remote.sink.dropped(start, stop)
            hit = [each for each in remote.awaited if given_up and each.want.touches(request)]
            self._wake_ready(remote, start, stop)
            taken = self._take()
        if error is not None and not isinstance(error, StoppedError):
            log.log(logging.DEBUG if given_up else logging.INFO, "%s (%d to %d)", error, start, stop)
            if given_up:
                remote.sink.failed(error)
        if hit:
            # Not before: who is told asks anew at once, of what `failed` put in order.
            with self._lock:
                for each in hit:
                    each.error = error
                    each.woken.set()
        remote.sink.moved()
        return taken

    def _wake_ready(self, remote: Remote, start: int, stop: int) -> None:
        """Let those who wait for a range that came look again, if they have all. The lock must be held."""
        for each in remote.awaited:
            if each.want.start < stop and start < each.enough and remote.has(each.want.start, each.enough):
                each.woken.set()

    def _remove(self, remote: Remote) -> None:
        with self._lock:
            remote.cancel.set()
            for each in remote.awaited:
                each.woken.set()
            if self._remotes.pop(remote.state, None) is not None:
                self._machine.remove(remote.state)
            while remote.writing:
                self._settled.wait()
            taken = self._take()
        self._start(taken)


def policy(settings: Settings) -> Policy:
    """The policy that a user's settings mean, for bytes that are not kept in memory."""
    return Policy(
        connections=settings.connections,
        quick=QUICK,
        processors=len(os.sched_getaffinity(0)),
        retries=settings.retries,
        retry_delay=settings.retry_delay,
    )


def expected(error: Exception, handle: str) -> HubfsError:
    """The error for readers; a bug is logged with its traceback."""
    if isinstance(error, HubfsError):
        return error
    log.error("%s: internal error", handle, exc_info=error)
    return internal_error(error, handle)
