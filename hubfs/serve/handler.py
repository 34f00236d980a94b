"""One request to a local hub: TensorFlow Hub's hosting protocol, with what a resuming client needs.

`GET /<publisher>/<model…>[/<version>]?tf-hub-format=compressed` answers the version's archive, and so does
`GET /<publisher>/<model…>[/<version>].tar.gz`. Ranges and conditional requests follow RFC 9110, checksums are
given as Google Cloud Storage gives them.

`?tf-hub-format=uncompressed` answers where the version's files are one by one: in a bucket that is served
here too, below `/<bucket>`. `X-Hubfs-Storage` says so to hubfs; other clients are led here by
`STORAGE_EMULATOR_HOST` or the like.

`?lite-format=tflite` leads to the only `.tflite` file of a version, `?tfjs-format=compressed` to its archive.
"""

from __future__ import annotations

import base64
import html
import logging
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, BinaryIO

from hubfs.errors import HubfsError, NotFoundError, StoppedError, UnavailableError
from hubfs.serve import gcs
from hubfs.serve.catalog import Archive
from hubfs.serve.conditions import wanted_part
from hubfs.serve.files import Version, only_file

if TYPE_CHECKING:
    from hubfs.serve.server import Server

LOG = logging.getLogger("hubfs.serve")

#: Seconds after which an idle connection, or one whose client takes no bytes, is closed.
_IDLE_SECONDS = 60
#: A refused request's body up to this size is read, so that closing does not reset the answer away.
_MAX_DISCARD = 1 << 20
_ARCHIVE_SUFFIX = ".tar.gz"
#: What can be asked for, and in which formats.
_FORMATS = {
    "tf-hub-format": ("compressed", "uncompressed"),
    "lite-format": ("tflite",),
    "tfjs-format": ("compressed",),
}


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


