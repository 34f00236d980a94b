"""The checksums that an answer declares in its head."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping


def declared_digests(headers: Mapping[str, str]) -> dict[str, bytes]:
    """`md5` and `crc32c` of the whole object, as raw bytes.

    From `x-goog-hash`, `Content-MD5`, or an ETag that is known to be an MD5.
    """
    found: dict[str, bytes] = {}
    for part in headers.get("x-goog-hash", "").split(","):
        name, _, value = part.strip().partition("=")
        if name in ("md5", "crc32c"):
            _add_base64(found, name, value)
    if "md5" not in found and "Content-MD5" in headers and "Content-Range" not in headers:
        _add_base64(found, "md5", headers["Content-MD5"])
    # Only object stores use the MD5 as ETag; elsewhere 32 hex digits may be the hash of anything.
    store = any(name.lower().startswith(("x-goog-", "x-amz-")) for name in headers)
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    if (
        store
        and etag
        and "md5" not in found
        and "aws:kms" not in headers.get("x-amz-server-side-encryption", "")
    ):
        found["md5"] = bytes.fromhex(etag[1])
    return found


def _add_base64(found: dict[str, bytes], name: str, value: str) -> None:
    try:
        raw = base64.b64decode(value, validate=True)
    except ValueError:
        return
    if len(raw) == {"md5": 16, "crc32c": 4}[name]:
        found[name] = raw
