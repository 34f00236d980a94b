"""A local hub: listens, holds its connections, and ends them."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from hubfs.errors import ConfigError, HubfsError
from hubfs.serve import gcs
from hubfs.serve.catalog import Catalog
from hubfs.serve.handler import Handler, RequestRecord
from hubfs.serve.objects import Objects

LOG = logging.getLogger("hubfs.serve")

#: Connections at one time. Each holds a thread; a client opens a handful, so this is for many machines.
_MAX_CONNECTIONS = 512


class LocalHub:
    """A hub that serves the models below a directory until it is stopped.

    It listens as soon as it is made, and answers once it is started.

    Args:
        root: the tree `<publisher>/<model…>/<version>/…`.
        host: address to listen on.
        port: port to listen on, 0 for any free one.
        archive_dir: where archives are kept; by default below `$XDG_CACHE_HOME/hubfs/serve`.
        bucket: the name of the bucket that has the models' files. No publisher may have this name.
        on_request: called after each answer, from the thread that gave it.

    Attributes:
        url: `http://<host>:<port>`, what a client takes for the hub.
        catalog: the models that are served.
        bucket: that has their files.

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
        bucket: str = gcs.BUCKET,
        on_request: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.catalog = Catalog(root, archive_dir)
        if not gcs.is_bucket_name(bucket):
            raise ConfigError(f"{bucket!r} is not the name of a bucket", hint="such as my-models")
        if (self.catalog.root / bucket).exists():
            raise ConfigError(f"{bucket} is a publisher's name already", hint="give the bucket another one")
        self.bucket = bucket
        self._server = _listen(host, port, self.catalog, bucket, on_request)
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
    host: str, port: int, catalog: Catalog, bucket: str, on_request: Callable[[RequestRecord], None] | None
) -> Server:
    try:
        return Server(host, port, catalog, bucket, on_request)
    except OverflowError as error:
        raise ConfigError(f"port {port} is not a port", hint="give one from 0 to 65535") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HubfsError(
                f"port {port} of {host} is in use", hint="choose another with --port, or 0 for any free one"
            ) from error
        raise HubfsError(f"cannot listen on {host}, port {port}: {error.strerror}") from error


class Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = False  # so that server_close joins them
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        catalog: Catalog,
        bucket: str,
        on_request: Callable[[RequestRecord], None] | None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.catalog = catalog
        self.objects = Objects(catalog)
        self.bucket = bucket
        self.on_request = on_request
        self._lock = threading.Lock()  # protects _connections
        self._connections: set[socket.socket] = set()
        super().__init__((host, port), Handler)

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
