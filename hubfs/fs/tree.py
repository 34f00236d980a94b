"""Mount path -> node. Knows nothing of FUSE; tested without a mount."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from hubfs.cache.entry import Entry
from hubfs.cache.manifest import DirectoryInfo, FileInfo, Info, Manifest
from hubfs.cache.readable import Readable, Wait
from hubfs.cache.store import Store
from hubfs.errors import NotFoundError, RefusedError
from hubfs.fs.control import Control
from hubfs.handles import Alias, InModel, Namespace

#: Name of the directory of control files at the top of the mount. It is not listed, as tools that copy
#: or search a mount have no use for it.
CONTROL = ".hubfs"


@dataclass(frozen=True)
class Attributes:
    """What stat(2) tells of a node.

    Attributes:
        links: 1 for a directory whose children are not known yet, which tools take as "not counted".
        stored: bytes that are on disk.
    """

    inode: int
    mode: int
    links: int
    size: int
    mtime: float
    stored: int


#: Names and their attributes.
Rows = list[tuple[str, Attributes]]


class Listing:
    """A directory's content, put together when it is first asked for: often the kernel has it already.

    Attributes:
        settled: it never changes, and the attributes are whole; else only inode and type of them hold.
    """

    def __init__(self, settled: bool, make: Callable[[], Rows]) -> None:
        self.settled = settled
        self._make = make

    @functools.cached_property
    def rows(self) -> Rows:
        """Name and attributes of each, `.` and `..` included.

        Raises:
            HubfsError: they could not be found out.
        """
        return self._make()


@dataclass(frozen=True)
class InEntry:
    """A path of an entry's version."""

    entry: Entry
    inner: str


