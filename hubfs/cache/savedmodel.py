"""What a SavedModel says it consists of, read from the skeleton of its protocol buffer.

Only field numbers and lengths are read; sources: saved_model.proto, meta_graph.proto of TensorFlow.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# SavedModel.meta_graphs; MetaGraphDef.saver_def, .asset_file_def, .object_graph_def; AssetFileDef.filename.
_META_GRAPHS, _SAVER, _ASSET_FILE, _OBJECT_GRAPH, _FILENAME = 2, 3, 6, 7, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Declared:
    """
    Attributes:
        variables: whether there must be a checkpoint in `variables/`. A version 2 SavedModel always has
            one; a version 1 model has a saver if variables were saved.
        assets: names of the files that must be in `assets/`.
    """

    variables: bool
    assets: frozenset[str]


def declared(path: Path) -> Declared | None:
    """What `saved_model.pb` declares; `None` if it cannot be understood.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _declared(data)
            except (ValueError, IndexError, UnicodeDecodeError):
                return None


def _declared(data: mmap.mmap) -> Declared:
    variables, assets = False, set()
    for number, start, end in _fields(data, 0, len(data)):
        if number != _META_GRAPHS:
            continue
        for inner, inner_start, inner_end in _fields(data, start, end):
            if inner in (_SAVER, _OBJECT_GRAPH):
                variables = True
            elif inner == _ASSET_FILE:
                for field, name_start, name_end in _fields(data, inner_start, inner_end):
                    if field == _FILENAME:
                        assets.add(data[name_start:name_end].decode("utf8"))
    return Declared(variables, frozenset(assets))


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field of a message."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            start, (_, at) = at, _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            start, at = at, at + (8 if kind == _FIXED64 else 4)
        elif kind == _BYTES:
            length, start = _varint(data, at)
            at = start + length
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, start, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
