"""The files of one version. Immutable once it is known."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hubfs.cache.layout import write_atomically
from hubfs.cache.savedmodel import declared
from hubfs.errors import CacheError

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Info:
    """A file or directory of a version."""


@dataclass(frozen=True, slots=True)
class DirectoryInfo(Info):
    """
    Attributes:
        mtime: epoch seconds.
        subdirectories: their number; `None` while they are not all known.
    """

    mtime: int
    subdirectories: int | None


@dataclass(frozen=True, slots=True)
class FileInfo(Info):
    """
    Attributes:
        size: bytes.
        mtime: the publisher's time of modification (or of caching), epoch seconds.
        crc32: CRC-32 of the content, `None` where it was never computed (a directory that was adopted).
    """

    size: int
    mtime: int
    crc32: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All files and directories of a version, by their path relative to its root.

    Attributes:
        files: every regular file.
        directories: every directory but the root, with its time of modification.
        mtime: that of the root.
    """

    handle: str
    files: Mapping[str, FileInfo]
    directories: Mapping[str, int]
    mtime: int
    _children: dict[str, dict[str, bool]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        tree: dict[str, dict[str, bool]] = {"": {}}
        for path in self.directories:
            tree.setdefault(path, {})
        for paths, is_dir in ((self.directories, True), (self.files, False)):
            for path in paths:
                parent, _, name = path.rpartition("/")
                tree.setdefault(parent, {})[name] = is_dir
        self._children.update(tree)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(info.size for info in self.files.values())

    def children(self, directory: str) -> Mapping[str, bool] | None:
        """Names in a directory and whether each is a directory; `None` if it is not one."""
        found = self._children.get(directory)
        return None if found is None else MappingProxyType(found)

    def directory(self, path: str) -> DirectoryInfo:
        """One of its directories; the root is the empty path."""
        mtime = self.directories[path] if path else self.mtime
        return DirectoryInfo(mtime, sum(self._children[path].values()))

    def same_content(self, other: Manifest) -> bool:
        """Whether both describe the same files, as far as sizes and known checksums tell."""
        if self.files.keys() != other.files.keys():
            return False
        for path, mine in self.files.items():
            yours = other.files[path]
            if mine.size != yours.size or (
                None not in (mine.crc32, yours.crc32) and mine.crc32 != yours.crc32
            ):
                return False
        return True

    def disagreement(self, directory: Path) -> str | None:
        """What is missing or has another size in `directory`, in words; `None` if all is there."""
        # Without pathlib: this is done for each model that a `find` comes by.
        base = f"{directory}/"
        for path, info in self.files.items():
            try:
                status = os.lstat(base + path)
            except (FileNotFoundError, NotADirectoryError):
                return f"{path} is missing"
            if not stat.S_ISREG(status.st_mode):
                return f"{path} is not a file"
            if status.st_size != info.size:
                return f"{path} has {status.st_size} bytes instead of {info.size}"
        for path in self.directories:
            try:
                missing = not stat.S_ISDIR(os.lstat(base + path).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                missing = True
            if missing:
                return f"{path}/ is missing"
        return None

    def save(self, path: Path, directory: Path) -> None:
        """
        Args:
            directory: where the files are.

        Raises:
            OSError: it could not be written.
        """
        text = json.dumps(
            {
                "format": _FORMAT,
                "handle": self.handle,
                "inode": directory.stat().st_ino,
                "mtime": self.mtime,
                "directories": dict(self.directories),
                "files": {name: [info.size, info.mtime, info.crc32] for name, info in self.files.items()},
            }
        )
        write_atomically(path, text)

    @classmethod
    def load(cls, path: Path) -> tuple[Manifest, int] | None:
        """The manifest in a file and the inode of its directory; `None` if there is none that can be used.

        A manifest only ever confirms what is on disk, so one that cannot be read costs no more than
        walking the directory again.
        """
        try:
            found = json.loads(path.read_text(encoding="utf8"))
            if found["format"] != _FORMAT:
                return None
            files = {
                name: FileInfo(natural(size), natural(mtime), None if crc32 is None else natural(crc32))
                for name, (size, mtime, crc32) in found["files"].items()
            }
            directories = {name: natural(mtime) for name, mtime in found["directories"].items()}
            manifest = cls(str(found["handle"]), files, directories, natural(found["mtime"]))
            return manifest, natural(found["inode"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def natural(value: object) -> int:
    """
    Raises:
        TypeError: it is not a number that can stand in a manifest.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a natural number")
    return value


def read_or_adopt(directory: Path, manifest_file: Path, handle: str) -> tuple[Manifest, bool]:
    """The manifest of a version in the cache, and whether it is new (not in `manifest_file`).

    Raises:
        CacheError: the directory is not a complete version; the message says why.
        FileNotFoundError: it vanished.
    """
    loaded = Manifest.load(manifest_file)
    if loaded is not None:
        manifest, inode = loaded
        problem = manifest.disagreement(directory)
        if problem is None:
            return manifest, False
        # Another directory has taken its place: tensorflow_hub downloaded the handle anew.
        if directory.stat().st_ino == inode:
            raise CacheError(f"{handle}: its directory in the cache ({directory}) was damaged: {problem}")
    return adopt(directory, handle), True


def adopt(directory: Path, handle: str) -> Manifest:
    """The manifest of a directory that tensorflow_hub filled.

    Raises:
        CacheError: it is empty, has no model in it, or visibly lacks a part of one.
        FileNotFoundError: it vanished.
    """
    files: dict[str, FileInfo] = {}
    directories: dict[str, int] = {}
    for folder, folder_names, names in os.walk(directory, onerror=_raise):
        base = Path(folder).relative_to(directory)
        for name in folder_names:
            if (Path(folder) / name).is_symlink():
                raise CacheError(f"{handle}: {Path(folder) / name} is a symbolic link")
            directories[(base / name).as_posix()] = int((Path(folder) / name).lstat().st_mtime)
        for name in names:
            path = Path(folder) / name
            if path.is_symlink() or not path.is_file():
                raise CacheError(f"{handle}: {path} is neither a file nor a directory")
            status = path.lstat()
            files[(base / name).as_posix()] = FileInfo(status.st_size, int(status.st_mtime))
    problem = incomplete(files, directories) or _undeclared_loss(directory, files)
    if problem:
        raise CacheError(f"{handle}: its directory in the cache ({directory}) {problem}")
    return Manifest(handle, files, directories, int(directory.stat().st_mtime))


def is_model_file(path: str) -> bool:
    """Whether a file makes the directory it is in a model."""
    known = {"saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb", "model.json"}
    return "/" not in path and (path in known or path.endswith((".tflite", ".keras", ".h5", ".safetensors")))


def incomplete(files: Mapping[str, FileInfo], directories: Collection[str]) -> str | None:
    """Why these files cannot be a whole model, if that can be seen."""
    if not files:
        return "is empty"
    if not any(is_model_file(path) for path in files):
        return "has no model in it"
    for name in ("saved_model.pb", "variables/variables.index"):
        if name in files and not files[name].size:
            return f"has an empty {name}"
    if "variables" in directories:
        shards = {path for path in files if path.startswith("variables/variables.data-")}
        if shards or "variables/variables.index" in files:
            if "variables/variables.index" not in files or not shards:
                return "lacks some of its variables"
            for path in shards:
                count = re.search(r"-of-(\d+)$", path)
                if count and int(count[1]) != len(shards):
                    return f"lacks some of its {int(count[1])} variable files"
        elif not any(path.startswith("variables/") for path in files):
            # A saver never leaves the directory empty, cleaners of temporary directories do.
            return "has lost its variables"
    return None


def _undeclared_loss(directory: Path, files: Mapping[str, FileInfo]) -> str | None:
    """What the SavedModel declares and is not there: cleaners remove emptied directories as well."""
    if "saved_model.pb" not in files:
        return None
    found = declared(directory / "saved_model.pb")
    if found is None:
        return None
    if found.variables and "variables/variables.index" not in files:
        return "has lost its variables"
    missing = [name for name in sorted(found.assets) if f"assets/{name}" not in files]
    return f"has lost its asset {missing[0]}" if missing else None


def _raise(error: OSError) -> None:
    raise error
