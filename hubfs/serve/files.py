"""The files of one version, as they lie below the root of a local hub."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hubfs.errors import HubfsError, NotFoundError

#: Large enough that the calls into isal and hashlib, which release the GIL, outweigh the Python between them.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Version:
    """One version of a model, as found below the root."""

    model: str
    number: str
    directory: Path

    @property
    def handle(self) -> str:
        """The path that names it at the hub: `google/bert/2`."""
        return f"{self.model}/{self.number}"


@dataclass(frozen=True)
class Member:
    """A file or directory of a version.

    Attributes:
        name: relative to the version's directory, with "/" at the end of a directory's.
        source: the file itself; where a symlink inside of the version leads.
        size: bytes.
        mtime_ns: nanoseconds since the epoch.
    """

    name: str
    source: Path
    size: int
    mtime_ns: int

    @property
    def is_directory(self) -> bool:
        return self.name.endswith("/")


def is_version(name: str) -> bool:
    return re.fullmatch("[0-9]+", name) is not None


def members_of(version: Version) -> list[Member]:
    """Everything below the version's directory, sorted so that a directory comes before what is in it."""
    found, waiting = [], [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(version.directory / below) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    found.append(Member(f"{name}/", Path(entry.path), 0, 0))
                    waiting.append(f"{name}/")
                else:
                    found.append(file_member(version, name))
    return sorted(found, key=lambda member: member.name.split("/"))


def file_member(version: Version, name: str) -> Member:
    source = version.directory / name
    if source.is_symlink():
        source = Path(os.path.realpath(source))
        if not source.is_relative_to(version.directory):
            raise HubfsError(f"{version.handle}: {name} is a symlink that leads out of the model")
        if not source.exists():
            raise HubfsError(f"{version.handle}: {name} is a symlink that leads nowhere")
    status = source.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise HubfsError(
            f"{version.handle}: {name} is neither a file nor a directory, nor a symlink to a file"
        )
    return Member(name, source, status.st_size, status.st_mtime_ns)


def only_file(version: Version, suffix: str) -> str:
    """The path below the hub's root of the one file with this suffix.

    Raises:
        NotFoundError: there is none, or there are several.
    """
    names = [member.name for member in members_of(version) if member.name.endswith(suffix)]
    if len(names) != 1:
        raise NotFoundError(f"{version.handle}: it has {len(names) or 'no'} {suffix} files")
    return f"{version.handle}/{names[0]}"


def open_member(member: Member) -> BinaryIO:
    """A file's bytes; never those of a symlink that took its place meanwhile.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    return os.fdopen(os.open(member.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
