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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from scripts.bench.models import Archive

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


@contextmanager
def serving(
    archives: Mapping[str, Archive],
    link: Link,
    *,
    digests: bool = True,
    stall: Mapping[str, int] | None = None,
) -> Iterator[str]:
    """Run a hub for the length of a `with` block; gives its URL.

    Args:
        archives: by the path of their handles, such as `bench/large/1`.
        digests: declare checksums (`x-goog-hash`), as Google's storage does.
        stall: handles whose answers stop for ever after so many bytes.
    """
    order = {
        "archives": {
            handle: {**asdict(archive), "path": str(archive.path)} for handle, archive in archives.items()
        },
        "rate": link.rate,
        "latency": link.latency,
        "digests": digests,
        "stall": dict(stall or {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.bench.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
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
        handle = unquote(urlsplit(self.path).path).strip("/").removesuffix(".tar.gz")
        found = order["archives"].get(handle)
        if found is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{found["md5"]}"'
        start, stop, status = self._asked(etag, found["size"])
        self.send_response(status)
        self.send_header("Content-Type", "application/gzip")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{found['size']}")
        if order["digests"]:
            self.send_header("x-goog-hash", f"crc32c={found['crc32c']},md5={found['md5']}")
        self.end_headers()
        if self.command == "GET":
            limit = order["stall"].get(handle)
            self._send(found["path"], start, stop if limit is None else min(stop, limit))
            if limit is not None and stop > limit:
                threading.Event().wait()

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
