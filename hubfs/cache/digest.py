"""The checksum of a whole file, a piece at a time."""

from __future__ import annotations

import hashlib
from typing import Any

import google_crc32c

from hubfs.hubs.base import RemoteFile


class Digest:
    """The checksum of a file: the CRC-32C if there is one to compare with, else the MD5, else none."""

    def __init__(self, file: RemoteFile) -> None:
        self.wanted = file.crc32c or file.md5
        md5 = file.md5 if file.crc32c is None else None
        self._sum: Any = hashlib.md5(usedforsecurity=False) if md5 else google_crc32c.Checksum()

    def update(self, part: bytes) -> None:
        self._sum.update(part)

    def matches(self) -> bool:
        return self.wanted is None or bool(self._sum.digest() == self.wanted)
