"""A fast loopback hub in a process of its own, with limits of rate and latency.

`tests/hub.py` copies every byte through Python and notes every step; this one hands files to the kernel
(`sendfile`), so that it takes as little as possible of the two CPUs that it shares with what is measured.
It is told everything as one line of JSON on standard input, says its port on standard output, and ends
when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from scripts.bench.processes import CHECKOUT

if TYPE_CHECKING:
    from scripts.bench.models import Archive, Model

#: Bytes that the kernel is given at once without a limit of rate; with one, what goes in `_TICK` seconds.
_STEP: Final = 4 << 20
_TICK: Final = 0.01


@dataclass(frozen=True)
class Link:
    """What a hub's connections are like.

    Attributes:
        name: for the table.
        rate: bits per second of one connection; 0 for no limit.
        latency: seconds before the head of each answer.
    """

    name: str
    rate: float = 0.0
    latency: float = 0.0


LOOPBACK: Final = Link("loopback")
GIGABIT: Final = Link("1000 Mbit/s + 30 ms", 1e9, 0.03)
SLOW: Final = Link("200 Mbit/s + 30 ms", 2e8, 0.03)


@contextmanager
def serving(
    archives: Mapping[str, Archive],
    link: Link,
    *,
    digests: bool = True,
    stall: Mapping[str, int] | None = None,
    trees: Sequence[Model] = (),
) -> Iterator[str]:
    """Run a hub for the length of a `with` block; gives its URL.

    Args:
        archives: by the path of their handles, such as `bench/large/1`.
        digests: declare checksums (`x-goog-hash`), as Google's storage does.
        stall: handles whose answers stop for ever after so many bytes.
        trees: models whose files are served one by one as well, below their handles, with listings in HTML.
    """
    order = {
        "archives": {
            handle: {**asdict(archive), "path": str(archive.path)} for handle, archive in archives.items()
        },
        "rate": link.rate,
        "latency": link.latency,
        "digests": digests,
        "stall": dict(stall or {}),
        "trees": {model.handle: str(model.tree) for model in trees},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.bench.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        order = self.server.order
        time.sleep(order["latency"])
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/files/"):
            self._answer_from_tree(path.removeprefix("/files/"))
            return
        handle = path.strip("/").removesuffix(".tar.gz")
        found = order["archives"].get(handle)
        if found is None:
            self._answer(404, {}, b"")
            return
        digests = {"x-goog-hash": f"crc32c={found['crc32c']},md5={found['md5']}"} if order["digests"] else {}
        headers = {"Content-Type": "application/gzip", **digests}
        self._answer_file(found["path"], f'"{found["md5"]}"', headers, order["stall"].get(handle))

    def _answer_from_tree(self, path: str) -> None:
        """A model's file, or the names in a directory of it as a web server lists them."""
        handle = next((h for h in self.server.order["trees"] if f"{path}/".startswith(f"{h}/")), None)
        if handle is None:
            self._answer(404, {}, b"")
            return
        place = Path(self.server.order["trees"][handle] + path.removeprefix(handle))
        if place.is_dir():
            names = (f"{child.name}/" if child.is_dir() else child.name for child in place.iterdir())
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            self._answer(200, {"Content-Type": "text/html"}, f"<html><body>{links}</body></html>".encode())
        elif place.exists():
            modified = {"Last-Modified": formatdate(place.stat().st_mtime, usegmt=True)}
            self._answer_file(str(place), f'"{place.name}"', modified, None)
        else:
            self._answer(404, {}, b"")

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self._answer_head(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _answer_file(self, path: str, etag: str, headers: Mapping[str, str], limit: int | None) -> None:
        """
        Args:
            limit: nothing comes after so many bytes.
        """
        size = Path(path).stat().st_size
        start, stop, status = self._asked(etag, size)
        ranges = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if status == 206 else {}
        length = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", "ETag": etag}
        self._answer_head(status, {**headers, **length, **ranges})
        if self.command == "GET":
            self._send(path, start, stop if limit is None else min(stop, limit))
            if limit is not None and stop > limit:
                threading.Event().wait()

    def _answer_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_GET

    def _asked(self, etag: str, size: int) -> tuple[int, int, int]:
        """The part that is asked for, and the status that goes with it."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or self.headers.get("If-Range", etag) != etag or int(match[1]) >= size:
            return 0, size, 200
        return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size, 206

    def _send(self, path: str, start: int, stop: int) -> None:
        rate = self.server.order["rate"] / 8
        step = int(rate * _TICK) if rate else _STEP
        self.wfile.flush()
        began, at = time.monotonic(), start
        with Path(path).open("rb") as file:
            while at < stop:
                at += os.sendfile(self.connection.fileno(), file.fileno(), at, min(step, stop - at))
                if rate:
                    time.sleep(max(0.0, began + (at - start) / rate - time.monotonic()))


def main() -> None:
    order = json.loads(sys.stdin.readline())
    server = _Server(order)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
