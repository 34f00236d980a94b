"""Buckets that break, stall, lie, change or refuse while a version is read from them, through a mount."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bucket_hub import BucketHub
from tests.hub import Fault, FaultHub, Request
from tests.models import make_archive, make_tree
from tests.mount.conftest import cached_keys, read_tree, until
from tests.mount.test_listing import (
    DATA,
    MODEL,
    SMALL,
    MiB,
    Mount,
    opened,
    read_at,
    total_sent,
    until_cached,
)

TREE = make_tree(5, size=4 * MiB + 321)
SIZE = sum(map(len, TREE.values()))
BODY = TREE[DATA]
OTHER = make_tree(6, size=5 * MiB + 7)
PB = "saved_model.pb"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    with BucketHub() as hub:
        hub.publish(MODEL, TREE)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        yield hub


@pytest.fixture(params=["auto", "uncompressed"])
def load_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def error_of(read: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        read()
    assert caught.value.errno is not None
    return caught.value.errno


def why(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.error").decode()


def republish(hub: BucketHub, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        hub.put(f"{MODEL}/{name}", content)


class TestBrokenConnections:
    @pytest.mark.parametrize(
        "fault",
        [
            Fault.cut(0), Fault.cut(700_000), Fault.reset(1), Fault.reset(700_000), Fault.hang_up(),
            Fault.status(503), Fault.status(429), Fault.status(500), Fault.status(408), Fault.long_length(10),
        ],
        ids=lambda fault: fault.kind,
    )  # fmt: skip
    def test_are_tried_again(self, hub: BucketHub, mount: Mount, load_format: str, fault: Fault) -> None:
        hub.fault_file(MODEL, DATA, fault, fault)
        hub.fault_file(MODEL, PB, fault)
        assert read_tree(mount(hub, load_format=load_format).path / MODEL) == TREE
        assert len([request for request in hub.reads(MODEL) if request.fault]) == 3

    def test_that_break_all_the_time_bring_it_piece_by_piece(self, hub: BucketHub, mount: Mount) -> None:
        hub.fault_file(MODEL, DATA, Fault.cut(1_200_000, times=8))
        mounted = mount(hub, retries=2)
        assert (mounted.path / MODEL / DATA).read_bytes() == BODY
        until_cached(mounted.cache)

    @pytest.mark.parametrize("what", ["location", "listing"])
    @pytest.mark.parametrize("code", [500, 503, 429])
    def test_while_it_is_located_are_tried_again(
        self, hub: BucketHub, mount: Mount, load_format: str, what: str, code: int
    ) -> None:
        hub.add(MODEL, make_archive(TREE))
        if what == "listing":
            hub.fault_listing(Fault.status(code), Fault.status(code))
        else:
            hub.fault(MODEL, Fault.status(code, on="listing"), Fault.status(code, on="listing"))
        assert read_tree(mount(hub, load_format=load_format).path / MODEL) == TREE

    @pytest.mark.logs(MODEL)
    def test_that_never_last_are_eio_and_are_tried_anew(
        self, hub: BucketHub, mount: Mount, load_format: str
    ) -> None:
        hub.fault_file(MODEL, PB, Fault.status(503, times=None))
        mounted = mount(hub, load_format=load_format, retries=2)
        path = mounted.path / MODEL / PB
        assert error_of(path.read_bytes) == errno.EIO
        assert len(hub.reads(MODEL, PB)) >= 3
        # Others are not spoilt by that, nor is it for good.
        assert (mounted.path / MODEL / "fingerprint.pb").read_bytes() == TREE["fingerprint.pb"]
        hub.clear_faults()
        until(lambda: _or_none(path.read_bytes) == TREE[PB], "its bytes, now that the bucket has recovered")

    @pytest.mark.logs(MODEL)
    def test_that_end_while_all_is_brought_in_leave_what_came(self, hub: BucketHub, mount: Mount) -> None:
        hub.fault_file(MODEL, "assets/vocab.txt", Fault.status(503, times=None))
        mounted = mount(hub, retries=1)
        assert (mounted.path / MODEL / DATA).read_bytes() == BODY
        assert error_of((mounted.path / MODEL / "assets/vocab.txt").read_bytes) == errno.EIO
        assert cached_keys(mounted.cache) == []
        hub.clear_faults()
        until(lambda: _or_none((mounted.path / MODEL / "assets/vocab.txt").read_bytes), "the last file")
        read_at(mounted.path / MODEL / DATA, 0, 1)
        until_cached(mounted.cache)
        assert total_sent(hub) == SIZE


def _or_none(read: Callable[[], bytes]) -> bytes | None:
    try:
        return read()
    except OSError:
        return None


class TestDeadlines:
    """Each test would hang for ever if a wait had no bound."""

    def test_reader_is_freed_by_the_read_timeout_and_the_rest_goes_on(
        self, hub: BucketHub, mount: Mount, load_format: str, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.stall(0, release, times=None))
        mounted = mount(hub, load_format=load_format, read_timeout=0.5, stall_timeout=60)
        with opened(mounted.path / MODEL / DATA) as data:
            assert error_of(lambda: os.pread(data, 10, 0)) == errno.EIO
            assert (mounted.path / MODEL / PB).read_bytes() == TREE[PB]
            release.set()
            until(lambda: _or_none(lambda: os.pread(data, 10, 0)) == BODY[:10], "the bytes")

    def test_stalled_connection_is_replaced(
        self, hub: BucketHub, mount: Mount, load_format: str, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.stall(100_000, release))
        mounted = mount(hub, load_format=load_format, stall_timeout=0.5)
        assert (mounted.path / MODEL / DATA).read_bytes() == BODY
        assert not release.is_set()

    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("what", ["listing", "file"])
    def test_bucket_that_never_answers_is_given_up(
        self, hub: BucketHub, mount: Mount, load_format: str, release: threading.Event, what: str
    ) -> None:
        fault = Fault.hang(release, times=None)
        hub.fault_listing(fault) if what == "listing" else hub.fault_file(MODEL, PB, fault)
        mounted = mount(
            hub, load_format=load_format, connect_timeout=0.3, stall_timeout=0.3, retries=1, read_timeout=30
        )
        # Under AUTO the archive would be taken; there is none.
        assert error_of((mounted.path / MODEL / PB).read_bytes) in (errno.EIO, errno.ENOENT)
        assert not release.is_set()

    def test_unmounting_does_not_wait_for_a_bucket(
        self, hub: BucketHub, mount: Mount, load_format: str, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        mounted = mount(hub, load_format=load_format)
        with subprocess.Popen(
            ["cat", mounted.path / MODEL / DATA], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as reader:
            hub.wait_for(lambda hub: hub.reads(MODEL, DATA), what="the request")
            mounted.unmount(lazy=True)
            reader.kill()
        until(lambda: not Path(f"/proc/{mounted.pid}").exists(), "the end of the daemon")
        assert not release.is_set()


class TestRefused:
    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("code", [401, 403])
    def test_file_is_eacces_with_the_buckets_own_words(
        self, hub: BucketHub, mount: Mount, load_format: str, code: int
    ) -> None:
        words = b"<Error><Code>AccessDenied</Code><Message>Not for you</Message></Error>"
        hub.fault_file(MODEL, PB, Fault.status(code, words, times=None))
        mounted = mount(hub, load_format=load_format)
        assert error_of((mounted.path / MODEL / PB).read_bytes) == errno.EACCES
        assert "Not for you" in why(mounted.path / "google")

    @pytest.mark.logs(MODEL)
    def test_listing_is_eacces_where_there_is_no_archive_to_fall_back_to(
        self, hub: BucketHub, mount: Mount
    ) -> None:
        words = b"<Error><Code>AccessDenied</Code><Message>Not for you</Message></Error>"
        hub.fault_listing(Fault.status(403, words, times=None))
        mounted = mount(hub, load_format="uncompressed")
        assert error_of(lambda: os.listdir(mounted.path / MODEL)) == errno.EACCES
        assert "Not for you" in why(mounted.path / "google")

    def test_access_that_is_granted_later_is_used(self, hub: BucketHub, mount: Mount) -> None:
        hub.fault_file(MODEL, PB, Fault.status(403))
        mounted = mount(hub)
        assert error_of((mounted.path / MODEL / PB).read_bytes) == errno.EACCES
        until(lambda: _or_none((mounted.path / MODEL / PB).read_bytes) == TREE[PB], "access")


class TestDamage:
    @pytest.mark.logs("md5")
    def test_wrong_checksum_is_eio_for_who_has_it_open_and_nothing_is_published(
        self, hub: BucketHub, mount: Mount
    ) -> None:
        wrong = hashlib.md5(b"wrong").hexdigest()
        hub.listed[f"{MODEL}/{PB}"] = {"ETag": f'"{wrong}"'}
        # Its bytes have that ETag, so that only their checksum shows it.
        hub.put(f"{MODEL}/{PB}", TREE[PB], etag=f'"{wrong}"', digests=False)
        mounted = mount(hub)
        until(lambda: _failed_with(mounted.path / MODEL / PB, errno.EIO), "the checksum to be compared")
        assert _or_none((mounted.path / MODEL / DATA).read_bytes) in (BODY, None)
        until(
            lambda: f"{PB}: its md5 is" in (_or_none(lambda: why(mounted.path / "google")) or ""),
            "the reason",
        )
        assert 2 <= len(hub.reads(MODEL, PB)) <= 6, "once more, and not on and on"
        assert cached_keys(mounted.cache) == []

    def test_bit_that_flipped_on_the_way_is_fetched_again(self, hub: BucketHub, mount: Mount) -> None:
        hub.fault_file(MODEL, DATA, flips(2 * MiB + 77, 1))
        hub.fault_file(MODEL, PB, flips(100, 1))
        mounted = mount(hub)
        with opened(mounted.path / MODEL / DATA) as data:
            _or_none(lambda: os.pread(data, 10, 2 * MiB))
            until_cached(mounted.cache)
            # Who had it open before may have been given wrong bytes: an error is all they get.
            assert _or_none(lambda: os.pread(data, 4096, 3 * MiB)) in (None, BODY[3 * MiB : 3 * MiB + 4096])
        assert read_tree(mounted.path / MODEL) == TREE
        (key,) = cached_keys(mounted.cache)
        assert read_tree(mounted.cache / key) == TREE

    @pytest.mark.logs("crc32c")
    def test_who_has_damaged_bytes_open_is_given_no_more(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, flips(77, 1000))
        mounted = mount(hub, retries=1)
        with opened(mounted.path / MODEL / DATA) as data:

            def is_told() -> bool:
                os.posix_fadvise(data, 0, 0, os.POSIX_FADV_DONTNEED)  # or the kernel answers by itself
                return _or_none(lambda: os.pread(data, 1, 0)) is None

            until(is_told, "an error for who has it open", 30)
            hub.clear_faults()
            for at in range(0, len(BODY), MiB):
                with pytest.raises(OSError):
                    os.pread(data, 100, at)
        assert cached_keys(mounted.cache) == []

    @pytest.mark.parametrize(
        ("fault", "what"),
        [
            (Fault.truncate(2 * MiB), "fewer"),
            (Fault.truncate(2 * MiB + 5), "fewer"),
            (Fault.short_length(100), "shorter"),
            (Fault.wrong_range(), "other"),
            (Fault.ignore_range(), "all"),
            (Fault.html(), "a page"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_answers_that_are_not_what_was_asked_for_are_never_taken(
        self, hub: BucketHub, mount: Mount, load_format: str, fault: Fault, what: str
    ) -> None:
        hub.fault_file(MODEL, DATA, fault)
        mounted = mount(hub, load_format=load_format)
        found = []
        until(lambda: found.append(_or_none((mounted.path / MODEL / DATA).read_bytes)) or found[-1], "bytes")
        assert set(found) <= {None, BODY}


def flips(offset: int, times: int) -> Fault:
    """Flip a bit in so many of the answers that have this byte."""
    left = [True] * times

    def hits(hub: FaultHub, request: Request) -> bool:
        first, last = map(int, str(request.range).removeprefix("bytes=").split("-"))
        return first <= offset <= last and bool(left) and left.pop()

    return Fault.when(hits, Fault.flip(offset))


def _failed_with(path: Path, number: int) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        assert error.errno == number
        return True
    return False


class TestChange:
    """An object is another one than when it was listed."""

    def test_is_an_error_for_open_handles_and_a_fresh_listing_for_others(
        self, hub: BucketHub, mount: Mount, load_format: str
    ) -> None:
        mounted = mount(hub, load_format=load_format, read_ahead=False)
        path = mounted.path / MODEL / DATA
        with opened(path) as data:
            assert os.pread(data, 10, 0) == BODY[:10]
            republish(hub, OTHER)
            assert error_of(lambda: os.pread(data, 10, 3 * MiB)) == errno.EIO
            # And from now on, wherever it reads.
            assert error_of(lambda: os.pread(data, 10, 2 * MiB)) == errno.EIO
            assert path.read_bytes() == OTHER[DATA]
            assert path.stat().st_size == len(OTHER[DATA])
            assert error_of(lambda: os.pread(data, 10, 2 * MiB)) == errno.EIO
        assert read_tree(mounted.path / MODEL) == OTHER
        assert len(hub.listings()) == 2

    @pytest.mark.parametrize("size", [10, 200, 10_000])
    def test_of_a_small_file_shows_its_new_size_and_bytes(
        self, hub: BucketHub, mount: Mount, load_format: str, size: int
    ) -> None:
        mounted = mount(hub, load_format=load_format, read_ahead=False)
        path = mounted.path / MODEL / "fingerprint.pb"
        assert path.stat().st_size == 55
        hub.put(f"{MODEL}/fingerprint.pb", b"x" * size)
        assert error_of(path.read_bytes) == errno.EIO
        assert path.read_bytes() == b"x" * size
        assert path.stat().st_size == size
        assert subprocess.run(["cat", path], capture_output=True, timeout=30).stdout == b"x" * size

    def test_is_never_a_mixture(self, hub: BucketHub, mount: Mount, load_format: str) -> None:
        """Whatever of it the kernel and the cache had."""
        mounted = mount(hub, load_format=load_format, read_ahead=False)
        path = mounted.path / MODEL / DATA
        assert read_at(path, 0, 10) == BODY[:10]
        changed = make_tree(8, size=len(BODY))[DATA]
        hub.put(f"{MODEL}/{DATA}", changed)
        found = []
        until(lambda: found.append(_or_none(path.read_bytes)) or found[-1], "the new bytes")
        assert found[-1] == changed and set(found[:-1]) <= {None}

    @pytest.mark.parametrize("when", ["before it is read", "later"])
    def test_gone_object_is_an_error_and_then_not_there(
        self, hub: BucketHub, mount: Mount, load_format: str, when: str
    ) -> None:
        mounted = mount(hub, load_format=load_format, read_ahead=False)
        path = mounted.path / MODEL / DATA
        path.stat() if when == "before it is read" else read_at(path, 0, 10)
        hub.delete(f"{MODEL}/{DATA}")
        assert error_of(lambda: read_at(path, 3 * MiB, 10)) == errno.EIO
        with pytest.raises(FileNotFoundError):
            read_at(path, 3 * MiB, 10)
        assert DATA.partition("/")[2] not in os.listdir(mounted.path / MODEL / "variables")
        assert (mounted.path / MODEL / PB).read_bytes() == TREE[PB]

    def test_while_all_is_brought_in_publishes_only_the_new_one(self, hub: BucketHub, mount: Mount) -> None:
        gate = threading.Event()
        # A connection that is held and then closed: what is asked for again is the new one.
        hub.fault_file(MODEL, "assets/vocab.txt", Fault._set("hang", {}, hold=gate, drop=True))
        mounted = mount(hub)
        with opened(mounted.path / MODEL / DATA) as data:
            assert os.pread(data, 1, 0) == BODY[:1]
            hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all of the data")
            republish(hub, OTHER)
            gate.set()
            until(lambda: _or_none((mounted.path / MODEL / DATA).read_bytes) == OTHER[DATA], "the new one")
        until_cached(mounted.cache)
        (key,) = cached_keys(mounted.cache)
        assert read_tree(mounted.cache / key) == OTHER
        assert read_tree(mounted.path / MODEL) == OTHER

    def test_at_the_next_mount_forgets_what_was_kept(self, hub: BucketHub, mount: Mount) -> None:
        mounted = mount(hub, read_ahead=False)
        read_at(mounted.path / MODEL / DATA, 0, MiB)
        mounted.unmount()
        republish(hub, OTHER)
        again = mount(hub, "again")
        assert read_tree(again.path / MODEL) == OTHER
        until_cached(again.cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
class TestFullDisk:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 8 MiB."""
        path = tmp_path / "small"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], check=True)
        yield path
        subprocess.run(["umount", path], check=True)

    @pytest.mark.logs(MODEL)
    def test_is_enospc_and_leaves_nothing(self, hub: BucketHub, mount: Mount, small: Path) -> None:
        large = make_tree(9, size=20 * MiB)
        hub.publish(MODEL, large)
        hub.publish("google/fits/1", SMALL)
        mounted = mount(hub, cache_dir=small / "cache")
        try:
            assert error_of((mounted.path / MODEL / DATA).read_bytes) == errno.ENOSPC
            assert "space" in why(mounted.path / MODEL).lower()
            until(lambda: not list(mounted.cache.glob("*.partial")), "what came to be removed")
            assert read_tree(mounted.path / "google/fits/1") == SMALL
            until(lambda: cached_keys(mounted.cache), "the one that fits in the cache")
        finally:
            mounted.unmount()

    def test_uncompressed_needs_none(self, hub: BucketHub, mount: Mount, small: Path) -> None:
        (small / "full").write_bytes(bytes(7 * MiB))
        mounted = mount(hub, cache_dir=small / "cache", load_format="uncompressed")
        try:
            assert read_tree(mounted.path / MODEL) == TREE
        finally:
            mounted.unmount()


