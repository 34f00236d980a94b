"""A server that gives prepared answers: as a hub that says odd things, and as a proxy that leads to it.

with AnswerServer() as server:
    server.answers["/google/m/1?tf-hub-format=uncompressed"] = Answer(303, b"gs://bucket/m")
    ...
    assert [seen.target for seen in server.seen] == [...]
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
import trustme


@dataclass(frozen=True)
class Answer:
    """Status, body and headers; `Content-Length` is the body's unless the headers have another, or ""."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """One request: where it was sent to, as `Host` has it, and for what."""

    host: str
    target: str
    range: str | None


class AnswerServer:
    """Running until the end of the `with` block. What it has no answer for is 404.

    Args:
        tls: the whole server speaks TLS with this, or what comes after a CONNECT does.
        as_proxy: it is asked for CONNECT first. All hosts are this server.

    Attributes:
        answers: by the request's target.
        upstream: URL of a server that gives the answers for other targets.
        connects: what CONNECT named.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, *, as_proxy: bool = False) -> None:
        self.answers: dict[str, Answer] = {}
        self.upstream: str | None = None
        self.seen: list[Seen] = []
        self.connects: list[str] = []
        self._tls = tls
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append(Seen(self.headers["Host"], self.path, self.headers.get("Range")))
                with contextlib.suppress(OSError):  # the client went away, as clients do
                    outer._give(self)

            def do_CONNECT(self) -> None:
                outer.connects.append(self.path)
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                self.close_connection = True
                assert tls is not None
                with contextlib.suppress(OSError), tls.wrap_socket(self.connection, server_side=True) as end:
                    Handler(end, self.client_address, self.server)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        if tls is not None and not as_proxy:
            # The handshake is the handler's, in its own thread.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "https" if tls is not None and not as_proxy else "http"
        self.host = f"localhost:{self._server.server_port}"
        self.url = f"{scheme}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def _give(self, to: BaseHTTPRequestHandler) -> None:
        answer = self.answers.get(to.path)
        if answer is None and self.upstream is not None:
            headers = {
                name: value for name, value in to.headers.items() if name.lower() in ("range", "if-match")
            }
            there = requests.get(
                f"{self.upstream}{to.path}", headers=headers, timeout=20, allow_redirects=False
            )
            answer = Answer(there.status_code, there.content, dict(there.headers))
        answer = answer or Answer(404, b"no such thing")
        to.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            if value and name not in ("Server", "Date", "Connection"):
                to.send_header(name, value)
        to.end_headers()
        to.wfile.write(answer.body)

    def __enter__(self) -> AnswerServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def own_authority(directory: Path, *hosts: str) -> tuple[ssl.SSLContext, Path]:
    """What a server needs to be one of these hosts, and the file with the authority that says so."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*hosts).configure_cert(context)
    path = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return context, path
