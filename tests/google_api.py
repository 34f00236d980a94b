"""The requests that `tests/google.py` understands: the JSON and the XML API of Google Cloud Storage.

Sources: https://cloud.google.com/storage/docs/json_api, https://cloud.google.com/storage/docs/xml-api
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tests.google_http import ApiError, Exchange, element

if TYPE_CHECKING:
    from tests.google import Blob

#: Names of one answer, as at Google.
MAX_NAMES = 1000
_XML = "http://doc.s3.amazonaws.com/2006-03-01"


@dataclass(frozen=True)
class Page:
    """A part of a listing, in the order of the names.

    Attributes:
        prefixes: what stands for all names that begin so.
        following: the last of these, if there are more.
    """

    names: list[str]
    prefixes: list[str]
    following: str


def page_of(
    names: Mapping[str, Blob], prefix: str, delimiter: str = "", after: str = "", most: int = MAX_NAMES
) -> Page:
    """What a listing names after a name."""
    shown: dict[str, bool] = {}
    for name in names:
        if name.startswith(prefix):
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            shown[name if end < 0 else name[: end + len(delimiter)]] = end >= 0
    rest = sorted((name for name in shown if name.encode() > after.encode()), key=str.encode)
    found = rest[:most]
    return Page(
        [name for name in found if not shown[name]],
        [name for name in found if shown[name]],
        found[-1] if len(rest) > len(found) and found else "",
    )


class StorageHandler(Exchange):
    """Both APIs."""

    # JSON

    def answer_json(self, parts: list[str]) -> None:
        method, uploading = self.command, parts[0] == "upload"
        rest = parts[3:] if uploading else parts[2:]
        if rest[:1] != ["b"] or len(rest) < 2:
            raise ApiError(404, "Not Found")
        bucket, name = rest[1], "/".join(rest[3:])
        names = self.server.storage.names(bucket)
        if names is None:
            raise ApiError(404, "The specified bucket does not exist.")
        if uploading:
            self._upload(bucket)
        elif rest[2:] == [] and method == "GET":
            self._say_json({"kind": "storage#bucket", "name": bucket, "location": "US"})
        elif rest[2:] == ["storageLayout"] and method == "GET":
            flat = {"hierarchicalNamespace": {"enabled": False}}
            self._say_json({"kind": "storage#storageLayout", "bucket": bucket, "location": "US", **flat})
        elif rest[2:] == ["o"] and method == "GET":
            self._list_json(bucket, names)
        elif method == "POST" and "rewriteTo" in rest:
            self._rewrite(rest)
        elif method == "DELETE":
            self._delete(bucket, name)
        elif method == "GET" and self._query.get("alt") == "media":
            self._send_object(self._object(bucket, name))
        elif method == "GET":
            self._say_json(_resource(bucket, name, self._object(bucket, name)))
        else:
            raise ApiError(405, "Method Not Allowed")

    def _list_json(self, bucket: str, names: Mapping[str, Blob]) -> None:
        query = self._query
        page = page_of(
            names,
            query.get("prefix", ""),
            query.get("delimiter", ""),
            _from_token(query.get("pageToken", "")),
            min(MAX_NAMES, int(query.get("maxResults", MAX_NAMES))),
        )
        found: dict[str, Any] = {"kind": "storage#objects"}
        if page.names:
            found["items"] = [_resource(bucket, name, names[name]) for name in page.names]
        if page.prefixes:
            found["prefixes"] = page.prefixes
        if page.following:
            found["nextPageToken"] = _token(page.following)
        self._say_json(found)

    def _rewrite(self, rest: list[str]) -> None:
        middle = rest.index("rewriteTo")
        source, bucket = self._object(rest[1], "/".join(rest[3:middle])), rest[middle + 2]
        name = "/".join(rest[middle + 4 :])
        blob = self.server.storage.put(bucket, name, source.body, self._wanted_generation(), source.md5)
        size = {"totalBytesRewritten": str(blob.size), "objectSize": str(blob.size)}
        resource = _resource(bucket, name, blob)
        self._say_json({"kind": "storage#rewriteResponse", **size, "done": True, "resource": resource})

    def _upload(self, bucket: str) -> None:
        storage, query = self.server.storage, self._query
        if self.command == "PUT":
            self._resume(query.get("upload_id", ""))
        elif self.command == "POST" and query.get("uploadType") == "media":
            blob = storage.put(bucket, query["name"], self._body, self._wanted_generation())
            self._say_json(_resource(bucket, query["name"], blob))
        elif self.command == "POST" and query.get("uploadType") == "resumable":
            name = query.get("name") or json.loads(self._body)["name"]
            key = storage.begin(bucket, name, self._wanted_generation())
            scheme = "http" if self.connection is self.request else "https"
            place = f"{scheme}://{self.headers['Host']}{self._path}?uploadType=resumable&upload_id={key}"
            self._say(200, b"", {"Location": place})
        else:
            raise ApiError(400, "this way to upload is not served here")

    def _resume(self, key: str) -> None:
        """The next bytes of an upload, or the question how many are there."""
        upload = self.server.storage.upload(key)
        if upload is None:
            raise ApiError(404, "no such upload")
        asked = self.headers.get("Content-Range")
        have = len(upload.parts.get(0, b""))
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", asked or f"bytes */{len(self._body)}")
        if match is None:
            raise ApiError(400, f"Content-Range: {asked}")
        first, last = int(match[1] or 0), int(match[2] or len(self._body) - 1)
        if first > have or last - first + 1 != len(self._body):
            raise ApiError(400, f"{have} bytes are here, these are others")
        if self._body:
            upload.parts[0] = upload.parts.get(0, b"")[:first] + self._body
            have = len(upload.parts[0])
        if match[3] == str(have):
            blob = self.server.storage.finish(key)
            self._say_json(_resource(upload.bucket, upload.name, blob))
        else:
            self._say(308, b"", {"Range": f"bytes=0-{have - 1}"} if have else {})

    # XML

    def answer_xml(self, bucket: str, name: str) -> None:
        method, query, storage = self.command, self._query, self.server.storage
        names = storage.names(bucket)
        if names is None:
            raise ApiError(404, "The specified bucket does not exist.")
        if not name and method == "GET":
            self._list_xml(bucket, names)
        elif "uploads" in query or "uploadId" in query:
            self._upload_in_parts(bucket, name)
        elif method in ("GET", "HEAD"):
            self._send_object(self._object(bucket, name))
        elif method == "PUT":
            source = self.headers.get("x-goog-copy-source")
            if source is None:
                blob = storage.put(bucket, name, self._body, self._wanted_generation())
            else:
                copied = self._object(*urllib.parse.unquote(source).lstrip("/").split("/", 1))
                blob = storage.put(bucket, name, copied.body, self._wanted_generation(), copied.md5)
            root = element("CopyObjectResult" if source else "Result", ETag=blob.etag)
            body = ElementTree.tostring(root) if source else b""
            self._say(200, body, {"ETag": blob.etag, "x-goog-generation": str(blob.generation)})
        elif method == "DELETE":
            self._delete(bucket, name)
        else:
            raise ApiError(405, "Method Not Allowed")

    def _list_xml(self, bucket: str, names: Mapping[str, Blob]) -> None:
        query = self._query
        if query.get("list-type") != "2":
            raise ApiError(400, "only list-type=2 is served here")
        after = _from_token(query.get("continuation-token", "")) or query.get("start-after", "")
        prefix, most = query.get("prefix", ""), min(MAX_NAMES, int(query.get("max-keys", MAX_NAMES)))
        page = page_of(names, prefix, query.get("delimiter", ""), after, most)
        count, more = len(page.names) + len(page.prefixes), "true" if page.following else "false"
        root = element("ListBucketResult", Name=bucket, Prefix=prefix, KeyCount=count, IsTruncated=more)
        root.set("xmlns", _XML)
        if page.following:
            ElementTree.SubElement(root, "NextContinuationToken").text = _token(page.following)
        for name in page.names:
            blob = names[name]
            about = {"Generation": blob.generation, "LastModified": _when(blob), "ETag": blob.etag}
            root.append(element("Contents", Key=name, Size=blob.size, **about))
        root.extend(element("CommonPrefixes", Prefix=name) for name in page.prefixes)
        self._say(200, ElementTree.tostring(root), {"Content-Type": "application/xml"})

    def _upload_in_parts(self, bucket: str, name: str) -> None:
        storage, method, query = self.server.storage, self.command, self._query
        if method == "POST" and "uploads" in query:
            key = storage.begin(bucket, name, self._wanted_generation())
            root = element("InitiateMultipartUploadResult", Bucket=bucket, Key=name, UploadId=key)
            self._say(200, ElementTree.tostring(root), {"Content-Type": "application/xml"})
            return
        key = query.get("uploadId", "")
        upload = storage.upload(key)
        if upload is None:
            raise ApiError(404, "no such upload")
        if method == "PUT":
            number = int(query["partNumber"])
            upload.parts[number] = self._body
            self._say(200, b"", {"ETag": f'"{key}-{number}"'})
        elif method == "POST":
            blob = storage.finish(key)
            root = element("CompleteMultipartUploadResult", Bucket=bucket, Key=name, ETag=blob.etag)
            generation = {"x-goog-generation": str(blob.generation)}
            self._say(200, ElementTree.tostring(root), {"Content-Type": "application/xml", **generation})
        else:
            storage.drop(key)
            self._say(204, b"")


def _resource(bucket: str, name: str, blob: Blob) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(blob.size),
        "generation": str(blob.generation),
        "metageneration": "1",
        "updated": _when(blob),
        "md5Hash": base64.b64encode(bytes.fromhex(blob.md5)).decode(),
        "etag": blob.etag,
    }


def _when(blob: Blob) -> str:
    return f"{datetime.fromtimestamp(blob.modified, timezone.utc):%Y-%m-%dT%H:%M:%S}.000Z"


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _from_token(token: str) -> str:
    return base64.urlsafe_b64decode(token).decode()
