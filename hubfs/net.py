"""One policy for every HTTP request: deadlines, redirects, retries, proxies, CA, cancelling."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Container, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from http.cookiejar import DefaultCookiePolicy
from threading import Event, local
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit
from weakref import WeakSet

from hubfs.errors import (
    HubfsError,
    OfflineError,
    ProtocolError,
    RefusedError,
    StoppedError,
    UnavailableError,
    from_status,
)
from hubfs.sharing import Sharing
from hubfs.version import __version__
from hubfs.wire import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests

    from hubfs.config import Settings

MAX_REDIRECTS = 10
#: Upper bound in seconds for one pause between attempts, whatever `Retry-After` says.
MAX_PAUSE = 60.0
_POOL = 32
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ANSWERS = frozenset({200, 206, 416})


class Route:
    """Where a URL's redirects led, so that the requests of one transfer follow them once.

    Attributes:
        url: where they begin.
        final: what gave bytes last, if that is another address. It may be signed for a short time only:
            after a failure there it is forgotten, and `url` is asked afresh.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.final: str | None = None

    @property
    def host(self) -> str:
        """Who gives the bytes, as far as it is known."""
        return urlsplit(self.final or self.url).netloc

    def forget(self, address: str) -> None:
        """Something failed at `address`."""
        if self.final == address:
            self.final = None


