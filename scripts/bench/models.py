"""Models to measure with: trees and archives of any size, made once in the work directory and kept.

Two kinds of bytes, both valid 32-bit floats of about normal distribution, the same at every run:

- `large` is what trained weights look like: deflate saves some 7 %;
- `embed` repeats: deflate makes it a quarter.

`transfer_model` makes a tree that looks like a SavedModel from outside, without TensorFlow.
`saved_model` makes a real one with TensorFlow, in a process of its own. Both have an archive beside them, as
hubs have them: tar.gz of zlib's level 6, the variables first.
`fake_cache` makes a cache directory of thousands of small models in tensorflow_hub's layout.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c

from hubfs.cache import layout, manifest
from hubfs.cache.layout import Layout
from hubfs.handles import cache_key

DATA: Final = "variables/variables.data-00000-of-00001"
#: SavedModel { saved_model_schema_version: 1, meta_graphs { meta_info_def { tags: "serve" } } }
_SAVED_MODEL: Final = bytes.fromhex("080112090a072205") + b"serve"
_BLOCK: Final = 1 << 20
#: Bytes that `embed` repeats, and how often: well inside deflate's window.
_REPEATED: Final = 128
_TIMES: Final = 4
#: Sign and upper exponent bits of normally distributed floats, as often as they come among 256.
_TOP_BYTES: Final = bytes(
    top | sign
    for sign in (0x00, 0x80)
    for top, count in ((0x3F, 73), (0x3E, 36), (0x3D, 10), (0x40, 6), (0x3C, 3))
    for _ in range(count)
)


@dataclass(frozen=True)
class Archive:
    """A model's archive on disk, and what a hub declares of it."""

    path: Path
    size: int
    md5: str
    crc32c: str


@dataclass(frozen=True)
class Model:
    """A model on disk.

    Attributes:
        handle: its path at a hub, `bench/<name>/1`.
        tree: the SavedModel's directory.
        size: bytes of its files.
    """

    handle: str
    tree: Path
    archive: Archive
    size: int


def payload(kind: str, size: int, seed: int) -> Iterator[bytes]:
    """`size` bytes of a kind, in blocks of 1 MiB; the same arguments give the same bytes."""
    source = random.Random(f"{kind} {seed}")
    for start in range(0, size, _BLOCK):
        yield bytes(_floats(source, kind))[: size - start]


