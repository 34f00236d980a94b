"""A hub and a bucket for tests that fail as they are told to.

The hub names the bucket (303), which lists its objects and gives ranges of them as Google Cloud Storage's
XML API does. The answers' faults are those of `tests/faults.py`. It shares no code with `hubfs.serve`.

    with BucketHub() as hub:
        hub.publish("google/model/1", make_tree())
        environ["STORAGE_EMULATOR_HOST"] = hub.url
        hub.fault_file("google/model/1", "saved_model.pb", Fault.cut(1000), Fault.status(503))
        ...
        assert hub.sent("google/model/1") == {"saved_model.pb": 3000}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from xml.sax.saxutils import escape

from tests.faults import AUTO, Answer, Fault, Request, Resource
from tests.hub import FaultHub

__all__ = ["BUCKET", "BucketHub"]

BUCKET = "models-of-a-test"
#: When all objects were written.
MODIFIED = "2023-05-04T03:02:01.000Z"
MTIME = 1683169321


class BucketHub(FaultHub):
    """A `FaultHub` with a bucket, `gs://models-of-a-test`.

    Attributes:
        named: what the hub answers to `?tf-hub-format=uncompressed`, by handle's path: status and body.
        listed: what the listing tells instead of the truth, by key: `ETag`, `Size`, `Key`; None leaves
            it out.
        page: objects of one answer at most.
    """

    def __init__(self) -> None:
        self.named: dict[str, tuple[int, bytes]] = {}
        self.listed: dict[str, Mapping[str, str | None]] = {}
        self.page = 1000
        super().__init__()

    def publish(self, handle_path: str, tree: Mapping[str, bytes], etag: str | None = AUTO) -> None:
        """Have a version in the bucket, which the hub names."""
        self.named[handle_path] = (303, f"gs://{BUCKET}/{handle_path}".encode())
        for name, content in tree.items():
            self.put(f"{handle_path}/{name}", content, etag)

    def put(self, key: str, content: bytes, etag: str | None = AUTO, *, digests: bool = True) -> None:
        """Have an object, or another one in its place. Without `digests` its ETag alone tells a checksum."""
        self.add(f"{BUCKET}/{key}", content, etag=etag, digests=digests)

    def delete(self, key: str) -> None:
        self.remove(f"{BUCKET}/{key}")

    def fault_file(self, handle_path: str, name: str, *faults: Fault) -> None:
        """Append to the script of one of a version's files."""
        self.fault(f"{BUCKET}/{handle_path}/{name}", *faults)

    def fault_listing(self, *faults: Fault) -> None:
        """Append to the script of the bucket's listings."""
        self.fault(BUCKET, *faults)

    def locations(self) -> list[Request]:
        """Requests that ask where a version's files are."""
        return [request for request in self.requests() if request.query.get("tf-hub-format")]

    def listings(self) -> list[Request]:
        return self.requests(BUCKET)

    def reads(self, handle_path: str = "", name: str | None = None) -> list[Request]:
        """Requests for bytes of objects: of one version, of one of its files, or of all."""
        start = f"{BUCKET}/{handle_path}"
        return [
            request
            for request in self.requests()
            if request.path.startswith(start)
            and request.path != BUCKET
            and (name is None or request.path == f"{start}/{name}")
        ]

    def sent(self, handle_path: str) -> dict[str, int]:
        """Bytes that were sent of each of a version's files of which any were asked for."""
        found: dict[str, int] = {}
        for request in self.reads(handle_path):
            name = request.path.removeprefix(f"{BUCKET}/{handle_path}/")
            found[name] = found.get(name, 0) + request.bytes_sent
        return found

    def _arrived(self, request: Request) -> Answer:
        answer = super()._arrived(request)
        if answer.drop or request.fault in ("status", "html"):
            return answer
        if request.path == BUCKET and request.query.get("list-type") == "2":
            answer.plain = self._listing(request)
        elif request.query.get("tf-hub-format") == "uncompressed" and request.path in self.named:
            status, body = self.named[request.path]
            answer.plain = (status, body, {})
        elif answer.resource is not None and request.path.startswith(f"{BUCKET}/"):
            answer.plain = None
            wanted = request.headers.get("if-match")
            if wanted not in (None, answer.resource.etag):
                body = b"<Error><Code>PreconditionFailed</Code></Error>"
                answer.plain = (412, body, {"Content-Type": "application/xml"})
        return answer

    def _take_fault(self, request: Request) -> Fault | None:
        if request.path.partition("/")[0] != BUCKET:
            return super()._take_fault(request)
        script = self._scripts.get(request.path, [])
        if not script:
            return None
        fault = script[0]
        if fault.times is not None:
            rest = dataclasses.replace(fault, times=fault.times - 1)
            script[:1] = [rest] if rest.times else []
        return fault

    def _listing(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
        with self._changed:
            objects = {
                path.removeprefix(f"{BUCKET}/"): resource
                for path, resource in self._resources.items()
                if path.startswith(f"{BUCKET}/{prefix}")
            }
        keys = sorted(key for key in objects if key > after)
        page, more = keys[: self.page], keys[self.page :]
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        rows = "".join(self._row(key, objects[key]) for key in page)
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://doc.s3.amazonaws.com/2006-03-01">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{token}{rows}</ListBucketResult>"
        )
        return 200, text.encode(), {"Content-Type": "application/xml; charset=UTF-8"}

    def _row(self, key: str, resource: Resource) -> str:
        fields = {"Key": key, "LastModified": MODIFIED, "ETag": resource.etag, "Size": str(resource.size)}
        told = {**fields, **self.listed.get(key, {})}
        inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in told.items() if value)
        return f"<Contents>{inner}</Contents>"