class Call:
    """A request that another thread can end while it waits for the answer or for more of its body."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._ended = False

    def end(self) -> None:
        """Make its thread fail soon. A connection that is still being opened is not interrupted."""
        self._ended = True
        _shut_down(self._socket)

    def uses(self, connection: socket.socket | None) -> None:
        self._socket = connection
        if self._ended:
            _shut_down(connection)


class Net:
    """Sends requests. Safe to use from many threads.

    Attributes:
        sharing: what transfers at the same time have in common.
    """

    def __init__(self, settings: Settings) -> None:
        self.sharing = Sharing(settings.connections)
        self._settings = settings
        self._session: requests.Session | None = None
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._stopping = Event()
        self._credentials: dict[str, Callable[[], Mapping[str, str]]] = {}
        #: The call that each thread makes just now.
        self._here = local()

    def prepare(self) -> None:
        """Load what the first request needs, before there is one: that takes some 50 ms."""
        self._get_session()

    def authorize(self, prefix: str, credentials: Callable[[], Mapping[str, str]]) -> None:
        """Send credentials with each request whose URL begins with `prefix`, whoever sends it.

        So never to what such a URL redirects to, unless that begins with it too. They are not logged.

        Args:
            prefix: scheme, host and at least the slash after it.
            credentials: gives the headers, asked anew for each request.
        """
        if not urlsplit(prefix).path.startswith("/"):
            raise ValueError(f"{prefix}: another host can begin so")
        self._credentials[prefix] = credentials

    def shut_down(self) -> None:
        """End all connections, so that nobody waits any longer for what they might bring."""
        self._stopping.set()
        for connection in list(self._sockets):
            _shut_down(connection)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    @contextmanager
    def get(
        self,
        url: str | Route,
        handle: str,
        headers: Mapping[str, str] | None = None,
        call: Call | None = None,
        *,
        statuses: Container[int] = (200, 206, 416),
    ) -> Iterator[requests.Response]:
        """The answer to a GET, redirects followed, its body not yet read.

        Args:
            url: what to ask for. That its host is allowed was decided before. The redirects of a `Route`
                are followed the first time, and again after a failure, also of reading the body.
            handle: named in errors.
            headers: of the request, sent to each hop: no credentials, for which there is `authorize`.
            call: by which another thread may end the request.

        Raises:
            HubfsError: no answer, or one whose status is not among `statuses`.
        """
        if self._settings.offline:
            raise OfflineError(
                f"{handle}: not cached, and hubfs is offline", hint="mount without --offline to download it"
            )
        route = url if isinstance(url, Route) else Route(url)
        call = call or Call()
        self._here.call = call
        asked = route.final or route.url
        try:
            response, asked = self._answer(route, handle, headers or {})
            try:
                if response.status_code not in statuses:
                    raise _refusal(response, handle)
                route.final = asked if asked != route.url else None
                yield response
            finally:
                call.uses(None)  # before the connection may be somebody else's
                response.close()
        except HubfsError:
            route.forget(asked)
            raise

    def pause(self, attempt: int, error: HubfsError, cancel: Event) -> None:
        """Wait before attempt number `attempt` (from 1) after `error`.

        Raises:
            StoppedError: `cancel` was set meanwhile.
        """
        delay = self._settings.retry_delay * 2 ** min(attempt - 1, 20) * random.uniform(0.75, 1.25)
        if isinstance(error, UnavailableError) and error.retry_after is not None:
            delay = max(delay, error.retry_after)
        if cancel.wait(min(delay, MAX_PAUSE)):
            raise StoppedError("stopped while waiting to try again")

    def _answer(self, route: Route, handle: str, headers: Mapping[str, str]) -> tuple[requests.Response, str]:
        """An answer, and who gave it."""
        known = route.final
        if known is not None:
            # Names may lead elsewhere than when the redirect was followed.
            self._check_redirect(route.url, known, handle, _is_public(urlsplit(route.url).hostname))
            response = self._send(known, handle, headers)
            if response.status_code in _ANSWERS or from_status(response.status_code, handle).temporary:
                return response, known
            # Perhaps only its signature is too old.
            response.close()
            route.forget(known)
        return self._follow(route.url, handle, headers)

    def _follow(self, url: str, handle: str, headers: Mapping[str, str]) -> tuple[requests.Response, str]:
        start_is_public = None
        for _ in range(MAX_REDIRECTS):
            response = self._send(url, handle, headers)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or not location:
                return response, url
            response.close()
            target = urljoin(url, location)
            if start_is_public is None:
                start_is_public = _is_public(urlsplit(url).hostname)
            self._check_redirect(url, target, handle, start_is_public)
            url = target
        raise ProtocolError(f"{handle}: the hub redirects more than {MAX_REDIRECTS} times")

    def _check_redirect(self, url: str, target: str, handle: str, start_is_public: bool) -> None:
        old, new = urlsplit(url), urlsplit(target)
        where = f"{new.scheme}://{new.netloc.rpartition('@')[2]}"
        if new.scheme not in ("http", "https") or not new.hostname:
            raise RefusedError(f"{handle}: the hub redirects to {where}, which is not a web address")
        if old.scheme == "https" and new.scheme == "http":
            raise RefusedError(
                f"{handle}: the hub redirects from https to http ({where}), which is not followed"
            )
        if start_is_public and not _is_public(new.hostname):
            raise RefusedError(
                f"{handle}: a public hub redirects to {where} in a private network, which is not followed"
            )

    def _send(self, url: str, handle: str, headers: Mapping[str, str]) -> requests.Response:
        import requests  # here, because its import would take a fifth of the mount's start-up time

        if self._stopping.is_set():
            raise StoppedError(f"{handle}: hubfs is being stopped")
        settings = self._settings
        host = urlsplit(url).netloc.rpartition("@")[2]
        try:
            return self._get_session().get(
                url,
                headers={**headers, **self._headers_for(url)},
                stream=True,
                allow_redirects=False,
                timeout=(settings.connect_timeout, settings.stall_timeout),
                verify=certificates(settings.verify_certificates),
            )
        except requests.exceptions.SSLError as error:
            raise ProtocolError(
                f"{handle}: no secure connection to {host}: {_cause(error)}",
                hint="add the hub's authority with SSL_CERT_FILE or REQUESTS_CA_BUNDLE",
            ) from error
        except requests.exceptions.ConnectTimeout as error:
            raise UnavailableError(
                f"{handle}: {host} does not answer within {settings.connect_timeout:g} s",
                hint="is it reachable?",
            ) from error
        except requests.exceptions.ReadTimeout as error:
            raise UnavailableError(
                f"{handle}: {host} sends no answer for {settings.stall_timeout:g} s", hint="try again later"
            ) from error
        except requests.exceptions.ConnectionError as error:
            raise UnavailableError(
                f"{handle}: no connection to {host}: {_cause(error)}",
                hint="check the network, or `hubfs doctor`",
            ) from error
        except (requests.exceptions.RequestException, ValueError) as error:
            raise ProtocolError(f"{handle}: the request to {host} failed: {_cause(error)}") from error

    def _headers_for(self, url: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for prefix, credentials in self._credentials.items():
            if url.startswith(prefix):
                found.update(credentials())
        return found

    def _get_session(self) -> requests.Session:
        if self._session is None:
            import requests
            import urllib3

            session = requests.Session()
            session.headers.update({"User-Agent": f"hubfs/{__version__}", "Accept-Encoding": "identity"})
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            adapter = _adapter(self._sockets, self._here)
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            if not self._settings.verify_certificates:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            # Two threads may both come here first; one session is dropped unused.
            self._session = session
        return self._session


def _adapter(sockets: WeakSet[socket.socket], here: local) -> requests.adapters.HTTPAdapter:
    """requests' adapter, with connections that tell what they are at.

    Args:
        sockets: of all connections.
        here: its `call` is told the socket of the request that the thread makes.
    """
    import requests
    import urllib3

    class Told:
        """Of a connection: its socket can be found, and an answer's bytes taken (`hubfs.wire`)."""

        sock: Any
        answer: Answer

        def response_class(self, *args: Any, **options: Any) -> Answer:
            self.answer = Answer(*args, **options)
            return self.answer

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            sockets.add(self.sock)

        def getresponse(self) -> Any:
            here.call.uses(self.sock)
            response = super().getresponse()  # type: ignore[misc]
            response.answer = self.answer
            return response

    class Plain(Told, urllib3.connection.HTTPConnection):  # type: ignore[misc]
        pass

    class Secure(Told, urllib3.connection.HTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> urllib3.ProxyManager:
            manager: urllib3.ProxyManager = super().proxy_manager_for(proxy, **kwargs)
            manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
            return manager

    return Adapter(pool_connections=_POOL, pool_maxsize=_POOL)


def _shut_down(connection: socket.socket | None) -> None:
    """End a connection that another thread may be reading, or closing."""
    if connection is not None:
        with suppress(OSError, ValueError):
            # Not SSLSocket's own method: it takes the TLS state from under the reader's feet, who then
            # may get what was encrypted for what it says.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _refusal(response: requests.Response, handle: str) -> HubfsError:
    return from_status(
        response.status_code,
        handle,
        words=_plain_words(response),
        retry_after=parse_retry_after(response.headers.get("Retry-After")),
    )


def certificates(verify: bool) -> bool | str:
    """What requests calls `verify`. It does not know OpenSSL's own variables, tensorflow_hub does."""
    if not verify:
        return False
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        value = os.environ.get(name)
        if value and os.path.exists(value):
            return value
    return True


def _is_public(host: str | None) -> bool:
    """Whether a host is outside loopback, private and link-local networks, as far as names tell."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        # It has no address here: a proxy resolves it, or the connection is going to fail.
        return True
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found)


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, without its layers of wrapping."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    text = str(reason if reason is not None else error.args[0] if error.args else error)
    text = re.sub(r"^<?[\w.]+(Connection|Error)?\(.*?\)?:? object at 0x[0-9a-f]+>: ", "", text)
    text = re.sub(r"^\w+\([^)]*\): ", "", text)
    return text[:300] or type(error).__name__


def _plain_words(response: requests.Response, limit: int = 200) -> str:
    """The beginning of an error answer as one line of text, for the log."""
    try:
        raw = response.raw.read(4096, decode_content=True)
    except Exception as error:  # noqa: BLE001 - the status tells the failure; this is only its comment
        return f"(its text could not be read: {type(error).__name__})"
    text = raw.decode("utf8", "replace")
    if "json" in response.headers.get("Content-Type", ""):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(text)["message"])
    else:
        text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.S | re.I)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + "…"


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a `Retry-After` header: a number or an HTTP date (RFC 9110 §10.2.3)."""
    if not value:
        return None
    if match := re.fullmatch(r"[ \t]*([0-9]{1,9})[ \t]*", value):
        return float(match[1])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    reference = datetime.fromtimestamp(time.time() if now is None else now, timezone.utc)
    return max(0.0, (when - reference).total_seconds())


def strong_etag(headers: Mapping[str, str]) -> str | None:
    """The ETag if it may be used with If-Range (RFC 9110 §13.1.5 allows strong ones only)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """Bytes that `Content-Length` announces, `None` if it is missing or no number."""
    text = headers.get("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]+", text) else None
