"""A path on the mount is a model to TensorFlow: the same outputs as from the publisher's own directory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.hub import Fault, FaultHub
from tests.tensorflow.conftest import OrderError, TensorFlow, until

LOADERS = ("tf.saved_model.load", "hub.load")


def spelled(spelling: str, mnt: Path, hub: FaultHub, model: str) -> str:
    """A model's path in one of the ways a user may write it."""
    return {
        "versioned": f"{mnt}/google/{model}/1",
        "unversioned": f"{mnt}/google/{model}",
        "whole URL": f"{mnt}/{hub.url}/google/{model}/1",
        "slash at the end": f"{mnt}/google/{model}/1/",
    }[spelling]


@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("spelling", ["versioned", "unversioned", "whole URL", "slash at the end"])
def test_a_model_with_assets_and_signatures_gives_the_same_outputs(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, spelling: str, how: str
) -> None:
    mounted = mount(tf_hub)
    path = spelled(spelling, mounted.path, tf_hub, "embed")
    assert tensorflow.embed(path=path, how=how) == tensorflow.embed(path=saved / "embed")
    assert len(tf_hub.body_requests()) == 1


@pytest.mark.parametrize("spelling", ["versioned", "unversioned", "whole URL"])
def test_keras_layer_takes_a_path(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, spelling: str
) -> None:
    path = spelled(spelling, mount(tf_hub).path, tf_hub, "embed")
    assert tensorflow.embed_layer(path=path) == tensorflow.embed_layer(path=saved / "embed")
    assert len(tf_hub.body_requests()) == 1


def test_keras_layer_from_the_mount_can_be_trained(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path
) -> None:
    found = tensorflow.keras(path=mount(tf_hub).path / "google/keras/1")
    weights, before, after = found
    assert found == tensorflow.keras(path=saved / "keras")
    assert weights == 4 and before != after


def test_hub_module_of_tensorflow_1_is_loaded(tf_hub: FaultHub, mount, tensorflow: TensorFlow) -> None:
    assert tensorflow.module(path=mount(tf_hub).path / "google/module/1") == [3.0, 8.0]


def test_an_archive_is_loaded_by_its_own_name(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes]
) -> None:
    tf_hub.add("files/embed.tar.gz", archives["embed"])
    path = f"{mount(tf_hub).path}/{tf_hub.url}/files/embed.tar.gz"
    assert tensorflow.embed(path=path) == tensorflow.embed(path=saved / "embed")


def test_second_load_sends_no_request(tf_hub: FaultHub, mount, tensorflow: TensorFlow) -> None:
    path = mount(tf_hub).path / "google/embed/1"
    first = tensorflow.embed(path=path)
    tf_hub.clear_log()
    assert tensorflow.embed(path=path) == first
    assert tf_hub.requests() == []


def test_load_after_a_new_mount_sends_no_request(tf_hub: FaultHub, mount, tensorflow: TensorFlow) -> None:
    mounted = mount(tf_hub)
    first = tensorflow.embed(path=mounted.path / "google/embed/1")
    mounted.unmount()
    tf_hub.clear_log()
    assert tensorflow.embed(path=mount(tf_hub, name="again").path / "google/embed/1") == first
    assert tf_hub.requests() == []


def test_model_that_does_not_exist_is_an_error_of_tensorflow(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow
) -> None:
    path = mount(tf_hub).path / "google/nothing/1"
    with pytest.raises(OrderError) as caught:
        tensorflow.embed(path=path)
    assert caught.value.kind in ("OSError", "NotFoundError")


def test_daemon_never_has_tensorflow_in_its_memory(tf_hub: FaultHub, mount, tensorflow: TensorFlow) -> None:
    mounted = mount(tf_hub)
    tensorflow.embed(path=mounted.path / "google/embed/1")
    assert "libtensorflow" in Path(f"/proc/{tensorflow.pid}/maps").read_text()
    assert "libtensorflow" not in Path(f"/proc/{mounted.pid}/maps").read_text()


def test_100_mb_are_loaded_while_they_arrive(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes]
) -> None:
    release = threading.Event()
    # The last bytes, among them the model's graph, stay away until TensorFlow is known to wait. Without
    # ranges: one connection brings all.
    tf_hub.add("google/big/1", archives["big"], accept_ranges=False)
    tf_hub.fault("google/big/1", Fault.stall(len(archives["big"]) * 9 // 10, release))
    mounted = mount(tf_hub)
    tensorflow.begin("big", path=mounted.path / "google/big/1")
    until(
        lambda: any(transfer["waiting"] for transfer in mounted.status()["transfers"]), "TensorFlow to read"
    )
    release.set()
    assert tensorflow.end() == tensorflow.big(path=saved / "big")
    assert len(tf_hub.body_requests("google/big/1")) == 1


@pytest.mark.parametrize("how", LOADERS)
def test_100_mb_over_lines_that_break_are_loaded_right(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes], how: str
) -> None:
    tf_hub.rate = 60e6
    tf_hub.fault("google/big/1", Fault.cut(900_000), Fault.reset(700_000), Fault.cut(400_000))
    path = mount(tf_hub).path / "google/big/1"
    assert tensorflow.big(path=path, how=how) == tensorflow.big(path=saved / "big")
    # Each range that broke was asked for again from where it had come to; only what was under way came twice.
    requests = tf_hub.body_requests()
    assert sum(request.fault is not None for request in requests) == 3
    size = len(archives["big"])
    assert size <= sum(request.bytes_sent for request in requests) < 1.1 * size
