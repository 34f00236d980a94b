"""A version that is brought into the cache file by file and chunk by chunk, as its files are asked for."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Final

from hubfs.cache.kept_file import KeptFile, OpenKept
from hubfs.cache.landing import LOCK_POLL, Seeker, publish, set_times
from hubfs.cache.listed import Listed, Owner, ends_listing
from hubfs.cache.manifest import Manifest
from hubfs.cache.partial import Partial
from hubfs.cache.readable import Readable
from hubfs.errors import AccessError, DamagedError, DiskFullError, HubfsError, StoppedError, from_os_error
from hubfs.hubs.base import Listing
from hubfs.transfer.fetch import Fetcher, expected
from hubfs.transfer.storage import Storage

if TYPE_CHECKING:
    from hubfs.cache.layout import DownloadLock, Layout
    from hubfs.config import Settings

log = logging.getLogger(__name__)

#: What came in so many seconds is what a power cut costs at most. To bring it to the disk more often would
#: take time from those who wait for more of it.
FLUSH_AFTER: Final = 5.0
#: So many bytes are brought to the disk before: while somebody reads, and while somebody waits for all of it.
FLUSH: Final = 1 << 30
FLUSH_AWAITED: Final = 32 << 20
#: Seconds for which a version that nobody reads stays in this process's hands.
LINGER: Final = 2.0
#: Files that are brought in at the same time, beside those that somebody reads.
BATCH: Final = 32
#: Descriptors for writing that are kept; those of files that are there are closed first.
DESCRIPTORS: Final = 256


class Kept(Listed):
    """Files of a listing on their way into the cache. One thread stores, checks and publishes them."""

    def __init__(
        self,
        listing: Listing,
        manifest: Manifest,
        key: str,
        layout: Layout,
        fetcher: Fetcher,
        checks: Executor,
        settings: Settings,
        owner: Owner,
    ) -> None:
        """
        Args:
            checks: compares files with their checksums. Readers do not wait for that.

        Raises:
            BusyError: another process is bringing it in.
            CacheError: the cache cannot be written.
        """
        self.listing = listing
        self.manifest = manifest
        self._key = key
        self._layout = layout
        self._fetcher = fetcher
        self._checks = checks
        self._settings = settings
        self._owner = owner
        self.partial = Partial(layout.partial(key), listing)
        self._changed = threading.Condition(threading.Lock())  # protects what follows
        self._files: dict[str, KeptFile] = {}
        self._checking: dict[KeptFile, Future[None]] = {}
        self._damaged: set[str] = set()
        self._rest: Iterator[str] | None = None
        self._filling: set[str] = set()
        self._awaited = False
        #: The key's lock, which keeps tensorflow_hub from downloading what is being brought in here.
        self._download: DownloadLock | None = None
        self._seeker = Seeker(listing.handle, key, layout, settings, owner)
        self._flushed = time.monotonic()
        self._opened = 0
        self._opening = 0
        self._leaving = False
        self._superseded = False
        self._stopped = threading.Event()
        self._discard = False
        self._failure: HubfsError | None = None
        self.fill_error: HubfsError | None = None

    # ---- for the entry

    def start(self) -> None:
        threading.Thread(target=self._run, name="hubfs-keep", daemon=True).start()

    @property
    def is_filling(self) -> bool:
        """Whether all of the version is being brought in."""
        return self._rest is not None

    @property
    def received(self) -> int:
        # The last chunk of a file is seldom a whole one.
        return min(self.partial.there, self.manifest.size)

    def open(self, path: str, *, direct: bool) -> Readable | None:
        with self._changed:
            self.check()
            if self._leaving:
                return None
            file = self._file(path)
            file.readers += 1
            self._opened += 1
            self._opening += 1
        try:
            return OpenKept(self, self._owner, file, self.partial.reader(path), direct)
        except BaseException:
            with self._changed:
                file.readers -= 1
                self._opened -= 1
            raise
        finally:
            with self._changed:
                self._opening -= 1
                self._changed.notify_all()

    def closed(self, file: KeptFile) -> None:
        """A reader of a file went."""
        with self._changed:
            file.readers -= 1
            self._opened -= 1
            if not file.readers and not file.whole:
                file.remote.leave()
            self._changed.notify_all()
        self._owner.note_closed()

    def expect(self, path: str) -> None:
        self.fill()

    def fill(self, *, awaited: bool = False) -> None:
        """Bring in all of the version, the smallest files first, as soon as no other process does.

        Args:
            awaited: somebody waits for it, and is to be told of failures (`fill_error`).
        """
        with self._changed:
            self._awaited = self._awaited or awaited
            if self._rest is not None:
                return
            sizes = self.listing.files
            self._rest = iter(sorted(sizes, key=lambda path: (sizes[path].size, path)))
            self.fill_error = None
            self._changed.notify_all()

    def retire(self) -> None:
        self.close()

    def stored(self, path: str) -> int:
        with self._changed:
            file = self._files.get(path)
            return file.stored if file else 0

    def close(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    # ---- what the fetcher tells, from its threads

    def moved(self, file: KeptFile) -> None:
        if file.remote.complete or self.partial.unstored() >= self._flush_size():
            with self._changed:
                if file.remote.complete:
                    self._arrived(file)
                self._changed.notify_all()
        self._owner.came()

    def failed(self, file: KeptFile, error: HubfsError) -> None:
        if isinstance(error, StoppedError):
            return
        if ends_listing(error) or isinstance(error, DiskFullError):
            self._end_with(error, discard=not isinstance(error, AccessError))
            return
        if isinstance(error, DamagedError):
            self._take_back(file, error)
            return
        tired = file.remote.failures > self._settings.retries
        with self._changed:
            # While somebody reads it, and nobody waits for all of it, there is no harm in trying on.
            given_up = not error.temporary or (tired and (self._awaited or not self._opened))
            given_up = given_up and file.path in self._filling
        if given_up:
            self._stop_filling(error)

    def _take_back(self, file: KeptFile, error: DamagedError) -> None:
        """What the hub gave of a file was wrong, by what it said itself."""
        file.error = error
        try:
            # First: nothing of it may be written afterwards.
            file.remote.close()
            self.partial.lose(file.path)
            self._begin_again(file, error)
        except Exception as failure:  # noqa: BLE001 - readers wait for an answer, whatever happens
            self._break(failure)

    def _stop_filling(self, error: HubfsError) -> None:
        """Not all can be brought in now. Whoever needs it tries again."""
        with self._changed:
            self._rest, self.fill_error, self._awaited = None, error, False
            filling, self._filling = self._filling, set()
            files = [self._files[path] for path in filling if path in self._files]
            self._changed.notify_all()
        for file in files:
            file.remote.stop_filling()
        self._owner.told()

    # ---- within

    def _file(self, path: str) -> KeptFile:
        """A file, for all who read it. `_changed` must be held."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = KeptFile(self, path, self._fetcher)
            if file.remote.complete:
                self._arrived(file)
        return file

    def _arrived(self, file: KeptFile) -> None:
        """All of a file has come. `_changed` must be held."""
        if not file.whole and file not in self._checking and not self._stopped.is_set():
            with contextlib.suppress(RuntimeError):  # hubfs is being stopped
                self._checking[file] = self._checks.submit(self._check, file)

    def _feed(self) -> None:
        """See to it that a batch of files is being brought in."""
        with self._changed:
            started = []
            while self._rest is not None and len(self._filling) < BATCH:
                path = next(self._rest, None)
                if path is None:
                    break
                if not self.partial.is_verified(path):
                    started.append(self._file(path))
                    self._filling.add(path)
        for file in started:
            self.partial.reserve(file.path)
            file.remote.fill()

    def _run(self) -> None:
        try:
            while (step := self._next()) is not None:
                step()
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            self._break(error)
        self._end()

    def _break(self, error: Exception) -> None:
        """Nothing more can be brought in because of an error."""
        if isinstance(error, OSError):
            error = from_os_error(error, self.listing.handle, "writing to the cache")
        error = expected(error, self.listing.handle)
        with self._changed:
            if self._failure is None and not isinstance(error, StoppedError):
                self._failure = self.error = error
                self._discard = self._discard or isinstance(error, (DamagedError, DiskFullError))
        self.close()

    def _next(self) -> Callable[[], None] | None:
        """The next thing to do; waits for it. `None` at the end."""
        with self._changed:
            lingered = False
            while not self._stopped.is_set():
                if self._superseded:
                    # Those who have files of it open go on with them.
                    if not self._opened:
                        break
                    self._changed.wait(FLUSH_AFTER)
                    continue
                unstored, left = self.partial.unstored(), self._flushed + FLUSH_AFTER - time.monotonic()
                if unstored >= self._flush_size() or (unstored and left <= 0):
                    return self._flush
                if self.partial.is_complete():
                    return self._publish if self._download else self._seek
                fills = self._rest is not None
                if fills and self._download is None:
                    if not lingered:
                        return self._seek
                elif fills and not self._filling:
                    return self._feed
                elif not fills and self._download is not None:
                    return self._give_way
                idle = not self._opened and not fills
                if idle and lingered:
                    break
                moved = self._changed.wait(LINGER if idle else left if unstored else FLUSH_AFTER)
                lingered = idle and not moved
            self._leaving = True
            return None

    def _flush_size(self) -> int:
        return FLUSH_AWAITED if self._awaited else FLUSH

    def _flush(self) -> None:
        """Bring what came to stable storage, and let others see that something moves."""
        self.partial.flush()
        self._flushed = time.monotonic()
        if self._download is not None:
            with (self._download.tmp / "progress").open("ab") as file:
                file.write(b".")

    def _seek(self) -> None:
        """Try to get the key's lock: for that no other process may be downloading it."""
        lock = self._seeker.look()
        if self._seeker.found:
            # It is there now, by another's doing.
            with self._changed:
                self._leaving = self._superseded = self._discard = True
                files = list(self._files.values())
            for file in files:
                file.remote.stop_filling()
        elif lock is None:
            self._stopped.wait(LOCK_POLL)
        else:
            lock.tmp.mkdir(mode=0o755)
            self._download = lock
            self._check_space()

    def _give_way(self) -> None:
        """Nothing is brought in any more that others would have to wait for."""
        lock, self._download = self._download, None
        if lock is not None:
            lock.release()

    def _check_space(self) -> None:
        root, needed = self._layout.root, self.manifest.size - self.received
        free = shutil.disk_usage(root).free
        if needed > free:
            text = f"{self.listing.handle}: {needed} bytes to bring in, {free} bytes free in {root}"
            hint = "free some space or choose another directory with --cache-dir"
            self._stop_filling(DiskFullError(text, hint=hint))

    def _check(self, file: KeptFile) -> None:
        """Compare a file with its checksum, in a thread of the checks."""
        try:
            self._verify(file)
        except Exception as error:  # noqa: BLE001 - readers wait for an answer, whatever happens
            self._break(error)
        finally:
            with self._changed:
                del self._checking[file]
                self._changed.notify_all()

    def _verify(self, file: KeptFile) -> None:
        path = file.path
        try:
            for _ in self.partial.verify(path, self.listing.source.declared(self.partial.file(path))):
                if self._stopped.is_set():
                    return
        except DamagedError as error:
            self._begin_again(file, error)
            return
        file.whole = True
        file.remote.close()
        with self._changed:
            self._filling.discard(path)
            known = list(self._files.values()) if len(self._files) > DESCRIPTORS else []
        for other in known:
            self._forget(other)
        self._feed()

    def _forget(self, file: KeptFile) -> None:
        """Hold nothing of a file that is whole and that nobody reads."""
        with self._changed:
            if not file.whole or file.readers:
                return
            del self._files[file.path]
        self.partial.release(file.path)

    def _begin_again(self, file: KeptFile, error: DamagedError) -> None:
        """What came of a file is not what the hub declares: once, it is fetched anew."""
        file.error = error
        file.remote.close()
        self._owner.tainted(file.path)
        with self._changed:
            if self._files.get(file.path) is not file:
                return  # it was begun again before
            again = file.path not in self._damaged
            self._damaged.add(file.path)
            del self._files[file.path]
            other = self._file(file.path) if again else None
            fills = file.path in self._filling
        self._owner.told()
        if other is None:
            raise error
        log.warning("%s; it is fetched again", error)
        if fills:
            other.remote.fill()

    def _publish(self) -> None:
        handle, layout, lock = self.listing.handle, self._layout, self._download
        assert lock is not None
        files = self.partial.files_directory
        self._flush()
        set_times(files, self.manifest)
        with contextlib.closing(Storage()) as storage:
            storage.sync(files)
        with self._changed:
            # Whoever comes now opens it where it is going to be.
            self._leaving = True
            while self._opening:
                self._changed.wait()
        model = publish(layout, self._key, handle, lock, files, self.manifest)
        self._discard = True
        self._owner.kept_whole(self.manifest, model)
        self.close()

    def _end_with(self, error: HubfsError, *, discard: bool) -> None:
        with self._changed:
            if self.error is None:
                self.error = error
                self._discard = discard
        self._owner.origin_failed(self, error)
        self.close()

    def _end(self) -> None:
        with self._changed:
            self._leaving = True
            files = list(self._files.values())
            for file in [file for file, check in self._checking.items() if check.cancel()]:
                del self._checking[file]
            # The others notice soon.
            while self._checking:
                self._changed.wait()
        for file in files:
            file.remote.close()
        try:
            if self._discard:
                self.partial.discard()
            else:
                self.partial.flush()
            self._give_way()
        except OSError as error:
            log.warning("%s: what came last is fetched again: %s", self.listing.handle, error)
        self.partial.close()
        self._owner.ended(self, self._failure)
