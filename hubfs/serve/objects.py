"""The files of a local hub's versions, one by one, as the objects of a bucket, with their checksums.

An object's key is its path below the root: `<publisher>/<model…>/<version>/<file>`. Checksums are computed
when they are first asked for and kept, in one JSON file a version, until a file's size or time changes.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
from cachetools import LRUCache

from hubfs.errors import HubfsError, NotFoundError, UnavailableError
from hubfs.serve.catalog import Catalog
from hubfs.serve.files import BLOCK, Member, Version, file_member, members_of, open_member

LOG = logging.getLogger("hubfs.serve")

#: Versions whose objects are kept in memory.
_VERSIONS = 64


@dataclass(frozen=True)
class StoredObject:
    """One object.

    Attributes:
        size: bytes.
        mtime_ns: of the file.
        md5: hex.
        crc32c: base64 of the big-endian CRC, as `x-goog-hash` has it.
    """

    size: int
    mtime_ns: int
    md5: str
    crc32c: str

    def is_of(self, member: Member) -> bool:
        """Whether the file still is as it was."""
        return (self.size, self.mtime_ns) == (member.size, member.mtime_ns)

    @property
    def etag(self) -> str:
        """The MD5, as Google Cloud Storage has it for objects that were uploaded in one piece."""
        return f'"{self.md5}"'

    @property
    def generation(self) -> int:
        """Microseconds since the epoch, as Google's generations are; another one for each content."""
        return max(1, self.mtime_ns // 1000)

    @property
    def modified(self) -> int:
        """Whole seconds since the epoch."""
        return max(0, self.mtime_ns // 10**9)


class Objects:
    """The objects of a catalog. Safe for use by many threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()  # protects _known
        self._known: LRUCache[str, Mapping[str, StoredObject]] = LRUCache(_VERSIONS)

    def files(self, prefix: str) -> Iterator[tuple[str, Version, Member]]:
        """Every key that begins with `prefix`, and whose file it is; in no order.

        Raises:
            HubfsError: a version has a file that an object cannot stand for.
        """
        for version in self._versions(prefix):
            for member in members_of(version):
                key = f"{version.handle}/{member.name}"
                if not member.is_directory and key.startswith(prefix):
                    yield _checked(key), version, member

    def describe(self, version: Version, member: Member) -> StoredObject:
        """A file's checksums. Its whole version's are computed if they are not known yet.

        Raises:
            UnavailableError: the files change while they are read.
        """
        known = self._remembered(version).get(member.name)
        if known is None or not known.is_of(member):
            known = self._compute(version).get(member.name)
        if known is None:
            raise _changing(version)
        return known

    def open(self, key: str) -> tuple[StoredObject, BinaryIO]:
        """An object and its bytes.

        Raises:
            NotFoundError: there is none.
            UnavailableError: it changes while it is read.
        """
        version = self._catalog.version_above(key)
        if version is None or any(part in ("", ".", "..") for part in key.split("/")):
            raise NotFoundError(f"{key!r}: no such object")
        name = key.removeprefix(f"{version.handle}/")
        try:
            if (version.directory / name).is_dir():
                raise NotFoundError(f"{key!r} is a directory")
            member = file_member(version, name)
            found = self.describe(version, member)
            file = open_member(member)
        except (OSError, ValueError) as error:
            raise NotFoundError(f"{key!r}: no such object ({error})") from error
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (found.size, found.mtime_ns):
            file.close()
            raise _changing(version)
        return found, file

    def _versions(self, prefix: str) -> list[Version]:
        # What comes behind the last slash may be the beginning of many names.
        above = prefix.rpartition("/")[0]
        version = self._catalog.version_above(above)
        if version is not None:
            return [version]
        return [v for v in self._catalog.models(above) if f"{v.handle}/".startswith(prefix)]

    def _remembered(self, version: Version) -> Mapping[str, StoredObject]:
        with self._lock:
            return self._known.get(version.handle) or {}

    def _compute(self, version: Version) -> Mapping[str, StoredObject]:
        """The objects of a version as its files are now; what did not change is not read again."""
        try:
            with self._catalog.claim(_key(version)):
                found = self._update(version)
        except FileNotFoundError as error:
            raise _changing(version) from error
        except OSError as error:
            raise HubfsError(f"{version.handle}: its files cannot be read: {error.strerror}") from error
        with self._lock:
            self._known[version.handle] = found
        return found

    def _update(self, version: Version) -> Mapping[str, StoredObject]:
        path = self._catalog.archive_dir / f"{_key(version)}.json"
        before, found = _read(path), {}
        for member in members_of(version):
            if not member.is_directory:
                known = before.get(member.name)
                found[member.name] = known if known and known.is_of(member) else self._digest(version, member)
        if found != before:
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text(json.dumps({name: dataclasses.astuple(o) for name, o in found.items()}))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return found

    def _digest(self, version: Version, member: Member) -> StoredObject:
        md5, crc32c = hashlib.md5(usedforsecurity=False), 0
        with open_member(member) as file:
            while block := file.read(BLOCK):
                self._catalog.check_open()
                md5.update(block)
                crc32c = google_crc32c.extend(crc32c, block)
            status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (member.size, member.mtime_ns):
            raise _changing(version)
        encoded = base64.b64encode(crc32c.to_bytes(4, "big")).decode()
        return StoredObject(member.size, member.mtime_ns, md5.hexdigest(), encoded)


def _changing(version: Version) -> UnavailableError:
    return UnavailableError(f"{version.handle}: its files are changing", retry_after=1.0)


def _key(version: Version) -> str:
    # "o:" keeps these names apart from those of the version's archive.
    return hashlib.sha1(os.fsencode(f"o:{version.handle}"), usedforsecurity=False).hexdigest()


def _read(path: Path) -> dict[str, StoredObject]:
    with contextlib.suppress(FileNotFoundError):
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            return {name: StoredObject(*fields) for name, fields in content.items()}
        except (ValueError, TypeError, AttributeError) as error:
            LOG.warning("%s is damaged, its checksums are computed again: %s", path, error)
    return {}


def _checked(key: str) -> str:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise HubfsError(f"{key!a}: this name is not UTF-8, so it cannot be an object's") from error
    if any(ord(c) < 0x20 or c in "\x7f\ufffe\uffff" for c in key):
        raise HubfsError(f"{key!a}: a name with control characters in it cannot be an object's")
    return key
