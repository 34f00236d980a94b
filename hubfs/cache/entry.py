"""One version, for readers: looking up, listing and opening its files, waiting for what is not there yet."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

from hubfs.cache.arrival import Arrival
from hubfs.cache.jobs import EntryJobs, expected
from hubfs.cache.kept import Kept
from hubfs.cache.listed import Listed
from hubfs.cache.manifest import DirectoryInfo, FileInfo, Info, Manifest
from hubfs.cache.readable import Readable, Wait, read_all
from hubfs.errors import CacheError, ChangedOriginError, NotFoundError, from_os_error
from hubfs.handles import MODEL_FILES, is_litter

#: Seconds to wait for the end of a rename that is under way.
RENAME_WAIT: Final = 2.0
#: Times that opening a file is tried, as versions come and go.
OPENS: Final = 6
#: From so many bytes on a file counts as data, whatever its name.
DATA: Final = 4 << 20
#: Seconds between two notes of a model's last use.
USE_INTERVAL: Final = 60.0


class Entry(EntryJobs):
    """One handle's version. Safe to use from many threads."""

    def ensure_exists(self, wait: Wait) -> None:
        """Return once it is known that there is such a version; nothing is downloaded.

        Raises:
            HubfsError: there is none, or it could not be found out.
        """
        self._settle()

        def known() -> bool | None:
            if self._manifest or self._origin or self._arrival:
                return True
            self._raise_failure()
            if not self._locating and self._transfer is None:
                self._begin_locating()
            return None

        self.until(known, wait)

    def lookup(self, inner: str, wait: Wait) -> Info:
        """A file or directory of the version. Starts the transfer if nothing is known of it yet.

        Raises:
            NotFoundError: the version has no such path.
            HubfsError: the version could not be brought in.
        """
        self._settle()

        def find() -> Info | None:
            manifest = self._manifest or self._listed_manifest
            if manifest is not None:
                return self._in_manifest(manifest, inner)
            if any(is_litter(name) for name in inner.split("/")):
                # Shell prompts look for such names wherever one goes: no reason to download, nor to wait.
                raise NotFoundError(f"{self.handle}: {inner} is not asked for")
            self._advance()
            arrival = self._arrival
            if arrival is None or arrival.error is not None or not arrival.released():
                return None
            file = arrival.files.get(inner)
            if file is not None:
                return FileInfo(file.size, file.mtime)
            if inner in arrival.directories:
                info = DirectoryInfo(arrival.directories[inner], None)
                return self._shown_early.setdefault(inner, info)
            return None

        return self.until(find, wait)

    def root_info(self) -> DirectoryInfo:
        """The version's own directory, as far as it is known. Starts nothing."""
        with self.changed:
            manifest = self._manifest or self._listed_manifest
            if manifest is not None:
                return self._directory_in(manifest, "")
            return self._shown_early.setdefault("", DirectoryInfo(int(time.time()), None))

    def manifest(self, wait: Wait) -> Manifest:
        """The complete manifest, for listings of directories. An archive is brought in for it.

        Raises:
            HubfsError: the version could not be brought in.
        """
        self._settle()

        def find() -> Manifest | None:
            manifest = self._manifest or self._listed_manifest
            if manifest is None:
                self._advance()
            return manifest

        return self.until(find, wait)

    def directory(self, inner: str, wait: Wait) -> dict[str, Info] | None:
        """What is in one of the version's directories, by name and sorted; `None` if it is not one.

        Raises:
            HubfsError: the version could not be brought in.
        """
        manifest = self.manifest(wait)
        children = manifest.children(inner)
        if children is None:
            return None
        above = f"{inner}/" if inner else ""
        with self.changed:
            return {name: self._in_manifest(manifest, above + name) for name in sorted(children)}

    def bring_in(self, wait: Wait) -> Path:
        """The version's directory in the cache, once it has been published there.

        Raises:
            HubfsError: the version could not be brought in.
        """
        self._settle()

        filled: list[Listed] = []

        def published() -> Path | None:
            if self._manifest is not None:
                return self._directory if self._transfer is None else None
            if len(filled) == OPENS and isinstance(error := filled[-1].error, ChangedOriginError):
                # What the hub gives is never what it lists.
                raise error.with_traceback(None)
            self._advance()
            self._begin_listed()
            listed = self._listed
            if isinstance(listed, Kept):
                if listed not in filled:
                    filled.append(listed)
                    listed.fill(awaited=True)
                elif listed.fill_error is not None:
                    raise listed.fill_error.with_traceback(None)
            elif listed is not None:
                self._take_over(listed)
            return None

        return self.until(published, wait)

    def open(self, inner: str, wait: Wait) -> Readable:
        """Open a file for reading.

        Raises:
            HubfsError: there is none, or it could not be brought in.
        """
        for _ in range(OPENS):
            info = self.lookup(inner, wait)
            if not isinstance(info, FileInfo):
                raise CacheError(f"{self.handle}: {inner} is a directory")
            with self.changed:
                arrival = None if self._manifest else self._arrival
                directory = arrival.directory_path if arrival else self._directory
                listed = self._manifest is None and self._listed_manifest is not None
            if listed:
                file = self._open_listed(inner, info, wait)
                if file is not None:
                    return file
                continue
            if directory is None:
                continue
            try:
                descriptor = os.open(directory / inner, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                # Renamed into place just now, or somebody cleans the cache directory.
                self._recheck(directory)
                continue
            except OSError as error:
                raise from_os_error(error, self.handle, "opening a cached file") from error
            if arrival is None and os.fstat(descriptor).st_size != info.size:
                os.close(descriptor)
                self._recheck(directory)
                continue
            return self._opened_file(inner, descriptor, info, arrival)
        raise CacheError(
            f"{self.handle}: {inner} vanishes from the cache again and again", hint="is it being cleaned?"
        )

    def stored(self, inner: str, info: FileInfo) -> int:
        """Bytes of a file that are on disk."""
        with self.changed:
            if self._manifest is not None or self._listed_manifest is None:
                return info.size
            return self._listed.stored(inner) if self._listed else 0

    # ---- within

    def _in_manifest(self, manifest: Manifest, inner: str) -> Info:
        if inner in manifest.files:
            return manifest.files[inner]
        if manifest.children(inner) is None:
            raise NotFoundError(f"{self.handle}: it has no {inner}")
        return self._directory_in(manifest, inner)

    def _directory_in(self, manifest: Manifest, inner: str) -> DirectoryInfo:
        return self._shown_early.get(inner) or manifest.directory(inner)

    def _open_listed(self, inner: str, info: FileInfo, wait: Wait) -> Readable | None:
        """Open a file that is read by range; `None` if its version is to be had in another way by now."""
        settings = self._store.settings
        if settings.verified_only:
            self.bring_in(wait)
            return None

        with self.changed:
            spare = self._listed
        if spare is not None and spare.is_spare:
            # Perhaps it can be kept by now.
            spare.retire()

        def begun() -> Listed | bool | None:
            if self._manifest is not None or self._listed_manifest is None:
                return False
            self._begin_listed()
            return self._listed

        listed = self.until(begun, wait)
        if not isinstance(listed, Listed) or inner not in listed.listing.files:
            return None
        with self.changed:
            self._opened += 1
            direct = inner in self._tainted
        file = None
        try:
            file = listed.open(inner, direct=direct)
        except OSError as error:
            raise from_os_error(error, self.handle, "writing to the cache") from error
        finally:
            if file is None:
                self.note_closed()
        if file is None:
            # It is being published, or ends: a moment later it can be opened in another way.
            self.until(lambda: self._listed is not listed or self._manifest is not None or None, wait)
            return None
        if settings.read_ahead and is_data(inner, info.size):
            listed.expect(inner)
        self._note_use()
        return file

    def _take_over(self, listed: Listed) -> None:
        """Have a version kept in the cache that is only streamed so far. The lock must be held."""
        if self._beginning:
            return
        self._beginning = True
        self._submit(self._store.carriers.submit, self._keep, listed)

    def _keep(self, streamed: Listed) -> None:
        try:
            with self.changed:
                manifest = self._listed_manifest
            kept = manifest and self._store.keep_when_free(self, streamed.listing, manifest)
        except Exception as error:  # noqa: BLE001 - who waits is told, whatever happens
            with self.changed:
                self._beginning = False
                self._fail(expected(error, self.handle))
            return
        with self.changed:
            self._beginning = False
            if kept:
                self._listed = kept
                self._store.note_running(self, True)
            self._moved()
        if kept:
            self._start(kept)
            streamed.retire()

    def _recheck(self, directory: Path) -> None:
        """Forget what was known of the directory if it is still the one in use."""
        with self.changed:
            if self._transfer is not None:
                # It is between being renamed and telling so.
                self.changed.wait_for(lambda: self._directory != directory, RENAME_WAIT)
                return
            if self._manifest is None or self._directory != directory:
                return
            self._manifest = self._directory = None
        self._look_on_disk()

    def _opened_file(self, inner: str, descriptor: int, info: FileInfo, arrival: Arrival | None) -> OpenFile:
        with self.changed:
            self._opened += 1
            tainted = inner in self._tainted
        if arrival is None:
            self._note_use()
        return OpenFile(self, inner, descriptor, info.size, arrival, direct=tainted)

    def _note_use(self) -> None:
        now = time.monotonic()
        if now - self._used > USE_INTERVAL or not self._used:
            self._used = now
            self._store.note_use(self.key)

    def wait_written(self, file: OpenFile, arrival: Arrival, end: int, wait: Wait) -> bool:
        """Wait until a file has arrived up to `end`.

        Returns:
            False if its attempt failed before any byte of it was given to anybody.
        """
        arriving = arrival.files[file.inner]

        def there() -> bool | None:
            if arrival.error is not None:
                if arriving.delivered:
                    raise arrival.error
                return False
            if arrival.has(arriving, end) and arrival.released():
                arriving.delivered = True
                return True
            return None

        return self.until(there, wait)


def is_data(path: str, size: int) -> bool:
    """Whether who opens a file is going to want the rest of the version too.

    What describes a model is read by those who only look at it. The index of a checkpoint is not.
    """
    name = path.rpartition("/")[2]
    return ".data-" in name or name == "variables.index" or (size >= DATA and name not in MODEL_FILES)


class OpenFile(Readable):
    """A file of a version, open for reading; it may still be arriving.

    Its pages are kept by the kernel from one open to the next, since a version never changes. To drop them
    at an open would besides make it wait, deaf to signals, for reads of others that are waiting for bytes.

    Attributes:
        size: bytes; known from the start.
        direct: the kernel may hold bytes of a failed attempt.
    """

    def __init__(
        self, entry: Entry, inner: str, descriptor: int, size: int, arrival: Arrival | None, direct: bool
    ) -> None:
        self.entry = entry
        self.inner = inner
        self.size = size
        self.direct = direct
        self._lock = threading.Lock()  # protects the two below while they are exchanged
        self._descriptor = descriptor
        self._arrival = arrival

    @property
    def backing(self) -> int | None:
        arrival = self._arrival
        return self._descriptor if arrival is None or arrival.verified else None

    def read_into(self, buffer: memoryview, offset: int, wait: Wait) -> int:
        expected = max(0, min(len(buffer), self.size - offset))
        if not expected:
            return 0
        arrival = self._arrival
        if arrival is not None and arrival.verified:
            arrival = self._arrival = None
        while arrival is not None and not self.entry.wait_written(self, arrival, offset + expected, wait):
            arrival = self._begin_again(arrival, wait)
        done = read_all(self._descriptor, buffer[:expected], offset)
        if done != expected:
            raise CacheError(f"{self.entry.handle}: {self.inner} was cut off in the cache directory")
        return done

    def close(self) -> None:
        os.close(self._descriptor)
        self.entry.note_closed()

    def _begin_again(self, failed: Arrival, wait: Wait) -> Arrival | None:
        """The attempt failed before anybody was given a byte of this file: go on with the next one."""
        other = self.entry.open(self.inner, wait)
        if not isinstance(other, OpenFile) or other.size != self.size:
            other.close()
            raise CacheError(f"{self.entry.handle}: {self.inner} has another size now; open it again")
        with self._lock:
            # Another thread that reads the same file may have been here first.
            if self._arrival is failed:
                self._descriptor, other._descriptor = other._descriptor, self._descriptor
                self._arrival = other._arrival
        other.close()
        return self._arrival
