"""Files that have a URL each, read by HTTP ranges.

What a server says of a file first holds for all of the file's ranges.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import google_crc32c

from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    DamagedError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
)
from hubfs.hubs.base import RemoteFile
from hubfs.hubs.checksums import declared_digests
from hubfs.hubs.flow import watched
from hubfs.net import Net, Route, content_length, strong_etag
from hubfs.wire import take_into

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings

#: Bytes taken from a connection at once. Between two of them a reader that was stopped is let go.
_BLOCK = 256 << 10
#: Where the server gives the whole instead of a range, so much of it is read past at most.
_MAX_SKIP = 64 << 20


@contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Say what to do where access is refused."""
    try:
        yield
    except AccessError as error:
        raise AccessError(error.message, hint=advice()) from error


class UrlFiles:
    """A `Source`: a file's location is its URL.

    A signed address that a URL redirects to is used again until it is refused; then the URL is asked for a
    new one at once.

    Args:
        explain: entered around each request, to say more in the errors that come out of it.
    """

    def __init__(
        self,
        net: Net,
        settings: Settings,
        explain: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._net = net
        self._settings = settings
        self._explain = explain
        self._lock = threading.Lock()  # protects the two
        self._routes: dict[str, Route] = {}
        self._declared: dict[str, RemoteFile] = {}

    def declared(self, file: RemoteFile) -> RemoteFile:
        """See `Source.declared`: the ETag and checksums came with the bytes."""
        with self._lock:
            return self._declared.get(file.location, file)

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[memoryview, None, None]:
        """See `Source.pieces`. A whole file is checked against the server's checksum, if it gives one."""
        if start >= stop:
            return
        with self._lock:
            route = self._routes.setdefault(file.location, Route(file.location))
        with self._explain(), self._asked(handle, file, route, start, stop) as response:
            skip = self._accept(handle, file, start, response)
            body = Body(response, handle, cancel, self._settings.stall_timeout)
            body.skip(skip)
            check = _Check(self.declared(file)) if (start, stop) == (0, file.size) else None
            left = stop - start
            for data in body.pieces(left):
                left -= len(data)
                if check is not None:
                    check.update(data)
                if not left:
                    # To its end, so that the connection can be used again.
                    if (response.status_code == 206 or stop == file.size) and body.take(1):
                        raise _changed(handle, file, "the server sends more bytes than there are")
                    if check is not None:
                        check.finish(handle)
                yield data
            if left:
                raise UnavailableError(
                    f"{handle}: the server sent {stop - start - left} of {stop - start} bytes",
                    hint="try again later",
                )

    @contextmanager
    def _asked(
        self, handle: str, file: RemoteFile, route: Route, start: int, stop: int
    ) -> Iterator[requests.Response]:
        try:
            with self._net.get(route, handle, {"Range": f"bytes={start}-{stop - 1}"}) as response:
                yield response
        except NotFoundError as error:
            raise _changed(handle, file, "it is gone") from error

    def _accept(self, handle: str, file: RemoteFile, start: int, response: requests.Response) -> int:
        """Compare an answer's head with what is known; returns how many of its bytes to leave out."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise ProtocolError(f"{handle}: a file comes in another encoding than it was asked for")
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not match or int(match[1]) != start:
                raise UnavailableError(f"{handle}: the server sent another range than it was asked for")
            total = None if match[2] == "*" else int(match[2])
        else:
            total = content_length(headers) if response.status_code == 200 else 0
        if total not in (None, file.size):
            raise _changed(handle, file, f"it has {total} bytes now, not {file.size}")
        self._compare(handle, file, described(file, response))
        if response.status_code == 206:
            return 0
        if start > _MAX_SKIP:
            raise ProtocolError(
                f"{handle}: the server does not give ranges", hint="use --load-format compressed"
            )
        return start

    def _compare(self, handle: str, file: RemoteFile, now: RemoteFile) -> None:
        with self._lock:
            before = self._declared.get(file.location)
            for known in (file, before):
                # A file that was only listed has no ETag; one that was read without has none for good.
                if known is not None and (
                    (known.etag != now.etag and (known.etag is not None or known is before))
                    or _differ(known.md5, now.md5)
                    or _differ(known.crc32c, now.crc32c)
                ):
                    raise _changed(handle, file, "the server has other bytes than before")
            # What the same file was known by before is as good as if it had been said again.
            first = before or file
            self._declared[file.location] = dataclasses.replace(
                now, md5=now.md5 or first.md5, crc32c=now.crc32c or first.crc32c
            )


def described(file: RemoteFile, response: requests.Response) -> RemoteFile:
    """The file with the ETag and checksums that an answer's head declares, and no others."""
    headers = response.headers
    # What was stored compressed is given in full, and its checksums are those of the compressed bytes.
    stored_as_is = headers.get("x-goog-stored-content-encoding", "identity") == "identity"
    digests = declared_digests(headers) if stored_as_is else {}
    return dataclasses.replace(
        file, etag=strong_etag(headers), md5=digests.get("md5"), crc32c=digests.get("crc32c")
    )


class Body:
    """An answer's bytes, in their order. They are given as they came: nothing is decoded."""

    def __init__(
        self, response: requests.Response, handle: str, cancel: threading.Event, stall_timeout: float
    ) -> None:
        self._raw = response.raw
        self._handle = handle
        self._cancel = cancel
        self._stall_timeout = stall_timeout

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end. Raises as `pieces` does."""
        return b"".join(map(bytes, self.pieces(count)))

    def skip(self, count: int) -> None:
        """Read past bytes. Raises as `pieces` does."""
        for _ in self.pieces(count):
            pass

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes as they come, fewer at the end. Each is there until the next is asked for.

        Raises:
            UnavailableError: the connection broke or is too slow.
            StoppedError: `cancel` was set meanwhile.
        """
        return watched(self._pieces(count), self._handle, self._cancel.is_set, self._stall_timeout)

    def _pieces(self, count: int) -> Iterator[memoryview]:
        import urllib3

        room = memoryview(bytearray(min(count, _BLOCK)))
        while count:
            try:
                taken = take_into(self._raw, room[:count])
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise UnavailableError(
                    f"{self._handle}: the connection broke: {error}", hint="try again later"
                ) from error
            if not taken:
                return
            count -= taken
            yield room[:taken]


class _Check:
    """The checksum of a file that is read from its beginning to its end."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._crc32c = 0
        self._md5 = None
        if file.crc32c is None and file.md5 is not None:
            self._md5 = hashlib.md5(usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        if self._file.crc32c is not None:
            self._crc32c = google_crc32c.extend(self._crc32c, bytes(data))
        elif self._md5 is not None:
            self._md5.update(data)

    def finish(self, handle: str) -> None:
        """
        Raises:
            DamagedError: the bytes are not those that were declared.
        """
        if self._file.crc32c is not None:
            kind, wanted, found = "crc32c", self._file.crc32c, self._crc32c.to_bytes(4, "big")
        elif self._file.md5 is not None and self._md5 is not None:
            kind, wanted, found = "md5", self._file.md5, self._md5.digest()
        else:
            return
        if found != wanted:
            raise DamagedError(
                f"{handle}: {_name(self._file)}: its {kind} is {found.hex()}, "
                f"the server declared {wanted.hex()}"
            )


def _differ(one: bytes | None, other: bytes | None) -> bool:
    return one is not None and other is not None and one != other


def _changed(handle: str, file: RemoteFile, what: str) -> ChangedOriginError:
    return ChangedOriginError(f"{handle}: {_name(file)} is not the file that was listed: {what}")


def _name(file: RemoteFile) -> str:
    return unquote(urlsplit(file.location).path).rpartition("/")[2][:200]
