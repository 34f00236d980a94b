"""The read side of Google Cloud Storage's XML API: what a bucket answers to a listing.

`GET /<bucket>?list-type=2&prefix=…&delimiter=…` names objects, at most a thousand an answer; the next
thousand begin at `continuation-token`. Source: https://cloud.google.com/storage/docs/xml-api/get-bucket-list
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from http import HTTPStatus
from xml.etree import ElementTree

from hubfs.errors import HubfsError
from hubfs.serve.files import Member, Version
from hubfs.serve.objects import Objects, StoredObject

#: The bucket of a local hub, unless it is given another name. No hub in the world names one like it: whoever
#: sees it knows that it is not Google's.
BUCKET = "hubfs-serve"
#: Objects of one answer, as at Google.
MAX_KEYS = 1000
_NAMESPACE = "http://doc.s3.amazonaws.com/2006-03-01"


class RequestError(HubfsError):
    """A request that the API does not know.

    Attributes:
        status: of the answer.
        code: what the API calls it.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def is_bucket_name(name: str) -> bool:
    """Whether it is one by Google's rules: 3 to 63 lower-case letters, digits, `-`, `_` and `.`."""
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name) is not None


def list_objects(bucket: str, objects: Objects, query: Mapping[str, str]) -> str:
    """The XML that answers a listing.

    Args:
        query: `prefix`, `delimiter`, `max-keys`, `start-after` and `continuation-token` of the request.

    Raises:
        RequestError: one of them cannot be used.
        HubfsError: a file that should be listed cannot be.
    """
    if query.get("list-type") != "2":
        raise RequestError(HTTPStatus.BAD_REQUEST, "InvalidArgument", "only list-type=2 is served here")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    most = _max_keys(query.get("max-keys", str(MAX_KEYS)))
    token = query.get("continuation-token")
    after = query.get("start-after", "") if token is None else _from_token(token)
    page: dict[str, tuple[Version, Member] | None] = {}
    last, more = "", False
    for name, file in _names(objects, prefix, delimiter):
        if name.encode() <= after.encode():
            continue
        if len(page) == most:
            more = True
            break
        page[name] = file
        last = name
    root = ElementTree.Element("ListBucketResult", xmlns=_NAMESPACE)
    _add(root, Name=bucket, Prefix=prefix, KeyCount=len(page), MaxKeys=most)
    if delimiter:
        _add(root, Delimiter=delimiter)
    _add(root, IsTruncated="true" if more else "false")
    if more:
        _add(root, NextContinuationToken=base64.urlsafe_b64encode(last.encode()).decode())
    for name, file in page.items():
        if file is None:
            _add(ElementTree.SubElement(root, "CommonPrefixes"), Prefix=name)
        else:
            _add_object(ElementTree.SubElement(root, "Contents"), name, objects.describe(*file))
    return _document(root)


def error_document(code: str, message: str) -> str:
    """The XML body of an answer that is not a success."""
    root = ElementTree.Element("Error")
    _add(root, Code=code, Message=message)
    return _document(root)


def object_headers(found: StoredObject) -> dict[str, str]:
    """What tells a client about an object's content, besides the usual headers."""
    md5 = base64.b64encode(bytes.fromhex(found.md5)).decode()
    return {
        "Content-Type": "application/octet-stream",
        "x-goog-hash": f"crc32c={found.crc32c},md5={md5}",
        "x-goog-generation": str(found.generation),
        "x-goog-metageneration": "1",
        "x-goog-stored-content-length": str(found.size),
        "x-goog-storage-class": "STANDARD",
    }


def _names(objects: Objects, prefix: str, delimiter: str) -> list[tuple[str, tuple[Version, Member] | None]]:
    """Keys, and prefixes that stand for all keys below them, in the order of their bytes."""
    found: dict[str, tuple[Version, Member] | None] = {}
    for key, version, member in objects.files(prefix):
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        if end >= 0:
            found[key[: end + len(delimiter)]] = None
        else:
            found[key] = (version, member)
    return sorted(found.items(), key=lambda item: item[0].encode())


def _document(root: ElementTree.Element) -> str:
    return '<?xml version="1.0" encoding="UTF-8"?>' + ElementTree.tostring(root, encoding="unicode")


def _max_keys(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise RequestError(HTTPStatus.BAD_REQUEST, "InvalidArgument", f"max-keys={text} is not a count")
    return min(int(text), MAX_KEYS)


def _from_token(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token).decode()
    except (binascii.Error, ValueError) as error:
        message = "the continuation token is not one of this hub's"
        raise RequestError(HTTPStatus.BAD_REQUEST, "InvalidArgument", message) from error


def _add_object(element: ElementTree.Element, key: str, found: StoredObject) -> None:
    when = datetime.fromtimestamp(found.modified, timezone.utc)
    _add(
        element,
        Key=key,
        Generation=found.generation,
        MetaGeneration=1,
        LastModified=f"{when:%Y-%m-%dT%H:%M:%S}.000Z",
        ETag=found.etag,
        Size=found.size,
    )


def _add(element: ElementTree.Element, **fields: object) -> None:
    for name, value in fields.items():
        ElementTree.SubElement(element, name).text = str(value)
