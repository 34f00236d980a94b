"""An archive on its way -> files on disk, safely, with every step told to whoever serves them meanwhile."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from isal import isal_zlib

from hubfs.errors import DamagedError, TooLargeError
from hubfs.transfer import unzip
from hubfs.transfer.download import in_background
from hubfs.transfer.inflate import inflate
from hubfs.transfer.storage import REST, STEP, Storage
from hubfs.transfer.tar import Member, members

#: Bytes of one write at most, should they come in larger pieces: readers are told after each.
_WRITE = 1 << 20

#: 2100-01-01. A later time, like one before 1970, is a writer's mistake.
_MAX_MTIME = 4102444800

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Sink(Protocol):
    """Who is told about progress, from the extracting thread. What it raises ends the extraction.

    Paths are relative to the directory that is extracted into; times are whole seconds since 1970.
    """

    def directory(self, path: str, mtime: int) -> None:
        """A directory exists; `""` is the root, told only if the archive names it.

        It comes before everything below it, and again if the archive names it later: the last time counts.
        """

    def file_started(self, path: str, size: int, mtime: int) -> None:
        """A file exists, still empty; it is going to have `size` bytes."""

    def file_grew(self, path: str, written: int) -> None:
        """Bytes 0 to `written` can be read. Called at least once a MiB."""

    def file_done(self, path: str, crc32: int) -> None:
        """A file is complete, its time is set, and hubfs holds it open no longer."""


@dataclass(frozen=True)
class Limits:
    """The most that is taken from an archive.

    Attributes:
        max_files: files and directories.
        max_bytes: bytes of all files together.
    """

    max_files: int
    max_bytes: int


def extract_any(
    chunks: Iterator[bytes],
    into: Path,
    sink: Sink,
    storage: Storage,
    limits: Limits,
    *,
    name: str,
    spool: Path,
    stop: Callable[[], None],
) -> None:
    """Extract a tar, a tar.gz or a zip, whichever it turns out to be. The rest is as `extract` does it.

    A tar is inflated in a thread of its own. A zip is read when all of it is there.

    Args:
        chunks: the archive as it comes.
        spool: where a file can be made, for a zip; no member has its name. It does not exist before nor
            afterwards.
        stop: makes `chunks` end soon; called if the extraction ends early.

    Raises:
        HubfsError, OSError: as `extract`.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(unzip.BEGINNINGS[0]):
            break
    whole = itertools.chain([head], chunks)
    if not head.startswith(unzip.BEGINNINGS):
        with closing(in_background(inflate(whole), stop)) as tar:
            extract(tar, into, sink, storage, limits, name=name)
        return
    with _named(name), unzip.spooled(whole, spool, max_bytes=limits.max_bytes) as file:
        found = unzip.members(file, max_files=limits.max_files, max_bytes=limits.max_bytes)
        _write(found, into, sink, storage)


def extract(
    tar: Iterable[bytes], into: Path, sink: Sink, storage: Storage, limits: Limits, *, name: str
) -> None:
    """Extract a tar, and read it to its end so that every check of it is made.

    Directories get mode 0755 and files 0644, whatever the archive and the umask say. Times are the
    publisher's, or the time of writing where that is before 1970 or after 2099. After an error what was
    written stays; the caller removes it.

    Args:
        tar: its bytes in pieces of any size.
        into: an existing, empty directory that nobody else writes to.
        sink: is told about progress.
        storage: brings large files to stable storage beside. Its `sync` is left to the caller.
        limits: the most that is taken.
        name: the handle, for messages.

    Raises:
        HostileError: the archive tries what only an attack would.
        DamagedError: the archive is not whole.
        TooLargeError: the archive passes the limits.
        OSError: writing failed, for example with ENOSPC. Errors of `tar` and `sink` go up unchanged too.
    """
    with _named(name):
        _write(members(tar, max_files=limits.max_files, max_bytes=limits.max_bytes), into, sink, storage)


def _write(
    found: Iterable[tuple[Member, Iterator[memoryview]]], into: Path, sink: Sink, storage: Storage
) -> None:
    with _Writer(into, sink, storage) as writer:
        for member, data in found:
            if member.is_dir:
                writer.directory(member)
            else:
                writer.file(member, data)
        writer.finish()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Begin the messages of errors with a name."""
    try:
        yield
    except (DamagedError, TooLargeError) as error:
        if error.message.startswith(f"{name}: "):
            raise  # One of the download's own.
        raise type(error)(f"{name}: {error.message}", hint=error.hint) from error


class _Writer:
    """Makes files and directories below one directory, by names relative to its descriptor."""

    def __init__(self, into: Path, sink: Sink, storage: Storage) -> None:
        self._root = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._sink = sink
        self._storage = storage
        self._directories: dict[str, int] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._root)

    def directory(self, member: Member) -> None:
        """Make a directory, or only remember its time if it is there already."""
        mtime = _sane_time(member.mtime)
        self._parents(member.name)
        self._directory(member.name, mtime)

    def _parents(self, path: str) -> None:
        """Make the directories that the archive did not name before something in them."""
        parent = path.rpartition("/")[0]
        if not parent or parent in self._directories:
            return
        self._parents(parent)
        self._directory(parent, _sane_time(0))

    def _directory(self, path: str, mtime: int) -> None:
        if path and path not in self._directories:
            os.mkdir(path, 0o755, dir_fd=self._root)
            # mkdir's mode is subject to the umask.
            os.chmod(path, 0o755, dir_fd=self._root)
        self._directories[path] = mtime
        self._sink.directory(path, mtime)

    def file(self, member: Member, data: Iterator[memoryview]) -> None:
        """Make a file and write its data as it comes."""
        path, mtime = member.name, _sane_time(member.mtime)
        self._parents(path)
        descriptor = os.open(path, _NEW_FILE, 0o644, dir_fd=self._root)
        try:
            os.fchmod(descriptor, 0o644)
            self._sink.file_started(path, member.size, mtime)
            crc32 = self._write(descriptor, path, data)
            os.utime(descriptor, (mtime, mtime))
        finally:
            os.close(descriptor)
        self._sink.file_done(path, crc32)

    def _write(self, descriptor: int, path: str, data: Iterator[memoryview]) -> int:
        written = begun = crc32 = 0
        for piece in data:
            for start in range(0, len(piece), _WRITE):
                part = piece[start : start + _WRITE]
                crc32 = isal_zlib.crc32(part, crc32)
                while part:
                    count = os.write(descriptor, part)
                    written += count
                    part = part[count:]
                self._sink.file_grew(path, written)
            if written - begun >= STEP and self._storage.begin(descriptor):
                begun = written
        if written - begun >= REST:
            self._storage.begin(descriptor)
        return crc32

    def finish(self) -> None:
        """Set the directories' times, which making files in them has changed."""
        for path, mtime in self._directories.items():
            if path:
                os.utime(path, (mtime, mtime), dir_fd=self._root, follow_symlinks=False)
            else:
                os.utime(self._root, (mtime, mtime))


def _sane_time(mtime: int) -> int:
    """The publisher's time, or now if it cannot be one. Seconds since 1970."""
    return mtime if 0 < mtime < _MAX_MTIME else int(time.time())
