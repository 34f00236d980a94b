"""hubfs and tensorflow_hub on one cold model at the same time, and what either leaves when it dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from tests.hub import Fault, FaultHub
from tests.tensorflow.conftest import TensorFlow, body_has_begun, tree_of, until

NAME = "google/embed/1"


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def stall_half_way(hub: FaultHub, archives: dict[str, bytes], release: threading.Event) -> int:
    """Make the next body stop half-way; returns how many bytes come before that."""
    half = len(archives["embed"]) // 2
    hub.fault(NAME, Fault.stall(half, release))
    return half


def model_file(mounted) -> bytes:
    """The head of the model, read through the mount."""
    found: bytes = (mounted.path / NAME / "saved_model.pb").read_bytes()
    return found


def waits_for_tensorflow_hub(mounted) -> Callable[[], bool]:
    return lambda: "another process is downloading it" in mounted.log_text()


def test_hubfs_waits_for_the_download_of_tensorflow_hub(
    tf_hub: FaultHub,
    mount,
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    background: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    mounted = mount(tf_hub)
    tensorflow.begin("embed", path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=mounted.cache)
    body_has_begun(tf_hub, NAME, half)
    reading = background.submit(model_file, mounted)
    until(waits_for_tensorflow_hub(mounted), "hubfs to wait")
    assert not reading.done()
    release.set()
    assert tensorflow.end() == tensorflow.embed(path=saved / "embed")
    assert reading.result(timeout=20) == (saved / "embed/saved_model.pb").read_bytes()
    assert tree_of(mounted.path / NAME) == tree_of(saved / "embed")
    assert len(tf_hub.body_requests(NAME)) == 1


def test_tensorflow_hub_waits_for_the_download_of_hubfs(
    tf_hub: FaultHub,
    mount,
    other_tensorflow: Callable[..., TensorFlow],
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    background: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    other = other_tensorflow()
    half = stall_half_way(tf_hub, archives, release)
    mounted = mount(tf_hub)
    reading = background.submit(model_file, mounted)
    body_has_begun(tf_hub, NAME, half)
    other.begin("embed", path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=mounted.cache)
    until(lambda: "already being downloaded" in other.said, "tensorflow_hub to wait")
    assert not reading.done()
    release.set()
    assert reading.result(timeout=20) == (saved / "embed/saved_model.pb").read_bytes()
    assert other.end() == tensorflow.embed(path=saved / "embed")
    assert len(tf_hub.body_requests(NAME)) == 1


def test_both_started_at_once_download_once(
    tf_hub: FaultHub,
    mount,
    tensorflow: TensorFlow,
    other_tensorflow: Callable[..., TensorFlow],
    saved: Path,
) -> None:
    """Who is first is left to chance."""
    other = other_tensorflow()
    other.ping()
    tf_hub.latency = 0.2
    mounted = mount(tf_hub)
    other.begin("embed", path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=mounted.cache)
    through_mount = tensorflow.embed(path=mounted.path / NAME)
    assert other.end() == through_mount == tensorflow.embed(path=saved / "embed")
    assert len(tf_hub.body_requests(NAME)) == 1


def killed_in_mid_download(
    process: TensorFlow, hub: FaultHub, half: int, cache: Path, before: Callable[[], object] = lambda: None
) -> Path:
    """Let tensorflow_hub be killed while it downloads; returns the lock that it leaves."""
    process.begin("resolve", handle=f"{hub.url}/{NAME}", cache=cache)
    body_has_begun(hub, NAME, half)
    lock = cache / f"{cache_key(f'{hub.url}/{NAME}')}.lock"
    until(lambda: list(cache.glob("*.tmp")), "the temporary directory of tensorflow_hub")
    before()
    process.kill()
    assert lock.exists()
    return lock


def test_lock_of_a_killed_tensorflow_hub_is_taken_over_soon(
    tf_hub: FaultHub,
    mount,
    other_tensorflow: Callable[..., TensorFlow],
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    release: threading.Event,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    # Ten minutes, as tensorflow_hub itself waits in such a case: the test would time out.
    mounted = mount(tf_hub, lock_timeout=600)
    lock = killed_in_mid_download(other_tensorflow(), tf_hub, half, mounted.cache)
    assert tensorflow.embed(path=mounted.path / NAME) == tensorflow.embed(path=saved / "embed")
    until(lambda: not lock.exists() and not list(mounted.cache.glob("*.tmp")), "the cache to be clean")
    assert len(tf_hub.body_requests(NAME)) == 2


def test_reader_that_waits_for_tensorflow_hub_goes_on_when_that_is_killed(
    tf_hub: FaultHub,
    mount,
    other_tensorflow: Callable[..., TensorFlow],
    saved: Path,
    archives: dict[str, bytes],
    background: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    mounted = mount(tf_hub, lock_timeout=600)
    reading: list[Future[bytes]] = []

    def read_and_wait() -> None:
        reading.append(background.submit(model_file, mounted))
        until(waits_for_tensorflow_hub(mounted), "hubfs to wait")

    killed_in_mid_download(other_tensorflow(), tf_hub, half, mounted.cache, before=read_and_wait)
    assert reading[0].result(timeout=30) == (saved / "embed/saved_model.pb").read_bytes()


def test_leftovers_of_a_killed_tensorflow_hub_are_gone_after_the_next_mount(
    tf_hub: FaultHub,
    mount,
    other_tensorflow: Callable[..., TensorFlow],
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    release: threading.Event,
    tmp_path: Path,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    lock = killed_in_mid_download(other_tensorflow(), tf_hub, half, tmp_path / "cache")
    mounted = mount(tf_hub)
    until(lambda: not lock.exists() and not list(mounted.cache.glob("*.tmp")), "the cache to be clean")
    # tensorflow_hub, which would have waited for ten minutes, goes on at once.
    loaded = tensorflow.embed(path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=mounted.cache)
    assert loaded == tensorflow.embed(path=saved / "embed")


def test_tensorflow_hub_goes_on_after_a_killed_hubfs_was_mounted_again(
    tf_hub: FaultHub,
    mount,
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    background: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    mounted = mount(tf_hub)
    reading = background.submit(model_file, mounted)
    body_has_begun(tf_hub, NAME, half)
    os.kill(mounted.pid, signal.SIGKILL)
    assert isinstance(reading.exception(timeout=20), OSError)
    again = mount(tf_hub)
    until(lambda: not list(mounted.cache.glob("*.lock")), "the lock of the killed one to be gone")
    loaded = tensorflow.embed(path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=again.cache)
    assert loaded == tensorflow.embed(path=saved / "embed")
    assert tree_of(again.path / NAME) == tree_of(saved / "embed")


def test_unmounting_in_mid_download_lets_tensorflow_hub_go_on(
    tf_hub: FaultHub,
    mount,
    tensorflow: TensorFlow,
    saved: Path,
    archives: dict[str, bytes],
    background: ThreadPoolExecutor,
    release: threading.Event,
) -> None:
    half = stall_half_way(tf_hub, archives, release)
    mounted = mount(tf_hub)
    reading = background.submit(model_file, mounted)
    body_has_begun(tf_hub, NAME, half)
    os.kill(mounted.pid, signal.SIGTERM)
    assert isinstance(reading.exception(timeout=20), OSError)
    until(lambda: not list(mounted.cache.glob("*.lock")), "the lock to be released")
    loaded = tensorflow.embed(path=f"{tf_hub.url}/{NAME}", how="hub.load", cache=mounted.cache)
    assert loaded == tensorflow.embed(path=saved / "embed")
    assert len(tf_hub.body_requests(NAME)) == 2
