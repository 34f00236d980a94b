"""Kaggle Models (PROTOCOLS §3): versions, paged listings, files by range, archives.

Kaggle is asked by the REST form of its API, which takes plain GETs:
`<endpoint>/api/v1/models/<owner>/<model>/<framework>/<variation>/…`. The bytes come from a storage service,
to which it redirects with a signed URL.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

import google_crc32c

from hubfs.config import LoadFormat
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    ConfigError,
    DamagedError,
    HostileError,
    NotFoundError,
    ProtocolError,
    StoppedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Listing, Origin, RemoteFile
from hubfs.hubs.checksums import declared_digests
from hubfs.hubs.kaggle_handle import KaggleModel, is_kaggle, parse
from hubfs.hubs.kaggle_login import Credentials, find_credentials
from hubfs.net import Net, Route, content_length, strong_etag

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings

_log = logging.getLogger(__name__)

#: Files of one page. The most that Kaggle gives; with fewer it is asked more often.
_PAGE = 200
#: Bytes of one JSON answer at most: a page has some 150 bytes a file.
_MAX_JSON = 4 << 20
#: Bytes taken from a connection at once. Between two of them a reader that was stopped is let go.
_BLOCK = 256 << 10
#: Slower than this over `stall_timeout`, a connection counts as stalled. In bytes per second.
_SLOWEST = 1024
#: Where the storage gives the whole instead of a range, so much of it is read past at most.
_MAX_SKIP = 64 << 20
#: No text, or a way out of the directory.
_BAD_NAME = re.compile("[\0\ud800-\udfff]|(^|/)(\\.\\.?)?(/|$)")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def endpoint(environ: Mapping[str, str]) -> str:
    """Where Kaggle's API is: `KAGGLE_API_ENDPOINT`, or kagglesdk's test server if that is what it is set to.

    Raises:
        ConfigError: the variable has no address in it.
    """
    url = environ.get("KAGGLE_API_ENDPOINT", "").rstrip("/")
    if not url:
        test = environ.get("KAGGLE_API_ENVIRONMENT") == "TEST"
        return "http://localhost:7777" if test else "https://www.kaggle.com"
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise ConfigError("KAGGLE_API_ENDPOINT is not the address of a server")
    return url.removesuffix("/api/v1")


class Kaggle:
    """The hub. Any framework's models, TensorFlow's or not."""

    def __init__(self, net: Net, settings: Settings) -> None:
        self._net = net
        self._settings = settings
        self._api = f"{endpoint(os.environ)}/api/v1/models/"
        # Not over a line on which others can read them.
        if self._api.startswith("https:") or urlsplit(self._api).hostname in _LOOPBACK:
            net.authorize(self._api, lambda: _headers(find_credentials(os.environ)))

    def supports(self, handle: str) -> bool:
        return is_kaggle(handle)

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The version's files, or under `COMPRESSED` and where Kaggle does not list them its archive.

        Raises:
            HubfsError: there is no such version, or Kaggle does not give it.
        """
        model = parse(handle)
        with helpful(model):
            if model.version is None:
                model = self._latest(handle, model)
            if load_format is not LoadFormat.COMPRESSED:
                try:
                    return self._listing(handle, model)
                except (NotFoundError, ProtocolError) as error:
                    if load_format is LoadFormat.UNCOMPRESSED:
                        raise
                    _log.info("%s; its archive is asked for", error.message)
            return probe(self._net, handle, f"{self._api}{model}/download")

    def _latest(self, handle: str, model: KaggleModel) -> KaggleModel:
        number = self._json(f"{self._api}{model}/get", handle).get("versionNumber")
        if type(number) is not int or number < 1:
            raise ProtocolError(f"{handle}: Kaggle does not say which version is the latest")
        return dataclasses.replace(model, version=number)

    def _listing(self, handle: str, model: KaggleModel) -> Listing:
        files: dict[str, RemoteFile] = {}
        for entry in self._pages(handle, model):
            name = _checked_name(handle, entry.get("name"))
            if name in files:
                raise HostileError(f"{handle}: Kaggle lists a file twice: {name[:200]!r}")
            size, mtime = entry.get("size", 0), parse_time(entry.get("creationDate"))
            if type(size) is not int or size < 0:
                raise ProtocolError(f"{handle}: Kaggle lists a file without its size: {name[:200]!r}")
            files[name] = RemoteFile(f"{self._api}{model}/download/{quote(name)}", size, mtime)
            if len(files) > self._settings.max_model_files:
                raise TooLargeError(f"{handle}: more than {self._settings.max_model_files} files")
        if not files:
            raise ProtocolError(f"{handle}: Kaggle lists no files")
        if sum(file.size for file in files.values()) > self._settings.max_model_size:
            raise TooLargeError(f"{handle}: more than {self._settings.max_model_size} bytes")
        return Listing(handle, files, KaggleFiles(self._net, self._settings, model), model.handle)

    def _pages(self, handle: str, model: KaggleModel) -> Iterator[dict[str, Any]]:
        """The entries of the listing, page after page."""
        token, seen = "", {""}
        while True:
            query = urlencode({"page_size": _PAGE, **({"page_token": token} if token else {})})
            answer = self._json(f"{self._api}{model}/files?{query}", handle)
            entries, token = answer.get("files", []), answer.get("nextPageToken") or ""
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ProtocolError(f"{handle}: Kaggle's listing is not one of files")
            # Else a server that errs, or lies, would keep this going for ever.
            if token and (not isinstance(token, str) or token in seen or not entries):
                raise ProtocolError(f"{handle}: Kaggle's listing does not come to an end")
            yield from entries
            if not token:
                return
            seen.add(token)

    def _json(self, url: str, handle: str) -> dict[str, Any]:
        with self._net.get(url, handle, {"Accept": "application/json"}) as response:
            body = _Body(response, handle, threading.Event(), self._settings.stall_timeout).take(_MAX_JSON)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ProtocolError(f"{handle}: Kaggle's answer is not what its API gives")
        return answer


