"""A hub for tests that fails as it is told to.

It speaks the hosting protocol for archives held in memory or in a file; listings it does not offer. It writes
down every request, and plays a script of faults (`tests/faults.py`) for each path. It shares no code with
`hubfs.serve`, so that neither hides the other's mistakes.

    with FaultHub() as hub:
        hub.add("google/model/1", make_archive(make_tree()))
        hub.fault("google/model/1", Fault.cut(1000), Fault.status(503, headers={"Retry-After": "1"}))
        ...
        assert [request.status for request in hub.body_requests("google/model/1")] == [200, 503, 206]
"""

from __future__ import annotations

import dataclasses
import fcntl
import socket
import socketserver
import ssl
import struct
import sys
import termios
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults import AUTO, Answer, Fault, Request, Resource, blocks, plain_answer

__all__ = ["Fault", "FaultHub", "Request"]

#: No fault holds a connection for longer, so that a broken test ends.
_LONGEST_WAIT = 60.0


class FaultHub:
    """A hub on 127.0.0.1 at a free port, running until `close` or the end of the `with` block.

    Args:
        tls: serve https with this context.

    Attributes:
        url: without a slash at the end.
        host: `127.0.0.1:<port>`.
        log: every request in the order of arrival.
        rate: bytes per second of one answer's body; None means no limit. May be set at any time.
        latency: seconds before the head of each answer. May be set at any time.
        busiest: the most connections that were open at a time.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.rate: float | None = None
        self.latency = 0.0
        self.busiest = 0
        self.log: list[Request] = []
        self.closing = threading.Event()
        self._changed = threading.Condition()  # protects log and everything below
        self._resources: dict[str, Resource] = {}
        self._redirects: dict[str, tuple[str, int]] = {}
        self._scripts: dict[str, list[Fault]] = {}
        self._server = _Server(self, tls)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="fault-hub", args=(0.02,))
        self._thread.start()

    def add(
        self,
        handle_path: str,
        body: bytes | Path,
        *,
        etag: str | None = AUTO,
        digests: bool = True,
        accept_ranges: bool = True,
        content_type: str = "application/gzip",
    ) -> None:
        """Serve `body` at this path.

        It is given for `?tf-hub-format=compressed`, and without that if the path is an archive's name.

        Args:
            handle_path: `google/model/1`.
            body: the archive, or the file that holds it.
            etag: with its quotes; by default the md5, as Google Cloud Storage does it; None for no ETag.
            digests: give `x-goog-hash`.
            accept_ranges: obey `Range`.
            content_type: of the archive.
        """
        resource = Resource.of(body, etag, digests, accept_ranges, content_type)
        with self._changed:
            self._resources[_normal(handle_path)] = resource

    def republish(self, handle_path: str, body: bytes | Path, etag: str | None = AUTO) -> Resource:
        """Give a path another body; everything else about it stays."""
        with self._changed:
            old = self._resources[_normal(handle_path)]
        digests, ranges, kind = bool(old.goog_hash), old.accept_ranges, old.content_type
        self.add(handle_path, body, etag=etag, digests=digests, accept_ranges=ranges, content_type=kind)
        with self._changed:
            return self._resources[_normal(handle_path)]

    def remove(self, handle_path: str) -> None:
        """Serve this path no longer."""
        with self._changed:
            del self._resources[_normal(handle_path)]

    def add_redirect(self, path: str, location: str, status: int = 302) -> None:
        """Answer every request of a path with a redirect. Its faults come first."""
        with self._changed:
            self._redirects[_normal(path)] = (location, status)

    def fault(self, handle_path: str, *faults: Fault) -> None:
        """Append to the script of a path.

        A request for an archive takes the first entry that is for its kind of request (body or probe), one
        for a listing the first that is for those. The path need not be served.
        """
        with self._changed:
            self._scripts.setdefault(_normal(handle_path), []).extend(faults)

    def clear_faults(self) -> None:
        """Forget the scripts of all paths."""
        with self._changed:
            self._scripts.clear()

    def requests(self, handle_path: str | None = None) -> list[Request]:
        """The requests of a path, or all."""
        with self._changed:
            return [
                request for request in self.log if handle_path is None or request.path == _normal(handle_path)
            ]

    def body_requests(self, handle_path: str | None = None) -> list[Request]:
        """The requests for an archive that were not probes."""
        return [
            request
            for request in self.requests(handle_path)
            if request.wants_archive and not request.is_probe
        ]

    def archive_requests(self, handle_path: str | None = None) -> list[Request]:
        """The requests for an archive, probes and others; not those that ask whether there is a listing."""
        return [request for request in self.requests(handle_path) if request.wants_archive]

    def answering(self) -> list[Request]:
        """The requests that are not answered to the end."""
        with self._changed:
            return [request for request in self.log if not request.done.is_set()]

    def wait_for(
        self, condition: Callable[[FaultHub], object], timeout: float = 10.0, *, what: str = "requests"
    ) -> None:
        """Wait until `condition(hub)` holds; it is looked at whenever a request arrives, moves on or ends."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout), f"waited in vain for {what}"

    def clear_log(self) -> None:
        with self._changed:
            self.log.clear()

    def close(self) -> None:
        """Release every fault, close all connections and wait for their threads.

        Raises:
            AssertionError: the hub itself failed.
        """
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()
        assert not self._server.errors, f"the hub itself failed: {self._server.errors}"

    def __enter__(self) -> FaultHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _arrived(self, request: Request) -> Answer:
        with self._changed:
            self.log.append(request)
            self._changed.notify_all()
            answer = Answer(request.path, self, self._resources.get(request.path))
            fault = self._take_fault(request)
            if request.path in self._redirects:
                location, status = self._redirects[request.path]
                answer.plain = (status, b"", {"Location": location})
        if fault is not None:
            request.fault = fault.kind
            fault.act(answer)
        if answer.plain is None and not answer.drop:
            answer.plain = plain_answer(request, answer.resource)
        return answer

    def _take_fault(self, request: Request) -> Fault | None:
        script = self._scripts.get(request.path, [])
        for i, fault in enumerate(script):
            if request.takes(fault):
                if fault.times is not None:
                    rest = dataclasses.replace(fault, times=fault.times - 1)
                    script[i : i + 1] = [rest] if rest.times else []
                return fault
        return None

    def _note(
        self, request: Request, *, status: int | None = None, sent: int = 0, done: bool = False
    ) -> None:
        with self._changed:
            request.status = request.status if status is None else status
            request.bytes_sent += sent
            if done:
                request.done.set()
            self._changed.notify_all()

    def _wait(self, event: threading.Event, longest: float = _LONGEST_WAIT) -> None:
        end = time.monotonic() + longest
        while not event.is_set() and not self.closing.wait(0.01) and time.monotonic() < end:
            pass
        self._check_open()

    def _check_open(self) -> None:
        if self.closing.is_set():
            raise ConnectionAbortedError("the hub is closed")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = False  # so that server_close joins them
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, hub: FaultHub, tls: ssl.SSLContext | None) -> None:
        self.hub = hub
        self.errors: list[BaseException] = []
        self.without_fin: set[socket.socket] = set()
        self._lock = threading.Lock()  # protects the two sets
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            # The handshake is the handler's, in its own thread.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
            self.hub.busiest = max(self.hub.busiest, len(self._connections))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            without_fin = request in self.without_fin
            self.without_fin.discard(request)
        if without_fin:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().close_request(request)

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                try:
                    # Not SSLSocket's own method, which takes the TLS state from under the handler's feet.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    continue  # the client was quicker

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()

    def log_message(self, format: str, *args: Any) -> None:
        pass  # tests look at FaultHub.log

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(
            method=self.command,
            path=_normal(urllib.parse.unquote(path)),
            query=dict(urllib.parse.parse_qsl(query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in self.headers.items()},
            range=self.headers.get("Range"),
        )
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        try:
            self._give(request, self.hub._arrived(request))
        except OSError:
            self.close_connection = True  # the client went away, as clients do
        finally:
            self.hub._note(request, done=True)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _give(self, request: Request, answer: Answer) -> None:
        if answer.hold is not None:
            self.hub._wait(answer.hold)
        self.hub.closing.wait(self.hub.latency)
        self.hub._check_open()
        if answer.drop:
            self.close_connection = True
        elif answer.plain is not None:
            status, body, headers = answer.plain
            self._head(request, status, {"Content-Length": str(len(body)), **headers})
            if self.command != "HEAD":
                self._send(request, body)
        else:
            assert answer.resource is not None
            self._give_resource(request, answer, answer.resource)

    def _give_resource(self, request: Request, answer: Answer, resource: Resource) -> None:
        size = resource.size if answer.size is None else min(answer.size, resource.size)
        headers = resource.headers()
        span = answer.asked(request, resource, size)
        if span is not None and not span:
            self._head(request, 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            return
        if span is not None:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        status, span = (200, range(size)) if span is None else (206, span)
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(span) + answer.length_error)
        if answer.length_error:
            self.close_connection = True
        self._head(request, status, headers)
        if self.command != "HEAD":
            self._send_body(request, answer, resource.body, span)

    def _head(self, request: Request, status: int, headers: Mapping[str, str]) -> None:
        self.hub._note(request, status=status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, request: Request, answer: Answer, body: bytes | Path, span: range) -> None:
        stop = len(span) if answer.stop_after is None else min(answer.stop_after, len(span))
        marks = [stop] if answer.stall is None else [min(answer.stall[0], stop), stop]
        rate = self.hub.rate
        # With a limit, small enough for about fifty steps a second.
        size = max(1, min(answer.chunk, int(rate / 50))) if rate else answer.chunk
        started, sent = time.monotonic(), 0
        for number, mark in enumerate(marks):
            for block in blocks(body, span.start + sent, span.start + mark, size):
                data = answer.flipped(block, span.start + sent)
                self._send(request, data, chunked=answer.chunked)
                sent += len(data)
                late = started + sent / rate - time.monotonic() if rate else 0.0
                self.hub.closing.wait(max(answer.interval, late))
                self.hub._check_open()
            if answer.stall is not None and number == 0:
                self.hub._wait(answer.stall[1])
        if answer.stop_after is not None:
            self.close_connection = True
            if answer.reset:
                self._reset()
        elif answer.chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def _send(self, request: Request, data: bytes | memoryview, *, chunked: bool = False) -> None:
        if chunked and data:
            self.connection.sendall(b"%x\r\n" % len(data))
        left = memoryview(data)
        while left:
            # Counted before and put right afterwards: a client that has the bytes finds them in the log.
            self.hub._note(request, sent=len(left))
            count = 0
            try:
                count = self.connection.send(left)
            finally:
                self.hub._note(request, sent=count - len(left))
            left = left[count:]
        if chunked and data:
            self.connection.sendall(b"\r\n")

    def _reset(self) -> None:
        # RST throws away what the client's kernel has not got yet, so first see it delivered.
        end = time.monotonic() + 2.0
        while time.monotonic() < end and not self.hub.closing.wait(0.002):
            if fcntl.ioctl(self.connection, termios.TIOCOUTQ, b"\0\0\0\0") == b"\0\0\0\0":
                break
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with self.server._lock:
            self.server.without_fin.add(self.connection)


def _normal(path: str) -> str:
    return path.strip("/")
