"""Taking an answer's bytes from a connection, with and without TLS, through all of requests and urllib3."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trustme
import urllib3

from hubfs.config import Settings
from hubfs.net import Net
from hubfs.wire import take_into

KiB = 1 << 10
BODY = random.Random(9).randbytes(200 * KiB)
ROOM = 256 * KiB


class Server:
    """Sends what its `script` sends for each request, over connections that it counts."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.script: Callable[[BaseHTTPRequestHandler], None] = whole
        self.connections = 0
        self._open: list[socket.socket] = []
        self.sent = threading.Event()
        self.go_on = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                outer._open.append(self.request)
                super().setup()

            def do_GET(self) -> None:
                outer.script(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # `server_close` waits for them
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://localhost:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._thread.join()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


def head(to: BaseHTTPRequestHandler, **headers: object) -> None:
    to.send_response(200)
    for name, value in headers.items():
        to.send_header(name.replace("_", "-"), str(value))
    to.end_headers()


def whole(to: BaseHTTPRequestHandler) -> None:
    head(to, Content_Length=len(BODY))
    to.wfile.write(BODY)


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    context = None
    if request.param == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("localhost").configure_cert(context)
    server = Server(context)
    yield server
    server.close()


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net(Settings(verify_certificates=False))
    yield net
    net.close()


def take_all(raw: Any) -> bytes:
    room, found = memoryview(bytearray(ROOM)), b""
    while count := take_into(raw, room):
        found += room[:count]
    return found


def test_answer_is_whole_and_its_connection_is_used_again(server: Server, net: Net) -> None:
    for _ in range(3):
        with net.get(server.url, "h") as response:
            assert take_all(response.raw) == BODY
    assert server.connections == 1


def test_small_rooms_and_the_usual_way_beside_it(server: Server, net: Net) -> None:
    with net.get(server.url, "h") as response:
        room, found = memoryview(bytearray(1000)), b""
        for turn in range(300):
            if turn % 2:
                found += room[: take_into(response.raw, room)]
            else:
                found += response.raw.read1(1000, decode_content=False)
        assert BODY.startswith(found)
        found += response.raw.read(decode_content=False)
    assert found == BODY


def test_answer_in_chunks_of_unknown_length(server: Server, net: Net) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        head(to, Transfer_Encoding="chunked")
        for at in range(0, len(BODY), 7000):
            part = BODY[at : at + 7000]
            to.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        to.wfile.write(b"0\r\n\r\n")

    server.script = script
    for _ in range(2):
        with net.get(server.url, "h") as response:
            assert take_all(response.raw) == BODY
    assert server.connections == 1


def test_answer_up_to_the_end_of_the_connection(server: Server, net: Net) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        head(to, Connection="close")
        to.wfile.write(BODY)

    server.script = script
    with net.get(server.url, "h") as response:
        assert take_all(response.raw) == BODY


def test_answer_of_nothing(server: Server, net: Net) -> None:
    server.script = lambda to: head(to, Content_Length=0)
    with net.get(server.url, "h") as response:
        assert take_all(response.raw) == b""


@pytest.mark.parametrize("how", ["take_into", "read1"])
@pytest.mark.parametrize("server", ["tls"], indirect=True)
def test_many_records_of_tls_are_taken_at_once(server: Server, net: Net, how: str) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        whole(to)
        server.sent.set()

    server.script = script
    with net.get(server.url, "h") as response:
        assert server.sent.wait(20)
        if how == "read1":
            assert response.raw.read1(ROOM, decode_content=False) == BODY
        else:
            room = memoryview(bytearray(ROOM))
            assert take_into(response.raw, room) == len(BODY)
            assert room[: len(BODY)] == BODY


def test_what_has_come_is_not_held_back(server: Server, net: Net) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        head(to, Content_Length=len(BODY))
        to.wfile.write(BODY[: 40 * KiB])
        server.go_on.wait(20)
        to.wfile.write(BODY[40 * KiB :])

    server.script = script
    room, found = memoryview(bytearray(ROOM)), b""
    with net.get(server.url, "h") as response:
        while len(found) < 40 * KiB:
            found += room[: take_into(response.raw, room)]
        assert not server.go_on.is_set()
        server.go_on.set()
        found += take_all(response.raw)
    assert found == BODY


def test_timeout_holds_after_all_that_had_come_was_taken(server: Server) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        head(to, Content_Length=len(BODY))
        to.wfile.write(BODY[: 40 * KiB])
        server.go_on.wait(20)

    server.script = script
    net = Net(Settings(verify_certificates=False, stall_timeout=0.2))
    room, came = memoryview(bytearray(ROOM)), 0
    with net.get(server.url, "h") as response:
        while came < 40 * KiB:
            came += take_into(response.raw, room)
        with pytest.raises((OSError, urllib3.exceptions.HTTPError)):
            take_into(response.raw, room)
    net.close()


def test_broken_connection_is_told_after_what_came(server: Server, net: Net) -> None:
    def script(to: BaseHTTPRequestHandler) -> None:
        head(to, Content_Length=len(BODY))
        to.wfile.write(BODY[: 40 * KiB])
        to.connection.shutdown(socket.SHUT_RDWR)
        to.close_connection = True

    server.script = script
    room, found = memoryview(bytearray(ROOM)), b""
    with net.get(server.url, "h") as response:
        with pytest.raises((OSError, urllib3.exceptions.HTTPError)):
            while count := take_into(response.raw, room):
                found += room[:count]
        assert found == BODY[: 40 * KiB]
    server.script = whole
    with net.get(server.url, "h") as response:
        assert take_all(response.raw) == BODY
    assert server.connections == 2
