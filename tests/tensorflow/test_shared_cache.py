"""The cache is tensorflow_hub's, both ways: what one of them cached the other uses without a request."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hubfs
from hubfs.handles import cache_key
from tests.hub import FaultHub
from tests.tensorflow.conftest import TensorFlow, tree_of


def hubfs_command(*arguments: object) -> str:
    """What `hubfs …` prints."""
    command = [sys.executable, "-m", "hubfs", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a directory a read-only file system, which also holds for root."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("name", ["google/embed/1", "google/embed"])
def test_what_tensorflow_hub_cached_is_mounted_without_a_request(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, tmp_path: Path, name: str
) -> None:
    expected = tensorflow.embed(path=f"{tf_hub.url}/{name}", how="hub.load", cache=tmp_path / "cache")
    tf_hub.clear_log()
    mounted = mount(tf_hub)
    assert tensorflow.embed(path=mounted.path / name) == expected
    assert tensorflow.embed(path=f"{mounted.path}/{tf_hub.url}/{name}") == expected
    assert tf_hub.requests() == []


def test_what_tensorflow_hub_caches_during_the_mount_is_used_without_a_request(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow
) -> None:
    mounted = mount(tf_hub)
    url = f"{tf_hub.url}/google/embed/1"
    expected = tensorflow.embed(path=url, how="hub.load", cache=mounted.cache)
    tf_hub.clear_log()
    assert tensorflow.embed(path=mounted.path / "google/embed/1") == expected
    assert tf_hub.requests() == []


@pytest.mark.parametrize("name", ["google/embed/1", "google/embed"])
def test_what_was_read_through_the_mount_is_loaded_by_url_without_a_request(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, name: str
) -> None:
    mounted = mount(tf_hub)
    expected = tensorflow.embed(path=mounted.path / name)
    mounted.unmount()
    tf_hub.clear_log()
    url = f"{tf_hub.url}/{name}"
    assert tensorflow.embed(path=url, how="hub.load", cache=mounted.cache) == expected
    assert tensorflow.resolve(handle=url, cache=mounted.cache) == str(mounted.cache / cache_key(url))
    assert tf_hub.requests() == []
    assert tree_of(mounted.cache / cache_key(url)) == tree_of(saved / "embed")


def test_what_was_pulled_is_loaded_by_url_without_a_request(
    tf_hub: FaultHub, tensorflow: TensorFlow, saved: Path, tmp_path: Path
) -> None:
    url, cache = f"{tf_hub.url}/google/embed/1", tmp_path / "cache"
    [pulled] = hubfs.pull([url], hub=tf_hub.url, cache_dir=str(cache))
    assert pulled.error is None
    tf_hub.clear_log()
    loaded = tensorflow.embed(path=url, how="hub.load", cache=cache)
    assert loaded == tensorflow.embed(path=saved / "embed")
    assert tf_hub.requests() == []


@pytest.mark.parametrize("name", ["google/embed/1", "google/embed"])
@pytest.mark.parametrize("first", ["hubfs", "tensorflow_hub"])
def test_both_resolve_a_handle_to_the_same_directory(
    tf_hub: FaultHub, tensorflow: TensorFlow, tmp_path: Path, first: str, name: str
) -> None:
    url, cache = f"{tf_hub.url}/{name}", tmp_path / "cache"

    def by_hubfs() -> str:
        return hubfs_command("resolve", "--hub", tf_hub.url, "--cache-dir", cache, url).strip()

    def by_tensorflow_hub() -> str:
        return str(tensorflow.resolve(handle=url, cache=cache))

    ways = [by_hubfs, by_tensorflow_hub] if first == "hubfs" else [by_tensorflow_hub, by_hubfs]
    found = ways[0]()
    tf_hub.clear_log()
    assert ways[1]() == found == str(cache / cache_key(url))
    assert tf_hub.requests() == []


def test_both_take_the_cache_from_the_same_variable(
    tf_hub: FaultHub,
    other_tensorflow: Callable[..., TensorFlow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, mnt, url = tmp_path / "shared", tmp_path / "mnt", f"{tf_hub.url}/google/embed/1"
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(cache))
    tensorflow = other_tensorflow(TFHUB_CACHE_DIR=str(cache))
    hubfs_command("mount", "--hub", tf_hub.url, mnt)
    try:
        through_mount = tensorflow.embed(path=mnt / "google/embed/1")
        tf_hub.clear_log()
        assert tensorflow.embed(path=url, how="hub.load") == through_mount
        assert tensorflow.resolve_as_configured(handle=url) == str(cache / cache_key(url))
        assert tf_hub.requests() == []
    finally:
        hubfs_command("unmount", mnt)


def test_read_only_cache_that_hubfs_filled_serves_tensorflow_hub(
    tf_hub: FaultHub, tensorflow: TensorFlow, saved: Path, tmp_path: Path
) -> None:
    url, cache = f"{tf_hub.url}/google/embed/1", tmp_path / "cache"
    hubfs.resolve(url, hub=tf_hub.url, cache_dir=str(cache))
    tf_hub.clear_log()
    with read_only(cache):
        loaded = tensorflow.embed(path=url, how="hub.load", cache=cache)
    assert loaded == tensorflow.embed(path=saved / "embed")
    assert tf_hub.requests() == []


def test_read_only_cache_that_tensorflow_hub_filled_serves_the_mount(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    expected = tensorflow.embed(path=f"{tf_hub.url}/google/embed/1", how="hub.load", cache=cache)
    tf_hub.clear_log()
    with read_only(cache):
        mounted = mount(tf_hub)
        assert tensorflow.embed(path=mounted.path / "google/embed/1") == expected
        mounted.unmount()
    assert tf_hub.requests() == []


def _lose_model(directory: Path) -> None:
    (directory / "saved_model.pb").unlink()


def _lose_data(directory: Path) -> None:
    next(directory.glob("variables/variables.data-*")).unlink()


def _lose_variables(directory: Path) -> None:
    shutil.rmtree(directory / "variables")


def _lose_all_files(directory: Path) -> None:
    """What a cleaner of temporary directories leaves that keeps directories."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()


