"""What `tests/kaggle.py` listens with: the two forms of Kaggle's API, and its storage."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import google_crc32c

if TYPE_CHECKING:
    from tests.kaggle import KaggleServer

_CALLS = {
    "GetModelInstance": "get",
    "ListModelInstanceVersionFiles": "files",
    "DownloadModelInstanceVersion": "download",
}


@dataclass
class Seen:
    """One request.

    Attributes:
        side: `api` or `storage`.
        what: of the API, `get`, `files` or `download`; of storage, the name of the file.
        signature: of a request to storage.
        authorization: the header, if there was one.
        status: of the answer.
    """

    side: str
    path: str
    what: str = ""
    range: str | None = None
    signature: str = ""
    authorization: str | None = None
    status: int = 0


@dataclass
class Stored:
    """An object of storage. Each fault holds until it is taken away.

    Attributes:
        faults: of `chunked` (no Content-Length), `no-ranges`, `no-hash`, `short` (half of the body, then
            the end), `flip` (one bit), `gzip` (stored compressed, given in full without ranges), `encoded`
            (given compressed), `elsewhere` (a range one byte later), `less` (half of it, and it says so),
            `trickle` (a byte now and then).
    """

    body: bytes
    faults: set[str] = field(default_factory=set)


class ApiError(Exception):
    """Answered as Kaggle does, with its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close joins them
    request_queue_size = 128

    def __init__(self, kaggle: KaggleServer, handler: type[Handler], port: int) -> None:
        self.kaggle = kaggle
        self._lock = threading.Lock()  # protects the set
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().close_request(request)

    def stop(self) -> None:
        """End all connections, also those that clients keep for later."""
        self.shutdown()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # the client was quicker
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.kaggle.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    side = ""
    timeout = 60
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass  # tests look at KaggleServer.seen

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.kaggle = self.server.kaggle
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen = Seen(self.side, urllib.parse.unquote(url.path), range=self.headers.get("Range"))
        self.seen.authorization = self.headers.get("Authorization")
        self.kaggle.note(self.seen)
        try:
            self.respond(self.seen.path)
        except OSError:
            self.close_connection = True  # the client went away, as clients do

    do_POST = do_GET

    def respond(self, path: str) -> None:
        raise NotImplementedError

    def give(self, status: int, headers: Mapping[str, str], pieces: Iterable[bytes]) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def give_body(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.give(status, {"Content-Type": kind, "Content-Length": str(len(body)), **headers}, [body])


class Api(Handler):
    side = "api"

    def respond(self, path: str) -> None:
        try:
            what, variation, arguments = self._call(path)
            self.seen.what = what
            answer = self.kaggle.answer(what, variation, arguments, self.seen.authorization)
        except ApiError as error:
            body = json.dumps({"code": error.status, "message": str(error)}).encode()
            self.give_body(error.status, "application/json; charset=utf-8", body)
            return
        if isinstance(answer, str):
            self.give_body(302, "text/html", b"", Location=answer)
        else:
            body = b""
            for change in self.kaggle.changes:
                body = change(answer) or body
            self.give_body(200, "application/json; charset=utf-8", body or json.dumps(answer).encode())

    def _call(self, path: str) -> tuple[str, str, dict[str, str]]:
        """What is asked for, of which variation, with what else: from either form."""
        call = re.fullmatch(r"/api/v1/models\.ModelApiService/(\w+)", path)
        if call and self.command == "POST":
            asked = json.loads(self.body)
            names = ("ownerSlug", "modelSlug", "framework", "instanceSlug")
            rest = {name: str(value) for name, value in asked.items() if name not in names}
            return _CALLS[call[1]], "/".join(asked[name] for name in names), rest
        rest_form = re.fullmatch(
            r"/api/v1/models/(?P<variation>[^/]+/[^/]+/[^/]+/[^/]+)(/(?P<version>\d+))?"
            r"/(?P<what>get|files|download)(/(?P<path>.+))?",
            path,
        )
        if not rest_form or self.command != "GET":
            raise ApiError(404, "Not found")
        arguments = {"versionNumber": rest_form["version"] or "", "path": rest_form["path"] or ""}
        arguments |= {
            "pageSize": self.query.get("page_size", ""),
            "pageToken": self.query.get("page_token", ""),
        }
        return rest_form["what"], rest_form["variation"], arguments


class Storage(Handler):
    side = "storage"

    def respond(self, path: str) -> None:
        name = path.removeprefix("/kaggle-models-data/")
        stored = self.kaggle.stored.get(name)
        self.seen.what = "/".join(name.split("/")[5:])
        self.seen.signature = self.query.get("X-Goog-Signature", "")
        if not self.kaggle.is_signed(self.seen.signature):
            self.refuse("ExpiredToken")
        elif self.seen.authorization is not None or stored is None:
            # A signed address and another login together are refused.
            self.give_body(
                400, "application/xml; charset=UTF-8", b"<Error><Code>InvalidRequest</Code></Error>"
            )
        else:
            self._give_object(stored)

    def refuse(self, code: str) -> None:
        body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>"
        self.give_body(400, "application/xml; charset=UTF-8", body.encode())

    def _give_object(self, stored: Stored) -> None:
        body, faults = stored.body, set(stored.faults)
        md5 = hashlib.md5(body).digest()
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{md5.hex()}"'}
        hashes = (google_crc32c.value(body).to_bytes(4, "big"), md5)
        if "gzip" in faults:
            # The checksums are then those of what is stored, not of what is given.
            headers["x-goog-stored-content-encoding"] = "gzip"
            hashes = (b"\1\2\3\4", bytes(16))
            faults |= {"chunked", "no-ranges"}
        if "no-hash" not in faults:
            crc32c, md5_text = (base64.b64encode(value).decode() for value in hashes)
            headers["x-goog-hash"] = f"crc32c={crc32c},md5={md5_text}"
        if "encoded" in faults:
            headers["Content-Encoding"] = "gzip"
        span, status = range(len(body)), 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.seen.range or "")
        if "no-ranges" not in faults:
            headers["Accept-Ranges"] = "bytes"
            if match:
                late = int("elsewhere" in faults)
                span = range(len(body))[int(match[1]) + late : int(match[2]) + 1 + late if match[2] else None]
                if "less" in faults:
                    span = span[: len(span) // 2]
                if not span:
                    self.give(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"}, [])
                    return
                headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(body)}"
                status = 206
        self._give_span(status, headers, body[span.start : span.stop], faults)

    def _give_span(self, status: int, headers: dict[str, str], part: bytes, faults: set[str]) -> None:
        if "flip" in faults and part:
            part = bytes([part[0] ^ 1]) + part[1:]
        whole = len(part)
        if "short" in faults:
            part = part[: whole // 2]
            self.close_connection = True
        if "chunked" in faults:
            ends = [b"0\r\n\r\n"] if "short" not in faults else []
            chunk = [b"%x\r\n" % len(part), part, b"\r\n"] if part else []
            self.give(status, {**headers, "Transfer-Encoding": "chunked"}, [*chunk, *ends])
        else:
            slow = (part[i : i + 1] for i in range(len(part)) if not self.kaggle.closing.wait(0.03))
            pieces = slow if "trickle" in faults else [part]
            self.give(status, {**headers, "Content-Length": str(whole)}, pieces)
