"""Which range to fetch next: a state machine that knows no thread, no clock and no network.

A file is known by its chunks: each is missing, asked for or present, and only what is missing is ever
asked for. What readers wait for comes first, then what those who read in order will need, the soonest
need first, then what is to be brought in anyhow.

TensorFlow reads the end of a file and then all of it from its start, so a file has several cursors: a
reader elsewhere never ends another one's run. The kernel reads ahead with several requests at a time, which
come in any order, so small jumps belong to the run.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from hubfs.transfer.chunks import ASKED, CHUNK, MISSING, PRESENT, Chunks, whole
from hubfs.transfer.lane import FIRST, Lane, Policy

#: A jump of so many bytes, forward or backward, belongs to the run.
JUMP: Final = 8 << 20
#: Requests that are read ahead for each connection: all are busy while the reader waits for the first ones.
DEPTH: Final = 1.5
#: Requests that a window is asked for in at least, however quick the line is.
PARTS: Final = 4
#: Cursors of a file at most. The one that was used last stays.
CURSORS: Final = 16
#: A cursor that did not move for so many seconds is given no part of the budget.
ACTIVE: Final = 30.0
#: Seconds between two attempts at most.
LONGEST_PAUSE: Final = 60.0


class Kind(enum.IntEnum):
    """Why something is asked for; the smaller, the more urgent."""

    DEMAND = 0
    AHEAD = 1
    FILL = 2


@dataclass
class Cursor:
    """Somebody who reads a file in order.

    Attributes:
        position: behind the last byte that was read.
        run: bytes read in order so far.
        used: when that was.
        read: whether that was ever; else somebody is only expected there, and the window does not move.
    """

    position: int
    run: int
    used: float
    read: bool = True

    @property
    def window(self) -> int:
        """Bytes to read ahead; doubles with the run."""
        return 1 << (4 * self.run - 1).bit_length() if self.run else 0

    def move(self, start: int, stop: int, now: float) -> None:
        """A read that belongs to the run."""
        jump = start - self.position
        if jump > self.window:
            self.run = max(0, self.run - jump)
        self.run += max(0, stop - max(start, self.position))
        self.position = max(self.position, stop)
        self.used, self.read = now, True


class File(Chunks):
    """What is there of a file, and who reads it. Only a `Prefetch` changes it.

    Attributes:
        lane: the host it comes from: connections are counted for each.
        cursors: the one that was used last comes last.
    """

    def __init__(self, size: int, lane: str = "", present: Iterable[int] = ()) -> None:
        """
        Args:
            present: numbers of the chunks that are there already.
        """
        super().__init__(size, present)
        self.lane = lane
        self.cursors: list[Cursor] = []


@dataclass(eq=False)
class Want:
    """A range that somebody waits for."""

    file: File
    start: int
    stop: int

    def touches(self, request: Request) -> bool:
        """Whether a request is going to bring some of it."""
        return self.file is request.file and self.start < request.stop and request.at < self.stop


@dataclass(eq=False)
class Request:
    """A range on its way, `stop` exclusive.

    Attributes:
        attempt: counts from 1.
        urgent: what is behind this is only read ahead.
        began: when it was sent.
        at: up to where its bytes have come.
    """

    file: File
    start: int
    stop: int
    kind: Kind
    began: float
    attempt: int = 1
    urgent: int = -1
    at: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.start
        if self.urgent < 0:
            self.urgent = self.stop if self.kind is Kind.DEMAND else self.start


#: Bytes to read ahead of a cursor.
_Window = tuple[int, Cursor, File]


@dataclass
class Prefetch:
    """Decides over all files of a process. All times are seconds of the same clock.

    `next` says what to ask for, until there is nothing; `done` or `failed` must be told of each.
    """

    policy: Policy = field(default_factory=Policy)
    wants: deque[Want] = field(default_factory=deque)
    lanes: defaultdict[str, Lane] = field(default_factory=lambda: defaultdict(Lane))
    _files: dict[File, None] = field(default_factory=dict)  # those with cursors
    _fill: dict[File, None] = field(default_factory=dict)
    _retries: list[tuple[float, Request]] = field(default_factory=list)

    # ---- what readers do

    def read(self, file: File, start: int, stop: int, now: float) -> bool:
        """Somebody reads a range, there or not.

        Returns:
            Whether it is worth the time to ask `next`: not for each of the many small reads of a run.
        """
        near = [c for c in file.cursors if abs(start - c.position) <= JUMP]
        if near:
            cursor = min(reversed(near), key=lambda c: abs(start - c.position))
            before = cursor.position
            cursor.move(start, stop, now)
            if cursor is file.cursors[-1] and before // FIRST == cursor.position // FIRST:
                return False
            file.cursors.remove(cursor)
        else:
            # Who begins at the start most often goes on; elsewhere a second read has to show it.
            cursor = Cursor(stop, 0 if start else stop, now)
        file.cursors = [*file.cursors[-CURSORS + 1 :], cursor]
        self._follow(file)
        return True

    def expect(self, file: File, start: int, size: int, now: float) -> None:
        """Somebody is going to read a file from `start` on: so many bytes are read ahead."""
        if not any(cursor.position == start for cursor in file.cursors):
            file.cursors = [Cursor(start, size // 4, now, read=False), *file.cursors[-CURSORS + 1 :]]
            self._follow(file)

    def want(self, want: Want) -> None:
        """Somebody waits for a range from now on."""
        self._lane(want.file)
        self.wants.append(want)

    def unwant(self, want: Want) -> None:
        """Nobody waits for it any more; it may be over already."""
        self.wants = deque(each for each in self.wants if each is not want)

    def wanted(self, request: Request) -> bool:
        """Whether somebody waits for bytes of a request."""
        return any(want.touches(request) for want in self.wants)

    def fill(self, file: File) -> None:
        """Bring in all of a file, after those for which that was said before."""
        self._lane(file)
        self._fill[file] = None

    def is_filling(self, file: File) -> bool:
        """Whether all of a file is to be brought in."""
        return file in self._fill

    def failures(self, file: File) -> int:
        """Times in a row that requests to a file's host failed."""
        return self._lane(file).failures

    def stop_filling(self, file: File) -> None:
        """Bring in only what is read from now on."""
        self._fill.pop(file, None)

    def leave(self, file: File) -> None:
        """Nobody has the file open any more: nothing is read ahead of it. Filling goes on."""
        file.cursors = []
        self._files.pop(file, None)

    def remove(self, file: File) -> None:
        """Ask for nothing of a file any more."""
        self.leave(file)
        self._fill.pop(file, None)
        self._retries = [(at, request) for at, request in self._retries if request.file is not file]
        self.wants = deque(want for want in self.wants if want.file is not file)

    # ---- what comes of it

    def next(self, now: float) -> Request | None:
        """The request to send now; `None` if there is none until something happens or `wake` has come."""
        # All hosts have a lane that there is anything to ask for. Most often all are busy while many read.
        if all(lane.busy >= self.policy.connections for lane in self.lanes.values()):
            return None
        request = self._again(now) or self._demand(now)
        if request is None:
            windows = self._windows(now)
            request = self._ahead(now, windows) or self._filling(now, reading=bool(windows))
        if request is not None:
            request.file.mark(request.start, request.stop, ASKED)
            self._lane(request.file).busy += 1
        return request

    def wake(self, now: float) -> float | None:
        """When `next` may have something though nothing else happened."""
        times = [at for at, _ in self._retries]
        if self._fill:
            times += [lane.rest for lane in self.lanes.values()]
        return min((at for at in times if at > now), default=None)

    def arrived(self, request: Request, upto: int) -> None:
        """Some of a request's bytes are there; the rest is still on its way."""
        request.file.mark(request.at, upto, PRESENT)
        request.at = upto

    def done(self, request: Request, now: float) -> None:
        """The bytes of a request are there."""
        request.file.mark(request.at, request.stop, PRESENT)
        lane = self._landed(request)
        lane.failures, lane.rest = 0, 0.0
        size = request.stop - request.start
        if size >= FIRST:
            rate = size / max(now - request.began, 1e-3)
            lane.learn(rate)

    def failed(
        self, request: Request, now: float, *, temporary: bool, pause: float = 0.0, factor: float = 1.0
    ) -> bool:
        """A request failed; what has arrived of it stays.

        What somebody waits for is tried again as often as the policy says. All else is given up: who comes
        for it tries again, and filling does so after a while.

        Args:
            temporary: it may succeed if it is repeated.
            pause: seconds that the hub asked for.
            factor: makes pauses differ, so that not all come back at the same moment.

        Returns:
            Whether it was given up. Those who wait for some of it must be told: their wants are over.
        """
        lane = self._landed(request)
        if request.began > lane.failed or not lane.failures:
            lane.failures, lane.failed = lane.failures + 1, now
        if request.at > request.start:
            # It made progress: attempts are counted anew.
            request.attempt = 1
        again = temporary and self.wanted(request) and request.attempt <= self.policy.retries
        delay = self.policy.retry_delay * factor
        delay *= 2 ** min((request.attempt if again else lane.failures) - 1, 20)
        at = now + min(max(delay, pause), LONGEST_PAUSE)
        lane.rest = max(lane.rest, at)
        if again:
            self._retries.append((at, request))
            return False
        request.file.mark(request.at, request.stop, MISSING)
        self.wants = deque(want for want in self.wants if not want.touches(request))
        if not temporary:
            # What was asked for without need is not asked for again.
            request.file.cursors = []
            self._fill.pop(request.file, None)
        return True

    def shorten(self, request: Request, stop: int) -> None:
        """There is room only up to `stop`; if that is its start, the request is not sent."""
        request.file.mark(max(stop, request.start), request.stop, MISSING)
        request.stop = stop
        if stop <= request.start:
            self._landed(request)

    def forget(self, file: File, start: int, stop: int) -> None:
        """Bytes that were present are not there any more."""
        file.mark(start, min(stop, file.size), MISSING)

    # ---- the decisions, most urgent first

    def _again(self, now: float) -> Request | None:
        for due in [retry for retry in self._retries if retry[0] <= now]:
            failed = due[1]
            if not self.wanted(failed):
                self._retries.remove(due)
                failed.file.mark(failed.at, failed.stop, MISSING)
            elif self._is_free(failed.file):
                self._retries.remove(due)
                return Request(failed.file, failed.at, failed.stop, Kind.DEMAND, now, failed.attempt + 1)
        return None

    def _demand(self, now: float) -> Request | None:
        for _ in range(len(self.wants)):
            want = self.wants[0]
            # Whoever wants much does not keep the others waiting.
            self.wants.rotate(-1)
            start = want.file.gap(want.start, want.stop)
            if start is None or not self._is_free(want.file):
                continue
            most = self._lane(want.file).request_size(self.policy.largest, self.policy.quick)
            size = min(most, max(FIRST, whole(want.stop - start)))
            stop = want.file.gap_end(start, max(size, self._run_on(want.file, start, now)))
            return Request(want.file, start, stop, Kind.DEMAND, now, urgent=min(start + size, stop))
        return None

    def _run_on(self, file: File, start: int, now: float) -> int:
        """Bytes from `start` on for somebody who reads there in order.

        While many wait, nothing is read ahead of anybody: all would go on in steps of what each waits for.
        """
        windows = self._windows(now)
        sizes = [
            min(cursor.position + window - start, self._part(file, window, len(windows)))
            for window, cursor, other in windows
            if other is file and start <= cursor.position <= start + JUMP
        ]
        return max(sizes, default=0)

    def _ahead(self, now: float, windows: list[_Window]) -> Request | None:
        best: tuple[int, Request] | None = None
        for window, cursor, file in windows:
            lane = self._lane(file)
            # Each of many readers may have one.
            most = min(max(lane.enough(self.policy), len(windows)), self.policy.connections)
            if lane.busy >= most or lane.rest > now or window < FIRST:
                continue
            end = min(cursor.position + window, file.size)
            start = file.gap(cursor.position, end)
            if start is None or (best is not None and start - cursor.position >= best[0]):
                continue
            size = self._part(file, window, len(windows))
            stop = file.gap_end(start, size)
            if stop > end and stop - start == size:
                # A window that moves by a few bytes is no reason for a request of a few bytes.
                if cursor.read:
                    continue
                stop = min(stop, start + whole(end - start))
            best = start - cursor.position, Request(file, start, stop, Kind.AHEAD, now)
        return best[1] if best else None

    def _part(self, file: File, window: int, readers: int) -> int:
        """Bytes of a request for some of a window."""
        parts = max(2, int(DEPTH * self.policy.connections / readers))
        share = min(self.policy.largest, max(FIRST, window // parts))
        return self._lane(file).request_size(share, min(self.policy.quick, window // PARTS))

    def _windows(self, now: float) -> list[_Window]:
        """Bytes to read ahead for each cursor: what its run deserves, or an equal part of what is left."""
        windows = [
            (cursor.window, cursor, file)
            for file in self._files
            for cursor in file.cursors
            if cursor.run and cursor.position < file.size and file.missing and now - cursor.used < ACTIVE
        ]
        windows.sort(key=lambda each: each[0])
        left = self.policy.budget
        for index, (window, cursor, file) in enumerate(windows):
            granted = min(window, left // (len(windows) - index))
            windows[index] = granted, cursor, file
            left -= granted
        return windows

    def _filling(self, now: float, reading: bool) -> Request | None:
        complete = []
        found = None
        for file in self._fill:
            if not file.missing:
                complete.append(file)
                continue
            lane = self._lane(file)
            # One connection is left for what somebody may want; and one tries whether the host is back.
            most = min(lane.enough(self.policy) - reading, self.policy.connections - 1)
            most = 1 if lane.failures else max(1, most)
            start = file.gap(file.filled * CHUNK, file.size)
            if start is None or lane.busy >= most or lane.rest > now:
                continue
            file.filled = start // CHUNK
            stop = file.gap_end(start, lane.request_size(self.policy.largest, self.policy.quick))
            found = Request(file, start, stop, Kind.FILL, now)
            break
        for file in complete:
            del self._fill[file]
        return found

    def _follow(self, file: File) -> None:
        """A file has cursors now."""
        self._lane(file)
        self._files[file] = None

    def _lane(self, file: File) -> Lane:
        return self.lanes[file.lane]

    def _is_free(self, file: File) -> bool:
        return self._lane(file).busy < self.policy.connections

    def _landed(self, request: Request) -> Lane:
        lane = self._lane(request.file)
        lane.busy -= 1
        return lane
