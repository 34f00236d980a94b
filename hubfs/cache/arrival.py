"""Files of a version while they arrive: what one attempt of a transfer has brought so far."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hubfs.cache.manifest import FileInfo, Manifest
from hubfs.errors import HubfsError

#: Seconds from the first byte on in which nothing is shown of an arriving version. A transfer that ends
#: sooner gives its readers checked bytes only, at a price that nobody notices.
HOLD_BACK: Final = 0.5


@dataclass
class ArrivingFile:
    """One file on its way.

    Attributes:
        written: bytes that can be read already.
        awaited: the nearest end that somebody waits for.
        delivered: whether a reader was given any of them.
    """

    size: int
    mtime: int
    written: int = 0
    awaited: int | None = None
    crc32: int | None = None
    delivered: bool = False


class Arrival:
    """The sink of one attempt's extraction (`hubfs.transfer.archive.Sink`).

    All attributes are protected by `changed`, the condition that readers of the entry wait on.
    """

    def __init__(self, directory: Path, changed: threading.Condition, verified_only: bool) -> None:
        self.directory_path = directory
        self.changed = changed
        self.files: dict[str, ArrivingFile] = {}
        self.directories: dict[str, int] = {}
        self.error: HubfsError | None = None
        self.verified = False
        #: Grows with everything that arrives; a wait during which it stands still has a deadline.
        self.progress = 0
        self.received = 0
        self.total: int | None = None
        self.written = 0
        self.began: float | None = None
        self._mtime = int(time.time())
        self._verified_only = verified_only

    def released(self) -> bool:
        """Whether readers may be shown what has arrived."""
        if self.verified or self._verified_only or self.began is None:
            return self.verified
        return time.monotonic() - self.began >= HOLD_BACK

    def has(self, file: ArrivingFile, end: int) -> bool:
        """Whether a file can be read up to `end`. If not, there is a notification once it can: to tell a
        hundred waiting readers of each piece instead made a transfer three times as long.

        Called with `changed` held.
        """
        if file.written < end:
            file.awaited = end if file.awaited is None else min(end, file.awaited)
        return file.written >= end

    def on_bytes(self, received: int, total: int | None) -> None:
        with self.changed:
            if self.began is None:
                self.began = time.monotonic()
            self.received, self.total = received, total
            self.progress += 1

    def directory(self, path: str, mtime: int) -> None:
        with self.changed:
            if path:
                self.directories[path] = mtime
            else:
                self._mtime = mtime
            self._moved()

    def file_started(self, path: str, size: int, mtime: int) -> None:
        with self.changed:
            self.files[path] = ArrivingFile(size, mtime)
            self._moved()

    def file_grew(self, path: str, written: int) -> None:
        with self.changed:
            file = self.files[path]
            self.written += written - file.written
            file.written = written
            self.progress += 1
            if file.awaited is not None and written >= file.awaited:
                file.awaited = None
                self.changed.notify_all()

    def file_done(self, path: str, crc32: int) -> None:
        with self.changed:
            self.files[path].crc32 = crc32
            self._moved()

    def fail(self, error: HubfsError) -> None:
        """No more comes of this attempt: its open files answer with `error` from now on."""
        with self.changed:
            self.error = error
            self._moved()

    def manifest(self, handle: str) -> Manifest:
        """The manifest, once all has arrived."""
        files = {path: FileInfo(f.size, f.mtime, f.crc32) for path, f in self.files.items()}
        return Manifest(handle, files, dict(self.directories), self._mtime)

    def rate(self) -> float:
        """Bytes a second since the first one came."""
        elapsed = time.monotonic() - self.began if self.began is not None else 0.0
        return self.received / elapsed if elapsed > 0 else 0.0

    def _moved(self) -> None:
        self.progress += 1
        self.changed.notify_all()
