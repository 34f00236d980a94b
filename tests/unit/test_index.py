"""Which models the cache holds, for listings, while others add and remove them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubfs.cache.index import Index
from hubfs.cache.layout import Layout, write_descriptor
from hubfs.cache.manifest import adopt
from hubfs.handles import HandleMap, cache_key

HUB = "https://tfhub.dev"
Put = Callable[..., str]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    return Layout(root)


@pytest.fixture
def index(layout: Layout) -> Index:
    return Index(layout, HandleMap(HUB, ["example.org"]))


@pytest.fixture
def put(layout: Layout) -> Put:
    """Puts a model into the cache as tensorflow_hub does."""

    def write(handle: str, *, descriptor: bool = True, content: bytes = b"x", manifest: bool = False) -> str:
        handle = handle if ":" in handle else f"{HUB}/{handle}"
        key = cache_key(handle)
        tmp = layout.tmp(key, "0" * 32)
        tmp.mkdir()
        (tmp / "saved_model.pb").write_bytes(content)
        if manifest:
            adopt(tmp, handle).save(layout.manifest(key), tmp)
        if descriptor:
            write_descriptor(layout.descriptor(key), handle)
        tmp.rename(layout.model(key))
        return key

    return write


def soon(look: Callable[[], object], expected: object) -> None:
    """A look after a change may come too early: scans are a moment apart, which is long on a busy machine."""
    deadline = time.monotonic() + 60
    while look() != expected and time.monotonic() < deadline:
        time.sleep(0.002)
    assert look() == expected


def names(index: Index, *parts: str) -> Callable[[], list[str]]:
    return lambda: index.below(parts)


def sizes(index: Index) -> int:
    index.refresh()
    return index.size()


def knows(index: Index, handle: str) -> bool:
    index.refresh()
    return index.has(handle)


def test_empty_and_missing_caches_have_no_names(index: Index, layout: Layout) -> None:
    soon(names(index), [])
    soon(index.count, 0)
    layout.root.rmdir()
    soon(names(index), [])
    soon(index.count, 0)
    soon(lambda: sizes(index), 0)


def test_names_lead_to_the_models(index: Index, put: Put) -> None:
    for handle in (
        "google/a/1",
        "google/a/2",
        "google/b/deep/er/1",
        "other/c/1",
        "https://example.org/x.tgz",
    ):
        put(handle)
    soon(names(index), ["google", "https:", "other"])
    soon(names(index, "google"), ["a", "b"])
    soon(names(index, "google", "a"), ["1", "2"])
    soon(names(index, "google", "b"), ["deep"])
    soon(names(index, "google", "b", "deep", "er"), ["1"])
    soon(names(index, "https:"), ["example.org"])
    soon(names(index, "https:", "example.org"), ["x.tgz"])
    soon(names(index, "google", "none"), [])
    soon(index.count, 5)


def test_what_others_add_and_remove_is_noticed(index: Index, layout: Layout, put: Put) -> None:
    first, _ = put("google/a/1"), put("google/a/2")
    soon(names(index, "google", "a"), ["1", "2"])
    put("google/b/1")
    soon(names(index, "google"), ["a", "b"])
    shutil.rmtree(layout.model(first))
    soon(names(index, "google", "a"), ["2"])
    shutil.rmtree(layout.model(cache_key(f"{HUB}/google/a/2")))
    soon(names(index, "google"), ["b"])
    shutil.rmtree(layout.model(cache_key(f"{HUB}/google/b/1")))
    soon(names(index), [])
    soon(index.count, 0)
    put("google/a/1")
    soon(names(index, "google", "a"), ["1"])


def test_each_model_is_noticed_however_quickly_they_come(index: Index, put: Put) -> None:
    for number in range(200):
        put(f"google/a/{number}")
        soon(lambda: len(index.below(("google", "a"))), number + 1)


def test_whole_cache_removed_and_made_again(index: Index, layout: Layout, put: Put) -> None:
    put("google/a/1")
    soon(index.count, 1)
    shutil.rmtree(layout.root)
    soon(index.count, 0)
    assert not index.has(f"{HUB}/google/a/1")
    layout.root.mkdir()
    put("google/a/1")
    soon(names(index, "google", "a"), ["1"])


def test_model_without_a_descriptor_counts_and_has_no_name(index: Index, put: Put) -> None:
    put("google/a/1", descriptor=False)
    soon(names(index), [])
    soon(index.count, 1)


def test_descriptor_that_comes_later_gives_the_model_its_name(index: Index, layout: Layout, put: Put) -> None:
    key = put("google/a/1", descriptor=False)
    soon(names(index), [])
    write_descriptor(layout.descriptor(key), f"{HUB}/google/a/1")
    soon(names(index), ["google"])


def test_handle_that_is_told_gives_the_model_its_name(index: Index, put: Put) -> None:
    key = put("google/a/1", descriptor=False)
    index.refresh()
    index.add(key, f"{HUB}/google/a/1")
    index.add(key, f"{HUB}/google/a/1")
    soon(names(index, "google", "a"), ["1"])
    soon(index.count, 1)
    assert index.has(f"{HUB}/google/a/1")


@pytest.mark.parametrize(
    "handle", ["gs://bucket/m", "https://other.org/a/b/1", f"{HUB}/a/b/1?lite-format=zip", "nonsense:"]
)
def test_model_that_the_mount_does_not_show_counts_only(index: Index, put: Put, handle: str) -> None:
    put(handle)
    soon(names(index), [])
    soon(index.count, 1)


@pytest.mark.parametrize("query", ["lite-format=tflite", "tfjs-format=compressed"])
def test_models_of_other_kinds_have_their_query_in_their_name(index: Index, put: Put, query: str) -> None:
    put(f"a/b/1?{query}")
    soon(names(index, "a", "b"), [f"1?{query}"])
    assert index.has(f"{HUB}/a/b/1?{query}")


def test_models_of_buckets_and_kaggle_are_found_below_their_schemes(layout: Layout, put: Put) -> None:
    index = Index(layout, HandleMap(HUB, ["gs://models", "s3://models"]))
    for handle in ("gs://models/a", "s3://models/b/2", "https://www.kaggle.com/models/o/m/f/v/3"):
        put(handle)
    soon(names(index), ["gs:", "https:", "s3:"])
    assert index.below(("gs:", "models")) == ["a"]
    assert index.below(("s3:", "models", "b")) == ["2"]
    assert index.below(("https:", "www.kaggle.com", "models", "o", "m", "f", "v")) == ["3"]


@pytest.mark.parametrize("handle", ["https://[::1/a/b/1", "https://tfhub.dev\u2100/a/b/1"])
def test_descriptor_of_nonsense_hides_no_other_model(index: Index, put: Put, handle: str) -> None:
    put(handle)
    put("google/a/1")
    soon(names(index), ["google"])


def test_empty_directory_is_no_model(index: Index, layout: Layout) -> None:
    layout.model("0" * 40).mkdir()
    soon(index.count, 0)


def test_other_spellings_are_one_model_with_several_keys(index: Index, layout: Layout, put: Put) -> None:
    handle = f"{HUB}/google/a/1"
    spellings = [handle, "http://tfhub.dev/google/a/1", f"{HUB}/google/a/1/", f"{HUB}:443/google/a/1"]
    keys = [put(spelling) for spelling in spellings[1:]]
    assert sorted(index.other_keys(handle, cache_key(handle))) == sorted(keys)
    assert index.has(handle)
    keys.append(put(handle))
    soon(names(index, "google", "a"), ["1"])
    for key in keys[:-1]:
        shutil.rmtree(layout.model(key))
        soon(names(index, "google", "a"), ["1"])
    shutil.rmtree(layout.model(keys[-1]))
    soon(names(index), [])
    assert not index.has(handle)
    assert index.other_keys(handle, cache_key(handle)) == []


def test_unversioned_model_and_its_versions(index: Index, layout: Layout, put: Put) -> None:
    unversioned = put("google/a")
    put("google/a/1")
    soon(names(index, "google"), ["a"])
    soon(names(index, "google", "a"), ["1"])
    assert index.has(f"{HUB}/google/a")
    shutil.rmtree(layout.model(unversioned))
    soon(names(index, "google", "a"), ["1"])
    soon(lambda: knows(index, f"{HUB}/google/a"), False)


def test_archives_of_another_host_come_and_go(index: Index, layout: Layout, put: Put) -> None:
    handle = "https://example.org/models/x.tar.gz"
    key = put(handle)
    soon(names(index, "https:", "example.org", "models"), ["x.tar.gz"])
    assert index.has(handle)
    shutil.rmtree(layout.model(key))
    soon(names(index), [])


def test_size_is_the_sum_of_the_manifests(index: Index, layout: Layout, put: Put) -> None:
    put("google/a/1", content=b"x" * 100, manifest=True)
    key = put("google/a/2", content=b"x" * 50, manifest=True)
    put("google/a/3", content=b"x" * 7)
    soon(lambda: sizes(index), 150)
    shutil.rmtree(layout.model(key))
    soon(lambda: sizes(index), 100)


def test_size_follows_a_model_that_was_removed_and_came_back(index: Index, layout: Layout, put: Put) -> None:
    key = put("google/a/1", content=b"x" * 100, manifest=True)
    soon(lambda: sizes(index), 100)
    shutil.rmtree(layout.model(key))
    index.refresh()
    put("google/a/1", content=b"x" * 30, manifest=True)
    soon(lambda: sizes(index), 30)


@pytest.mark.parametrize(
    "garbage", [b"", b"[]", b'{"files": 5}', b'{"files": {"a": "x"}}', b"\xff", b"[" * 100_000]
)
def test_garbage_manifest_counts_as_none(index: Index, layout: Layout, put: Put, garbage: bytes) -> None:
    put("google/a/1", content=b"x" * 100, manifest=True)
    layout.manifest(put("google/a/2")).write_bytes(garbage)
    soon(lambda: sizes(index), 100)


def test_a_thousand_models(index: Index, put: Put) -> None:
    for number in range(1000):
        put(f"publisher{number % 10}/model{number // 10}/1", manifest=True)
    assert len(index.below(())) == 10
    assert len(index.below(("publisher3",))) == 100
    soon(index.count, 1000)
    soon(lambda: sizes(index), 1000)
    assert all(index.has(f"{HUB}/publisher{n % 10}/model{n // 10}/1") for n in range(1000))


def test_many_readers_while_models_come_and_go(index: Index, layout: Layout, put: Put) -> None:
    put("google/stays/1")
    over, wrong = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            if "stays" not in index.below(("google",)) or index.below(("google", "stays")) != ["1"]:
                wrong.append("it vanished")
            if index.count() < 1 or index.size() < 0:
                wrong.append("it miscounts")

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for number in range(60):
        key = put(f"google/goes{number}/1")
        index.add(key, f"{HUB}/google/goes{number}/1")
        shutil.rmtree(layout.model(key))
    over.set()
    for reader in readers:
        reader.join(10)
    assert wrong == []
    soon(names(index, "google"), ["stays"])
    soon(index.count, 1)
    assert os.listdir(layout.root)


def test_totals_do_not_wait_for_a_scan_that_takes_long(index: Index, put: Put) -> None:
    put("google/m/1", manifest=True)
    assert index.totals() == (1, 1)
    put("google/m/2", manifest=True)
    with index._scan_lock:
        assert index.totals() == (1, 1)
    soon(index.totals, (2, 2))
