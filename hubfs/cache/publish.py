"""Bringing a version into the shared tier: complete, or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hubfs.cache.bucket import LARGEST_COPY, Bucket
from hubfs.cache.holder import Lease
from hubfs.cache.layout import descriptor_text
from hubfs.cache.lease import tmp_of
from hubfs.cache.manifest import FileInfo, is_model_file, natural
from hubfs.errors import DamagedError, HubfsError, StoppedError, from_os_error
from hubfs.hubs.base import RemoteFile
from hubfs.hubs.bucket import md5_of

log = logging.getLogger(__name__)

_FORMAT = "tier-1"
#: Cleaning up must not hold up a stop for longer.
_CLEANING_SECONDS = 10.0


def descriptor_of(key: str) -> str:
    return f"{key}.descriptor.txt"


def manifest_of(key: str) -> str:
    return f"{key}.hubfs.json"


@dataclass(frozen=True)
class SharedManifest:
    """What `<key>.hubfs.json` in the bucket holds.

    Attributes:
        files: by their path relative to the version's root, with the checksums of what was uploaded;
            `location` and `etag` say nothing.
    """

    handle: str
    files: Mapping[str, RemoteFile]

    def encode(self) -> bytes:
        files = {
            name: {
                "size": file.size,
                "mtime": file.mtime,
                "crc32c": file.crc32c.hex() if file.crc32c else None,
                "md5": file.md5.hex() if file.md5 else None,
            }
            for name, file in self.files.items()
        }
        return json.dumps({"format": _FORMAT, "handle": self.handle, "files": files}).encode()

    @classmethod
    def decode(cls, content: bytes) -> SharedManifest | None:
        """`None` if it cannot be understood: the version is then brought in anew."""
        try:
            found = json.loads(content)
            if found["format"] != _FORMAT:
                return None
            files = {
                str(name): RemoteFile(
                    location="",
                    size=natural(file["size"]),
                    mtime=natural(file["mtime"]),
                    crc32c=_digest(file["crc32c"], 4),
                    md5=_digest(file["md5"], 16),
                )
                for name, file in found["files"].items()
            }
            return cls(str(found["handle"]), files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def disagreement(self, scheme: str, files: Mapping[str, RemoteFile]) -> str | None:
        """What is missing, too much or different among the files that the bucket lists; `None` if nothing."""
        for name in self.files.keys() ^ files.keys():
            return f"{name} is {'missing' if name in self.files else 'not in its manifest'}"
        for name, mine in self.files.items():
            there = files[name]
            if mine.size != there.size:
                return f"{name} has {there.size} bytes instead of {mine.size}"
            md5 = md5_of(scheme, there.etag)
            if md5 is not None and mine.md5 is not None and md5 != mine.md5:
                return f"{name} has another content"
        return None

    def located(self, files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
        """The files that the bucket lists, with what the manifest knows of them."""
        return {
            name: replace(file, mtime=mine.mtime, md5=mine.md5, crc32c=mine.crc32c)
            for name, file in files.items()
            for mine in [self.files[name]]
        }


class Publication:
    """One version's way into the bucket.

    First everything is uploaded to `<key>.<uid>.tmp/` and compared there. Then the server copies it to
    `<key>/`, the model's own file (`saved_model.pb`) last, and after that come the descriptor and the
    manifest. So:

    - hubfs takes nothing for a version before its manifest is there and agrees with the listing, nor, as if
      tensorflow_hub had put it there, while there is a lock, no descriptor, or no model file;
    - hub.load takes any object below `<key>/` for the whole model: while the server copies, which has no
      other way, it finds a directory without `saved_model.pb` and fails. tensorflow_hub's own renaming has
      the same gap. At S3 a file above 5 GiB cannot be copied by one request, and is uploaded into its place:
      there the gap is as long as that.

    An owner that is cut off stops in time (`Policy.safe`), except for a request that is already on its way.

    Args:
        directory: where the files are.
        files: all of them, by their paths relative to `directory`.
        cancel: gives up, at the next piece of a file.
    """

    def __init__(
        self,
        bucket: Bucket,
        lease: Lease,
        directory: Path,
        files: Mapping[str, FileInfo],
        cancel: threading.Event,
    ) -> None:
        self._bucket = bucket
        self._lease = lease
        self._handle = lease.handle
        self._key = lease.key
        self._tmp = tmp_of(lease.key, lease.token)
        self._directory = directory
        self._files = files
        self._cancel = cancel
        self._scheme = bucket.place.scheme
        self._uploaded: dict[str, RemoteFile] = {}
        self._placing = False

    def run(self) -> None:
        """
        Raises:
            LeaseLostError, StoppedError, DamagedError, HubfsError: nothing is published.
        """
        try:
            self._remove_orphans()
            copied = [name for name in self._files if not self._is_uncopied(name)]
            for name in copied:
                self._upload(name, f"{self._tmp}/{name}")
            self._compare(self._tmp, copied)
            self._go_on()
            self._placing = True
            self._clear()
            self._place()
            self._finish()
        except BaseException:
            if self._placing:
                self._clean("parts", self._clear)
            self._clean("temporary objects", self._remove_tmp)
            raise
        self._clean("temporary objects", self._remove_tmp)

    def _go_on(self) -> None:
        if self._cancel.is_set():
            raise StoppedError(f"{self._handle}: the upload was given up")
        self._lease.check()

    def _remove_orphans(self) -> None:
        """Who owned the lease before may have died in the middle."""
        self._go_on()
        uploads = self._bucket.uploads(self._handle, self._key, self._cancel)
        for uid, names in uploads.items():
            if uid != self._lease.token:
                self._bucket.remove(self._handle, names, self._cancel)

    def _is_uncopied(self, name: str) -> bool:
        return self._scheme == "s3" and self._files[name].size > LARGEST_COPY

    def _upload(self, name: str, to: str) -> None:
        self._go_on()
        reading = _Reading(self, name)
        self._bucket.upload(self._handle, to, self._files[name].size, reading.pieces, self._cancel)
        self._uploaded[name] = reading.result()

    def _compare(self, directory: str, names: list[str]) -> None:
        """See that the bucket has what was read from the disk."""
        self._go_on()
        there, _ = self._bucket.files(self._handle, directory, self._cancel)
        expected = SharedManifest(self._handle, {name: self._uploaded[name] for name in names})
        problem = expected.disagreement(self._scheme, there)
        if problem:
            raise DamagedError(f"{self._handle}: {self._bucket.where(directory)}: after the upload {problem}")

    def _clear(self, seconds: float | None = None) -> None:
        """Remove what is in the version's place: first what makes it complete, for hubfs and for hub.load."""
        self._lease.check()
        bucket, handle = self._bucket, self._handle
        bucket.remove(handle, [manifest_of(self._key), descriptor_of(self._key)], seconds=seconds)
        there = bucket.listed(handle, self._key, seconds=seconds)
        for first in (True, False):
            names = [f"{self._key}/{name}" for name in there if is_model_file(name) is first]
            bucket.remove(handle, names, seconds=seconds)

    def _place(self) -> None:
        for name in self._files:
            if self._is_uncopied(name):
                self._upload(name, f"{self._key}/{name}")
        # TensorFlow looks for the model's own file first: while it is missing, nobody reads a part.
        for last in (False, True):
            self._go_on()
            pairs = [
                (f"{self._tmp}/{name}", f"{self._key}/{name}", info.size)
                for name, info in self._files.items()
                if is_model_file(name) is last and not self._is_uncopied(name)
            ]
            self._bucket.copy(self._handle, pairs, self._cancel)
        self._compare(self._key, list(self._files))

    def _finish(self) -> None:
        descriptor = descriptor_text(self._handle)
        manifest = SharedManifest(self._handle, self._uploaded)
        for name, content in (
            (descriptor_of(self._key), descriptor.encode("utf-8", "surrogateescape")),
            (manifest_of(self._key), manifest.encode()),
        ):
            self._go_on()
            self._bucket.overwrite(self._handle, name, content, self._cancel)

    def _remove_tmp(self, seconds: float) -> None:
        uploads = self._bucket.uploads(self._handle, self._key, seconds=seconds)
        self._bucket.remove(self._handle, uploads.get(self._lease.token, []), seconds=seconds)

    def _clean(self, what: str, clean: Callable[[float], None]) -> None:
        """Clean up as far as possible: who takes the lease next does the rest."""
        try:
            clean(_CLEANING_SECONDS)
        except HubfsError as error:
            log.info("%s: %s stay in the shared tier: %s", self._handle, what, error)


