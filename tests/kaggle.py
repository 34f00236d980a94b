"""Kaggle Models for tests: the API in both of its forms, and the storage that it redirects to.

kagglesdk and kagglehub are content with it (they POST JSON to `/api/v1/models.ModelApiService/<Call>`), and
so is whoever uses the REST form (`/api/v1/models/<owner>/<model>/<framework>/<variation>/…`). API and storage
are two servers, so that what is meant for one of them alone is seen to stay there.

    with KaggleServer() as kaggle:
        kaggle.publish("google/demo/tensorFlow2/small/1", make_tree())
        environ["KAGGLE_API_ENDPOINT"] = kaggle.url
        ...
        assert [seen.path for seen in kaggle.seen("storage")] == [...]
"""

from __future__ import annotations

import base64
import gzip
import io
import re
import secrets
import tarfile
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.kaggle_http import Api, ApiError, Seen, Server, Storage, Stored

__all__ = ["ApiError", "KaggleServer", "Seen", "Stored"]

#: What Kaggle gives without being asked for another number, and at most.
PAGE, MAX_PAGE = 20, 200
CREATED = "2024-02-21T09:30:00.1234567Z"


@dataclass
class Version:
    """A version of a variation.

    Attributes:
        files: as they are listed.
        archive: what a download of the whole gives, and its name.
    """

    files: dict[str, bytes]
    archive: tuple[str, bytes]