class KaggleFiles:
    """Reads a version's files by range. What storage says of a file first holds for all of its ranges."""

    def __init__(self, net: Net, settings: Settings, model: KaggleModel) -> None:
        self._net = net
        self._settings = settings
        self._model = model
        self._lock = threading.Lock()  # protects the two
        self._routes: dict[str, Route] = {}
        self._declared: dict[str, RemoteFile] = {}

    def declared(self, file: RemoteFile) -> RemoteFile:
        """The file with the ETag and checksums that came with its bytes; Kaggle's listing has none."""
        with self._lock:
            return self._declared.get(file.location, file)

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        """See `Source.read`. The whole of a file is checked against storage's checksum, if it gives one.

        A signed address is used again until it is refused; then Kaggle is asked for a new one at once.
        """
        if start >= stop:
            return b""
        with self._lock:
            route = self._routes.setdefault(file.location, Route(file.location))
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with helpful(self._model), self._net.get(route, handle, headers) as response:
            skip = self._accept(handle, file, start, response)
            body = _Body(response, handle, cancel, self._settings.stall_timeout)
            body.skip(skip)
            data = body.take(stop - start)
            # To its end, so that the connection can be used again.
            more = body.take(1) if response.status_code == 206 or stop == file.size else b""
        if len(data) != stop - start:
            raise UnavailableError(
                f"{handle}: storage sent {len(data)} of {stop - start} bytes", hint="try again later"
            )
        if more:
            raise _changed(handle, file, "storage sends more bytes than there are")
        if (start, stop) == (0, file.size):
            _verify(handle, self.declared(file), data)
        return data

    def _accept(self, handle: str, file: RemoteFile, start: int, response: requests.Response) -> int:
        """Compare an answer's head with what is known; returns how many of its bytes to leave out."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise ProtocolError(f"{handle}: storage sends a file in another encoding than it was asked for")
        # What was stored compressed is given in full, and its checksums are those of the compressed bytes.
        stored_as_is = headers.get("x-goog-stored-content-encoding", "identity") == "identity"
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not match or int(match[1]) != start:
                raise UnavailableError(f"{handle}: storage sent another range than it was asked for")
            total = None if match[2] == "*" else int(match[2])
        else:
            total = content_length(headers) if response.status_code == 200 else 0
        if total not in (None, file.size):
            raise _changed(handle, file, f"storage has {total} bytes, the listing says {file.size}")
        digests = declared_digests(headers) if stored_as_is else {}
        now = dataclasses.replace(
            file, etag=strong_etag(headers), md5=digests.get("md5"), crc32c=digests.get("crc32c")
        )
        self._compare(handle, file, now)
        if response.status_code == 206:
            return 0
        if start > _MAX_SKIP:
            raise ProtocolError(
                f"{handle}: storage does not give ranges", hint="use --load-format compressed"
            )
        return start

    def _compare(self, handle: str, file: RemoteFile, now: RemoteFile) -> None:
        with self._lock:
            first = self._declared.setdefault(file.location, now)
        if (first.etag, first.md5, first.crc32c) != (now.etag, now.md5, now.crc32c):
            raise _changed(handle, file, "storage has other bytes than before")


@contextmanager
def helpful(model: KaggleModel) -> Iterator[None]:
    """Say what to do where Kaggle refuses: it answers so for a missing licence, login and model alike."""
    try:
        yield
    except AccessError as error:
        page = dataclasses.replace(model, version=None).handle
        login = find_credentials(os.environ)
        if login is None:
            hint = (
                f"log in: put a token from https://www.kaggle.com/settings into KAGGLE_API_TOKEN or "
                f"~/.kaggle/access_token, and accept the model's licence at {page} if it has one"
            )
        else:
            hint = (
                f"accept the model's licence at {page} as the user of {login.where}; if that was done, make "
                f"a new token at https://www.kaggle.com/settings"
            )
        raise AccessError(error.message, hint=f"{hint}; or there is no such model") from error


class _Body:
    """An answer's bytes, in their order. They are given as they came: nothing is decoded."""

    def __init__(
        self, response: requests.Response, handle: str, cancel: threading.Event, stall_timeout: float
    ) -> None:
        self._raw = response.raw
        self._handle = handle
        self._cancel = cancel
        self._stall_timeout = stall_timeout

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end. Raises as `skip` does."""
        return b"".join(self._pieces(count))

    def skip(self, count: int) -> None:
        """Read past bytes.

        Raises:
            UnavailableError: the connection broke or is too slow.
            StoppedError: `cancel` was set meanwhile.
        """
        for _ in self._pieces(count):
            pass

    def _pieces(self, count: int) -> Iterator[bytes]:
        import urllib3

        window, came = time.monotonic(), 0
        while count:
            if self._cancel.is_set():
                raise StoppedError(f"{self._handle}: the transfer was stopped")
            try:
                piece: bytes = self._raw.read1(min(count, _BLOCK), decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise UnavailableError(
                    f"{self._handle}: the connection broke: {error}", hint="try again later"
                ) from error
            if not piece:
                return
            count -= len(piece)
            came += len(piece)
            yield piece
            elapsed = time.monotonic() - window
            if elapsed >= self._stall_timeout:
                if came < _SLOWEST * elapsed:
                    raise UnavailableError(
                        f"{self._handle}: storage sends less than {_SLOWEST} bytes a second"
                    )
                window, came = time.monotonic(), 0


def parse_time(text: object) -> int:
    """Epoch seconds of a time as Kaggle's JSON has it (`2024-02-21T09:30:00.1234567Z`), 0 without one."""
    match = re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text) if isinstance(text, str) else None
    try:
        return int(datetime.fromisoformat(match[0]).replace(tzinfo=timezone.utc).timestamp()) if match else 0
    except ValueError:
        return 0


def _headers(login: Credentials | None) -> Mapping[str, str]:
    return {} if login is None else {"Authorization": login.header}


def _checked_name(handle: str, name: object) -> str:
    """A name that may become a part of a URL here, and of a path above."""
    if not isinstance(name, str) or _BAD_NAME.search(name):
        raise HostileError(f"{handle}: Kaggle lists a file with a name that cannot be: {str(name)[:200]!r}")
    return name


def _changed(handle: str, file: RemoteFile, what: str) -> ChangedOriginError:
    name = urlsplit(file.location).path.partition("/download/")[2]
    return ChangedOriginError(f"{handle}: {name} is not the file that was listed: {what}")


def _verify(handle: str, file: RemoteFile, data: bytes) -> None:
    if file.crc32c is not None:
        kind, wanted, found = "crc32c", file.crc32c, google_crc32c.value(data).to_bytes(4, "big")
    elif file.md5 is not None:
        kind, wanted, found = "md5", file.md5, hashlib.md5(data, usedforsecurity=False).digest()
    else:
        return
    if found != wanted:
        name = urlsplit(file.location).path.partition("/download/")[2]
        raise DamagedError(f"{handle}: {name}: its {kind} is {found.hex()}, storage declared {wanted.hex()}")
