"""A local hub over HTTP: TensorFlow Hub's hosting protocol, with what a resuming client needs.

`GET /<publisher>/<model…>[/<version>]?tf-hub-format=compressed` answers the version's archive, and so does
`GET /<publisher>/<model…>[/<version>].tar.gz`. Ranges and conditional requests follow RFC 9110, checksums are
given as Google Cloud Storage gives them.
"""

from __future__ import annotations

import base64
import errno
import html
import logging
import re
import socket
import socketserver
import sys
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hubfs.errors import ConfigError, HubfsError, NotFoundError, StoppedError, UnavailableError
from hubfs.serve.catalog import Archive, Catalog, Version

LOG = logging.getLogger("hubfs.serve")

#: Connections at one time. Each holds a thread; a client opens a handful, so this is for many machines.
_MAX_CONNECTIONS = 512
#: Seconds after which an idle connection, or one whose client takes no bytes, is closed.
_IDLE_SECONDS = 60
#: A refused request's body up to this size is read, so that closing does not reset the answer away.
_MAX_DISCARD = 1 << 20
_ARCHIVE_SUFFIX = ".tar.gz"


@dataclass(frozen=True)
class RequestRecord:
    """One answered request.

    Attributes:
        method: `GET`, `HEAD`, or whatever was refused.
        path: the request target, with its query.
        status: of the answer; 0 if the hub was stopped before there was one.
        bytes_sent: of the body; fewer than announced if the client went away.
        range: the `Range` header, if there was one.
    """

    method: str
    path: str
    status: int
    bytes_sent: int
    range: str | None