LOSSES = [_lose_model, _lose_data, _lose_variables, _lose_all_files]


@pytest.mark.parametrize("lose", LOSSES)
def test_half_cleaned_directory_of_tensorflow_hub_is_repaired(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    cache, url = tmp_path / "cache", f"{tf_hub.url}/google/embed/1"
    expected = tensorflow.embed(path=url, how="hub.load", cache=cache)
    lose(cache / cache_key(url))
    mounted = mount(tf_hub)
    assert tensorflow.embed(path=mounted.path / "google/embed/1") == expected
    tf_hub.clear_log()
    assert tensorflow.embed(path=url, how="hub.load", cache=cache) == expected
    assert tf_hub.requests() == []


@pytest.mark.parametrize("lose", [*LOSSES, lambda directory: (directory / "assets/words.txt").unlink()])
def test_directory_that_was_cleaned_after_hubfs_had_seen_it_is_repaired(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    cache, url = tmp_path / "cache", f"{tf_hub.url}/google/embed/1"
    expected = tensorflow.embed(path=url, how="hub.load", cache=cache)
    mounted = mount(tf_hub)
    assert tensorflow.embed(path=mounted.path / "google/embed/1") == expected
    mounted.unmount()
    lose(cache / cache_key(url))
    again = mount(tf_hub, name="again")
    assert tensorflow.embed(path=again.path / "google/embed/1") == expected
    tf_hub.clear_log()
    assert tensorflow.embed(path=url, how="hub.load", cache=cache) == expected
    assert tf_hub.requests() == []


def test_empty_directory_is_not_a_model(tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path) -> None:
    mounted = mount(tf_hub)
    url = f"{tf_hub.url}/google/embed/1"
    (mounted.cache / cache_key(url)).mkdir()
    loaded = tensorflow.embed(path=mounted.path / "google/embed/1")
    assert loaded == tensorflow.embed(path=saved / "embed")
    assert tensorflow.embed(path=url, how="hub.load", cache=mounted.cache) == loaded
    assert len(tf_hub.body_requests()) == 1
