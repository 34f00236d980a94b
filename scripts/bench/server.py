"""A fast loopback hub in a process of its own, with limits of rate and latency.

`tests/hub.py` copies every byte through Python and notes every step; this one hands files to the kernel
(`sendfile`), so that it takes as little as possible of the two CPUs that it shares with what is measured.
It is told everything as one line of JSON on standard input, says its port on standard output, and ends
when its input does.

The files of models may be in a bucket, too, which it serves as Google does, to TensorFlow's own `gs://` as
well (`tests/google.py`). That one insists on TLS, so there is no `sendfile` for it, but large writes from a
mapping; a connection has the same limits, and nothing is taken for opening one.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.bench.models import checksums
from scripts.bench.processes import CHECKOUT
from tests.google import Storage, StorageServer, certified
from tests.google_api import StorageHandler
from tests.google_http import ApiError, Seen

if TYPE_CHECKING:
    from scripts.bench.models import Archive, Model

#: The bucket that models are in: tfhub.dev's.
BUCKET: Final = "tfhub-modules"
#: Bytes that the kernel is given at once without a limit of rate; with one, what goes in `_TICK` seconds.
_STEP: Final = 4 << 20
_TICK: Final = 0.01
_COUNTS: Final = "/_counts"


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
    bucket: Sequence[Model] = (),
    authority: Path | None = None,
) -> Iterator[str]:
    """Run a hub for the length of a `with` block; gives its URL.

    Args:
        archives: by the path of their handles, such as `bench/large/1`.
        digests: declare checksums (`x-goog-hash`), as Google's storage does.
        stall: handles whose answers stop for ever after so many bytes.
        trees: models whose files are served one by one as well, below their handles, with listings in HTML.
        bucket: models that are in `BUCKET` as well, below their handles; uncompressed is offered for them.
        authority: the server is a proxy that takes Google's place (`tests.google.led_to`), and writes the
            certificate of its authority there.
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
        "bucket": [model.handle for model in bucket],
        "objects": {
            f"{model.handle}/{name}": [str(model.tree / name), md5]
            for model in bucket
            for name, md5 in checksums(model).items()
        },
        "authority": authority and str(authority),
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


@dataclass(frozen=True)
class Counts:
    """What a hub has been asked for so far, and the bytes of bodies that it has sent."""

    requests: int
    bytes: int

    def since(self, before: Counts) -> Counts:
        return Counts(self.requests - before.requests, self.bytes - before.bytes)


def counts(url: str) -> Counts:
    """The counts of the hub at a URL. Asking is not counted."""
    with urllib.request.urlopen(url + _COUNTS, timeout=30) as answer:
        return Counts(**json.load(answer))


class _Server(StorageServer):
    daemon_threads = True

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        storage = Storage()
        for key, (path, md5) in order["objects"].items():
            storage.put(BUCKET, key, Path(path), md5=md5)
        super().__init__(
            storage, certified(Path(order["authority"])) if order["authority"] else None, _Handler
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super(StorageServer, self).handle_error(request, client_address)


class _Handler(StorageHandler):
    server: _Server
    timeout = None  # with one, the socket does not wait, and sendfile would have to be told when to go on

    def do_GET(self) -> None:
        if self.path == _COUNTS:
            seen = self.server.seen()
            found = Counts(len(seen), sum(request.bytes_sent for request in seen))
            self._seen = Seen("counts", "GET", "", self.path, None)  # known to nobody
            self._answer(200, {}, json.dumps(asdict(found)).encode())
            return
        time.sleep(self.server.order["latency"])
        super().do_GET()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer_xml(self, bucket: str, name: str) -> None:
        """Whatever is not the JSON API."""
        if bucket == BUCKET:
            super().answer_xml(bucket, name)
        elif bucket == "files":
            self._answer_from_tree(name)
        else:
            self._answer_for_handle(f"{bucket}/{name}")

    def _answer_for_handle(self, path: str) -> None:
        order = self.server.order
        handle = path.strip("/").removesuffix(".tar.gz")
        if self._query.get("tf-hub-format") == "uncompressed":
            if handle not in order["bucket"]:
                raise ApiError(404, "not offered")
            # The bucket is served here, whatever Google's address is.
            self._answer(303, {"X-Hubfs-Storage": "/"}, f"gs://{BUCKET}/{handle}".encode())
            return
        found = order["archives"].get(handle)
        if found is None:
            raise ApiError(404, "no such model")
        digests = {"x-goog-hash": f"crc32c={found['crc32c']},md5={found['md5']}"} if order["digests"] else {}
        headers = {"Content-Type": "application/gzip", **digests}
        self._answer_file(found["path"], f'"{found["md5"]}"', headers, order["stall"].get(handle))

    def _answer_from_tree(self, path: str) -> None:
        """A model's file, or the names in a directory of it as a web server lists them."""
        handle = next((h for h in self.server.order["trees"] if f"{path}/".startswith(f"{h}/")), None)
        if handle is None:
            raise ApiError(404, "no such model")
        place = Path(self.server.order["trees"][handle] + path.removeprefix(handle))
        if place.is_dir():
            names = (f"{child.name}/" if child.is_dir() else child.name for child in place.iterdir())
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            self._answer(200, {"Content-Type": "text/html"}, f"<html><body>{links}</body></html>".encode())
        elif place.exists():
            modified = {"Last-Modified": formatdate(place.stat().st_mtime, usegmt=True)}
            self._answer_file(str(place), f'"{place.name}"', modified, None)
        else:
            raise ApiError(404, "no such file")

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self._seen.bytes_sent += len(body)
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
        self._head(status, {**headers, **length, **ranges})
        if self.command == "GET":
            self.send_body(Path(path), range(start, stop if limit is None else min(stop, limit)))
            if limit is not None and stop > limit:
                threading.Event().wait()

    def _asked(self, etag: str, size: int) -> tuple[int, int, int]:
        """The part that is asked for, and the status that goes with it."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or self.headers.get("If-Range", etag) != etag or int(match[1]) >= size:
            return 0, size, 200
        return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size, 206

    def send_body(self, body: bytes | Path, span: range) -> None:
        """Send a part of a file, at the rate of this hub's connections."""
        assert isinstance(body, Path)
        rate = self.server.order["rate"] / 8
        step = int(rate * _TICK) if rate else _STEP
        self.wfile.flush()
        began, at = time.monotonic(), span.start
        with body.open("rb") as file, self._sending(file.fileno()) as send:
            while at < span.stop:
                count = min(step, span.stop - at)
                # Counted before and put right afterwards: a client that has the bytes finds them counted.
                self._seen.bytes_sent += count
                sent = 0
                try:
                    sent = send(at, count)
                finally:
                    self._seen.bytes_sent += sent - count
                at += sent
                if rate:
                    time.sleep(max(0.0, began + (at - span.start) / rate - time.monotonic()))

    @contextmanager
    def _sending(self, file: int) -> Iterator[Callable[[int, int], int]]:
        """What sends some bytes of a file from a place on, and says how many."""
        connection = self.connection
        if not isinstance(connection, ssl.SSLSocket):
            yield lambda at, count: os.sendfile(connection.fileno(), file, at, count)
            return
        with mmap.mmap(file, 0, prot=mmap.PROT_READ) as content, memoryview(content) as view:
            yield lambda at, count: connection.send(view[at : at + count])


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