class _Reading:
    """A file of the version as it is read for an upload, and its checksums."""

    def __init__(self, publication: Publication, name: str) -> None:
        self._publication = publication
        self._name = name
        self._info = publication._files[name]

    def pieces(self, size: int) -> Iterator[bytes]:
        """The file from its beginning, in pieces of so many bytes.

        Raises:
            DamagedError: it is not what its manifest says.
            StoppedError, LeaseLostError: nobody wants it any more.
        """
        import google_crc32c

        path = self._publication._directory / self._name
        handle, info = self._publication._handle, self._info
        crc32c, crc32, md5, count = 0, 0, hashlib.md5(usedforsecurity=False), 0
        try:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(size):
                    self._publication._go_on()
                    crc32c = google_crc32c.extend(crc32c, piece)
                    crc32 = zlib.crc32(piece, crc32)
                    md5.update(piece)
                    count += len(piece)
                    yield piece
        except OSError as error:
            raise from_os_error(error, handle, "reading the cache") from error
        if count != info.size or info.crc32 not in (None, crc32):
            raise DamagedError(f"{handle}: {path} is not what its manifest says: it is not shared")
        self._result = RemoteFile("", count, info.mtime, None, md5.digest(), crc32c.to_bytes(4, "big"))

    def result(self) -> RemoteFile:
        """Its size and checksums, once all of it was read."""
        return self._result


def _digest(value: object, size: int) -> bytes | None:
    if value is None:
        return None
    raw = bytes.fromhex(str(value))
    if len(raw) != size:
        raise ValueError(f"{value!r} is no checksum")
    return raw
