"""Model trees and archives for tests, made without TensorFlow."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from isal import igzip

#: A tree maps a relative path to a file's content; a path that ends in "/" is a directory, its content b"".
Tree = dict[str, bytes]

# SavedModel { saved_model_schema_version: 1, meta_graphs { meta_info_def { tags: "serve" } } }
_SAVED_MODEL = bytes.fromhex("0801 1209 0a07 2205") + b"serve"
_LEVELDB_MAGIC = bytes.fromhex("57fb808b247547db")


def make_tree(
    seed: int = 0,
    files: Mapping[str, bytes] | None = None,
    size: int = 1 << 16,
    *,
    empty_directory: bool = False,
) -> Tree:
    """What a SavedModel looks like from outside; the same arguments give the same bytes.

    Args:
        seed: another one gives other bytes in every file.
        files: files to add or to replace.
        size: bytes of the variables' data, which are incompressible.
        empty_directory: add `assets.extra/`.
    """
    source = random.Random(seed)
    words = "".join(f"word{source.randrange(10**6)}\n" for _ in range(500))
    tree = {
        "saved_model.pb": _SAVED_MODEL + source.randbytes(3000),
        "fingerprint.pb": source.randbytes(55),
        "variables/variables.index": source.randbytes(400) + _LEVELDB_MAGIC,
        "variables/variables.data-00000-of-00001": source.randbytes(size),
        "assets/vocab.txt": words.encode(),
    }
    if empty_directory:
        tree["assets.extra/"] = b""
    return {**tree, **(files or {})}


def make_archive(
    tree: Mapping[str, bytes],
    *,
    order: Sequence[str] | None = None,
    dirs: bool = True,
    prefix: str = "./",
    fmt: int = tarfile.GNU_FORMAT,
    gzip: bool = True,
    mtime: int = 1_500_000_000,
    extra_members: Sequence[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = (),
) -> bytes:
    """A tar or tar.gz of a tree; the same arguments give the same bytes.

    Args:
        tree: the files.
        order: names in the order in which they are stored, by default sorted; names left out are not stored.
        dirs: store directories as members too, each before what is in it, the root's (`prefix`) first.
        prefix: put before each name; `""` for none, and then no member for the root.
        fmt: `tarfile`'s number of the tar format.
        gzip: compress it.
        mtime: of all members.
        extra_members: stored at the end just as they are, with their content where they have one, and
            then with its size unless they give another.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        stored: set[str] = set()
        if dirs and prefix:
            _add_directory(tar, prefix, mtime)
        for name in sorted(tree) if order is None else order:
            parts = name.split("/")
            for directory in ["/".join(parts[:i]) + "/" for i in range(1, len(parts))]:
                if directory not in stored and (dirs or name == directory):
                    _add_directory(tar, prefix + directory, mtime)
                stored.add(directory)
            if not name.endswith("/"):
                _add(tar, _member(prefix + name, mtime), tree[name])
        for extra in extra_members:
            if isinstance(extra, tuple):
                info, content = extra
                info.size = info.size or len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(extra)
    return igzip.compress(buffer.getvalue(), 1, mtime=0) if gzip else buffer.getvalue()


def write_tree(tree: Mapping[str, bytes], directory: Path) -> Path:
    """Write a tree below `directory`, which is made if need be, and return that."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        path = directory / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return directory


def _member(name: str, mtime: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mtime = mtime
    return info


def _add_directory(tar: tarfile.TarFile, name: str, mtime: int) -> None:
    info = _member(name, mtime)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(info)


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, content: bytes) -> None:
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
