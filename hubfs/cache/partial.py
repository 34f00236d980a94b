"""A version of which some bytes are there: sparse files, and on disk the map of their chunks.

    <key>.hubfs.partial/
        files/…      as large as the version's files, with holes where nothing has come yet
        map          which chunks are on stable storage, and of which files
        written      which chunks the kernel has, at least (hubfs.cache.written)
        lock         held (flock) by the one process that writes here

The map never speaks of a chunk before its bytes are on stable storage. So whatever ends the machine, the next
process goes on with all that the map names, and fetches the rest again. If only the process ended, the next
one goes on with what was written.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from hubfs.cache.digest import Digest
from hubfs.cache.layout import write_atomically
from hubfs.cache.written import Written
from hubfs.errors import CacheError, DamagedError, from_os_error
from hubfs.hubs.base import Listing, RemoteFile
from hubfs.transfer.chunks import CHUNK
from hubfs.transfer.storage import allocate

_FORMAT: Final = 2
#: Bytes that are read of a file at once to check it.
_STEP: Final = 4 << 20
#: Bytes of a file for which it is worth the time to claim room.
_LARGE: Final = 1 << 20


class BusyError(CacheError):
    """Another process writes to this partial version."""


class Summary(NamedTuple):
    """What a map tells without its listing: whose it is, and how many bytes of its files are there."""

    handle: str
    there: int
    files: int


class Partial:
    """The files of a listing in the cache, as far as they are there. Safe to use from many threads.

    A file is made when it is first written to or read, and held open until `release`.
    """

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
        self._lock = threading.Lock()  # protects all below
        #: Chunks of each file that are on stable storage, as the map has them: a bit each.
        self._stored: dict[str, bytearray] = {}
        #: Those that were written since.
        self._unstored: dict[str, set[int]] = {}
        self._verified: set[str] = set()
        #: What came with the bytes of each file and the listing does not tell: ETag, MD5, CRC-32C.
        self._learned: dict[str, tuple[str, str, str]] = {}
        #: Of which files the map has what was learned.
        self._noted: set[str] = set()
        self._descriptors: dict[str, int] = {}
        self._written: Written | None = None
        self._flushing = threading.Lock()
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

    def file(self, path: str) -> RemoteFile:
        """The listing's file, with the ETag and checksums that its chunks here came with."""
        with self._lock:
            learned = self._learned.get(path)
        file = self._files[path]
        if learned is None:
            return file
        etag, md5, crc32c = learned
        return dataclasses.replace(
            file,
            etag=file.etag or etag or None,
            md5=file.md5 or bytes.fromhex(md5) or None,
            crc32c=file.crc32c or bytes.fromhex(crc32c) or None,
        )

    def present(self, path: str) -> list[int]:
        """Numbers of the chunks of a file that are there."""
        with self._lock:
            bits, fresh = self._stored.get(path, b""), set(self._unstored.get(path, ()))
            return sorted({n for n in range(8 * len(bits)) if _has(bits, n)} | fresh)

    def write(self, path: str, start: int, data: bytes | memoryview) -> None:
        """Bytes of a file have come; with its last byte a chunk is there.

        Whoever writes a chunk does so in order, from its first byte on.

        Raises:
            OSError: they could not be written, for example with ENOSPC.
        """
        size, view = self._files[path].size, memoryview(data)
        stop = start + len(view)
        descriptor, at = self._descriptor(path), start
        while view:
            count = os.pwrite(descriptor, view, at)
            at, view = at + count, view[count:]
        numbers = range(start // CHUNK, -(-stop // CHUNK) if stop == size else stop // CHUNK)
        if not numbers:
            return
        with self._lock:
            self._unstored.setdefault(path, set()).update(numbers)
            # Without its ETag nobody could go on with it.
            known = self._files[path].etag is not None or path in self._noted
            if known and self._written is not None:
                self._written.add(path, numbers)

    def reserve(self, path: str) -> None:
        """Claim the room of a file that is going to be brought in as a whole, if it is large.

        Raises:
            OSError: it cannot be made.
        """
        if self._files[path].size >= _LARGE:
            allocate(self._descriptor(path), self._files[path].size)

    def reader(self, path: str) -> int:
        """A descriptor of its own for somebody who reads a file; what is there of it is for others to know.

        Raises:
            OSError: it cannot be opened.
        """
        self._descriptor(path)
        return os.open(self.files_directory / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def remember(self, path: str, file: RemoteFile) -> None:
        """What came with a file's bytes."""
        learned = (file.etag or "", (file.md5 or b"").hex(), (file.crc32c or b"").hex())
        with self._lock:
            self._learned[path] = learned

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
                    os.fdatasync(self._descriptor(path))
            except OSError:
                with self._lock:
                    for path, numbers in fresh.items():
                        self._unstored.setdefault(path, set()).update(numbers)
                raise
            with self._lock:
                for path, numbers in fresh.items():
                    bits = self._stored.setdefault(path, _bits(self._files[path].size))
                    for number in numbers:
                        _set(bits, number)
            if fresh:
                self._save()

    def unstored(self) -> int:
        """Bytes that the end of the machine would cost, at most."""
        with self._lock:
            return CHUNK * sum(map(len, self._unstored.values()))

    def release(self, path: str) -> None:
        """Close a file for now. Call it when nobody writes to it.

        Raises:
            OSError: what was written to it could not be brought to stable storage.
        """
        with self._lock:
            unstored = path in self._unstored
        if unstored:
            self.flush()
        with self._lock:
            descriptor = self._descriptors.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def is_complete(self) -> bool:
        """Whether every file was checked."""
        with self._lock:
            return len(self._verified) == len(self._files)

    def is_verified(self, path: str) -> bool:
        """Whether a file was checked as a whole."""
        with self._lock:
            return path in self._verified

    @property
    def there(self) -> int:
        """Bytes of the version that are there, in whole chunks."""
        with self._lock:
            stored = sum(byte.bit_count() for bits in self._stored.values() for byte in bits)
            fresh = sum(map(len, self._unstored.values()))
        return CHUNK * (stored + fresh)

    def verify(self, path: str, file: RemoteFile) -> Iterator[None]:
        """Compare a file that is all there with its checksum, a step at a time.

        Args:
            file: with the checksums that are known of it by now.

        Raises:
            DamagedError: it differs. All of the file counts as missing again.
            OSError: it cannot be read.
        """
        digest = Digest(file)
        for offset in range(0, file.size if digest.wanted else 0, _STEP):
            digest.update(os.pread(self._descriptor(path), _STEP, offset))
            yield
        # An empty file has come without anybody writing it.
        self._descriptor(path)
        if digest.matches():
            with self._lock:
                self._verified.add(path)
            return
        self.lose(path)
        raise DamagedError(f"{self.handle}: the checksum of {path} is not the one that the hub gave")

    def lose(self, path: str) -> None:
        """What is there of a file is not right: all of it counts as missing.

        Raises:
            OSError: the map cannot be written.
        """
        with self._flushing:
            with self._lock:
                self._stored.pop(path, None)
                self._unstored.pop(path, None)
                self._learned.pop(path, None)
                self._noted.discard(path)
                if self._written is not None:
                    self._written.clear(path)
            self._save()

    def close(self) -> None:
        """Let others write here. What is not flushed is fetched again."""
        with self._lock:
            descriptors, self._descriptors = self._descriptors, {}
            guard, self._guard = self._guard, -1
            written, self._written = self._written, None
        if written is not None:
            written.close()
        for descriptor in descriptors.values():
            os.close(descriptor)
        if guard >= 0:
            os.close(guard)

    def discard(self) -> None:
        """Remove all that is left here, while nobody else may write here, and close it."""
        # The lock goes last: whoever opens a new one then finds nothing of this.
        for name in ("map", "written", "files"):
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    # ---- within

    def _begin(self) -> None:
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it meanwhile, and then another one is the lock.
            same = os.path.samestat(os.fstat(self._guard), (self.directory / "lock").stat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise BusyError(f"{self.handle}: another process is bringing it in")
        known = self._load()
        if known is not None:
            self._stored, self._learned = known
            self._noted = set(self._learned)
        try:
            # First of all: a map must never speak for files that are made anew.
            self._save()
            self._sync_map()
            if known is None:
                (self.directory / "written").unlink(missing_ok=True)
            sizes = {path: file.size for path, file in self._files.items()}
            self._written = Written(self.directory / "written", self._identity, sizes)
            self._go_on_with_written()
            if not self._stored and not self._unstored:
                shutil.rmtree(self.files_directory, ignore_errors=True)
            self.files_directory.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, self.handle, "making room for it in the cache") from error

    def _go_on_with_written(self) -> None:
        assert self._written is not None
        for path in self._files:
            numbers = self._written.numbers(path)
            if not numbers:
                continue
            if self._is_whole_size(path):
                numbers -= {n for n in numbers if path in self._stored and _has(self._stored[path], n)}
                if numbers:
                    self._unstored[path] = numbers
            else:
                self._written.clear(path)

    def _is_whole_size(self, path: str) -> bool:
        """Whether a file is there. One that was removed or cut since has none of its chunks."""
        place = self.files_directory / path
        return place.is_file() and place.lstat().st_size == self._files[path].size

    def _descriptor(self, path: str) -> int:
        """Of a file, which is made if it is not there yet."""
        with self._lock:
            if path in self._descriptors:
                return self._descriptors[path]
            if self._guard < 0:
                raise CacheError(f"{self.handle}: {path} is not being brought in any more")
            place = self.files_directory / path
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(place, flags, 0o644)
            try:
                if os.fstat(descriptor).st_size != self._files[path].size:
                    os.ftruncate(descriptor, self._files[path].size)
            except OSError:
                os.close(descriptor)
                raise
            self._descriptors[path] = descriptor
            return descriptor

    def _load(self) -> tuple[dict[str, bytearray], dict[str, tuple[str, str, str]]] | None:
        """The chunks and what was learned; `None` if the map is of no use, or of another listing."""
        try:
            found = _read_map(self.directory)
            if found["identity"] != self._identity:
                return None
            known = {path: bytearray(base64.b64decode(bits)) for path, bits in found["chunks"].items()}
            learned: dict[str, tuple[str, str, str]] = {}
            for path, (etag, md5, crc32c) in found["learned"].items():
                learned[path] = str(etag), bytes.fromhex(md5).hex(), bytes.fromhex(crc32c).hex()
            for path, bits in list(known.items()):
                size = self._files[path].size
                if len(bits) != len(_bits(size)):
                    return None
                if not self._is_whole_size(path):
                    del known[path]
            return known, learned
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _save(self) -> None:
        with self._lock:
            chunks = {path: base64.b64encode(bits).decode() for path, bits in self._stored.items()}
            learned = dict(self._learned)
        text = json.dumps(
            {
                "format": _FORMAT,
                "handle": self.handle,
                "identity": self._identity,
                "files": len(self._files),
                "learned": learned,
                "chunks": chunks,
            }
        )
        write_atomically(self.directory / "map", text)
        with self._lock:
            self._noted |= learned.keys() & self._learned.keys()

    def _sync_map(self) -> None:
        for path, flags in ((self.directory / "map", 0), (self.directory, os.O_DIRECTORY)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def summary(directory: Path) -> Summary | None:
    """What the map in a partial version's directory tells; `None` if there is none that makes sense."""
    try:
        found = _read_map(directory)
        chunks = [base64.b64decode(bits) for bits in found["chunks"].values()]
        there = CHUNK * sum(byte.bit_count() for bits in chunks for byte in bits)
        return Summary(str(found["handle"]), there, int(found["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_map(directory: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((directory / "map").read_text(encoding="utf8"))
    if found["format"] != _FORMAT:
        raise ValueError("a map of another format")
    return found


def _identity(listing: Listing) -> str:
    """What must be the same for chunks to be of the same version."""
    rows = [
        [path, file.size, file.etag, (file.md5 or b"").hex(), (file.crc32c or b"").hex()]
        for path, file in sorted(listing.files.items())
    ]
    return hashlib.sha256(json.dumps([listing.handle, rows]).encode()).hexdigest()


def _bits(size: int) -> bytearray:
    """A bit for each chunk of a file of `size` bytes, all of them 0."""
    chunks = (size + CHUNK - 1) // CHUNK
    return bytearray((chunks + 7) // 8)


def _has(bits: bytes | bytearray, number: int) -> bool:
    return bool(bits[number >> 3] >> (number & 7) & 1)


def _set(bits: bytearray, number: int) -> None:
    bits[number >> 3] |= 1 << (number & 7)
