"""TensorFlow's own `gs://`, and tensorflow_hub on it: hubfs is compared with both, and shares buckets."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs.serve import LocalHub
from tests.conftest import Mounted
from tests.google import Google
from tests.hub import FaultHub
from tests.models import Tree, write_tree
from tests.tensorflow.conftest import OrderError, TensorFlow, tree_of, until

BUCKET = "tfhub-cache"
CACHE = f"gs://{BUCKET}/cache"


@pytest.fixture(scope="module")
def google() -> Iterator[Google]:
    with Google() as google:
        yield google


@pytest.fixture(scope="module")
def reader(google: Google, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorFlow]:
    """A process whose `gs://` is the stand-in; it forgets what it knew of names after no time at all."""
    log = tmp_path_factory.mktemp("gs-reader") / "stderr.txt"
    process = TensorFlow(log, {**google.environment, "GCS_STAT_CACHE_MAX_AGE": "0"})
    yield process
    process.close()


@pytest.fixture(autouse=True)
def empty_bucket(google: Google) -> None:
    google.make(BUCKET)
    for name in google.names(BUCKET) or ():
        google.delete(BUCKET, name)
    google.seen(clear=True)


def key(handle: str) -> str:
    return hashlib.sha1(handle.encode()).hexdigest()


def in_cache(google: Google, handle: str, tree: Tree) -> None:
    """As tensorflow_hub leaves it."""
    google.add(BUCKET, f"cache/{key(handle)}", tree)
    about = f"Module: {handle}\nDownload Time: {time.asctime()}\nDownloader Hostname: there (PID:1)"
    google.put(BUCKET, f"cache/{key(handle)}.descriptor.txt", about.encode())


def test_saved_model_is_loaded_from_a_bucket(google: Google, reader: TensorFlow, saved: Path) -> None:
    google.add(BUCKET, "models/embed", tree_of(saved / "embed"))
    assert reader.embed(path=f"gs://{BUCKET}/models/embed") == reader.embed(path=saved / "embed")
    reads = [seen for seen in google.seen() if seen.api == "xml"]
    assert {seen.host for seen in reads} == {"storage.googleapis.com"}
    assert all(seen.range and seen.method == "GET" for seen in reads)


def test_100_mb_are_read_in_ranges(google: Google, reader: TensorFlow, saved: Path) -> None:
    google.add(BUCKET, "models/big", tree_of(saved / "big"))
    assert reader.big(path=f"gs://{BUCKET}/models/big") == reader.big(path=saved / "big")
    size = sum(len(content) for content in google.tree(BUCKET).values())
    assert size <= sum(seen.bytes_sent for seen in google.seen() if seen.api == "xml")


def test_a_model_that_is_not_there(google: Google, reader: TensorFlow) -> None:
    with pytest.raises(OrderError) as caught:
        reader.embed(path=f"gs://{BUCKET}/models/nothing")
    assert caught.value.kind in ("OSError", "NotFoundError")


def test_hub_load_takes_what_is_in_the_bucket(
    google: Google, reader: TensorFlow, tf_hub: FaultHub, saved: Path
) -> None:
    handle = f"{tf_hub.url}/google/embed/1"
    in_cache(google, handle, tree_of(saved / "embed"))
    found = reader.embed(path=handle, how="hub.load", cache=CACHE)
    assert found == reader.embed(path=saved / "embed")
    assert tf_hub.requests() == []


def test_hub_load_puts_into_the_bucket_what_is_not_there(
    google: Google, reader: TensorFlow, tf_hub: FaultHub, saved: Path
) -> None:
    handle = f"{tf_hub.url}/google/embed/1"
    assert reader.embed(path=handle, how="hub.load", cache=CACHE) == reader.embed(path=saved / "embed")
    # TensorFlow makes directories of empty objects, and leaves some.
    stored = {name: body for name, body in google.tree(BUCKET).items() if not name.endswith("/")}
    place = f"cache/{key(handle)}"
    assert stored.pop(f"{place}.descriptor.txt").startswith(f"Module: {handle}\n".encode())
    assert stored == {f"{place}/{name}": body for name, body in tree_of(saved / "embed").items()}
    assert len(tf_hub.body_requests()) == 1
    assert reader.embed(path=handle, how="hub.load", cache=CACHE) == reader.embed(path=saved / "embed")
    assert len(tf_hub.body_requests()) == 1


def test_hub_load_finds_what_a_mount_put_into_the_bucket(
    google: Google,
    reader: TensorFlow,
    tf_hub: FaultHub,
    saved: Path,
    mount: Callable[..., Mounted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = f"{tf_hub.url}/google/embed/1"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    mounted = mount(tf_hub, shared_cache=CACHE)
    expected = reader.embed(path=saved / "embed")
    assert reader.embed(path=mounted.path / "google/embed/1") == expected
    until(lambda: google.get(BUCKET, f"cache/{key(handle)}.hubfs.json"), "the version in the bucket")
    until(lambda: not google.get(BUCKET, f"cache/{key(handle)}.lock"), "the end of the lease")
    asked = len(tf_hub.requests())
    assert reader.embed(path=handle, how="hub.load", cache=CACHE) == expected
    assert len(tf_hub.requests()) == asked


def test_mount_finds_what_hub_load_put_into_the_bucket(
    google: Google,
    reader: TensorFlow,
    tf_hub: FaultHub,
    saved: Path,
    mount: Callable[..., Mounted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = f"{tf_hub.url}/google/embed/1"
    expected = reader.embed(path=saved / "embed")
    assert reader.embed(path=handle, how="hub.load", cache=CACHE) == expected
    asked = len(tf_hub.requests())
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    mounted = mount(tf_hub, shared_cache=CACHE)
    assert reader.embed(path=mounted.path / "google/embed/1") == expected
    assert len(tf_hub.requests()) == asked


def test_hub_load_follows_a_hub_into_the_bucket(
    google: Google, other_tensorflow: Callable[..., TensorFlow], saved: Path, tmp_path: Path
) -> None:
    tree = tree_of(saved / "embed")
    write_tree(tree, tmp_path / "models/google/embed/1")
    google.add(BUCKET, "google/embed/1", tree)
    process = other_tensorflow(**google.environment, TFHUB_MODEL_LOAD_FORMAT="UNCOMPRESSED")
    with LocalHub(tmp_path / "models", archive_dir=tmp_path / "archives", bucket=BUCKET) as hub:
        found = process.embed(path=f"{hub.url}/google/embed/1", how="hub.load")
    assert found == process.embed(path=saved / "embed")
