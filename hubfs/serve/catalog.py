"""What a local hub has to offer: the models below a directory, and their archives.

The tree is `ROOT/<publisher>/<model…>/<version>/…`. An archive is built when it is first asked for and kept
until the version's files change. Next to it lies a JSON file with its checksums; the rename of that file is
what publishes the archive, so a crash leaves either the old archive, the new one or none.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import stat
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from isal import isal_zlib

from hubfs.errors import ConfigError, HubfsError, NotFoundError, StoppedError, UnavailableError
from hubfs.serve.files import BLOCK, Member, Version, is_version, members_of, open_member

LOG = logging.getLogger("hubfs.serve")

#: Part of every signature: raise it when the archives are to be made in another way.
_ARCHIVE_KIND = "1"
#: How often a request that waits for another one's archive looks whether it is there.
_POLL_SECONDS = 0.05
#: zlib's window bits for a deflate stream in a gzip frame (whose time stamp isal leaves at zero).
_GZIP = 31


@dataclass(frozen=True)
class Archive:
    """A built archive: what its JSON file says.

    Attributes:
        signature: of the tree it was made from.
        file: its name in the archive directory.
        size: bytes.
        md5: hex, of the compressed bytes.
        crc32c: base64 of the big-endian CRC, as `x-goog-hash` has it.
        modified: when it was built, in whole seconds since the epoch; no two archives of a version share it.
    """

    signature: str
    file: str
    size: int
    md5: str
    crc32c: str
    modified: int


class Catalog:
    """The models below `root`. Safe for use by many threads and, on one archive directory, many processes.

    Args:
        root: the directory of publishers. Directories in it that are symlinks, or whose names begin with
            a dot, are not looked into.
        archive_dir: where archives are kept; by default a directory of this root's own in the user's cache.

    Raises:
        ConfigError: one of the directories cannot be used.
    """

    def __init__(self, root: Path, archive_dir: Path | None = None) -> None:
        if not root.is_dir():
            raise ConfigError(
                f"{root} is not a directory", hint="give a directory of <publisher>/<model>/<version>/"
            )
        self.root = root.resolve()
        self.archive_dir = (archive_dir or _default_archive_dir(self.root)).absolute()
        self._closing = threading.Event()
        _prepare_archive_dir(self.archive_dir)

    def close(self) -> None:
        """Give up the archives that are being built; their requests end with `StoppedError`."""
        self._closing.set()

    def check_open(self) -> None:
        """
        Raises:
            StoppedError: the catalog was closed.
        """
        if self._closing.is_set():
            raise StoppedError("the hub is being stopped")

    def models(self, below: str = "") -> list[Version]:
        """All versions that are served, by model and number.

        Args:
            below: only those below this path, which is no version's.
        """
        found = []
        parts = tuple(part for part in below.split("/") if part)
        try:
            top = self._directory(below, parts)
        except NotFoundError:
            return []
        for path, directories, _ in os.walk(top):
            above = Path(path).relative_to(self.root).parts
            here = [
                Version("/".join(above), name, Path(path, name)) for name in directories if len(above) >= 2
            ]
            served = [version for version in here if is_version(version.number) and _is_served(version)]
            found += served
            taken = {version.number for version in served}
            directories[:] = [name for name in directories if name not in taken and not name.startswith(".")]
        return sorted(found, key=lambda version: (version.model, *_order(version.number)))

    def version_above(self, path: str) -> Version | None:
        """The version that a path is, or leads into; `None` if it leads to none.

        A number from the third component on is a version if it leads to a file without another number.
        Others are a part of a model's name, as in `tensorflow/lite-model/mobilenet/1/default/1`.
        """
        parts = path.split("/")
        for at, name in enumerate(parts):
            if at >= 2 and is_version(name):
                try:
                    version = Version("/".join(parts[:at]), name, self._directory(path, parts[: at + 1]))
                except NotFoundError:
                    return None
                if _is_served(version):
                    return version
        return None

    def find(self, handle: str) -> Version:
        """The version that a handle's path names; without a number at its end, the latest.

        Raises:
            NotFoundError: there is none, or the path is not one that could name any.
        """
        parts = handle.split("/")
        if len(parts) < 2:
            raise NotFoundError(f"{handle}: not a model", hint="ask for <publisher>/<model>/<version>")
        directory = self._directory(handle, parts)
        try:
            version = self.version_above(handle)
            if version is None:
                versions = _versions(handle, directory)
                if not versions:
                    raise NotFoundError(f"{handle}: no version of such a model here")
                return versions[-1]
        except OSError as error:
            raise NotFoundError(f"{handle}: cannot be looked into ({error.strerror})") from error
        if version.handle != handle:
            raise NotFoundError(f"{handle}: files of a version are not served one by one")
        return version

    def open_archive(self, version: Version) -> tuple[Archive, BinaryIO]:
        """The version's archive, built first if there is none or its files have changed.

        Many callers may ask at once: one builds, the others wait for it.

        Raises:
            UnavailableError: the files change while they are read.
            StoppedError: the catalog was closed.
            HubfsError: the version has what an archive cannot hold, or a file cannot be read or written.
        """
        key = hashlib.sha1(os.fsencode(version.handle), usedforsecurity=False).hexdigest()
        try:
            members = members_of(version)
            signature = _signature(members)
            found = self._open(key, signature)
            if found is None:
                with self.claim(key):
                    found = self._open(key, signature) or self._build(version, key, members, signature)
        except FileNotFoundError as error:
            raise UnavailableError(f"{version.handle}: its files are changing", retry_after=1.0) from error
        except OSError as error:
            raise HubfsError(f"{version.handle}: its archive cannot be made: {error.strerror}") from error
        return found

    def _directory(self, handle: str, parts: Sequence[str]) -> Path:
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise NotFoundError(f"{handle!r} is not the path of a model")
        directory = self.root
        for part in parts:
            directory = directory / part
            try:
                mode = directory.lstat().st_mode
            except (OSError, ValueError) as error:
                raise NotFoundError(f"{handle}: no such model here ({error})") from error
            if not stat.S_ISDIR(mode):
                raise NotFoundError(f"{handle}: {part} is not a directory")
        return directory

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Keep others, of this process or another, from making the same file of the archive directory.

        Raises:
            StoppedError: the catalog was closed.
        """
        _prepare_archive_dir(self.archive_dir)  # a cleaned ~/.cache is no reason to stop serving
        path = self.archive_dir / f"{key}.lock"
        while not _locked(lock := path.open("ab"), path):
            lock.close()
            if self._closing.wait(_POLL_SECONDS):
                raise StoppedError("the hub is being stopped")
        with lock:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _read(self, key: str) -> Archive | None:
        path = self.archive_dir / f"{key}.json"
        try:
            return Archive(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            LOG.warning("%s is damaged, its archive is built again: %s", path, error)
            return None

    def _open(self, key: str, signature: str) -> tuple[Archive, BinaryIO] | None:
        archive = self._read(key)
        if archive is None or archive.signature != signature:
            return None
        try:
            file = (self.archive_dir / archive.file).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != archive.size:
            file.close()
            return None
        return archive, file

    def _build(
        self, version: Version, key: str, members: list[Member], signature: str
    ) -> tuple[Archive, BinaryIO]:
        started, previous = time.monotonic(), self._read(key)
        temporary = self.archive_dir / f"{key}.tmp"
        try:
            size, md5, crc32c = self._write(version, members, temporary)
            if _signature(members_of(version)) != signature:
                raise UnavailableError(f"{version.handle}: its files are changing", retry_after=1.0)
            # The date may stand for the bytes (If-Range), so one second must not see two archives.
            modified = max(int(time.time()), previous.modified + 1 if previous else 0)
            archive = Archive(signature, f"{key}.{md5}.tar.gz", size, md5, crc32c, modified)
            temporary.replace(self.archive_dir / archive.file)
        finally:
            temporary.unlink(missing_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(archive), indent=1))
        temporary.replace(self.archive_dir / f"{key}.json")
        self._drop_others(key, archive)
        LOG.info("%s: archive of %d bytes in %.1f s", version.handle, size, time.monotonic() - started)
        return archive, (self.archive_dir / archive.file).open("rb")

    def _write(self, version: Version, members: list[Member], path: Path) -> tuple[int, str, str]:
        compressor = isal_zlib.compressobj(isal_zlib.ISAL_DEFAULT_COMPRESSION, isal_zlib.DEFLATED, _GZIP)
        md5, crc32c, size = hashlib.md5(usedforsecurity=False), 0, 0
        with path.open("wb") as out:
            for block in _tar_blocks(version, members):
                self.check_open()
                packed = compressor.compress(block) if block else compressor.flush()
                md5.update(packed)
                crc32c = google_crc32c.extend(crc32c, packed)
                size += out.write(packed)
            # Half an archive after a power cut, with the whole one's checksum, would be refused for ever.
            out.flush()
            os.fsync(out.fileno())
        return size, md5.hexdigest(), base64.b64encode(crc32c.to_bytes(4, "big")).decode()

    def _drop_others(self, key: str, archive: Archive) -> None:
        for path in self.archive_dir.glob(f"{key}.*.tar.gz"):
            if path.name != archive.file:
                path.unlink(missing_ok=True)


