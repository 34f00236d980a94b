"""The files of one version: kept, found again, and compared with what is on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubfs.cache.manifest import DirectoryInfo, FileInfo, Manifest, adopt, read_or_adopt
from hubfs.errors import CacheError
from tests.models import make_tree, write_tree

HANDLE = "https://tfhub.dev/google/m/1"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tree(make_tree(size=1000), tmp_path / "model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "manifest.json"


def manifest(files: dict[str, FileInfo], directories: dict[str, int] | None = None) -> Manifest:
    return Manifest(HANDLE, files, directories or {}, 5)


# ---- what it tells


def test_children_and_directories() -> None:
    found = manifest(
        {"a": FileInfo(3, 1), "d/b": FileInfo(4, 2), "d/e/c": FileInfo(5, 3)}, {"d": 7, "d/e": 8, "x": 9}
    )
    assert dict(found.children("") or {}) == {"a": False, "d": True, "x": True}
    assert dict(found.children("d") or {}) == {"b": False, "e": True}
    assert found.children("x") == {}
    assert found.children("a") is None
    assert found.children("none") is None
    assert found.directory("") == DirectoryInfo(5, 2)
    assert found.directory("d") == DirectoryInfo(7, 1)
    assert found.directory("x") == DirectoryInfo(9, 0)
    assert found.size == 12


@pytest.mark.parametrize(
    ("mine", "yours", "same"),
    [
        ({"a": FileInfo(1, 1, 5)}, {"a": FileInfo(1, 1, 5)}, True),
        ({"a": FileInfo(1, 1, 5)}, {"a": FileInfo(1, 2, 5)}, True),
        ({"a": FileInfo(1, 1, 5)}, {"a": FileInfo(1, 1, None)}, True),
        ({"a": FileInfo(1, 1, 5)}, {"a": FileInfo(1, 1, 6)}, False),
        ({"a": FileInfo(1, 1, 0)}, {"a": FileInfo(1, 1, 6)}, False),
        ({"a": FileInfo(1, 1, 5)}, {"a": FileInfo(2, 1, 5)}, False),
        ({"a": FileInfo(1, 1, 5)}, {"b": FileInfo(1, 1, 5)}, False),
        ({"a": FileInfo(1, 1, 5)}, {}, False),
        ({}, {}, True),
    ],
)
def test_same_content(mine: dict[str, FileInfo], yours: dict[str, FileInfo], same: bool) -> None:
    assert manifest(mine).same_content(manifest(yours)) is same
    assert manifest(yours).same_content(manifest(mine)) is same


# ---- kept in a file


def test_kept_and_found_again(model: Path, file: Path) -> None:
    found = adopt(model, HANDLE)
    found.save(file, model)
    assert Manifest.load(file) == (found, model.stat().st_ino)


_NAME = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda n: n not in (".", "..")
)
_PATH = st.lists(_NAME, min_size=1, max_size=3).map("/".join)
_INFO = st.builds(
    FileInfo, st.integers(0, 2**63), st.integers(0, 2**40), st.none() | st.integers(0, 2**32 - 1)
)


@given(
    handle=st.text(max_size=30),
    files=st.dictionaries(_PATH, _INFO, max_size=6),
    directories=st.dictionaries(_PATH, st.integers(0, 2**40), max_size=3),
    mtime=st.integers(0, 2**40),
)
def test_anything_that_can_be_kept_is_found_again(
    tmp_path_factory: pytest.TempPathFactory,
    handle: str,
    files: dict[str, FileInfo],
    directories: dict[str, int],
    mtime: int,
) -> None:
    directory = tmp_path_factory.getbasetemp()
    kept = Manifest(handle, files, directories, mtime)
    kept.save(directory / "kept.json", directory)
    assert Manifest.load(directory / "kept.json") == (kept, directory.stat().st_ino)


def test_name_that_is_not_utf8_is_kept(model: Path, file: Path) -> None:
    (model / os.fsdecode(b"assets/\xff\xfe")).write_bytes(b"x")
    found = adopt(model, HANDLE)
    found.save(file, model)
    loaded = Manifest.load(file)
    assert loaded is not None
    assert os.fsdecode(b"assets/\xff\xfe") in loaded[0].files
    assert loaded[0].disagreement(model) is None


def good() -> dict[str, Any]:
    return {
        "format": 1,
        "handle": "h",
        "inode": 5,
        "mtime": 5,
        "directories": {"d": 1},
        "files": {"a": [1, 2, 3]},
    }


def test_the_example_that_is_damaged_below_is_good(file: Path) -> None:
    file.write_text(json.dumps(good()))
    assert Manifest.load(file) == (Manifest("h", {"a": FileInfo(1, 2, 3)}, {"d": 1}, 5), 5)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}", b"\xff\xfe", b"\0" * 100, b"[" * 100_000,
        json.dumps(good()).encode()[:-5], b'{"format": 1}',
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_garbage_is_no_manifest(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert Manifest.load(file) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2), ("format", None), ("inode", None), ("inode", "x"), ("mtime", float("inf")),
        ("mtime", None),
        ("directories", None), ("directories", ["d"]), ("directories", {"d": "x"}),
        ("directories", {"d": None}),
        ("files", None), ("files", []), ("files", ["a"]), ("files", {"a": 5}), ("files", {"a": []}),
        ("files", {"a": [1, 2, 3, 4]}), ("files", {"a": ["1", 2, 3]}), ("files", {"a": [1, None, 3]}),
        ("files", {"a": [-1, 2, 3]}), ("files", {"a": [1, 2, "x"]}),
    ],
)  # fmt: skip
def test_wrong_value_is_no_manifest(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps({**good(), key: value}))
    assert Manifest.load(file) is None


def test_missing_file_is_no_manifest(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path / "none") is None
    assert Manifest.load(tmp_path) is None


# ---- compared with a directory


def test_untouched_directory_agrees(model: Path) -> None:
    assert adopt(model, HANDLE).disagreement(model) is None


def _swap_for_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swap_for_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("saved_model.pb", Path.unlink, "saved_model.pb is missing"),
        ("variables/variables.index", Path.unlink, "variables/variables.index is missing"),
        ("variables/variables.index", _grow, "has 409 bytes instead of 408"),
        ("variables", shutil.rmtree, "is missing"),
        ("variables", _swap_for_file, "is missing"),
        ("saved_model.pb", _swap_for_directory, "saved_model.pb"),
        ("empty", Path.rmdir, "empty/ is missing"),
    ],
)
def test_changed_directory_disagrees(
    model: Path, name: str, change: Callable[[Path], object], words: str
) -> None:
    (model / "empty").mkdir()
    found = adopt(model, HANDLE)
    change(model / name)
    assert words in (found.disagreement(model) or "")


def test_directory_in_the_place_of_a_file_of_its_size_disagrees(model: Path) -> None:
    (model / "other").mkdir()
    size = (model / "other").stat().st_size
    found = manifest({"other": FileInfo(size, 1)})
    assert found.disagreement(model) is not None


def test_link_in_the_place_of_a_file_disagrees(model: Path) -> None:
    (model / "link").symlink_to("x" * 55)
    assert manifest({"link": FileInfo(55, 1)}).disagreement(model) is not None


def test_files_that_were_added_do_no_harm(model: Path) -> None:
    found = adopt(model, HANDLE)
    (model / "note").touch()
    assert found.disagreement(model) is None


# ---- adopting what tensorflow_hub cached


def test_adopted_manifest_tells_all(model: Path) -> None:
    os.utime(model / "saved_model.pb", (1_500_000_000, 1_500_000_000))
    found = adopt(model, HANDLE)
    tree = make_tree(size=1000)
    assert {name: info.size for name, info in found.files.items()} == {k: len(v) for k, v in tree.items()}
    assert set(found.directories) == {"assets", "variables"}
    assert found.files["saved_model.pb"].mtime == 1_500_000_000


@pytest.mark.parametrize(
    "names",
    [
        ["saved_model.pb"],
        ["saved_model.pbtxt"],
        ["tfhub_module.pb", "saved_model.pb", "assets/tokens.txt"],
        ["1.tflite"],
        ["model.json", "group1-shard1of1"],
        ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"],
        ["saved_model.pb"]
        + ["variables/variables.index"]
        + [f"variables/variables.data-0000{number}-of-00003" for number in range(3)],
    ],
)
def test_whole_models_are_adopted(tmp_path: Path, names: list[str]) -> None:
    write_tree(dict.fromkeys(names, b"x"), tmp_path / "m")
    assert set(adopt(tmp_path / "m", HANDLE).files) == set(names)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "is empty"),
        ({"variables/": b""}, "is empty"),
        ({"README": b"x"}, "no model"),
        ({"sub/saved_model.pb": b"x"}, "no model"),
        ({"saved_model.pb": b""}, "empty saved_model.pb"),
        ({"saved_model.pb": b"x", "variables/": b""}, "lost its variables"),
        ({"saved_model.pb": b"x", "variables/variables.index": b"x"}, "lacks some"),
        ({"saved_model.pb": b"x", "variables/variables.data-00000-of-00001": b"x"}, "lacks some"),
        (
            {
                "saved_model.pb": b"x",
                "variables/variables.index": b"",
                "variables/variables.data-00000-of-00001": b"x",
            },
            "empty variables/variables.index",
        ),
        (
            {
                "saved_model.pb": b"x",
                "variables/variables.index": b"x",
                "variables/variables.data-00000-of-00002": b"x",
            },
            "lacks some of its 2",
        ),
    ],
)
def test_what_is_no_whole_model_is_not_adopted(tmp_path: Path, tree: dict[str, bytes], words: str) -> None:
    write_tree(tree, tmp_path / "m")
    with pytest.raises(CacheError, match=words):
        adopt(tmp_path / "m", HANDLE)


@pytest.mark.parametrize("target", ["saved_model.pb", "variables", "/etc/passwd", "nowhere"])
def test_links_are_not_adopted(model: Path, target: str) -> None:
    (model / "link").symlink_to(target)
    with pytest.raises(CacheError, match="link"):
        adopt(model, HANDLE)


def test_fifo_is_not_adopted_nor_waited_for(model: Path) -> None:
    os.mkfifo(model / "fifo")
    with pytest.raises(CacheError, match="fifo"):
        adopt(model, HANDLE)


def test_vanished_directory_is_not_adopted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        adopt(tmp_path / "none", HANDLE)


# ---- read, or else adopted


def test_manifest_that_agrees_is_read(model: Path, file: Path) -> None:
    kept = Manifest(
        HANDLE, {"saved_model.pb": FileInfo((model / "saved_model.pb").stat().st_size, 1, 77)}, {}, 5
    )
    kept.save(file, model)
    assert read_or_adopt(model, file, HANDLE) == (kept, False)


def test_directory_without_a_manifest_is_adopted(model: Path, file: Path) -> None:
    assert read_or_adopt(model, file, HANDLE) == (adopt(model, HANDLE), True)


def test_directory_with_a_manifest_of_garbage_is_adopted(model: Path, file: Path) -> None:
    file.write_bytes(b"{")
    assert read_or_adopt(model, file, HANDLE) == (adopt(model, HANDLE), True)


def test_damaged_directory_is_refused(model: Path, file: Path) -> None:
    adopt(model, HANDLE).save(file, model)
    (model / "assets/vocab.txt").unlink()
    with pytest.raises(CacheError, match=r"damaged: assets/vocab.txt is missing"):
        read_or_adopt(model, file, HANDLE)


def test_directory_that_took_the_place_of_another_is_adopted(model: Path, file: Path) -> None:
    adopt(model, HANDLE).save(file, model)
    model.rename(model.with_name("old"))
    write_tree(make_tree(seed=1, size=2000), model)
    assert read_or_adopt(model, file, HANDLE) == (adopt(model, HANDLE), True)


def test_directory_that_took_the_place_of_another_is_adopted_only_if_whole(model: Path, file: Path) -> None:
    adopt(model, HANDLE).save(file, model)
    model.rename(model.with_name("old"))
    write_tree({"README": b"x"}, model)
    with pytest.raises(CacheError, match="no model"):
        read_or_adopt(model, file, HANDLE)


def test_renamed_directory_keeps_its_manifest(model: Path, file: Path) -> None:
    kept = adopt(model, HANDLE)
    kept.save(file, model)
    moved = model.rename(model.with_name("moved"))
    assert read_or_adopt(moved, file, HANDLE) == (kept, False)