def _floats(source: random.Random, kind: str) -> bytearray:
    if kind == "large":
        block = bytearray(source.randbytes(_BLOCK))
        block[3::4] = block[3::4].translate(_TOP_BYTES)
        return block
    unique = bytearray(source.randbytes(_BLOCK // _TIMES))
    unique[3::4] = unique[3::4].translate(_TOP_BYTES)
    pieces = (unique[at : at + _REPEATED] * _TIMES for at in range(0, len(unique), _REPEATED))
    return bytearray(b"".join(pieces))


def transfer_model(work: Path, kind: str, size: int) -> Model:
    """A model of `size` bytes of variables that only looks like one."""
    name = f"transfer-{kind}-{size // 1_000_000}mb"

    def build(tree: Path) -> None:
        (tree / "variables").mkdir(parents=True)
        source = random.Random(name)
        (tree / "saved_model.pb").write_bytes(_SAVED_MODEL + source.randbytes(200_000))
        (tree / "fingerprint.pb").write_bytes(source.randbytes(55))
        (tree / "variables/variables.index").write_bytes(source.randbytes(400))
        with (tree / DATA).open("wb") as file:
            file.writelines(payload(kind, size, 0))

    return _kept(work, name, build)


def saved_model(work: Path, kind: str, size: int) -> Model:
    """A real SavedModel whose variables have about `size` bytes: one for `embed`, many for `large`."""
    name = f"{kind}-{size // 1_000_000}mb"

    def build(tree: Path) -> None:
        command = [sys.executable, "-m", "scripts.bench.build_saved_model", kind, str(size), str(tree)]
        root = Path(__file__).resolve().parents[2]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    return _kept(work, name, build)


def _kept(work: Path, name: str, build: Callable[[Path], None]) -> Model:
    """The model of that name, built if it is not there yet."""
    home = work / "models" / name
    if not home.exists():
        print(f"  building {home} (once)", file=sys.stderr)
        unfinished = home.with_name(f"{name}.{os.getpid()}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            build(unfinished / "tree")
            found = pack(unfinished / "tree", unfinished / "archive.tar.gz")
            about = {"size": found.size, "md5": found.md5, "crc32c": found.crc32c}
            (unfinished / "archive.json").write_text(json.dumps(about))
            unfinished.rename(home)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    archive = Archive(home / "archive.tar.gz", **json.loads((home / "archive.json").read_text()))
    size = sum(path.stat().st_size for path in (home / "tree").rglob("*") if path.is_file())
    return Model(f"bench/{name}/1", home / "tree", archive, size)


def checksums(model: Model) -> dict[str, str]:
    """The MD5 of each file of a model, in hex, by its path in the tree; computed once and kept beside it."""
    kept = model.tree.with_name("tree.json")
    if not kept.exists():
        found = {
            path.relative_to(model.tree).as_posix(): _md5(path)
            for path in sorted(model.tree.rglob("*"))
            if path.is_file()
        }
        unfinished = kept.with_name(f"tree.json.{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        unfinished.rename(kept)
    known: dict[str, str] = json.loads(kept.read_text())
    return known


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            md5.update(block)
    return md5.hexdigest()


def pack(tree: Path, target: Path) -> Archive:
    """Make a tree's archive."""
    names = sorted(tree.rglob("*"), key=lambda path: ("variables" not in path.parts, str(path)))
    with tarfile.open(target, "w:gz", compresslevel=6, format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree, "./", recursive=False)
        for path in names:
            tar.add(path, f"./{path.relative_to(tree)}", recursive=False)
    md5, crc32c = hashlib.md5(usedforsecurity=False), google_crc32c.Checksum()
    with target.open("rb") as file:
        while block := file.read(_BLOCK):
            md5.update(block)
            crc32c.update(block)
    return Archive(target, target.stat().st_size, _base64(md5.digest()), _base64(crc32c.digest()))


def fake_cache(root: Path, hub: str, count: int) -> list[str]:
    """Fill a cache directory with `count` models of 7 small files, as if tensorflow_hub had cached them.

    Returns:
        their mount paths. What is there already stays.
    """
    source = random.Random(count)
    paths = [f"pub{i % 20:02}/family-{i // 20 % 25:02}/model-{i:05}/1" for i in range(count)]
    finished = root.with_name(f"{root.name}.finished")
    if finished.exists():
        return paths
    print(f"  building a cache of {count} models in {root} (once)", file=sys.stderr)
    for path in paths:
        add_to_cache(root, f"{hub}/{path}", _small_tree(source))
    finished.touch()
    return paths


def add_to_cache(root: Path, handle: str, tree: dict[str, bytes]) -> Path:
    """Put a model into a cache directory, as tensorflow_hub does."""
    place = Layout(root)
    directory = place.model(cache_key(handle))
    for name, content in tree.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    layout.write_descriptor(place.descriptor(cache_key(handle)), handle)
    return directory


def link_into_cache(root: Path, handle: str, model: Model) -> Path:
    """Put a model into a cache directory by hard links: its pages are the ones of the local tree."""
    place = Layout(root)
    directory = place.model(cache_key(handle))
    shutil.copytree(model.tree, directory, copy_function=os.link)
    layout.write_descriptor(place.descriptor(cache_key(handle)), handle)
    return directory


def drop_manifests(root: Path) -> None:
    """Make a cache look as if only tensorflow_hub had ever used it."""
    with os.scandir(root) as entries:
        for entry in entries:
            if ".hubfs" in entry.name:
                Path(entry.path).unlink()


def write_manifests(root: Path, handles: list[str]) -> None:
    """Make a cache look as if hubfs had brought all its models in."""
    place = Layout(root)
    for handle in handles:
        key = cache_key(handle)
        directory = place.model(key)
        if not place.manifest(key).exists():
            manifest.adopt(directory, handle).save(place.manifest(key), directory)


def _small_tree(source: random.Random) -> dict[str, bytes]:
    return {
        "saved_model.pb": _SAVED_MODEL + source.randbytes(2000),
        "keras_metadata.pb": source.randbytes(300),
        "fingerprint.pb": source.randbytes(55),
        "variables/variables.index": source.randbytes(300),
        DATA: source.randbytes(3000),
        "assets/vocab.txt": b"one\ntwo\nthree\n",
        "assets/labels.txt": b"yes\nno\n",
    }


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
