"""What does not arrive whole and right never becomes a model: TensorFlow gets an error, the cache nothing."""

from __future__ import annotations

import io
import re
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from isal import igzip

from hubfs.handles import cache_key
from tests.hub import Fault, FaultHub
from tests.tensorflow.conftest import OrderError, TensorFlow, body_has_begun, tree_of

NAME = "google/embed/1"


def half(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def without_trailer(archive: bytes) -> bytes:
    return archive[:-8]


def ended_between_members(archive: bytes) -> bytes:
    """Whole gzip, and a tar that ends after a member: tensorflow_hub takes that for a model."""
    raw = igzip.decompress(archive)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        last = tar.getmembers()[-1]
    return igzip.compress(raw[: last.offset], 1)


def flipped_bit(archive: bytes) -> bytes:
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 4]) + archive[middle + 1 :]


def wrong_checksum(archive: bytes) -> bytes:
    """Inflates to the right bytes; only gzip's own checksum disagrees."""
    crc = int.from_bytes(archive[-8:-4], "little")
    assert crc == zlib.crc32(igzip.decompress(archive))
    return archive[:-8] + (crc ^ 1).to_bytes(4, "little") + archive[-4:]


def web_page(archive: bytes) -> bytes:
    return b"<!DOCTYPE html><html><body>Please sign in.</body></html>"


def without_members(archive: bytes) -> bytes:
    return igzip.compress(b"\0" * 10240, 1)


DAMAGES = [
    half, without_trailer, ended_between_members, flipped_bit, wrong_checksum, web_page, without_members,
]  # fmt: skip


def assert_no_model(cache: Path, hub: FaultHub) -> None:
    directory = cache / cache_key(f"{hub.url}/{NAME}")
    assert not directory.exists()


@pytest.mark.logs(NAME)
@pytest.mark.parametrize("how", ["tf.saved_model.load", "hub.load"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archive_is_an_error_and_not_a_model(
    hub: FaultHub,
    mount,
    tensorflow: TensorFlow,
    archives: dict[str, bytes],
    damage: Callable[[bytes], bytes],
    how: str,
) -> None:
    # Its length and checksums are those of what is sent: the archive itself must tell.
    hub.add(NAME, damage(archives["embed"]))
    mounted = mount(hub)
    with pytest.raises(OrderError) as caught:
        tensorflow.embed(path=mounted.path / NAME, how=how)
    assert caught.value.kind in ("OSError", "ValueError", "UnknownError", "NotFoundError")
    assert_no_model(mounted.cache, hub)
    assert re.search(rf" ERROR .*{NAME}", mounted.log_text())


@pytest.mark.logs(NAME)
def test_body_that_always_ends_early_is_an_error_and_not_a_model(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, archives: dict[str, bytes]
) -> None:
    tf_hub.fault(NAME, Fault.truncate(len(archives["embed"]) - 1000, times=None))
    mounted = mount(tf_hub)
    with pytest.raises(OrderError):
        tensorflow.embed(path=mounted.path / NAME)
    assert_no_model(mounted.cache, tf_hub)


@pytest.mark.logs("google/big/1")
def test_wrong_bytes_of_100_mb_are_never_loaded(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, archives: dict[str, bytes]
) -> None:
    """Slow enough that TensorFlow reads while it arrives; the wrong bytes are among the last."""
    tf_hub.rate = 60e6
    tf_hub.fault("google/big/1", Fault.flip(len(archives["big"]) - 20_000, times=None))
    mounted = mount(tf_hub)
    with pytest.raises(OrderError):
        tensorflow.big(path=mounted.path / "google/big/1")
    assert not (mounted.cache / cache_key(f"{tf_hub.url}/google/big/1")).exists()


@pytest.mark.logs("google/big/1")
def test_wrong_bytes_are_not_loaded_before_the_checksum_behind_them_has_come(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes]
) -> None:
    """Every file is there, with one wrong byte of a variable; what tells comes last, and late."""
    raw = bytearray(igzip.decompress(archives["big"]))
    files = tree_of(saved / "big")
    raw[raw.index(files["variables/variables.data-00000-of-00001"][1000:1100])] ^= 1
    damaged = igzip.compress(raw, 1)[:-8] + archives["big"][-8:]
    # Over one connection, whose last bytes are the archive's.
    tf_hub.add("google/big/1", damaged, accept_ranges=False)
    release = threading.Event()
    tf_hub.fault("google/big/1", *[Fault.stall(len(damaged) - 8, release)] * 2)
    tf_hub.rate = 60e6
    mounted = mount(tf_hub)
    tensorflow.begin("big", path=mounted.path / "google/big/1")
    try:
        body_has_begun(tf_hub, "google/big/1", len(damaged) - 8)
        assert not tensorflow.has_ended(within=2.0)
    finally:
        release.set()
    with pytest.raises(OrderError):
        tensorflow.end()


def test_damage_that_happens_once_is_not_noticed(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes]
) -> None:
    tf_hub.fault(NAME, Fault.flip(len(archives["embed"]) // 2))
    mounted = mount(tf_hub)
    assert tensorflow.embed(path=mounted.path / NAME) == tensorflow.embed(path=saved / "embed")
    assert len(tf_hub.body_requests(NAME)) == 2


@pytest.mark.logs(NAME)
def test_model_is_loaded_once_the_hub_has_it_whole(
    tf_hub: FaultHub, mount, tensorflow: TensorFlow, saved: Path, archives: dict[str, bytes]
) -> None:
    """Neither hubfs nor tensorflow_hub takes anything of the failed attempt for a model."""
    tf_hub.add(NAME, half(archives["embed"]))
    mounted = mount(tf_hub)
    with pytest.raises(OrderError):
        tensorflow.embed(path=mounted.path / NAME)
    mounted.unmount()
    tf_hub.republish(NAME, archives["embed"])
    expected = tensorflow.embed(path=saved / "embed")
    url = f"{tf_hub.url}/{NAME}"
    assert tensorflow.embed(path=url, how="hub.load", cache=mounted.cache) == expected
    assert tensorflow.embed(path=mount(tf_hub, name="again").path / NAME) == expected
