"""The words of `tests/hub.py`: requests as they arrive, answers as they are planned, faults in between."""

from __future__ import annotations

import base64
import dataclasses
import email.utils
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

if TYPE_CHECKING:
    from tests.hub import FaultHub

#: An ETag that is made from the body.
AUTO = "auto"
#: Large writes, so that the client is what a test measures.
CHUNK = 1 << 20
_PROBE = "bytes=0-0"


@dataclass
class Request:
    """A request as it arrived; `status`, `bytes_sent` and `fault` are filled in while it is answered.

    `bytes_sent` counts the body's bytes that were handed to the kernel. `done` is set after the answer.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names
    range: str | None
    status: int | None = None
    bytes_sent: int = 0
    fault: str | None = None
    done: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def is_probe(self) -> bool:
        """Whether it only asks what is there: `Range: bytes=0-0`, or HEAD."""
        return self.method == "HEAD" or self.range == _PROBE

    @property
    def wants_archive(self) -> bool:
        return self.query.get("tf-hub-format") == "compressed" or self.path.endswith(
            (".tar.gz", ".tgz", ".tar")
        )

    @property
    def wants_listing(self) -> bool:
        return self.query.get("tf-hub-format") == "uncompressed"

    @property
    def kind(self) -> str:
        """What it is for: `listing`, `probe`, `body` or, if a person could have sent it, `page`."""
        if self.wants_archive:
            return "probe" if self.is_probe else "body"
        return "listing" if self.wants_listing else "page"

    def takes(self, fault: Fault) -> bool:
        return fault.on == self.kind or (fault.on == "any" and self.wants_archive)


@dataclass(frozen=True)
class Resource:
    """What a path holds."""

    body: bytes | Path
    etag: str | None
    goog_hash: dict[str, str]
    accept_ranges: bool
    content_type: str
    modified: str

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size

    @classmethod
    def of(
        cls, body: bytes | Path, etag: str | None, digests: bool, accept_ranges: bool, content_type: str
    ) -> Resource:
        """What `FaultHub.add` is given, with its checksums."""
        md5, crc32c = hashlib.md5(), 0
        for block in blocks(body, 0, len(body) if isinstance(body, bytes) else body.stat().st_size):
            md5.update(block)
            crc32c = google_crc32c.extend(crc32c, bytes(block))
        return cls(
            body=body,
            etag=f'"{md5.hexdigest()}"' if etag == AUTO else etag,
            goog_hash={"crc32c": _base64(crc32c.to_bytes(4, "big")), "md5": _base64(md5.digest())}
            if digests
            else {},
            accept_ranges=accept_ranges,
            content_type=content_type,
            # Another body has another date, and the same one the same.
            modified=email.utils.formatdate(1_500_000_000 + crc32c % 10**8, usegmt=True),
        )

    def headers(self) -> dict[str, str]:
        """Those that tell about the whole body."""
        headers = {"Content-Type": self.content_type, "Last-Modified": self.modified}
        if self.accept_ranges:
            headers["Accept-Ranges"] = "bytes"
        if self.etag is not None:
            headers["ETag"] = self.etag
        if self.goog_hash:
            headers["x-goog-hash"] = ",".join(f"{name}={value}" for name, value in self.goog_hash.items())
        return headers


@dataclass
class Answer:
    """How a request is going to be answered. Faults change it before anything is sent."""

    path: str
    hub: FaultHub
    resource: Resource | None
    drop: bool = False  # close without a word
    hold: threading.Event | None = None  # wait for it before the answer
    plain: tuple[int, bytes, dict[str, str]] | None = None  # this instead of the resource
    ranges: str = "obey"  # or "ignore" or "wrong"
    size: int | None = None  # the resource appears to have only so many bytes
    length_error: int = 0  # what is added to Content-Length
    chunked: bool = False
    stop_after: int | None = None
    reset: bool = False
    stall: tuple[int, threading.Event] | None = None
    chunk: int = CHUNK
    interval: float = 0.0
    flip: int | None = None

    def asked(self, request: Request, resource: Resource, size: int) -> range | None:
        """The range to answer with: None for the whole body, an empty one for 416."""
        match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", request.range or "")
        condition = request.headers.get("if-range")
        obey = resource.accept_ranges and condition in (None, resource.etag, resource.modified)
        if self.ranges == "wrong":
            first = int(match[1] or 0) if match else 0
            return range(max(1, size - 1)) if first else range(min(1, size - 1), size)
        if match is None or not obey or self.ranges == "ignore":
            return None
        if not match[1]:
            return range(max(0, size - int(match[2] or 0)), size)
        return range(int(match[1]), min(size, int(match[2]) + 1 if match[2] else size))

    def flipped(self, block: bytes | memoryview, start: int) -> bytes | memoryview:
        """The block, which begins at byte `start` of the whole body, with the flipped bit if it has that."""
        if self.flip is None or not start <= self.flip < start + len(block):
            return block
        copy = bytearray(block)
        copy[self.flip - start] ^= 1
        return bytes(copy)


@dataclass(frozen=True)
class Fault:
    """One entry of a script; make it with one of the constructors.

    Args:
        kind: its constructor's name, as it appears in `Request.fault`.
        act: how it changes the answer.
        on: which requests it waits for: "body" and "probe" are for the archive, "any" is both of them,
            "listing" asks where the files are.
        times: to how many requests it applies; None means for ever.
    """

    kind: str
    act: Callable[[Answer], None]
    on: str = "body"
    times: int | None = 1

    @classmethod
    def _set(cls, kind: str, select: Mapping[str, Any], **changes: Any) -> Fault:
        def act(answer: Answer) -> None:
            for name, value in changes.items():
                setattr(answer, name, value)

        return cls(kind, act, **select)

    @classmethod
    def status(
        cls, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None, **select: Any
    ) -> Fault:
        """Answer with this status."""
        return cls._set("status", select, plain=(code, body, dict(headers or {})))

    @classmethod
    def html(cls, **select: Any) -> Fault:
        """Answer 200 with a web page, as a captive portal or a consent page does."""
        page = b"<!DOCTYPE html><html><body>Please sign in.</body></html>"
        return cls._set("html", select, plain=(200, page, {"Content-Type": "text/html; charset=utf-8"}))

    @classmethod
    def cut(cls, after: int, **select: Any) -> Fault:
        """Close the connection after so many bytes of the body; Content-Length promises all."""
        return cls._set("cut", select, stop_after=after)

    @classmethod
    def reset(cls, after: int, **select: Any) -> Fault:
        """Reset the connection (RST) after so many bytes of the body."""
        return cls._set("reset", select, stop_after=after, reset=True)

    @classmethod
    def stall(cls, after: int, until: threading.Event, **select: Any) -> Fault:
        """Wait after so many bytes of the body until the event is set, then go on."""
        return cls._set("stall", select, stall=(after, until))

    @classmethod
    def drip(cls, chunk: int, interval: float, **select: Any) -> Fault:
        """Send `chunk` bytes every `interval` seconds."""
        return cls._set("drip", select, chunk=chunk, interval=interval)

    @classmethod
    def wrong_range(cls, **select: Any) -> Fault:
        """Answer 206 with another range than the one asked for; Content-Range tells which."""
        return cls._set("wrong_range", select, ranges="wrong")

    @classmethod
    def ignore_range(cls, **select: Any) -> Fault:
        """Answer 200 with the whole body, whatever range is asked for."""
        return cls._set("ignore_range", select, ranges="ignore")

    @classmethod
    def change(cls, body: bytes | Path, etag: str | None = AUTO, **select: Any) -> Fault:
        """Publish another body before answering, for good."""

        def act(answer: Answer) -> None:
            answer.resource = answer.hub.republish(answer.path, body, etag)

        return cls("change", act, **select)

    @classmethod
    def flip(cls, offset: int, **select: Any) -> Fault:
        """Flip one bit of the byte at this offset of the whole body, if the answer includes it."""
        return cls._set("flip", select, flip=offset)

    @classmethod
    def truncate(cls, size: int, **select: Any) -> Fault:
        """Make the whole body appear to be only `size` bytes long; ETag and checksums stay."""
        return cls._set("truncate", select, size=size)

    @classmethod
    def short_length(cls, by: int, **select: Any) -> Fault:
        """Announce a Content-Length that is too small; all bytes are sent."""
        return cls._set("short_length", select, length_error=-by)

    @classmethod
    def long_length(cls, by: int, **select: Any) -> Fault:
        """Announce a Content-Length that is too large; the connection is closed after all bytes there are."""
        return cls._set("long_length", select, length_error=by)

    @classmethod
    def no_length(cls, **select: Any) -> Fault:
        """Send chunks (Transfer-Encoding) without Content-Length."""
        return cls._set("no_length", select, chunked=True)

    @classmethod
    def wrong_md5(cls, **select: Any) -> Fault:
        """Give only a wrong md5 in `x-goog-hash`: a crc32c would be looked at instead. The ETag stays."""
        return cls._wrong_hash("md5", hashlib.md5(b"wrong").digest(), select, alone=True)

    @classmethod
    def wrong_crc32c(cls, **select: Any) -> Fault:
        """Give a wrong crc32c in `x-goog-hash`."""
        return cls._wrong_hash("crc32c", b"\1\2\3\4", select)

    @classmethod
    def _wrong_hash(cls, name: str, digest: bytes, select: Mapping[str, Any], alone: bool = False) -> Fault:
        def act(answer: Answer) -> None:
            assert answer.resource is not None, f"{answer.path} has nothing to give a wrong checksum of"
            others = {} if alone else answer.resource.goog_hash
            wrong = {**others, name: _base64(digest)}
            answer.resource = dataclasses.replace(answer.resource, goog_hash=wrong)

        return cls(f"wrong_{name}", act, **select)

    @classmethod
    def when(cls, condition: Callable[[FaultHub, Request], bool], fault: Fault, **select: Any) -> Fault:
        """Another fault, for requests for which the condition holds; by default for ever."""

        def act(answer: Answer) -> None:
            if condition(answer.hub, answer.hub.log[-1]):
                fault.act(answer)

        return cls(f"when {fault.kind}", act, **{"times": None, **select})

    @classmethod
    def hang_up(cls, **select: Any) -> Fault:
        """Close the connection without any answer."""
        return cls._set("hang_up", select, drop=True)

    @classmethod
    def hang(cls, until: threading.Event, **select: Any) -> Fault:
        """Answer nothing until the event is set, then as usual."""
        return cls._set("hang", select, hold=until)


def plain_answer(request: Request, resource: Resource | None) -> tuple[int, bytes, dict[str, str]] | None:
    """The answer that is not an archive, or None if it is one."""
    if request.method not in ("GET", "HEAD"):
        return 405, b"read-only\n", {"Allow": "GET, HEAD"}
    if resource is None:
        return 404, b"no such model\n", {"Content-Type": "text/plain"}
    if request.wants_archive:
        return None
    if "tf-hub-format" in request.query:
        return 404, b"not offered\n", {"Content-Type": "text/plain"}
    return 200, b"<html>a model's page</html>", {"Content-Type": "text/html"}


def blocks(body: bytes | Path, start: int, stop: int, size: int = CHUNK) -> Iterator[bytes | memoryview]:
    """The bytes of a body from `start` to `stop`."""
    if isinstance(body, bytes):
        view = memoryview(body)
        for at in range(start, stop, size):
            yield view[at : min(at + size, stop)]
        return
    with body.open("rb") as file:
        file.seek(start)
        for at in range(start, stop, size):
            yield file.read(min(size, stop - at))


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
