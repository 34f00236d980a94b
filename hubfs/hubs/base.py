"""What a hub is to the rest of hubfs."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hubfs.config import LoadFormat


@dataclass(frozen=True)
class Archive:
    """An origin: one tar or tar.gz with all files of a version.

    Attributes:
        handle: whose bytes these are.
        url: where to ask for them. Redirects are followed afresh for each transfer: what they lead to may
            be signed for a few days only.
        size: bytes of the archive, `None` where the hub does not say.
        etag: its strong ETag, if the hub gives ranges of it.
    """

    handle: str
    url: str = field(repr=False)  # it may be signed
    size: int | None = None
    etag: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """One file of a listing.

    Attributes:
        location: what the listing's source is asked for: an object's key, a URL.
        size: bytes.
        mtime: epoch seconds.
        etag: what the file must have when it is read; `None` where the hub does not say.
        md5, crc32c: its checksums, where the listing gives them.
    """

    location: str
    size: int
    mtime: int
    etag: str | None = None
    md5: bytes | None = None
    crc32c: bytes | None = None


class Source(Protocol):
    """Reads ranges of a listing's files. Safe to use from many threads."""

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes | memoryview, None, None]:
        """Bytes `start` to `stop` (exclusive) of a file, as they come: exactly so many. Tried once.

        To be taken by one thread, and closed if it is left early. A piece is there until the next is asked
        for. What was given before an error is the file's, except that a `DamagedError` takes it all back.
        The last piece is given after all checks.

        Raises:
            ChangedOriginError: the file is another one than when it was listed; where `file` has an ETag,
                than the one that had it.
            UnavailableError: it may be tried again.
            StoppedError: `cancel` was set. That may take as long as a connection may stand still.
            HubfsError: it cannot be read.
        """

    def declared(self, file: RemoteFile) -> RemoteFile:
        """The file with what was learned of it (ETag, checksums) when it was read. No request is sent."""


@dataclass(frozen=True)
class Listing:
    """An origin: files that can be read by range.

    Attributes:
        handle: whose files these are.
        files: by their path relative to the version's root.
        source: what reads them.
        where: for people: `gs://bucket/dir`.
    """

    handle: str
    files: Mapping[str, RemoteFile]
    source: Source
    where: str


Origin = Archive | Listing


class Hub(Protocol):
    """A protocol by which models are found."""

    def supports(self, handle: str) -> bool:
        """Whether this protocol is the one for the handle. No request is sent."""

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """Where the version's bytes are.

        Raises:
            HubfsError: there is no such version, or the hub cannot be asked.
        """
