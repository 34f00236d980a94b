"""Versions that are read file by file and range by range, through a mount: `AUTO` and `UNCOMPRESSED`.

What breaks on the way is in `test_listing_faults.py`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from tests.bucket_hub import MTIME, BucketHub
from tests.conftest import Mounted
from tests.hub import Fault
from tests.models import make_archive, make_tree
from tests.mount.conftest import Hubfs, cached_keys, read_tree, until

Mount = Callable[..., Mounted]
MODEL = "google/demo/1"
DATA = "variables/variables.data-00000-of-00001"
MiB = 1 << 20
SMALL = make_tree(1, size=300_000)
TREE = make_tree(2, size=12 * MiB + 4321)
SIZE = sum(map(len, TREE.values()))
BODY = TREE[DATA]
#: For an answer that needs no network. Generous, as what is held back is held back until a test ends.
SOON = 20.0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    with BucketHub() as hub:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        yield hub


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(path: Path, offset: int, size: int) -> bytes:
    with opened(path) as descriptor:
        return os.pread(descriptor, size, offset)


def ranges(hub: BucketHub, name: str = DATA, model: str = MODEL) -> list[tuple[int, int]]:
    """First and last byte (exclusive) of the requests for a file, in the order of the file."""
    found = [str(request.range).removeprefix("bytes=").split("-") for request in hub.reads(model, name)]
    return sorted((int(first), int(last) + 1) for first, last in found)


def total_sent(hub: BucketHub, model: str = MODEL) -> int:
    return sum(hub.sent(model).values())


def partial(mounted: Mounted, hub: BucketHub, model: str = MODEL) -> Path:
    return mounted.cache / f"{cache_key(f'{hub.url}/{model}')}.hubfs.partial"


def until_cached(cache: Path) -> None:
    """Wait until the one version is published: readers do not wait for that."""

    def published() -> bool:
        names = os.listdir(cache)
        return bool(cached_keys(cache)) and not any(name.endswith((".lock", ".partial")) for name in names)

    until(published, "the version in the cache", 30)
    assert len(cached_keys(cache)) == 1


def is_free(directory: Path) -> bool:
    """Whether no process brings a version in."""
    with opened(directory / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def state(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.state").decode()


def everything_below(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*")) if directory.exists() else []


class TestNothingIsFetchedFor:
    """What needs the listing only."""

    @pytest.fixture(params=["auto", "uncompressed"])
    def mounted(self, request: pytest.FixtureRequest, hub: BucketHub, mount: Mount) -> Mounted:
        hub.publish(MODEL, TREE)
        return mount(hub, load_format=request.param)

    @pytest.mark.parametrize(
        "command",
        [
            ("ls", "-lR"),
            ("find",),
            ("find", "-name", "*.pb", "-size", "+1k"),
            ("du", "-a", "--apparent-size"),
            ("stat",),
        ],
        ids=lambda command: " ".join(command),
    )
    def test_tools_that_look_around(self, hub: BucketHub, mounted: Mounted, command: tuple[str, ...]) -> None:
        words = [command[0], str(mounted.path / MODEL), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len(hub.listings()) == 1
        assert hub.reads() == []

    def test_names_sizes_and_times_are_the_listings(self, hub: BucketHub, mounted: Mounted) -> None:
        model = mounted.path / MODEL
        assert sorted(os.listdir(model)) == ["assets", "fingerprint.pb", "saved_model.pb", "variables"]
        for name, content in TREE.items():
            status = (model / name).stat()
            assert (status.st_size, int(status.st_mtime)) == (len(content), MTIME)
            assert status.st_blocks <= 1
        assert int((model / "variables").stat().st_mtime) == MTIME
        assert hub.reads() == []

    @pytest.mark.parametrize("tool", ["cp", "cp --sparse=always", "tar", "tar -S"])
    def test_but_copies_are_whole(self, mounted: Mounted, tmp_path: Path, tool: str) -> None:
        """Hardly a block of the files is on disk: tools must not take them for holes."""
        copy = tmp_path / "copy"
        copy.mkdir()
        command, *options = tool.split()
        if command == "cp":
            subprocess.run([*tool.split(), "-r", f"{mounted.path / MODEL}/.", copy], check=True, timeout=60)
        else:
            archive = tmp_path / "copy.tar"
            model = str(mounted.path / MODEL)
            subprocess.run(["tar", *options, "-cf", archive, "-C", model, "."], check=True, timeout=60)
            subprocess.run(["tar", "-xf", archive, "-C", copy], check=True, timeout=60)
        assert read_tree(copy) == TREE

    def test_names_that_the_version_lacks(self, hub: BucketHub, mounted: Mounted) -> None:
        os.listdir(mounted.path / MODEL)
        asked = len(hub.requests())
        for name in ("debug/saved_model_debug_info.pb", "assets.extra", "saved_model.pbtxt", "variables/x"):
            with pytest.raises(FileNotFoundError):
                (mounted.path / MODEL / name).stat()
        assert len(hub.requests()) == asked

    def test_archive_is_not_asked_for(self, hub: BucketHub, mounted: Mounted) -> None:
        hub.add(MODEL, make_archive(TREE))
        assert (mounted.path / MODEL / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert hub.archive_requests() == []
        assert len(hub.locations()) == 1 and len(hub.listings()) == 1


class TestUncompressed:
    @pytest.mark.parametrize("where", ["proc", "a file", "below a file", "read-only"])
    def test_needs_no_cache_directory(self, hub: BucketHub, mount: Mount, tmp_path: Path, where: str) -> None:
        (tmp_path / "file").write_text("")
        places = {
            "proc": "/proc/nowhere/cache",
            "a file": f"{tmp_path}/file",
            "below a file": f"{tmp_path}/file/cache",
            "read-only": "/sys/x",
        }
        hub.publish(MODEL, SMALL)
        mounted = mount(hub, load_format="uncompressed", cache_dir=places[where])
        assert read_tree(mounted.path / MODEL) == SMALL
        assert mounted.status()["cache"]["models"] == 0
        assert mounted.status()["transfers"] == []

    def test_leaves_nothing_on_disk(self, hub: BucketHub, mount: Mount, tmp_path: Path) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, load_format="uncompressed")
        assert read_tree(mounted.path / MODEL) == TREE
        assert everything_below(mounted.cache) == []
        assert (mounted.path / MODEL / DATA).stat().st_blocks <= 1
        big = [path for path in tmp_path.rglob("*") if path.is_file() and mounted.path not in path.parents]
        assert [path for path in big if path.stat().st_size > MiB and path.suffix != ".log"] == []

    def test_serves_what_is_cached_without_asking(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, SMALL)
        first = mount(hub)
        read_tree(first.path / MODEL)
        until_cached(first.cache)
        first.unmount()
        asked = len(hub.requests())
        second = mount(hub, "second", load_format="uncompressed")
        assert read_tree(second.path / MODEL) == SMALL
        assert len(hub.requests()) == asked

    def test_memory_is_bounded(self, hub: BucketHub, mount: Mount) -> None:
        """A file of 100 MB through 16 MiB, with all that a daemon needs beside them."""
        content = os.urandom(4 * MiB) * 25
        hub.publish(MODEL, {**SMALL, DATA: content})
        mounted = mount(hub, load_format="uncompressed", memory_limit="16MiB")
        path = mounted.path / MODEL / DATA
        read_at(path, 0, 10)
        before = memory(mounted, "VmRSS")
        with opened(path) as one, opened(path) as two, ThreadPoolExecutor(2) as pool:
            # Two readers far from each other, so that nothing of one serves the other.
            first = pool.submit(compare, one, content, 0)
            second = pool.submit(compare, two, content, len(content) // 2)
            first.result()
            second.result()
        assert memory(mounted, "VmHWM") - before < 16 * MiB + 44 * MiB

    @pytest.mark.logs(MODEL)
    def test_is_an_error_where_the_hub_has_no_listing(self, hub: BucketHub, mount: Mount) -> None:
        hub.add(MODEL, make_archive(SMALL))
        mounted = mount(hub, load_format="uncompressed")
        with pytest.raises(OSError) as caught:
            (mounted.path / MODEL / "saved_model.pb").read_bytes()
        assert caught.value.errno == errno.EIO
        assert "uncompressed" in os.getxattr(mounted.path / "google", "user.hubfs.error").decode()
        assert hub.body_requests() == []


def memory(mounted: Mounted, what: str) -> int:
    """Bytes that the kernel counts for a daemon: `VmRSS`, `VmHWM`."""
    lines = Path(f"/proc/{mounted.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def compare(descriptor: int, content: bytes, start: int) -> None:
    size = len(content) // 2
    for at in range(start, start + size, MiB):
        stop = min(at + MiB, start + size)
        assert os.pread(descriptor, stop - at, at) == content[at:stop], at


class TestOnDemand:
    def test_random_reads_ask_for_a_mebibyte_each(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        with opened(mounted.path / MODEL / DATA) as data:
            os.posix_fadvise(data, 0, 0, os.POSIX_FADV_RANDOM)
            for offset in (9 * MiB + 5, 3 * MiB, 6 * MiB + 77):
                assert os.pread(data, 4096, offset) == BODY[offset : offset + 4096]
        assert [stop - start for start, stop in ranges(hub)] == [MiB] * 3

    def test_tail_and_then_all_in_order_is_sent_once(self, hub: BucketHub, mount: Mount) -> None:
        """As TensorFlow reads (PROTOCOLS §5)."""
        hub.publish(MODEL, TREE)
        mounted = mount(hub)
        with opened(mounted.path / MODEL / DATA) as data:
            assert os.pread(data, 4096, len(BODY) - 4096) == BODY[-4096:]
            found = b"".join(os.pread(data, MiB, at) for at in range(0, len(BODY), MiB))
        assert found == BODY
        assert total_sent(hub) <= SIZE
        until_cached(mounted.cache)
        assert total_sent(hub) == SIZE

    def test_what_is_there_is_kept_in_sparse_files(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        path = mounted.path / MODEL
        assert read_at(path / DATA, 7 * MiB, 10) == BODY[7 * MiB : 7 * MiB + 10]
        kept = partial(mounted, hub) / "files" / DATA
        assert kept.stat().st_size == len(BODY)
        assert kept.stat().st_blocks * 512 < 2 * MiB + 65536
        assert state(path) == "partial"
        assert int(os.getxattr(path, "user.hubfs.received")) < 3 * MiB

    def test_without_read_ahead_only_what_is_touched_comes(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        path = mounted.path / MODEL
        assert (path / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert read_at(path / DATA, 5 * MiB, 10) == BODY[5 * MiB : 5 * MiB + 10]
        until(lambda: is_free(partial(mounted, hub)), "nobody to bring the version in any more")
        assert set(hub.sent(MODEL)) == {"saved_model.pb", DATA}
        assert hub.sent(MODEL)[DATA] <= 2 * MiB
        assert cached_keys(mounted.cache) == []

    def test_without_read_ahead_reading_all_of_it_makes_it_complete(
        self, hub: BucketHub, mount: Mount
    ) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        assert read_tree(mounted.path / MODEL) == TREE
        until_cached(mounted.cache)
        assert state(mounted.path / MODEL) == "complete"
        assert total_sent(hub) == SIZE

    @pytest.mark.parametrize("name", ["saved_model.pb", "fingerprint.pb", "assets/vocab.txt"])
    def test_small_file_does_not_bring_in_the_rest(self, hub: BucketHub, mount: Mount, name: str) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub)
        assert (mounted.path / MODEL / name).read_bytes() == TREE[name]
        until(lambda: is_free(partial(mounted, hub)), "nobody to bring the version in any more")
        assert set(hub.sent(MODEL)) == {name}

    def test_version_that_was_given_free_is_gone_on_with(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        data = mounted.path / MODEL / DATA
        read_at(data, 5 * MiB, 10)
        until(lambda: is_free(partial(mounted, hub)), "nobody to bring the version in any more")
        assert data.read_bytes() == BODY
        assert hub.sent(MODEL)[DATA] == len(BODY)

    def test_many_readers_of_one_range_cause_one_request(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        mounted = mount(hub, read_ahead=False)
        with ThreadPoolExecutor(16) as pool:
            reads = [pool.submit(read_at, mounted.path / MODEL / DATA, 4 * MiB, 4096) for _ in range(16)]
            hub.wait_for(lambda hub: hub.reads(MODEL, DATA), what="the request")
            release.set()
            assert {read.result() for read in reads} == {BODY[4 * MiB : 4 * MiB + 4096]}
        assert ranges(hub)[0] == (4 * MiB, 5 * MiB)
        assert len(set(ranges(hub))) == len(ranges(hub)) and total_sent(hub) < 3 * MiB

    def test_a_demand_is_answered_while_the_rest_is_held_back(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        mounted = mount(hub)
        with opened(mounted.path / MODEL / DATA):  # and all is read ahead
            hub.wait_for(lambda hub: hub.reads(MODEL, DATA), what="the request")
            for name in TREE.keys() - {DATA}:
                assert (mounted.path / MODEL / name).read_bytes() == TREE[name]
            release.set()
        until_cached(mounted.cache)


class TestReadAhead:
    def test_opening_a_data_file_makes_the_version_complete(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        until_cached(mounted.cache)
        handle = f"{hub.url}/{MODEL}"
        assert read_tree(mounted.cache / cache_key(handle)) == TREE
        told = (mounted.cache / f"{cache_key(handle)}.descriptor.txt").read_text()
        assert told.startswith(f"Module: {handle}\nDownload Time: ")
        assert not partial(mounted, hub).exists()
        assert state(mounted.path / MODEL) == "complete"
        assert total_sent(hub) == SIZE and len(hub.listings()) == 1

    def test_complete_version_is_served_with_the_hub_gone(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub)
        with opened(mounted.path / MODEL / DATA) as data:
            os.pread(data, 1, 0)
            until_cached(mounted.cache)
            hub.close()
            # In this mount, by who has it open, by others, and in the next one.
            assert os.pread(data, MiB, MiB) == BODY[MiB : 2 * MiB]
        assert read_tree(mounted.path / MODEL) == TREE
        mounted.unmount()
        assert read_tree(mount(hub, "again").path / MODEL) == TREE

    def test_goes_on_after_the_last_reader_has_gone(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all of the data")
        assert cached_keys(mounted.cache) == []
        release.set()
        until_cached(mounted.cache)

    def test_times_in_the_cache_are_the_publishers(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, SMALL)
        mounted = mount(hub)
        before = {name: (mounted.path / MODEL / name).stat() for name in SMALL}
        read_tree(mounted.path / MODEL)
        until_cached(mounted.cache)
        (key,) = cached_keys(mounted.cache)
        for name, status in before.items():
            for place in (mounted.cache / key, mounted.path / MODEL):
                now = (place / name).stat()
                assert (now.st_size, int(now.st_mtime)) == (status.st_size, MTIME)
            assert (mounted.path / MODEL / name).stat().st_ino == status.st_ino

    def test_version_of_many_small_files_comes_whole(self, hub: BucketHub, mount: Mount) -> None:
        many = {f"assets/{n % 7}/{n:04}": str(n).encode() * (n % 50) for n in range(600)}
        hub.page = 250
        hub.publish(MODEL, {**SMALL, **many})
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        until_cached(mounted.cache)
        assert read_tree(mounted.path / MODEL) == {**SMALL, **many}
        assert len(hub.listings()) == 3


class TestGoingOn:
    """After whatever ended the process that brought it in."""

    def test_killed_daemon_loses_hardly_anything(self, hub: BucketHub, mount: Mount) -> None:
        tree = {**TREE, DATA: make_tree(3, size=40 * MiB)[DATA]}
        hub.publish(MODEL, tree)
        hub.rate = 6e6  # of each connection
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        hub.wait_for(lambda hub: total_sent(hub) > 25 * MiB, timeout=60, what="half of it")
        os.kill(mounted.pid, signal.SIGKILL)
        hub.wait_for(lambda hub: not hub.answering(), what="the end of all connections")
        before = total_sent(hub)
        mounted.unmount(lazy=True)
        hub.rate = None
        again = mount(hub, "again")
        assert (again.path / MODEL / DATA).read_bytes() == tree[DATA]
        until_cached(again.cache)
        assert read_tree(again.path / MODEL) == tree
        size = sum(map(len, tree.values()))
        # Eight of them were not on stable storage yet, at most, and a piece of each of eight requests,
        # as much of each in the sockets.
        assert total_sent(hub) - size <= 24 * MiB < before
        assert again.log_text().count("going on") <= 1

    @pytest.mark.parametrize("damage", ["remove", "cut", "map", "map of another"])
    def test_what_is_not_there_is_never_trusted(self, hub: BucketHub, mount: Mount, damage: str) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        (mounted.path / MODEL / DATA).read_bytes()
        mounted.unmount()
        kept = partial(mounted, hub)
        assert (kept / "files" / DATA).read_bytes() == BODY
        if damage == "remove":
            (kept / "files" / DATA).unlink()
        elif damage == "cut":
            os.truncate(kept / "files" / DATA, 5 * MiB)
        elif damage == "map":
            (kept / "map").write_bytes((kept / "map").read_bytes()[:-100])
        else:
            hub.put(f"{MODEL}/{DATA}", BODY[::-1])
        expected = BODY[::-1] if damage == "map of another" else BODY
        assert (mount(hub, "again").path / MODEL / DATA).read_bytes() == expected

    def test_unmounted_in_the_middle_goes_on(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, TREE)
        hub.rate = 3e6
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        hub.wait_for(lambda hub: total_sent(hub) > 4 * MiB, timeout=60, what="some of it")
        mounted.unmount()
        assert is_free(partial(mounted, hub))
        hub.rate = None
        again = mount(hub, "again")
        assert (again.path / MODEL / DATA).read_bytes() == BODY
        until_cached(again.cache)
        # What was written is flushed at the end: a piece of each request and what sockets hold is lost.
        assert total_sent(hub) - SIZE <= 12 * MiB

    def test_hubfs_ls_tells_of_partial_versions(self, hub: BucketHub, mount: Mount, hubfs: Hubfs) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        mounted.unmount()
        said = hubfs("ls", "--cache-dir", mounted.cache, "--hub", hub.url).stdout
        assert "partial" in said and "google/demo" in said


class TestOtherProcesses:
    def test_two_mounts_give_right_bytes_and_one_version(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        one, two = mount(hub), mount(hub, "two")
        read_at(one.path / MODEL / DATA, 0, 1)
        hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all of the data")
        # It is the first one's to bring in; the second one does not wait for it.
        assert (two.path / MODEL / DATA).read_bytes() == BODY
        assert (two.path / MODEL / "assets/vocab.txt").read_bytes() == TREE["assets/vocab.txt"]
        release.set()
        until_cached(one.cache)
        assert read_tree(two.path / MODEL) == read_tree(one.path / MODEL) == TREE
        assert [name for name in os.listdir(one.cache) if "partial" in name] == []

    def test_pull_waits_for_the_mount_that_brings_it_in(
        self, hub: BucketHub, mount: Mount, hubfs: Hubfs, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        mounted = mount(hub)
        read_at(mounted.path / MODEL / DATA, 0, 1)
        hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all of the data")
        with ThreadPoolExecutor(1) as pool:
            pull = pool.submit(
                hubfs, "pull", MODEL, "--hub", hub.url, "--cache-dir", mounted.cache, "--retry-delay", "0.02"
            )
            hub.wait_for(lambda hub: len(hub.listings()) == 2, timeout=30, what="the other process")
            assert not pull.done()
            release.set()
            pull.result(60)
        assert read_tree(mounted.path / MODEL) == TREE
        assert total_sent(hub) == SIZE

    def test_pull_of_a_listing_is_served_by_a_mount(self, hub: BucketHub, mount: Mount, hubfs: Hubfs) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub)
        hubfs("pull", MODEL, "--hub", hub.url, "--cache-dir", mounted.cache)
        assert len(cached_keys(mounted.cache)) == 1
        sent = total_sent(hub)
        assert read_tree(mounted.path / MODEL) == TREE
        assert total_sent(hub) == sent == SIZE

    @pytest.mark.leaves("*.lock")
    def test_lock_of_tensorflow_hub_does_not_keep_readers_waiting(self, hub: BucketHub, mount: Mount) -> None:
        """hub.load downloads the same: readers have their bytes, and it is published by one of both."""
        hub.publish(MODEL, TREE)
        mounted = mount(hub, load_format="auto")
        os.listdir(mounted.path / MODEL)
        key = cache_key(f"{hub.url}/{MODEL}")
        mounted.cache.mkdir(parents=True, exist_ok=True)
        lock, growing = mounted.cache / f"{key}.lock", mounted.cache / f"{key}.{'0' * 32}.tmp"
        lock.write_text(f"elsewhere.1.{'0' * 32}")
        growing.mkdir()
        assert read_tree(mounted.path / MODEL) == TREE
        assert cached_keys(mounted.cache) == []
        growing.rmdir()
        lock.unlink()
        until_cached(mounted.cache)
        assert read_tree(mounted.path / MODEL) == TREE

    def test_version_that_tensorflow_hub_publishes_meanwhile_is_taken(
        self, hub: BucketHub, mount: Mount
    ) -> None:
        hub.publish(MODEL, TREE)
        mounted = mount(hub, read_ahead=False)
        key = cache_key(f"{hub.url}/{MODEL}")
        with opened(mounted.path / MODEL / DATA) as data:
            assert os.pread(data, 10, 0) == BODY[:10]
            for name, content in TREE.items():
                place = mounted.cache / "new" / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            (mounted.cache / "new").rename(mounted.cache / key)
            assert os.pread(data, 10, 9 * MiB) == BODY[9 * MiB : 9 * MiB + 10]
        assert read_tree(mounted.path / MODEL) == TREE


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_free_a_reader_that_waits(
        self, hub: BucketHub, mount: Mount, release: threading.Event, number: int, load_format: str
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        mounted = mount(hub, load_format=load_format)
        reader = subprocess.Popen(["cat", str(mounted.path / MODEL / DATA)], stdout=subprocess.DEVNULL)
        hub.wait_for(lambda hub: hub.reads(MODEL, DATA), what="the request")
        reader.send_signal(number)
        assert reader.wait(SOON) == -number
        assert not release.is_set()

    def test_a_program_that_handles_them_is_told(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        mounted = mount(hub)
        code = (
            "import os, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "try:\n"
            "    os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)\n"
            "except KeyboardInterrupt:\n"
            "    print('interrupted')\n"
        )
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(mounted.path / MODEL / DATA)], stdout=subprocess.PIPE, text=True
        )
        hub.wait_for(lambda hub: hub.reads(MODEL, DATA), what="the request")
        reader.send_signal(signal.SIGINT)
        assert reader.communicate(timeout=SOON)[0] == "interrupted\n"
        assert not release.is_set()


class TestLoadFormats:
    def test_auto_falls_back_to_the_archive(self, hub: BucketHub, mount: Mount) -> None:
        hub.add(MODEL, make_archive(SMALL))
        mounted = mount(hub)
        assert read_tree(mounted.path / MODEL) == SMALL
        assert hub.locations()[0].query["tf-hub-format"] == "uncompressed"

    @pytest.mark.parametrize(
        "named",
        [
            (303, b""), (303, b"https://elsewhere.example/x"), (303, b"gs://x"),
            (303, b"gs://" + b"a" * 9000), (303, b"\xff\xfe"),
            (200, b"<html>"), (404, b"not offered"), (400, b"bad format"),
        ],
        ids=str,
    )  # fmt: skip
    def test_anything_else_than_a_bucket_means_the_archive(
        self, hub: BucketHub, mount: Mount, named: tuple[int, bytes]
    ) -> None:
        hub.add(MODEL, make_archive(SMALL))
        hub.named[MODEL] = named
        assert (mount(hub).path / MODEL / "saved_model.pb").read_bytes() == SMALL["saved_model.pb"]
        assert hub.listings() == []

    @pytest.mark.parametrize("code", [403, 404, 400])
    def test_bucket_that_gives_no_listing_means_the_archive(
        self, hub: BucketHub, mount: Mount, code: int
    ) -> None:
        hub.publish(MODEL, SMALL)
        hub.add(MODEL, make_archive(SMALL))
        hub.fault_listing(Fault.status(code, times=None))
        assert read_tree(mount(hub).path / MODEL) == SMALL
        assert len(hub.body_requests()) == 1

    def test_compressed_asks_for_no_listing(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, SMALL)
        hub.add(MODEL, make_archive(SMALL))
        assert read_tree(mount(hub, load_format="compressed").path / MODEL) == SMALL
        assert hub.listings() == [] and {r.query["tf-hub-format"] for r in hub.locations()} == {"compressed"}

    def test_verified_only_shows_nothing_before_all_was_checked(
        self, hub: BucketHub, mount: Mount, release: threading.Event
    ) -> None:
        hub.publish(MODEL, TREE)
        hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        mounted = mount(hub, verified_only=True)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((mounted.path / MODEL / "saved_model.pb").read_bytes)
            hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all of the data")
            assert not read.done()
            release.set()
            assert read.result(30) == TREE["saved_model.pb"]
        assert len(cached_keys(mounted.cache)) == 1

    def test_offline_serves_what_is_complete_and_nothing_else(self, hub: BucketHub, mount: Mount) -> None:
        hub.publish(MODEL, SMALL)
        hub.publish("google/part/1", TREE)
        first = mount(hub, read_ahead=False)
        read_tree(first.path / MODEL)
        until(lambda: cached_keys(first.cache), "the version in the cache")
        read_at(first.path / "google/part/1" / DATA, 0, 10)
        first.unmount()
        asked = len(hub.requests())
        mounted = mount(hub, "offline", offline=True)
        assert read_tree(mounted.path / MODEL) == SMALL
        with pytest.raises(OSError) as caught:
            (mounted.path / "google/part/1" / DATA).read_bytes()
        assert caught.value.errno == errno.ENONET
        assert len(hub.requests()) == asked

    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_model_that_there_is_not_is_asked_for_once(
        self, hub: BucketHub, mount: Mount, load_format: str
    ) -> None:
        mounted = mount(hub, load_format=load_format)
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                (mounted.path / MODEL / "saved_model.pb").read_bytes()
        assert [r.query["tf-hub-format"] for r in hub.locations()] == ["uncompressed", "compressed"]

    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_unversioned_handle_is_the_latest_version(
        self, hub: BucketHub, mount: Mount, load_format: str
    ) -> None:
        hub.publish(MODEL, SMALL)
        hub.named["google/demo"] = hub.named[MODEL]
        mounted = mount(hub, load_format=load_format)
        model = mounted.path / "google/demo"
        assert (model / "saved_model.pb").read_bytes() == SMALL["saved_model.pb"]
        assert (model / DATA).read_bytes() == SMALL[DATA]
