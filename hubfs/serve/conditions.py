"""Conditional and range requests (RFC 9110, 13 and 14): which part of a content an answer has, if any."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus


@dataclass(frozen=True)
class Part:
    """What is to be sent.

    Attributes:
        status: 200, 206, 304, 412 or 416.
        span: the bytes of the content, for 200 and 206.
    """

    status: HTTPStatus
    span: range = range(0)


def wanted_part(method: str, headers: Message, size: int, etag: str, date: str | None = None) -> Part:
    """The part of a content that a request asks for.

    Args:
        size: bytes of the whole.
        etag: a strong one.
        date: what stands for the content besides the ETag in `If-Range`.
    """
    if "If-Match" in headers and not _any_matches(headers["If-Match"], etag, weak=False):
        return Part(HTTPStatus.PRECONDITION_FAILED)
    if _any_matches(headers.get("If-None-Match"), etag, weak=True):
        return Part(HTTPStatus.NOT_MODIFIED)
    asked = headers.get("Range")
    if method == "HEAD" or headers.get("If-Range", etag) not in (etag, date):
        asked = None
    span = _parse_range(asked, size)
    if span is None:
        return Part(HTTPStatus.OK, range(size))
    return Part(HTTPStatus.PARTIAL_CONTENT if span else HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, span)


def _any_matches(condition: str | None, etag: str, *, weak: bool) -> bool:
    """Whether the condition names the ETag; a weak one counts for `If-None-Match` only (RFC 9110, 13.1)."""
    if condition is None:
        return False
    if condition.strip() == "*":
        return True
    return etag in re.findall('"[^"]*"' if weak else '(?<!W/)"[^"]*"', condition)


def _parse_range(header: str | None, size: int) -> range | None:
    """The bytes asked for; `None` stands for all of them, an empty range for one that cannot be satisfied.

    A header of several ranges, or one that is not understood, asks for all (RFC 9110, 14.2).
    """
    match = re.fullmatch(r"bytes=\s*([0-9]{0,19})-([0-9]{0,19})\s*", header or "", re.IGNORECASE)
    if match is None or match[0].strip() == "bytes=-":
        return None
    if not match[1]:
        return range(max(0, size - int(match[2])), size)
    first, last = int(match[1]), int(match[2] or size)
    if match[2] and last < first:
        return None
    return range(first, min(last + 1, size))
