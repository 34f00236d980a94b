"""Google Cloud Storage on loopback: what TensorFlow's `gs://`, tensorflow_hub and obstore ask it for.

Both APIs show the same objects: the JSON one, which TensorFlow uses for everything but reads, and the XML
one, which obstore uses. TensorFlow has no setting for another endpoint, but takes a proxy: this server is one
too, answers each CONNECT to Google by itself, with a certificate of a private CA, and leads nobody elsewhere.

    with Google() as google:
        google.put("bucket", "models/a/saved_model.pb", b"…")
        subprocess.run([…], env={**os.environ, **google.environment})        # TensorFlow: gs://bucket/models/a
        STORAGE_EMULATOR_HOST = google.url                                   # hubfs and obstore

`tests/google_api.py` has the requests.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.google_api import StorageHandler
from tests.google_http import HOSTS, PreconditionError, Seen
from tests.models import Tree


@dataclass(frozen=True)
class Blob:
    """An object. Another content is another one, with another generation.

    Attributes:
        md5: hex.
        modified: seconds since the epoch.
    """

    body: bytes | Path
    size: int
    md5: str
    generation: int
    modified: float

    @property
    def etag(self) -> str:
        return f'"{self.md5}"'


@dataclass
class Upload:
    """One that has begun, of either API; nobody sees its object before it is complete.

    Attributes:
        parts: by number; those of the JSON API are all one.
        generation: what the object must have then; 0 if there must be none.
    """

    bucket: str
    name: str
    generation: int | None
    parts: dict[int, bytes] = field(default_factory=dict)


class Storage:
    """Buckets, by name. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects what follows
        self._buckets: dict[str, dict[str, Blob]] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._uploads: dict[str, Upload] = {}

    def names(self, bucket: str) -> dict[str, Blob] | None:
        """What is in a bucket now; None if there is no such bucket."""
        with self._lock:
            found = self._buckets.get(bucket)
            return None if found is None else dict(found)

    def get(self, bucket: str, name: str) -> Blob | None:
        with self._lock:
            return self._buckets.get(bucket, {}).get(name)

    def make(self, bucket: str) -> None:
        with self._lock:
            self._buckets.setdefault(bucket, {})

    def put(
        self,
        bucket: str,
        name: str,
        body: bytes | Path,
        generation: int | None = None,
        md5: str | None = None,
    ) -> Blob:
        """Store an object, whole and at once.

        Args:
            body: its bytes, or a file that has them and does not change.
            generation: only if it is this one that is replaced; 0 for none.
            md5: hex; computed if it is not given.

        Raises:
            PreconditionError: it is not.
        """
        size = len(body) if isinstance(body, bytes) else body.stat().st_size
        if md5 is None:
            content = body if isinstance(body, bytes) else body.read_bytes()
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        with self._lock:
            self._check(bucket, name, generation)
            blob = Blob(body, size, md5, next(self._generations), time.time())
            self._buckets.setdefault(bucket, {})[name] = blob
            return blob

    def delete(self, bucket: str, name: str, generation: int | None = None) -> bool:
        """
        Returns:
            whether there was one.
        """
        with self._lock:
            self._check(bucket, name, generation)
            return self._buckets.get(bucket, {}).pop(name, None) is not None

    def begin(self, bucket: str, name: str, generation: int | None) -> str:
        """Begin an upload; gives its id."""
        key = uuid.uuid4().hex
        with self._lock:
            self._uploads[key] = Upload(bucket, name, generation)
        return key

    def upload(self, key: str) -> Upload | None:
        with self._lock:
            return self._uploads.get(key)

    def finish(self, key: str) -> Blob:
        """The object of an upload's parts, in the order of their numbers.

        Raises:
            PreconditionError: its generation is another one meanwhile.
        """
        with self._lock:
            upload = self._uploads.pop(key)
        body = b"".join(upload.parts[number] for number in sorted(upload.parts))
        return self.put(upload.bucket, upload.name, body, upload.generation)

    def drop(self, key: str) -> None:
        """Give an upload up."""
        with self._lock:
            self._uploads.pop(key, None)

    @property
    def uploads(self) -> list[Upload]:
        """Those that have begun and not ended."""
        with self._lock:
            return list(self._uploads.values())

    def _check(self, bucket: str, name: str, generation: int | None) -> None:
        found = self._buckets.get(bucket, {}).get(name)
        if generation is not None and generation != (found.generation if found else 0):
            raise PreconditionError(f"{bucket}/{name} has another generation")


class StorageServer(ThreadingHTTPServer):
    """Listens on a port of its own; `handler` gives the answers."""

    daemon_threads = False  # so that server_close joins them
    request_queue_size = 256

    def __init__(
        self, storage: Storage, tls: ssl.SSLContext | None, handler: type[StorageHandler] = StorageHandler
    ) -> None:
        self.storage = storage
        self.tls = tls
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()  # protects what follows
        self._connections: set[socket.socket] = set()
        self._seen: list[Seen] = []
        super().__init__(("127.0.0.1", 0), handler)

    def note(self, seen: Seen) -> None:
        with self._lock:
            self._seen.append(seen)

    def seen(self, *, clear: bool = False) -> list[Seen]:
        with self._lock:
            found = list(self._seen)
            if clear:
                self._seen.clear()
            return found

    def process_request(self, request: Any, client_address: Any) -> None:
        self.opened(request)
        super().process_request(request, client_address)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

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
                    # Not SSLSocket's own method, which takes the TLS state from under the handler's feet.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)


class Google(Storage):
    """A server with buckets, for the length of a `with` block.

    Attributes:
        url: where it listens, for clients that have a setting for that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._directory = Path(tempfile.mkdtemp(prefix="google-"))
        self._certificate = self._directory / "ca.pem"
        self._server = StorageServer(self, certified(self._certificate))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="google"
        )
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Google:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._thread.join()
        shutil.rmtree(self._directory)
        assert not self._server.errors, self._server.errors

    @property
    def environment(self) -> dict[str, str]:
        """What leads TensorFlow's `gs://` here, without credentials."""
        return led_to(self.url, self._certificate)

    def add(self, bucket: str, below: str, tree: Tree) -> None:
        """Store the files of a tree, with names that begin with `below` and a slash."""
        self.make(bucket)
        for name, content in tree.items():
            if not name.endswith("/"):
                self.put(bucket, f"{below}/{name}", content)

    def tree(self, bucket: str, below: str = "") -> dict[str, bytes]:
        """The bytes of all objects whose names begin so, by the rest of their names."""
        return {
            name.removeprefix(below): blob.body if isinstance(blob.body, bytes) else blob.body.read_bytes()
            for name, blob in (self.names(bucket) or {}).items()
            if name.startswith(below)
        }

    def seen(self, method: str | None = None, *, clear: bool = False) -> list[Seen]:
        """The requests that have come, as far as they are answered.

        Args:
            method: only of this one.
            clear: forget them all.
        """
        found = self._server.seen(clear=clear)
        return [seen for seen in found if method in (None, seen.method)]


def led_to(url: str, certificate: Path) -> dict[str, str]:
    """The environment in which TensorFlow's `gs://` asks a server here instead of Google."""
    return {
        "https_proxy": url,
        "HTTPS_PROXY": url,
        "no_proxy": "",
        "NO_PROXY": "",
        "CURL_CA_BUNDLE": str(certificate),
        "NO_GCE_CHECK": "true",
    }


def certified(authority: Path) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate for Google's names; its CA's is written to `authority`."""
    import trustme

    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*HOSTS).configure_cert(context)
    return context
