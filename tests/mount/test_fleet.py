"""Many machines with one bucket: each daemon is a process of its own, with a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from tests.hub import FaultHub
from tests.models import make_archive, make_tree
from tests.moto_s3 import MotoS3
from tests.mount.conftest import cached_keys, read_tree, until

MODEL = "google/demo/1"
TIER = "s3://models/tier"
TREE = make_tree(size=3_000_000)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoS3]:
    with MotoS3() as s3:
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        yield s3


def handle(hub: FaultHub) -> str:
    return f"{hub.url}/{MODEL}"


def is_there(bucket: MotoS3, hub: FaultHub) -> bool:
    key = cache_key(handle(hub))
    names = bucket.objects()
    return f"tier/{key}.hubfs.json" in names and not any(name.endswith(".lock") for name in names)


@pytest.mark.timeout(300)
def test_fifty_daemons_that_start_cold_ask_the_hub_once(
    hub: FaultHub, bucket: MotoS3, mount, tmp_path
) -> None:
    hub.add(MODEL, make_archive(TREE))
    mounts = [
        mount(hub, f"mnt{number}", cache_dir=tmp_path / f"cache{number}", shared_cache=TIER, log_level="info")
        for number in range(50)
    ]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda mounted: read_tree(mounted.path / MODEL), mounts))
    assert all(tree == TREE for tree in found)
    asked = hub.requests(MODEL)
    assert [r.query["tf-hub-format"] for r in asked] == ["uncompressed", "compressed", "compressed"]
    until(lambda: is_there(bucket, hub), "the version in the bucket")


def test_bucket_serves_when_the_hub_is_gone(hub: FaultHub, bucket: MotoS3, mount, tmp_path: Path) -> None:
    hub.add(MODEL, make_archive(TREE))
    first = mount(hub, "first", cache_dir=tmp_path / "cache1", shared_cache=TIER)
    assert read_tree(first.path / MODEL) == TREE
    until(lambda: is_there(bucket, hub), "the version in the bucket")
    status = first.status()["shared_cache"]
    assert status["url"] == TIER
    names = {name.removeprefix(f"tier/{cache_key(handle(hub))}/") for name in bucket.objects()}
    assert TREE.keys() <= names
    hub.close()
    second = mount(hub, "second", cache_dir=tmp_path / "cache2", shared_cache=TIER)
    assert read_tree(second.path / MODEL) == TREE
    until(lambda: cached_keys(tmp_path / "cache2"), "the version in the second cache")


def test_streaming_reads_from_the_bucket(hub: FaultHub, bucket: MotoS3, mount, hubfs, tmp_path: Path) -> None:
    hub.add(MODEL, make_archive(TREE))
    done = hubfs("pull", "--hub", hub.url, "--cache-dir", tmp_path / "cache1", MODEL, TFHUB_CACHE_DIR=TIER)
    assert "is cached" in done.stdout
    # The command waits for it.
    assert is_there(bucket, hub)
    hub.close()
    mounted = mount(hub, cache_dir=tmp_path / "none", shared_cache=TIER, load_format="uncompressed")
    assert read_tree(mounted.path / MODEL) == TREE
    assert not (tmp_path / "none").exists()


def test_bucket_that_is_down_stops_nobody(hub: FaultHub, bucket: MotoS3, mount) -> None:
    hub.add(MODEL, make_archive(TREE))
    bucket.fault = lambda request: 503
    mounted = mount(hub, shared_cache=TIER, retries=1)
    assert read_tree(mounted.path / MODEL) == TREE
    until(lambda: "cannot be used now" in mounted.log_text(), "a word about the bucket")


def test_lease_of_a_version_that_was_only_looked_at_is_given_back(
    hub: FaultHub, bucket: MotoS3, mount
) -> None:
    hub.add(MODEL, make_archive(TREE))
    mounted = mount(hub, shared_cache=TIER)
    # Only whether there is such a version is asked.
    assert (mounted.path / MODEL).is_dir()
    assert any(name.endswith(".lock") for name in bucket.objects())
    until(lambda: not any(name.endswith(".lock") for name in bucket.objects()), "the lease's end", timeout=30)
    # Whoever reads it later puts it there all the same.
    assert read_tree(mounted.path / MODEL) == TREE
    until(lambda: is_there(bucket, hub), "the version in the bucket")