class KaggleServer:
    """Kaggle and its storage on loopback, running until `close` or the end of the `with` block.

    Args:
        port: of the API; kagglesdk's `KAGGLE_API_ENVIRONMENT=TEST` means 7777.

    Attributes:
        url: of the API, without a slash at the end.
        accounts: values of `Authorization` that Kaggle knows.
        consents: pairs of such a value and the `owner/model` whose licence its user has accepted.
        gated: `owner/model` of those that want a licence to be accepted.
        changes: made to what the API says before it is sent, in place; what they return is sent instead.
    """

    def __init__(self, port: int = 0) -> None:
        self.accounts: set[str] = set()
        self.consents: set[tuple[str, str]] = set()
        self.gated: set[str] = set()
        self.changes: list[Callable[[Any], bytes | None]] = []
        self.stored: dict[str, Stored] = {}
        self.errors: list[BaseException] = []
        self.closing = threading.Event()
        self._log: list[Seen] = []
        self._versions: dict[str, dict[int, Version]] = {}
        self._spelt: dict[str, str] = {}
        self._unlisted: dict[str, int] = {}
        self._signatures: set[str] = set()
        self._lock = threading.Lock()  # protects the log and the signatures
        self._servers = [Server(self, Api, port), Server(self, Storage, 0)]
        # Another host than the storage's: `localhost` and `127.0.0.1` are two for every client.
        self.url = f"http://localhost:{self._servers[0].server_address[1]}"
        self.storage_url = f"http://127.0.0.1:{self._servers[1].server_address[1]}"
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def publish(
        self, handle: str, files: Mapping[str, bytes], archive: tuple[str, bytes] | None = None
    ) -> None:
        """Have a version, `owner/model/framework/variation/number`.

        Args:
            archive: name and bytes of a download of the whole; by default a tar.gz of the files.
        """
        variation, _, number = handle.rpartition("/")
        version = Version(dict(files), archive or ("archive.tar.gz", make_tar_gz(files)))
        self._versions.setdefault(_key(variation), {})[int(number)] = version
        self._spelt[_key(variation)] = variation
        for name, body in [*files.items(), version.archive]:
            self.stored[f"{_key(variation)}/{number}/{name}"] = Stored(body)

    def object(self, handle: str, name: str = "archive.tar.gz") -> Stored:
        """What storage has for a file of a version, to be changed."""
        return self.stored[f"{_key(handle)}/{name}"]

    def unlist(self, handle: str, status: int) -> None:
        """Refuse to list this version's files."""
        self._unlisted[_key(handle)] = status

    def expire(self) -> None:
        """No address that was given so far is good any more."""
        with self._lock:
            self._signatures.clear()

    def seen(self, side: str | None = None, what: str | None = None) -> list[Seen]:
        """The requests in their order."""
        with self._lock:
            return [s for s in self._log if side in (None, s.side) and what in (None, s.what)]

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    def close(self) -> None:
        """
        Raises:
            AssertionError: the server itself failed.
        """
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.stop()
            thread.join()
        assert not self.errors, f"the server itself failed: {self.errors}"

    def __enter__(self) -> KaggleServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note(self, seen: Seen) -> None:
        with self._lock:
            self._log.append(seen)

    def is_signed(self, signature: str) -> bool:
        with self._lock:
            return signature in self._signatures

    def answer(self, what: str, variation: str, arguments: Mapping[str, str], login: str | None) -> Any:
        """What the API says: an object for JSON, or a string for an address to go to.

        Raises:
            ApiError: it refuses.
        """
        if login is not None and login not in self.accounts:
            raise ApiError(401, "Unauthenticated")
        versions = self._versions.get(_key(variation))
        if not versions:
            raise ApiError(404, "Not found")
        model = "/".join(_key(variation).split("/")[:2])
        if what != "get" and model in self.gated and (login, model) not in self.consents:
            raise ApiError(403, "User has not consented to terms of use.")
        number = int(arguments.get("versionNumber") or max(versions))
        if number not in versions:
            raise ApiError(404, "Not found")
        version, handle = versions[number], f"{_key(variation)}/{number}"
        if what == "get":
            return self._instance(self._spelt[_key(variation)], number, version)
        if what == "files":
            if handle in self._unlisted:
                raise ApiError(self._unlisted[handle], "There is no listing")
            return self._page(version, arguments)
        name = arguments.get("path") or version.archive[0]
        if f"{handle}/{name}" not in self.stored:
            raise ApiError(404, "Not found")
        return self._signed(f"{handle}/{name}")

    def _instance(self, variation: str, number: int, version: Version) -> dict[str, Any]:
        return {
            "id": 1,
            "slug": variation.split("/")[3],
            "framework": variation.split("/")[2],
            "versionId": 100 + number,
            "versionNumber": number,
            "url": f"https://www.kaggle.com/models/{variation}",
            "licenseName": "Apache 2.0",
            "totalUncompressedBytes": sum(map(len, version.files.values())),
        }

    def _page(self, version: Version, arguments: Mapping[str, str]) -> dict[str, Any]:
        size = min(int(arguments.get("pageSize") or PAGE), MAX_PAGE)
        start = int(base64.urlsafe_b64decode(arguments.get("pageToken") or "") or b"0")
        names = sorted(version.files)
        more = base64.urlsafe_b64encode(str(start + size).encode()).decode() if names[start + size :] else ""
        return {
            "files": [
                {"name": name, "size": len(version.files[name]), "creationDate": CREATED}
                for name in names[start : start + size]
            ],
            "nextPageToken": more,
        }

    def _signed(self, name: str) -> str:
        signature = secrets.token_hex(16)
        with self._lock:
            self._signatures.add(signature)
        query = urllib.parse.urlencode({"X-Goog-Expires": 259200, "X-Goog-Signature": signature})
        return f"{self.storage_url}/kaggle-models-data/{urllib.parse.quote(name)}?{query}"


def make_tar_gz(files: Mapping[str, bytes]) -> bytes:
    """As Kaggle packs them: names without `./`, no directories."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, body in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def _framework(name: str) -> str:
    """One name for a framework, whatever its form: `tensorFlow2`, `MODEL_FRAMEWORK_TENSOR_FLOW_2`."""
    return re.sub("_", "", name).lower().removeprefix("modelframework")


def _key(handle: str) -> str:
    owner, model, framework, *rest = handle.split("/")
    return "/".join((owner, model, _framework(framework), *rest))