class TestHostileListings:
    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize(
        "key", [f"{MODEL}/../../x", f"{MODEL}/a//b", f"{MODEL}/{'n' * 300}", f"{MODEL}/a\nb"], ids=repr
    )
    def test_names_that_are_no_files_fail_the_version(
        self, hub: BucketHub, mount: Mount, load_format: str, key: str
    ) -> None:
        hub.listed[f"{MODEL}/{PB}"] = {"Key": key}
        mounted = mount(hub, load_format=load_format)
        assert error_of(lambda: os.listdir(mounted.path / MODEL)) == errno.EIO
        assert not [name for name in os.listdir(mounted.path) if name not in ("google",)]

    @pytest.mark.logs(MODEL)
    def test_more_files_than_allowed_are_refused(
        self, hub: BucketHub, mount: Mount, load_format: str
    ) -> None:
        mounted = mount(hub, load_format=load_format, max_model_files=3)
        assert error_of(lambda: os.listdir(mounted.path / MODEL)) == errno.EFBIG

    @pytest.mark.logs(MODEL)
    def test_larger_than_allowed_is_refused(self, hub: BucketHub, mount: Mount, load_format: str) -> None:
        mounted = mount(hub, load_format=load_format, max_model_size="1MB")
        assert error_of(lambda: os.listdir(mounted.path / MODEL)) == errno.EFBIG

    @pytest.mark.logs(MODEL)
    def test_empty_directory_is_no_model(self, hub: BucketHub, mount: Mount) -> None:
        hub.named["google/empty/1"] = (303, b"gs://models-of-a-test/google/empty/1")
        mounted = mount(hub, load_format="uncompressed")
        with pytest.raises(FileNotFoundError):
            os.listdir(mounted.path / "google/empty/1")
        hub.add("google/empty/1", make_archive(SMALL))
        other = mount(hub, "other")
        assert read_tree(other.path / "google/empty/1") == SMALL