class Tree:
    """The tree that a mount shows. Every path is absolute, `/` being the mount point."""

    def __init__(self, store: Store, control: Control) -> None:
        self._store = store
        self._control = control

    def attributes(self, path: str, wait: Wait) -> Attributes:
        """
        Raises:
            HubfsError: there is no such path, or it could not be found out.
        """
        control = _control_name(path)
        if control is not None:
            return self._control_attributes(path, control)
        node, started = self._resolve(path), self._store.started
        if isinstance(node, Alias):
            return Attributes(inode(path), stat.S_IFLNK | 0o777, 1, len(node.target), started, 0)
        if isinstance(node, Namespace):
            return self._directory(path)
        if node.inner:
            info = node.entry.lookup(node.inner, wait)
            stored = node.entry.stored(node.inner, info) if isinstance(info, FileInfo) else 0
            return _attributes(path, info, stored)
        node.entry.ensure_exists(wait)
        return _attributes(path, node.entry.root_info())

    def link_target(self, path: str) -> str:
        """
        Raises:
            OSError: it is not a link.
        """
        node = self._resolve(path)
        if not isinstance(node, Alias):
            raise _os_error(errno.EINVAL, path)
        return node.target

    def list(self, path: str, wait: Wait) -> Listing:
        """
        Raises:
            HubfsError: its content could not be found out.
            OSError: it is not a directory.
        """
        base = path.rstrip("/")
        node = None if _control_name(path) is not None else self._resolve(path)
        if isinstance(node, Alias):
            raise _os_error(errno.ENOTDIR, path)
        if isinstance(node, InEntry):
            if not self._store.index.has(node.entry.handle):
                # Here is where to wait for it, and to fail.
                node.entry.manifest(wait)
            return Listing(True, lambda: self._rows_of_version(base, node, wait))
        return Listing(False, lambda: self._rows_of_names(base, node))

    def open(self, path: str, wait: Wait) -> Readable:
        """
        Raises:
            HubfsError: there is no such file, or it could not be brought in.
            OSError: it is a directory.
        """
        control = _control_name(path)
        if control is not None:
            return self._control.open(control)
        node = self._resolve(path)
        if not isinstance(node, InEntry) or not node.inner:
            raise _os_error(errno.EISDIR, path)
        return node.entry.open(node.inner, wait)

    def extended_attributes(self, path: str) -> dict[str, bytes]:
        """The `user.hubfs.*` attributes of a path. Starts nothing."""
        if _control_name(path) is not None:
            return {}
        node = self._resolve(path)
        if isinstance(node, InEntry):
            return self._control.attributes_of(node.entry, path)
        return self._control.attributes_below(node.parts) if isinstance(node, Namespace) else {}

    def paths_of(self, handle: str, manifest: Manifest) -> Sequence[str]:
        """The paths that a version has in this mount, directories included; none if it is not shown."""
        base = self._store.handles.mount_path(handle)
        if base is None:
            return []
        inner = [*manifest.files, *manifest.directories]
        return [f"/{base}", *(f"/{base}/{path}" for path in inner)]

    def space(self, block: int) -> tuple[int, int, int]:
        """Blocks of the cache's file system, free ones, and 0 for files, which are not counted."""
        total, free = self._store.space()
        return total // block, free // block, 0

    def close(self) -> None:
        """End everything that runs."""
        self._store.close()

    # ---- within

    def _resolve(self, path: str) -> Alias | Namespace | InEntry:
        """Which node a path is. Sends no request and waits for none.

        Raises:
            RefusedError: nothing can be there.
        """
        parts = tuple(part for part in path.split("/") if part)
        place: Alias | Namespace | InModel | RefusedError
        try:
            place = self._store.handles.place(path)
        except RefusedError as error:
            place = error
        if isinstance(place, Alias):
            return place
        for node in self._in_unversioned(parts, surely=isinstance(place, InModel)):
            return node
        if isinstance(place, InModel):
            return InEntry(self._store.entry(place.handle), place.inner)
        unversioned = self._store.handles.unversioned(path)
        if unversioned is not None:
            return InEntry(self._store.entry(unversioned.handle), unversioned.inner)
        if isinstance(place, RefusedError):
            if len(parts) == 2 and parts[0].endswith(":"):
                # A host: who typed it will look for the reason.
                self._store.note_failure(f"{parts[0]}//{parts[1]}", place)
            raise place
        return place

    def _in_unversioned(self, parts: tuple[str, ...], surely: bool) -> Iterator[InEntry]:
        """Unversioned models, cached or arriving, that the path may lie in, the nearest first.

        Args:
            surely: give only those that are known to have the path, since it may be a version as well.
        """
        for cut in range(len(parts) - 1, 1, -1):
            try:
                place = self._store.handles.place("/".join(parts[:cut]))
            except RefusedError:
                continue
            if not isinstance(place, Namespace) or place.handle is None:
                continue
            entry = (
                self._store.known_entry(place.handle) if surely else self._store.cached_entry(place.handle)
            )
            inner = "/".join(parts[cut:])
            manifest = entry.known_manifest() if entry else None
            if entry is None:
                continue
            if manifest is not None:
                if inner in manifest.files or manifest.children(inner) is not None:
                    yield InEntry(entry, inner)
            elif not surely and entry.is_under_way():
                yield InEntry(entry, inner)

    def _rows_of_version(self, base: str, node: InEntry, wait: Wait) -> Rows:
        found = node.entry.directory(node.inner, wait)
        if found is None:
            raise _os_error(errno.ENOTDIR, base)
        own = node.entry.lookup(node.inner, wait) if node.inner else node.entry.root_info()
        rows = [(".", _attributes(base, own)), ("..", self._directory(base.rpartition("/")[0]))]
        above = f"{node.inner}/" if node.inner else ""
        for name, info in found.items():
            stored = node.entry.stored(above + name, info) if isinstance(info, FileInfo) else 0
            rows.append((name, _attributes(f"{base}/{name}", info, stored)))
        return rows

    def _rows_of_names(self, base: str, node: Namespace | None) -> Rows:
        """Of a directory above versions, or of the one with the control files."""
        rows = [(".", self._directory(base)), ("..", self._directory(base.rpartition("/")[0]))]
        names = self._namespace_names(node) if node else dict.fromkeys(self._control.names(), False)
        for name, is_dir in sorted(names.items()):
            made = self._directory if is_dir else self._file
            rows.append((name, made(f"{base}/{name}")))
        return rows

    def _namespace_names(self, place: Namespace) -> dict[str, bool]:
        """Names in a directory above versions, and whether each is a directory."""
        names = dict.fromkeys(self._store.index.below(place.parts), True)
        entry = self._store.cached_entry(place.handle) if place.handle else None
        manifest = entry.known_manifest() if entry else None
        if manifest is not None:
            names = {**(manifest.children("") or {}), **names}
        depth = len(place.parts)
        for handle in self._store.known_handles():
            mount_path = self._store.handles.mount_path(handle) or ""
            parts = tuple(mount_path.split("/"))
            if len(parts) > depth and parts[:depth] == place.parts:
                names[parts[depth]] = True
        return names

    def _control_attributes(self, path: str, name: str) -> Attributes:
        if not name:
            return dataclasses.replace(self._directory(path), links=2)
        if name not in self._control.names():
            raise NotFoundError(f"{path}: there is no such control file")
        return self._file(path)

    def _directory(self, path: str) -> Attributes:
        """A directory of which only the name is known."""
        return Attributes(inode(path), stat.S_IFDIR | 0o555, 1, 0, self._store.started, 0)

    def _file(self, path: str) -> Attributes:
        """A file of which only the name is known."""
        return Attributes(inode(path), stat.S_IFREG | 0o444, 1, 0, time.time(), 0)


def _attributes(path: str, info: Info, stored: int = 0) -> Attributes:
    """Of a file or directory of a version."""
    if isinstance(info, FileInfo):
        # GNU tar -S takes a file without any block for one hole.
        stored = stored or min(1, info.size)
        return Attributes(inode(path), stat.S_IFREG | 0o444, 1, info.size, info.mtime, stored)
    assert isinstance(info, DirectoryInfo)
    links = 1 if info.subdirectories is None else 2 + info.subdirectories
    return Attributes(inode(path), stat.S_IFDIR | 0o555, links, 0, info.mtime, 0)


def inode(path: str) -> int:
    """A stable inode number: the same path always has the same one, after a remount too."""
    name = path.rstrip("/").encode("utf8", "surrogateescape")
    number = int.from_bytes(blake2b(name, digest_size=8).digest(), "big")
    # 0 means "none" to many tools, 1 is the root's in libfuse, and some tools use signed numbers.
    return (number >> 1) | 2


def _control_name(path: str) -> str | None:
    """The name below the control directory, empty for itself, `None` if the path is not there."""
    if path == f"/{CONTROL}":
        return ""
    return path[len(CONTROL) + 2 :] if path.startswith(f"/{CONTROL}/") else None


def _os_error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