class LocalHub:
    """A hub that serves the models below a directory until it is stopped.

    It listens as soon as it is made, and answers once it is started.

    Args:
        root: the tree `<publisher>/<model…>/<version>/…`.
        host: address to listen on.
        port: port to listen on, 0 for any free one.
        archive_dir: where archives are kept; by default below `$XDG_CACHE_HOME/hubfs/serve`.
        on_request: called after each answer, from the thread that gave it.

    Attributes:
        url: `http://<host>:<port>`, what a client takes for the hub.
        catalog: the models that are served.

    Raises:
        ConfigError: a directory, the address or the port makes no sense.
        HubfsError: the address cannot be listened on.
    """

    def __init__(
        self,
        root: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        archive_dir: Path | None = None,
        on_request: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.catalog = Catalog(root, archive_dir)
        self._server = _listen(host, port, self.catalog, on_request)
        reachable = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        name = f"[{reachable}]" if ":" in reachable else reachable
        self.url = f"http://{name}:{self._server.server_address[1]}"
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve in a thread. Starting twice is the same as once."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._server.serve_forever, name="hubfs-serve", args=(0.1,)
            )
            self._thread.start()
            LOG.info("serving %s at %s", self.catalog.root, self.url)

    def stop(self) -> None:
        """Close all connections and wait for their threads. Stopping twice is the same as once."""
        self.catalog.close()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    def serve_forever(self) -> None:
        """Serve until `stop` is called, by another thread or a signal handler, or an exception arrives."""
        self.start()
        assert self._thread is not None
        self._thread.join()

    def __enter__(self) -> LocalHub:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _listen(
    host: str, port: int, catalog: Catalog, on_request: Callable[[RequestRecord], None] | None
) -> _Server:
    try:
        return _Server(host, port, catalog, on_request)
    except OverflowError as error:
        raise ConfigError(f"port {port} is not a port", hint="give one from 0 to 65535") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HubfsError(
                f"port {port} of {host} is in use", hint="choose another with --port, or 0 for any free one"
            ) from error
        raise HubfsError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = False  # so that server_close joins them
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, catalog: Catalog, on_request: Callable[[RequestRecord], None] | None
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.catalog = catalog
        self.on_request = on_request
        self._lock = threading.Lock()  # protects _connections
        self._connections: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up in the DNS, which may take long and is not used.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._connections) >= _MAX_CONNECTIONS
            if not full:
                self._connections.add(request)
        if not full:
            super().process_request(request, client_address)
            return
        LOG.warning("%d connections are open, another one was refused", _MAX_CONNECTIONS)
        request.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().close_request(request)

    def close_connections(self) -> None:
        """Wake every thread that waits for its client."""
        with self._lock:
            connections = list(self._connections)
            for connection in connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError as error:
                    LOG.debug("a connection was closed already: %s", error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            LOG.debug("%s went away: %s", client_address, error)
        else:
            LOG.error("a request of %s failed", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True

    def version_string(self) -> str:
        return "hubfs"

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug("%s %s", self.address_string(), format % args)

    def do_GET(self) -> None:
        self._serve(self._answer)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._serve(self._refuse)

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _serve(self, answer: Callable[[], None]) -> None:
        self._status = self._sent = 0
        # The request line as it came: http.server folds the slashes at the beginning of `self.path`.
        self._target = self.requestline.split()[1]
        try:
            self._discard_body()
            answer()
        except StoppedError:
            self.close_connection = True
        except NotFoundError as error:
            self._say(HTTPStatus.NOT_FOUND, str(error))
        except UnavailableError as error:
            self._say(
                HTTPStatus.SERVICE_UNAVAILABLE, str(error), {"Retry-After": f"{error.retry_after or 1:.0f}"}
            )
        except HubfsError as error:
            LOG.error("%s", error)
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except OSError as error:
            LOG.debug("%s went away: %s", self.address_string(), error)
            self.close_connection = True
        finally:
            if self.server.on_request is not None:
                self.server.on_request(
                    RequestRecord(
                        self.command, self._target, self._status, self._sent, self.headers.get("Range")
                    )
                )

    def _discard_body(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if length != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        if re.fullmatch("[0-9]{1,9}", length):
            self.rfile.read(min(int(length), _MAX_DISCARD))

    def _refuse(self) -> None:
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "this hub is read-only", {"Allow": "GET, HEAD"})

    def _answer(self) -> None:
        path, _, query = self._target.partition("?")
        # One slash at each end at most: a doubled one makes a path that `Catalog.find` refuses.
        handle = urllib.parse.unquote(path.removeprefix("/").removesuffix("/"), errors="surrogateescape")
        if not path.startswith("/"):
            raise NotFoundError(f"{path!r} is not a path of this hub")
        if path == "/":
            handles = [version.handle for version in self.server.catalog.models()]
            self._say(HTTPStatus.OK, "\n".join(["models of this hub:", *handles]))
            return
        formats = urllib.parse.parse_qs(query, keep_blank_values=True).get("tf-hub-format")
        if formats is None and handle.endswith(_ARCHIVE_SUFFIX):
            handle, formats = handle.removesuffix(_ARCHIVE_SUFFIX), ["compressed"]
        version = self.server.catalog.find(handle)
        if formats is None:
            self._send_page(version)
        elif formats[-1] == "compressed":
            archive, file = self.server.catalog.open_archive(version)
            with file:
                self._send_archive(archive, file)
        else:
            raise NotFoundError(
                f"{handle}: the format {formats[-1]!r} is not offered",
                hint="ask for tf-hub-format=compressed",
            )

    def _send_page(self, version: Version) -> None:
        host, port = self.connection.getsockname()[:2]
        address = self.headers.get("Host") or f"{host}:{port}"
        url = f"http://{address}/{urllib.parse.quote(version.handle, errors='surrogateescape')}"
        page = (
            f"<!DOCTYPE html><title>{html.escape(version.handle)}</title>"
            f"<h1>{html.escape(version.model)}, version {version.number}</h1>"
            f"<p>Download it: <code>{html.escape(url)}?tf-hub-format=compressed</code></p>"
            f"<p>Load it: <code>hub.load({html.escape(repr(url))})</code></p>\n"
        )
        self._say(HTTPStatus.OK, page, kind="text/html")

    def _send_archive(self, archive: Archive, file: BinaryIO) -> None:
        etag = f'"{archive.md5}"'
        date = self.date_time_string(archive.modified)
        md5 = base64.b64encode(bytes.fromhex(archive.md5)).decode()
        headers = {
            "ETag": etag,
            "Last-Modified": date,
            "Accept-Ranges": "bytes",
            "x-goog-hash": f"crc32c={archive.crc32c},md5={md5}",
        }
        if _any_matches(self.headers.get("If-None-Match"), etag):
            self._send_head(HTTPStatus.NOT_MODIFIED, headers)
            return
        headers["Content-Type"] = "application/gzip"
        asked = self.headers.get("Range")
        if self.command == "HEAD" or self.headers.get("If-Range", etag) not in (etag, date):
            asked = None
        span = _parse_range(asked, archive.size)
        if span is None:
            self._send_head(HTTPStatus.OK, headers | {"Content-Length": str(archive.size)})
            self._send_file(file, 0, archive.size)
        elif not span:
            headers = {"Content-Range": f"bytes */{archive.size}"}
            self._say(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"there are {archive.size} bytes", headers)
        else:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{archive.size}"
            self._send_head(HTTPStatus.PARTIAL_CONTENT, headers | {"Content-Length": str(len(span))})
            self._send_file(file, span.start, len(span))

    def _send_file(self, file: BinaryIO, start: int, count: int) -> None:
        if self.command == "HEAD":
            return
        file.seek(start)
        try:
            self.connection.sendfile(file, start, count)
        finally:
            # sendfile leaves the file where it stopped, even if it failed.
            self._sent = file.tell() - start
            if self._sent != count:
                self.close_connection = True

    def _say(
        self,
        status: HTTPStatus,
        text: str,
        headers: dict[str, str] | None = None,
        *,
        kind: str = "text/plain",
    ) -> None:
        body = f"{text}\n".encode(errors="backslashreplace")
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        self._send_head(status, {**own, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)
            self._sent = len(body)

    def _send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self._status = status.value
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def _any_matches(condition: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names the ETag; weak ones count as well (RFC 9110, 13.1.2)."""
    if condition is None:
        return False
    return condition.strip() == "*" or etag in re.findall('"[^"]*"', condition)


def _parse_range(header: str | None, size: int) -> range | None:
    """The bytes asked for; `None` stands for all of them, an empty range for one that cannot be satisfied.

    A header of several ranges, or one that is not understood, asks for all (RFC 9110, 14.2).
    """
    match = re.fullmatch(r"bytes=\s*([0-9]{0,19})-([0-9]{0,19})\s*", header or "", re.IGNORECASE)
    if match is None or match[0].strip() == "bytes=-":
        return None
    if not match[1]:
        return range(max(0, size - int(match[2])), size)
    first, last = int(match[1]), int(match[2] or size)
    if match[2] and last < first:
        return None
    return range(first, min(last + 1, size))
