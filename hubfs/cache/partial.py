"""A version of which some bytes are there: sparse files, and on disk the map of their chunks.

    <key>.hubfs.partial/
        files/…      as large as the version's files, with holes where nothing has come yet
        map          which chunks are on stable storage, and of which files
        lock         held (flock) by the one process that writes here

The map never speaks of a chunk before its bytes are on stable storage. So whatever ends a process or the
machine, the next one goes on with all that the map names, and fetches the rest again.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c

from hubfs.cache.layout import write_atomically
from hubfs.errors import CacheError, DamagedError, from_os_error
from hubfs.hubs.base import Listing, RemoteFile
from hubfs.transfer.chunks import CHUNK

_FORMAT: Final = 1


class BusyError(CacheError):
    """Another process writes to this partial version."""


class Partial:
    """The files of a listing in the cache, as far as they are there. Safe to use from many threads."""

    def __init__(self, directory: Path, listing: Listing) -> None:
        """Go on with what is in `directory`, if that is of the same listing; else begin anew.

        Raises:
            BusyError: another process has it.
            CacheError: it cannot be made.
        """
        self.directory = directory
        self.handle = listing.handle
        self._files = dict(listing.files)
        self._identity = _identity(listing)
        self._lock = threading.Lock()  # protects the four below
        self._there: dict[str, bytearray] = {path: _bits(file.size) for path, file in self._files.items()}
        self._stored: dict[str, bytearray] = {path: _bits(file.size) for path, file in self._files.items()}
        self._unstored: dict[str, set[int]] = {}
        self._verified: set[str] = set()
        self._flushing = threading.Lock()
        self._descriptors: dict[str, int] = {}
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._guard = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_os_error(error, self.handle, "making room for it in the cache") from error
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def files_directory(self) -> Path:
        return self.directory / "files"

    def missing(self, path: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of a file in whole chunks, in order, that `start` to `stop` needs and that are not there."""
        size = self._files[path].size
        with self._lock:
            there = bytes(self._there[path])
        begin: int | None = None
        first, last = start // CHUNK, -(-min(stop, size) // CHUNK)
        for number in range(first, last):
            if _has(there, number):
                if begin is not None:
                    yield begin * CHUNK, number * CHUNK
                    begin = None
            elif begin is None:
                begin = number
        if begin is not None:
            yield begin * CHUNK, min(last * CHUNK, size)

    def write(self, path: str, start: int, data: bytes | memoryview) -> None:
        """Whole chunks of a file have come.

        Raises:
            OSError: they could not be written, for example with ENOSPC.
        """
        size, view = self._files[path].size, memoryview(data)
        stop = start + len(view)
        if start % CHUNK or (stop % CHUNK and stop != size):
            raise ValueError(f"{path}: {start} to {stop} are not whole chunks")
        at = start
        while view:
            count = os.pwrite(self._descriptors[path], view, at)
            at, view = at + count, view[count:]
        numbers = range(start // CHUNK, -(-stop // CHUNK))
        with self._lock:
            for number in numbers:
                _set(self._there[path], number)
            self._unstored.setdefault(path, set()).update(numbers)

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        """Bytes that are there; the caller has seen to that with `missing`."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptors[path], [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def flush(self) -> None:
        """Bring what was written to stable storage, and then note in the map that it is there.

        Raises:
            OSError: the storage failed; the map stays as it was.
        """
        with self._flushing:
            with self._lock:
                fresh, self._unstored = self._unstored, {}
            try:
                for path in fresh:
                    os.fdatasync(self._descriptors[path])
            except OSError:
                with self._lock:
                    for path, numbers in fresh.items():
                        self._unstored.setdefault(path, set()).update(numbers)
                raise
            for path, numbers in fresh.items():
                for number in numbers:
                    _set(self._stored[path], number)
            if fresh:
                self._save()

    def unstored(self) -> int:
        """Bytes that a kill would cost, at most."""
        with self._lock:
            return CHUNK * sum(map(len, self._unstored.values()))

    def is_complete(self, path: str | None = None) -> bool:
        """Whether all of a file is there; without `path`, of every file, and all were checked."""
        if path is None:
            with self._lock:
                return len(self._verified) == len(self._files)
        return next(self.missing(path, 0, self._files[path].size), None) is None

    def verify(self, path: str) -> None:
        """Compare a file that is complete with the checksum of the listing.

        Raises:
            DamagedError: it differs. All of the file counts as missing again.
        """
        if _matches(self._descriptors[path], self._files[path]):
            with self._lock:
                self._verified.add(path)
            return
        with self._flushing, self._lock:
            self._there[path] = _bits(self._files[path].size)
            self._stored[path] = _bits(self._files[path].size)
            self._unstored.pop(path, None)
            self._save()
        raise DamagedError(f"{self.handle}: the checksum of {path} is not the one that the hub gave")

    def close(self) -> None:
        """Let others write here. What is not flushed is fetched again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    # ---- within

    def _begin(self) -> None:
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{self.handle}: another process is bringing it in") from error
        known = self._load() or {}
        for path, bits in known.items():
            self._there[path] = bytearray(bits)
            self._stored[path] = bytearray(bits)
        try:
            # First of all: a map must never speak for files that are made anew.
            self._save()
            self._sync_map()
            if not known:
                shutil.rmtree(self.files_directory, ignore_errors=True)
            for path, file in self._files.items():
                self._open(path, file.size)
        except OSError as error:
            raise from_os_error(error, self.handle, "making room for it in the cache") from error

    def _open(self, path: str, size: int) -> None:
        place = self.files_directory / path
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = self._descriptors[path] = os.open(place, flags, 0o644)
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)

    def _load(self) -> Mapping[str, bytes] | None:
        """The chunks that the map names; `None` if it cannot be used, or is of another listing."""
        try:
            found = json.loads((self.directory / "map").read_text(encoding="utf8"))
            if found["format"] != _FORMAT or found["identity"] != self._identity:
                return None
            known = {path: base64.b64decode(bits) for path, bits in found["chunks"].items()}
            whole = known.keys() == self._files.keys()
            if not whole or any(len(bits) != len(self._there[path]) for path, bits in known.items()):
                return None
            # A file that was removed or cut since has none of its chunks.
            for path, file in self._files.items():
                place = self.files_directory / path
                if not place.is_file() or place.lstat().st_size != file.size:
                    known[path] = bytes(len(known[path]))
            return known
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _save(self) -> None:
        chunks = {path: base64.b64encode(bits).decode() for path, bits in self._stored.items()}
        text = json.dumps({"format": _FORMAT, "identity": self._identity, "chunks": chunks})
        write_atomically(self.directory / "map", text)

    def _sync_map(self) -> None:
        for path, flags in ((self.directory / "map", 0), (self.directory, os.O_DIRECTORY)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _identity(listing: Listing) -> str:
    """What must be the same for chunks to be of the same version."""
    rows = [
        [path, file.size, file.etag, (file.md5 or b"").hex(), (file.crc32c or b"").hex()]
        for path, file in sorted(listing.files.items())
    ]
    return hashlib.sha256(json.dumps([listing.handle, rows]).encode()).hexdigest()


def _matches(descriptor: int, file: RemoteFile) -> bool:
    """Whether a file has the checksums of its listing; true if there are none."""
    crc32c: Any = google_crc32c.Checksum() if file.crc32c else None
    md5 = hashlib.md5(usedforsecurity=False) if file.md5 and crc32c is None else None
    for offset in range(0, file.size if crc32c or md5 else 0, CHUNK):
        part = os.pread(descriptor, CHUNK, offset)
        if crc32c is not None:
            crc32c.update(part)
        elif md5 is not None:
            md5.update(part)
    if crc32c is not None:
        return bool(crc32c.digest() == file.crc32c)
    return md5 is None or md5.digest() == file.md5


def _bits(size: int) -> bytearray:
    """A bit for each chunk of a file of `size` bytes, all of them 0."""
    chunks = (size + CHUNK - 1) // CHUNK
    return bytearray((chunks + 7) // 8)


def _has(bits: bytes | bytearray, number: int) -> bool:
    return bool(bits[number >> 3] >> (number & 7) & 1)


def _set(bits: bytearray, number: int) -> None:
    bits[number >> 3] |= 1 << (number & 7)
