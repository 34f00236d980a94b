"""How `tests/google.py` is asked and answers: HTTP, as it is or behind CONNECT, parts of objects, errors."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

from hubfs.serve.conditions import wanted_part

if TYPE_CHECKING:
    from tests.google import Blob, StorageServer

#: The names that the certificate is for; nobody may connect to others.
HOSTS = ("www.googleapis.com", "storage.googleapis.com", "oauth2.googleapis.com")
#: Bytes of one request's body.
_MAX_BODY = 1 << 30


class PreconditionError(Exception):
    """The object is of another generation than the request asks for."""


class ApiError(Exception):
    """Answered with a status and the words of the API that was asked."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Seen:
    """One request.

    Attributes:
        api: `json`, `xml`, or `connect` for a way through the proxy.
        target: path and query as they came; host and port of a CONNECT.
        bytes_sent: of the body.
    """

    api: str
    method: str
    host: str
    target: str
    range: str | None
    status: int = 0
    bytes_sent: int = 0


class Exchange(BaseHTTPRequestHandler):
    """Requests and answers, whatever they are about."""

    server: StorageServer
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float | None] = 60
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass  # tests look at Google.seen

    def do_GET(self) -> None:
        # The request line as it came: http.server folds the slashes at the beginning of `self.path`.
        target = self.requestline.split()[1]
        self._path, _, query = target.partition("?")
        self._query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        parts = [urllib.parse.unquote(part) for part in self._path.split("/")[1:]]
        is_json = parts[:2] == ["storage", "v1"] or parts[:3] == ["upload", "storage", "v1"]
        host = self.headers.get("Host", "")
        self._seen = Seen("json" if is_json else "xml", self.command, host, target, self.headers.get("Range"))
        self.server.note(self._seen)
        try:
            self._body = self._read_body()
            if is_json:
                self.answer_json(parts)
            else:
                self.answer_xml(parts[0], "/".join(parts[1:]))
        except PreconditionError as error:
            self._say_error(ApiError(412, str(error)))
        except ApiError as error:
            self._say_error(error)
        except OSError:
            self.close_connection = True  # the client went away, as clients do

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer_json(self, parts: list[str]) -> None:
        """Answer a request to the JSON API, whose path has these parts."""
        raise NotImplementedError

    def answer_xml(self, bucket: str, name: str) -> None:
        """Answer a request to the XML API; without a name it is about the whole bucket."""
        raise NotImplementedError

    def do_CONNECT(self) -> None:
        """Be Google for the rest of the connection."""
        target = self.requestline.split()[1]
        host, _, port = target.partition(":")
        seen = Seen("connect", "CONNECT", host, target, None, 200)
        if self.server.tls is None or host not in HOSTS or port != "443":
            seen.status = 403
            self.close_connection = True
        self.server.note(seen)
        self.send_response(seen.status)
        self.end_headers()
        if self.server.tls is None or seen.status != 200:
            return
        self.close_connection = True  # until the handshake is over
        plain = self.connection
        self.connection = self.server.tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self.server.opened(self.connection)
        self.connection.do_handshake()
        self.rfile = self.connection.makefile("rb", self.rbufsize)
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def finish(self) -> None:
        super().finish()
        if self.connection is not self.request:
            self.server.shutdown_request(self.connection)

    def _object(self, bucket: str, name: str) -> Blob:
        blob = self.server.storage.get(bucket, name)
        if blob is None or self._query.get("generation", str(blob.generation)) != str(blob.generation):
            raise ApiError(404, f"No such object: {bucket}/{name}")
        wanted = self._wanted_generation()
        if wanted is not None and self.command in ("GET", "HEAD") and wanted != blob.generation:
            raise PreconditionError(f"its generation is {blob.generation}")
        return blob

    def _delete(self, bucket: str, name: str) -> None:
        if not self.server.storage.delete(bucket, name, self._wanted_generation()):
            raise ApiError(404, f"No such object: {bucket}/{name}")
        self._say(204, b"")

    def _wanted_generation(self) -> int | None:
        found = self.headers.get("x-goog-if-generation-match") or self._query.get("ifGenerationMatch")
        return None if found is None else int(found)

    def _send_object(self, blob: Blob) -> None:
        part = wanted_part(self.command, self.headers, blob.size, blob.etag)
        if part.status == 412:
            raise PreconditionError("it has another ETag")
        if part.status == 416:
            raise ApiError(416, "out of range", Content_Range=f"bytes */{blob.size}")
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": blob.etag,
            "Last-Modified": self.date_time_string(int(blob.modified)),
            "x-goog-generation": str(blob.generation),
            "x-goog-hash": f"md5={base64.b64encode(bytes.fromhex(blob.md5)).decode()}",
        }
        if part.status == 206:
            headers["Content-Range"] = f"bytes {part.span.start}-{part.span.stop - 1}/{blob.size}"
        if part.status != 304:
            headers["Content-Length"] = str(len(part.span))
        self._head(part.status, headers)
        if self.command != "HEAD" and part.span:
            self.send_body(blob.body, part.span)

    def send_body(self, body: bytes | Path, span: range) -> None:
        """Send a part of an object."""
        for block in pieces(body, span.start, span.stop):
            self._seen.bytes_sent += len(block)
            self.connection.sendall(block)

    def _read_body(self) -> bytes:
        # TensorFlow sends both headers, and then means the chunks; without a body it says `identity`.
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,10}", length):
            self.close_connection = True
            raise ApiError(411, "Length Required")
        return self._read(int(length))

    def _chunks(self) -> Iterator[bytes]:
        total = 0
        while length := int(self.rfile.readline(100).partition(b";")[0], 16):
            total += length
            yield self._read(length, total)
            self.rfile.readline(100)
        while self.rfile.readline(1000).strip():
            pass  # trailers

    def _read(self, length: int, total: int = 0) -> bytes:
        if max(length, total) > _MAX_BODY:
            self.close_connection = True
            raise ApiError(413, "Payload Too Large")
        found = self.rfile.read(length)
        if len(found) != length:
            raise ConnectionAbortedError("the client went away")
        return found

    def _say_error(self, error: ApiError) -> None:
        if self._seen.api == "json":
            body = json.dumps({"error": {"code": error.status, "message": str(error)}}).encode()
            kind = "application/json"
        else:
            body = ElementTree.tostring(element("Error", Code=f"Status{error.status}", Message=error))
            kind = "application/xml"
        self._say(error.status, body, {"Content-Type": kind, **error.headers})

    def _say_json(self, found: Mapping[str, Any]) -> None:
        self._say(200, json.dumps(found).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _say(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        length = {} if status == 204 else {"Content-Length": str(len(body))}
        self._head(status, {**(headers or {}), **length})
        if self.command != "HEAD":
            self._seen.bytes_sent += len(body)
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self._seen.status = int(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def pieces(body: bytes | Path, start: int, stop: int, size: int = 1 << 20) -> Iterator[Any]:
    """A part of a body, in blocks."""
    if isinstance(body, bytes):
        view = memoryview(body)[start:stop]
        yield from (view[at : at + size] for at in range(0, len(view), size))
        return
    with body.open("rb") as file:
        file.seek(start)
        while block := file.read(min(size, stop - file.tell())):
            yield block


def element(tag: str, **fields: object) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    for name, value in fields.items():
        ElementTree.SubElement(element, name).text = str(value)
    return element
