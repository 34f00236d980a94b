"""S3 on loopback for tests: moto's server, with conditional writes that are atomic, and faults on demand.

    with MotoS3() as s3:
        s3.environ                          # what leads hubfs and obstore there
        s3.put({"prefix/key": b"..."})      # into the bucket `models`

Real stores check a condition and write in one step; moto does it in two, so writes go one at a time here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import obstore
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

BUCKET = "models"


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        path: `/models/…`, with its query.
        conditional: whether it is to overwrite only what it names.
    """

    method: str
    path: str
    conditional: bool


#: What happens to a request before moto sees it: an HTTP status to answer instead, or None.
Fault = Callable[[Request], int | None]


class _Quiet(MotoRequestHandler):
    def log(self, *args: Any) -> None:
        pass


class MotoS3:
    """A server with one bucket, `models`, that is empty at first."""

    def __init__(self) -> None:
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._writing = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.environ = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def __enter__(self) -> MotoS3:
        import requests

        self._thread.start()
        requests.put(f"{self.url}/{BUCKET}", timeout=20).raise_for_status()
        self.store = S3Store(
            BUCKET,
            endpoint=self.url,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            client_options={"allow_http": True},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        """Forget all objects, requests and faults."""
        self.fault = lambda request: None
        self.requests.clear()
        names = list(self.objects())
        if names:
            obstore.delete(self.store, names)
        self.requests.clear()

    def put(self, objects: Mapping[str, bytes]) -> None:
        for path, content in objects.items():
            obstore.put(self.store, path, content, use_multipart=False)

    def remove(self, *paths: str) -> None:
        obstore.delete(self.store, list(paths))

    def objects(self, prefix: str | None = None) -> dict[str, int]:
        """Paths and sizes of all objects."""
        return {meta["path"]: meta["size"] for meta in obstore.list(self.store, prefix).collect()}

    def read(self, path: str) -> bytes:
        return bytes(obstore.get(self.store, path).bytes())

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"] + (f"?{query}" if query else ""),
            "HTTP_IF_MATCH" in environ,
        )
        self.requests.append(request)
        status = self.fault(request)
        if status is not None:
            body = f"<Error><Code>Fault</Code><Message>{status}</Message></Error>"
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return Response(body, status)(environ, start)  # type: ignore[arg-type]
        if request.method in ("GET", "HEAD"):
            return self._app(environ, start)  # type: ignore[no-any-return]
        with self._writing:
            return list(self._app(environ, start))