class Handler(BaseHTTPRequestHandler):
    server: Server
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
        # Clients quote what they like: obstore asks for /tfhub%2Dmodules.
        first = re.match("/([^/?]*)", self._target)
        self._in_bucket = first is not None and urllib.parse.unquote(first[1]) == self.server.bucket
        try:
            self._discard_body()
            answer()
        except StoppedError:
            self.close_connection = True
        except NotFoundError as error:
            self._say_error(HTTPStatus.NOT_FOUND, "NoSuchKey", str(error))
        except gcs.RequestError as error:
            self._say_error(error.status, error.code, str(error))
        except UnavailableError as error:
            again = {"Retry-After": f"{error.retry_after or 1:.0f}"}
            self._say_error(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailable", str(error), again)
        except HubfsError as error:
            LOG.error("%s", error)
            self._say_error(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError", str(error))
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
        allow = {"Allow": "GET, HEAD"}
        self._say_error(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed", "this hub is read-only", allow)

    def _answer(self) -> None:
        path, _, query = self._target.partition("?")
        if self._in_bucket:
            self._answer_for_bucket(path, urllib.parse.parse_qs(query, keep_blank_values=True))
            return
        # One slash at each end at most: a doubled one makes a path that `Catalog.find` refuses.
        handle = urllib.parse.unquote(path.removeprefix("/").removesuffix("/"), errors="surrogateescape")
        if not path.startswith("/"):
            raise NotFoundError(f"{path!r} is not a path of this hub")
        if path == "/":
            handles = [version.handle for version in self.server.catalog.models()]
            self._say(HTTPStatus.OK, "\n".join(["models of this hub:", *handles]))
            return
        asked = urllib.parse.parse_qs(query, keep_blank_values=True)
        kind, form = next(((kind, asked[kind][-1]) for kind in _FORMATS if kind in asked), ("", ""))
        if form in ("", "compressed") and handle.endswith(_ARCHIVE_SUFFIX):
            handle, kind, form = handle.removesuffix(_ARCHIVE_SUFFIX), "tf-hub-format", "compressed"
        if kind and form not in _FORMATS[kind]:
            raise NotFoundError(
                f"{handle}: the format {form!r} is not offered",
                hint=f"ask for {kind}={' or '.join(_FORMATS[kind])}",
            )
        version = self.server.catalog.find(handle)
        if not kind:
            self._send_page(version)
        elif form == "compressed":
            archive, file = self.server.catalog.open_archive(version)
            with file:
                self._send_archive(archive, file)
        elif form == "uncompressed":
            # The body is the location, to the letter: tensorflow_hub does not strip it.
            location = f"gs://{self.server.bucket}/{version.handle}"
            self._say(HTTPStatus.SEE_OTHER, location, {"X-Hubfs-Storage": _root_from(path)}, end="")
        else:
            name = urllib.parse.quote(only_file(version, ".tflite"), errors="surrogateescape")
            location = f"{_root_from(path)}{self.server.bucket}/{name}"
            self._say(HTTPStatus.FOUND, f"it is at {location}", {"Location": location})

    def _answer_for_bucket(self, path: str, query: dict[str, list[str]]) -> None:
        asked = {name: values[-1] for name, values in query.items()}
        key = urllib.parse.unquote(path.removeprefix("/").partition("/")[2], errors="surrogateescape")
        if not key:
            found = gcs.list_objects(self.server.bucket, self.server.objects, asked)
            self._say(HTTPStatus.OK, found, kind="application/xml", end="")
            return
        try:
            stored, file = self.server.objects.open(key)
        except NotFoundError:
            if not key.endswith(_ARCHIVE_SUFFIX):
                raise
            # An archive is there for those who know its name; a listing of it would have to build it.
            version = self.server.catalog.find(key.removesuffix(_ARCHIVE_SUFFIX))
            archive, file = self.server.catalog.open_archive(version)
            with file:
                self._send_archive(archive, file)
            return
        with file:
            if asked.get("generation", str(stored.generation)) != str(stored.generation):
                raise NotFoundError(f"{key}: no such generation of this object")
            wanted = self.headers.get("x-goog-if-generation-match", str(stored.generation))
            if wanted != str(stored.generation):
                message = f"its generation is {stored.generation}"
                raise gcs.RequestError(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed", message)
            headers = {
                "Last-Modified": self.date_time_string(stored.modified),
                **gcs.object_headers(stored),
            }
            self._send_content(file, stored.size, stored.etag, headers)

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
        md5 = base64.b64encode(bytes.fromhex(archive.md5)).decode()
        headers = {
            "Content-Type": "application/gzip",
            "Last-Modified": self.date_time_string(archive.modified),
            "x-goog-hash": f"crc32c={archive.crc32c},md5={md5}",
        }
        # No two archives of a version have the same date, so it may stand for one.
        self._send_content(file, archive.size, f'"{archive.md5}"', headers, headers["Last-Modified"])

    def _send_content(
        self, file: BinaryIO, size: int, etag: str, headers: dict[str, str], date: str | None = None
    ) -> None:
        """Answer with a file, or the part of it that is asked for; `date` may stand for it in `If-Range`."""
        part = wanted_part(self.command, self.headers, size, etag, date)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
        if part.status is HTTPStatus.NOT_MODIFIED:
            self._send_head(part.status, headers)
        elif part.status is HTTPStatus.PRECONDITION_FAILED:
            self._say_error(part.status, "PreconditionFailed", "it has another ETag")
        elif part.status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            total = {"Content-Range": f"bytes */{size}"}
            self._say_error(part.status, "InvalidRange", f"there are {size} bytes", total)
        else:
            if part.status is HTTPStatus.PARTIAL_CONTENT:
                headers["Content-Range"] = f"bytes {part.span.start}-{part.span.stop - 1}/{size}"
            self._send_head(part.status, headers | {"Content-Length": str(len(part.span))})
            self._send_file(file, part.span.start, len(part.span))

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

    def _say_error(
        self, status: HTTPStatus, code: str, text: str, headers: dict[str, str] | None = None
    ) -> None:
        """Answer with an error: plain text, or XML with a `code` where the client asked for the bucket."""
        if self._in_bucket:
            self._say(status, gcs.error_document(code, text), headers, kind="application/xml")
        else:
            self._say(status, text, headers)

    def _say(
        self,
        status: HTTPStatus,
        text: str,
        headers: dict[str, str] | None = None,
        *,
        kind: str = "text/plain",
        end: str = "\n",
    ) -> None:
        body = f"{text}{end}".encode(errors="backslashreplace")
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


def _root_from(path: str) -> str:
    """The top of the hub, relative to the URL of a path in it: also behind a proxy that adds a prefix."""
    return "../" * (path.count("/") - 1) or "./"
