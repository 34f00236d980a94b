"""Clients of object stores: which endpoint, whose credentials, what deadline, and what an error means.

obstore does the talking, but for reading objects that need no credentials (`hubfs.hubs.bucket`). It is
imported when the first bucket is asked for, or once the mount is up.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from cachetools import LRUCache

from hubfs.config import BUCKET_NAME
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    HostileError,
    HubfsError,
    OfflineError,
    ProtocolError,
    RefusedError,
    StoppedError,
    UnavailableError,
    from_status,
)
from hubfs.net import certificates
from hubfs.version import __version__

if TYPE_CHECKING:
    import asyncio

    from obstore.store import ClientConfig, GCSStore, S3Store

    from hubfs.config import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Buckets whose connections are kept.
_BUCKETS = 32
#: How often a waiting thread looks whether it should give up.
_POLL_SECONDS = 0.05
#: How long a signed URL of an archive holds: what S3 and Google allow at most is a week.
_SIGNED_FOR = timedelta(days=6)
_GOOGLE = "https://storage.googleapis.com"
_GOOGLE_CREDENTIALS = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
_AMAZON_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class BucketPath:
    """A directory or an object in a bucket.

    Attributes:
        scheme: `gs` or `s3`.
        bucket: its name.
        path: without a slash at either end; empty for the whole bucket.
        endpoint: the URL of the server that has the bucket, where that is neither Google's nor Amazon's.
            What the environment says goes before it.
    """

    scheme: str
    bucket: str
    path: str
    endpoint: str | None = None

    @classmethod
    def parse(cls, url: str) -> BucketPath:
        """
        Raises:
            RefusedError: it is not `gs://bucket/path` or `s3://bucket/path`.
        """
        match = re.fullmatch(rf"(gs|s3)://({BUCKET_NAME})(?:/(.*))?", url, re.DOTALL)
        path = (match[3] or "").rstrip("/") if match else ""
        if match is None or (path and any(part in ("", ".", "..") for part in path.split("/"))):
            raise RefusedError(f"{url!r} is not a path in a bucket", hint="such as gs://bucket/directory")
        return cls(match[1], match[2], path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")


class ObjectStores:
    """Clients, one a bucket, and the thread that waits for their answers. Safe to use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # protects what follows; not held while anything is asked for
        self._stores: LRUCache[tuple[str, str, str | None], GCSStore | S3Store] = LRUCache(_BUCKETS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Load what the first request needs, before there is one: that takes some 30 ms and 5 MB."""
        try:
            import asyncio  # noqa: F401

            # Not `obstore.store`: who names a part first, while another thread imports the whole, waits for
            # it in the other order, and one of the two gets _DeadlockError.
            import obstore  # noqa: F401
        except ImportError as error:
            log.debug("obstore cannot be loaded: %s", error)  # whoever needs it is told

    def store(self, handle: str, place: BucketPath) -> GCSStore | S3Store:
        """The client of a place's bucket.

        Raises:
            AccessError: the credentials in the environment cannot be used.
        """
        key = (place.scheme, place.bucket, _endpoint(place))
        with self._lock:
            known = self._stores.get(key)
        if known is not None:
            return known
        from obstore import exceptions

        make = _google if place.scheme == "gs" else _amazon
        try:
            made = make(place, self._client_options())
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise AccessError(
                f"{handle}: the credentials for {place.scheme}:// cannot be used: {_first_line(error)}",
                hint="correct or unset the environment variables that name them",
            ) from error
        with self._lock:
            return self._stores.setdefault(key, made)

    def url(self, handle: str, place: BucketPath) -> str:
        """A URL that gives an object to a plain GET: signed, if there are credentials.

        Raises:
            HubfsError: the credentials do not allow it.
        """
        public = public_url(place)
        if public is not None:
            return public
        store = self.store(handle, place)
        return self.call(handle, place, lambda: _sign(store, place.path))

    def call(
        self,
        handle: str,
        place: BucketPath,
        work: Callable[[], Coroutine[Any, Any, T]],
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> T:
        """The result of a coroutine that asks a store, waited for in this thread.

        Args:
            handle: named in errors, as is `place`.
            cancel: ends the wait when it is set.
            seconds: how long it may take; by default `--connect-timeout` and `--stall-timeout` together.

        Raises:
            OfflineError: nobody is to be asked.
            StoppedError: `cancel` was set, or hubfs is being stopped.
            UnavailableError: it took too long, or may succeed when it is tried again.
            HubfsError: the store does not give it.
        """
        import asyncio  # here, because its import would take a tenth of the mount's start-up time

        if self._settings.offline:
            raise OfflineError(f"{handle}: not cached, and hubfs is offline", hint="mount without --offline")
        loop = self._running_loop(handle)  # first: nobody would await the coroutine if this fails
        future = asyncio.run_coroutine_threadsafe(work(), loop)
        settings = self._settings
        allowed = settings.connect_timeout + settings.stall_timeout if seconds is None else seconds
        deadline = time.monotonic() + allowed
        while not concurrent.futures.wait([future], _POLL_SECONDS).done:
            if self._stopping.is_set() or (cancel is not None and cancel.is_set()):
                future.cancel()
                raise StoppedError(f"{handle}: the request was given up")
            if time.monotonic() > deadline:
                future.cancel()
                raise UnavailableError(
                    f"{handle}: {place} did not come within {allowed:.0f} s", hint="try again later"
                )
        with _errors(handle, place):
            try:
                return future.result()
            except concurrent.futures.CancelledError as error:
                raise StoppedError(f"{handle}: hubfs is being stopped") from error

    def understanding(self, handle: str, place: BucketPath, items: Iterable[T]) -> Iterator[T]:
        """The same items, each waited for in this thread, and errors that are understood."""
        waiting = iter(items)
        while True:
            with _errors(handle, place):
                try:
                    item = next(waiting)
                except StopIteration:
                    return
            yield item

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def shut_down(self) -> None:
        """Let nobody wait any longer."""
        self._stopping.set()

    def close(self) -> None:
        """Give up what is asked for, and end the thread."""
        self.shut_down()
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _running_loop(self, handle: str) -> asyncio.AbstractEventLoop:
        import asyncio

        with self._lock:
            if self._stopping.is_set():
                raise StoppedError(f"{handle}: hubfs is being stopped")
            if self._loop is None:
                loop = self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(loop,), name="hubfs-buckets", daemon=True)
                self._thread.start()
            return self._loop

    def _client_options(self) -> ClientConfig:
        settings = self._settings
        options: ClientConfig = {
            "user_agent": f"hubfs/{__version__}",
            "allow_http": True,  # an endpoint's own URL decides
            "connect_timeout": timedelta(seconds=settings.connect_timeout),
            "read_timeout": timedelta(seconds=settings.stall_timeout),
            # The time for a whole answer depends on its size: `call` has the deadline.
            "timeout": timedelta(days=1),
        }
        authorities = certificates(settings.verify_certificates)
        if authorities is False:
            options["allow_invalid_certificates"] = True
        elif isinstance(authorities, str) and Path(authorities).is_file():
            options["root_certificate"] = Path(authorities).read_bytes()
        return options


def _run(loop: asyncio.AbstractEventLoop) -> None:
    import asyncio

    async def give_up() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    loop.run_forever()
    loop.run_until_complete(give_up())
    loop.close()


async def _sign(store: GCSStore | S3Store, path: str) -> str:
    import obstore

    return await obstore.sign_async(store, "GET", path, _SIGNED_FOR)


def _google(place: BucketPath, options: ClientConfig) -> GCSStore:
    import obstore

    endpoint = _endpoint(place)
    if endpoint is not None:
        key = {"gcs_base_url": endpoint, "disable_oauth": True}
        unused = {"client_email": "", "private_key": "", "private_key_id": ""}
        return obstore.store.GCSStore(
            place.bucket,
            service_account_key=json.dumps({**key, **unused}),
            client_options=options,
            retry_config={"max_retries": 0},
        )
    # Without this, obstore would ask the machine it runs on for an identity.
    anonymous = not _has_credentials(place)
    return obstore.store.GCSStore(
        place.bucket, skip_signature=anonymous, client_options=options, retry_config={"max_retries": 0}
    )


def _amazon(place: BucketPath, options: ClientConfig) -> S3Store:
    import obstore

    endpoint = _endpoint(place)
    return obstore.store.S3Store(
        place.bucket,
        config={"endpoint": endpoint} if endpoint else {},
        region=_region(),
        skip_signature=not _has_credentials(place),
        client_options=options,
        retry_config={"max_retries": 0},
    )


def _endpoint(place: BucketPath) -> str | None:
    """The server of a bucket that is not the usual one; the environment's word goes first."""
    return (_emulator() if place.scheme == "gs" else _s3_endpoint()) or place.endpoint


def _emulator() -> str | None:
    """Where Google's own clients are led to by `STORAGE_EMULATOR_HOST`, with or without a scheme."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    return (host if "://" in host else f"http://{host}") if host else None


def _s3_endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return endpoint.rstrip("/") or None


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _has_credentials(place: BucketPath) -> bool:
    if place.scheme == "s3":
        return any(os.environ.get(name) for name in _AMAZON_CREDENTIALS)
    # Google's are for Google.
    return _endpoint(place) is None and any(os.environ.get(name) for name in _GOOGLE_CREDENTIALS)


def public_url(place: BucketPath) -> str | None:
    """The URL of an object, if it is asked for without credentials."""
    if _has_credentials(place):
        return None
    usual = _GOOGLE if place.scheme == "gs" else f"https://s3.{_region()}.amazonaws.com"
    return f"{_endpoint(place) or usual}/{place.bucket}/{quote(place.path)}"


@contextmanager
def _errors(handle: str, place: BucketPath) -> Iterator[None]:
    from obstore import exceptions

    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise _understood(error, handle, place) from error


def _understood(error: Exception, handle: str, place: BucketPath) -> HubfsError:
    """What a store's error means. obstore has kinds for some, and words for the others."""
    from obstore import exceptions

    text, first = str(error), _first_line(error)
    status = re.search(r"non-2xx status code: (\d{3})", text)
    if isinstance(error, exceptions.PreconditionError):
        return ChangedOriginError(f"{handle}: {place} is not what was listed any more")
    if isinstance(error, exceptions.InvalidPathError):
        return HostileError(f"{handle}: {place} has names that lead elsewhere: {first}")
    if "token request" in text or "TokenRequest" in text:
        return AccessError(
            f"{handle}: the credentials for {place.scheme}:// are not accepted: {first}",
            hint="correct or unset the environment variables that name them",
        )
    if status:
        return _from_status(int(status[1]), text, handle, place)
    if "without LOCATION" in text:
        return ProtocolError(
            f"{handle}: {place.scheme}://{place.bucket} is elsewhere",
            hint="set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to its server",
        )
    if re.search("(?i)certificate|handshake", text):
        return ProtocolError(
            f"{handle}: no secure connection to {place.scheme}://{place.bucket}: {first}",
            hint="add the server's authority with SSL_CERT_FILE or REQUESTS_CA_BUNDLE",
        )
    if "HTTP error" in text:
        # The innermost cause stands last: `message: "Connection refused"`.
        causes = re.findall(r'(?:message|error): "([^"]+)"', text)
        reason = "it stands still" if re.search("Timeout|TimedOut", text) else [first, *causes][-1]
        return UnavailableError(f"{handle}: {place} cannot be read: {reason}", hint="try again later")
    return ProtocolError(f"{handle}: {place} cannot be read: {first}")


def _from_status(status: int, text: str, handle: str, place: BucketPath) -> HubfsError:
    words = " ".join(re.findall(r"<(?:Code|Message)>([^<]*)</", text)[:2])
    known = from_status(status, handle, words=f"{place}: {words}" if words else str(place))
    if status in (401, 403):
        known.hint = hint_of_refusal(place)
    return known


def hint_of_refusal(place: BucketPath) -> str:
    """What to do where a bucket refuses access."""
    names = _GOOGLE_CREDENTIALS if place.scheme == "gs" else _AMAZON_CREDENTIALS
    asked = "the environment's credentials" if _has_credentials(place) else "no credentials"
    return f"it was asked with {asked}; set {names[0]}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