def _default_archive_dir(root: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha1(os.fsencode(root), usedforsecurity=False).hexdigest()[:16]
    return Path(cache, "hubfs", "serve", key)


def _prepare_archive_dir(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be used for archives: {error.strerror}") from error
    # What lies there is served as the publisher's bytes: nobody else may have put it there.
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{path} belongs to another user or everybody may write to it")


def _locked(lock: BinaryIO, path: Path) -> bool:
    # flock belongs to the open file: it keeps threads apart as well as processes, and a crash frees it.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have removed it meanwhile, and then another one is the lock.
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _order(number: str) -> tuple[int, str]:
    return int(number), number


def _versions(model: str, directory: Path) -> list[Version]:
    found = [Version(model, name, directory / name) for name in os.listdir(directory) if is_version(name)]
    return sorted(filter(_is_served, found), key=lambda version: _order(version.number))


def _is_served(version: Version) -> bool:
    """Whether it is a directory, not a link to one, and a file is in it that no further number leads to."""
    if version.directory.is_symlink():
        return False
    for path, directories, names in os.walk(version.directory):
        directories[:] = [name for name in directories if not is_version(name)]
        files = (os.path.join(path, name) for name in names)
        if any(os.path.isfile(file) and not os.path.islink(file) for file in files):
            return True
    return False


def _signature(members: list[Member]) -> str:
    digest = hashlib.sha256(_ARCHIVE_KIND.encode())
    for member in members:
        digest.update(os.fsencode(f"{member.name}\0{member.size}\0{member.mtime_ns}\0"))
    return digest.hexdigest()


def _tar_blocks(version: Version, members: list[Member]) -> Iterator[bytes]:
    """The tar stream in blocks, with an empty one at its end."""
    # A directory's own time changes when something is put into it and taken out again; the newest file's
    # is a function of what the signature covers.
    newest = max((member.mtime_ns for member in members), default=0)
    written = 0
    for member in [Member("", version.directory, 0, 0), *members]:
        is_directory = member.is_directory or not member.name
        info = tarfile.TarInfo(f"./{member.name}")
        info.type = tarfile.DIRTYPE if is_directory else tarfile.REGTYPE
        info.mode = 0o755 if is_directory else 0o644
        info.size = member.size
        info.mtime = max(0, (newest if is_directory else member.mtime_ns) // 10**9)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        yield header
        if not is_directory:
            yield from _file_blocks(version, member)
        padding = -member.size % tarfile.BLOCKSIZE
        if padding:
            yield bytes(padding)
        written += len(header) + member.size + padding
    # The end marker is two blocks; tar fills up to a whole record.
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % tarfile.RECORDSIZE)
    yield b""


def _file_blocks(version: Version, member: Member) -> Iterator[bytes]:
    left = member.size
    with open_member(member) as file:
        while left:
            block = file.read(min(left, BLOCK))
            if not block:
                raise UnavailableError(f"{version.handle}: its files are changing", retry_after=1.0)
            yield block
            left -= len(block)
