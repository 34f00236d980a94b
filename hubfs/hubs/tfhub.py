"""The TF Hub hosting protocol (PROTOCOLS §1): one handle, in two formats, and two other kinds of models.

`?tf-hub-format=compressed` is the archive. `?tf-hub-format=uncompressed` is answered with 303 and, as its
body, the directory of a bucket that has the version's files. Anything else means that it is not offered.

Handles of TF Lite end with `?lite-format=tflite` and are answered with one file, those of TF.js with
`?tfjs-format=compressed` and are answered with an archive.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urljoin, urlsplit

from cachetools import LRUCache

from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    HostileError,
    HubfsError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    RefusedError,
    StoppedError,
    TooLargeError,
    UnavailableError,
    from_status,
)
from hubfs.handles import compressed_url, is_archive
from hubfs.hubs.archive_url import not_one_by_one, probe
from hubfs.hubs.base import Archive, Listing, Origin
from hubfs.hubs.bucket import Buckets
from hubfs.hubs.object_store import BucketPath
from hubfs.hubs.single_file import single_file
from hubfs.net import Net

if TYPE_CHECKING:
    import requests

log = logging.getLogger("hubfs.hubs")

#: The header by which a hub says that it has the bucket itself, and where: a URL relative to the answer's.
STORAGE_HEADER = "X-Hubfs-Storage"
_SEE_OTHER = 303
#: Longer bodies are no location.
_MAX_LOCATION = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: For how long a bucket that could not be reached is passed over.
_AVOIDED_SECONDS = 60.0
#: Seconds within which an answer is no time-out.
_AT_ONCE = 1.0
_BUCKETS = 32
#: No reason to ask for the archive instead of the files.
_FINAL = (HostileError, TooLargeError, StoppedError, OfflineError)


class TfHub:
    """tfhub.dev and every server that speaks as it does.

    Args:
        buckets: lists what the hub names.
    """

    def __init__(self, net: Net, settings: Settings, buckets: Buckets) -> None:
        self._net = net
        self._settings = settings
        self._buckets = buckets
        self._lock = threading.Lock()  # protects what follows
        #: Until when a bucket is not asked, by its name and server. One that a firewall hides would else
        #: keep each model waiting for as long as it takes to give up.
        self._unreachable: LRUCache[tuple[str, str | None], float] = LRUCache(_BUCKETS)

    def supports(self, handle: str) -> bool:
        return handle.startswith(("http://", "https://")) and not is_archive(handle)

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The version's files in a bucket, or its archive.

        Under `AUTO` it is the archive where the hub names no bucket, or one that cannot be listed.

        Raises:
            HubfsError: there is no such version, it is not to be had in this format, or there is no answer.
        """
        query = parse_qs(urlsplit(handle).query)
        if query.get("lite-format") == ["tflite"]:
            return single_file(self._net, self._settings, handle, ".tflite")
        if "tfjs-format" in query:
            if load_format is LoadFormat.UNCOMPRESSED:
                raise not_one_by_one(handle)
            return probe(self._net, handle, handle)
        if load_format is LoadFormat.COMPRESSED:
            return self._archive(handle)
        try:
            place = self._place(handle)
        except _NotOfferedError as error:
            if load_format is LoadFormat.UNCOMPRESSED:
                raise self._why_not(handle, error) from error
            reason: HubfsError = error
        else:
            try:
                return self._listing(handle, place, load_format)
            except HubfsError as error:
                if load_format is LoadFormat.UNCOMPRESSED:
                    error.hint = error.hint or "use --load-format auto, which takes the archive then"
                    raise
                if isinstance(error, _FINAL):
                    raise
                reason = error
        log.info("%s; its archive is asked for", reason.message)
        try:
            return self._archive(handle)
        except NotFoundError as error:
            if reason.temporary:
                # There are files, and nothing else: they can be had later.
                raise reason from error
            raise

    def _archive(self, handle: str) -> Archive:
        return probe(self._net, handle, compressed_url(handle))

    def _listing(self, handle: str, place: BucketPath, load_format: LoadFormat) -> Listing:
        """The files there. The bucket is allowed with the hub that names it."""
        bucket = (place.bucket, place.endpoint)
        with self._lock:
            avoided = load_format is LoadFormat.AUTO and time.monotonic() < self._unreachable.get(bucket, 0.0)
        if avoided:
            raise UnavailableError(f"{handle}: {place} could not be reached a moment ago")
        began = time.monotonic()
        try:
            try:
                return self._buckets.listing(handle, place)
            except UnavailableError as error:
                # What failed at once may pass as soon, and an archive is much more to bring in.
                if load_format is not LoadFormat.AUTO or time.monotonic() - began > _AT_ONCE:
                    raise
                log.info("%s; trying again", error.message)
                return self._buckets.listing(handle, place)
        except UnavailableError:
            with self._lock:
                self._unreachable[bucket] = time.monotonic() + _AVOIDED_SECONDS
            raise

    def _place(self, handle: str) -> BucketPath:
        """Where the hub says that the version's files are.

        Raises:
            _NotOfferedError: it says nothing of the kind.
            UnavailableError: there is no connection to it.
        """
        url = compressed_url(handle, "uncompressed")
        try:
            # Some hubs lead to the archive for every format, of which no more is taken than this.
            beginning = {"Range": f"bytes=0-{_MAX_LOCATION - 1}"}
            with self._net.get(url, handle, beginning, statuses=range(100, 600)) as response:
                status, answered = response.status_code, str(response.url)
                body = _body(response, handle) if status == _SEE_OTHER else b""
                storage = response.headers.get(STORAGE_HEADER)
        except (ProtocolError, RefusedError) as error:
            # Such as a redirect to `gs://`. If it is the hub's fault, the archive's request says so too.
            raise _NotOfferedError(error.message, hint=error.hint) from error
        where = re.fullmatch(r"(gs://\S+?)/?\s*", body.decode("utf-8", "replace"))
        if where is None:
            raise _NotOfferedError(
                f"{handle}: the hub does not offer this model uncompressed (HTTP {status})", status=status
            )
        try:
            place = BucketPath.parse(where[1])
        except RefusedError as error:
            raise _NotOfferedError(f"{handle}: the hub names no bucket: {error.message}") from error
        if storage is None:
            return place
        # It is the hub's own word about itself only: it cannot send anybody to another server with it.
        endpoint = _on_same_server(answered, storage)
        if endpoint is None:
            raise _NotOfferedError(f"{handle}: the hub names another server as its own ({STORAGE_HEADER})")
        return dataclasses.replace(place, endpoint=endpoint)

    def _why_not(self, handle: str, error: _NotOfferedError) -> HubfsError:
        """What it means for those who want no archive that the hub gives no listing."""
        if error.status in (404, 410):
            # The same answer if there is no such model: in that case the next line raises.
            self._archive(handle)
        elif error.status >= 400:
            return from_status(error.status, handle)
        return error


class _NotOfferedError(ProtocolError):
    """The hub gives no listing. `status` is that of its answer, where that is the reason."""

    def __init__(self, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint or "--load-format auto or compressed downloads its archive")
        self.status = status


def _body(response: requests.Response, handle: str) -> bytes:
    import urllib3

    try:
        body: bytes = response.raw.read(_MAX_LOCATION, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise UnavailableError(f"{handle}: the connection broke: {error}", hint="try again later") from error
    return body


def _on_same_server(url: str, reference: str) -> str | None:
    """The URL that `reference` means at `url`, without a slash at its end; `None` if it is elsewhere."""
    try:
        target = urljoin(url, reference)
        same = _server(target) == _server(url)
    except ValueError:
        return None
    return target.rstrip("/") if same and not re.search(r"[?#\s]", target) else None


def _server(url: str) -> tuple[str, str | None, int | None, str]:
    """Scheme, host and port of a URL, and what should not be there besides."""
    split = urlsplit(url)
    port = split.port or _DEFAULT_PORTS.get(split.scheme)
    return split.scheme, split.hostname, port, split.netloc.rpartition("@")[0]
