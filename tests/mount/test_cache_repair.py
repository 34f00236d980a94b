"""The backing cache under a mount: cleaned by others, filled by others, locked by others, read-only."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import hubfs
from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree, write_tree

MODEL = "google/demo/1"
DATA = "variables/variables.data-00000-of-00001"
TREE = make_tree(size=300_000, empty_directory=True)
GOOD = make_archive(TREE)
SOON = 30.0


@dataclass(frozen=True)
class Cached:
    """A model in the cache directory, published, and a mount of it that was not asked for it yet."""

    mounted: Mounted
    directory: Path


def key_of(handle: str) -> str:
    return hashlib.sha1(handle.encode()).hexdigest()


def assert_reads_right(mounted: Mounted, model: str = MODEL) -> None:
    """Every file, and that there is nothing else."""
    root = mounted.path / model
    found = {str(path.relative_to(root)) + "/" * path.is_dir() for path in root.rglob("*")}
    assert found == {*TREE, "assets/", "variables/"}
    for name, content in TREE.items():
        if not name.endswith("/"):
            assert (root / name).read_bytes() == content, name


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def put_as_tensorflow_hub_does(cache: Path, handle: str) -> Path:
    """What `hub.resolve(handle)` of tensorflow_hub 0.16.1 leaves in its cache."""
    cache.mkdir(mode=0o700, exist_ok=True)
    directory = write_tree(TREE, cache / key_of(handle))
    (cache / f"{key_of(handle)}.descriptor.txt").write_text(
        f"Module: {handle}\nDownload Time: 2023-01-01 12:00:00.000000\nDownloader Hostname: box (PID:17)"
    )
    return directory


def put_lock(cache: Path, handle: str, owner: str, pid: int) -> tuple[Path, Path]:
    """The lock of a running tensorflow_hub and its temporary directory, which is still empty."""
    cache.mkdir(mode=0o700, exist_ok=True)
    uid = uuid.uuid4().hex
    lock, tmp = cache / f"{key_of(handle)}.lock", cache / f"{key_of(handle)}.{uid}.tmp"
    lock.write_text(f"{owner}.{pid}.{uid}")
    tmp.mkdir()
    return lock, tmp


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def listing(cache: Path) -> list[tuple[str, int, int]]:
    """Every name below a directory with its size and time of modification."""
    found = [(str(path), path.lstat()) for path in sorted(cache.rglob("*"))]
    return [(path, status.st_size, status.st_mtime_ns) for path, status in found]


@pytest.fixture
def cached(hub: FaultHub, mount, tmp_path: Path) -> Cached:
    hub.add(MODEL, GOOD)
    directory = Path(hubfs.resolve(MODEL, hub=hub.url, cache_dir=str(tmp_path / "cache")))
    hub.clear_log()
    return Cached(mount(hub), directory)


def delete_file(directory: Path) -> None:
    (directory / "saved_model.pb").unlink()


def delete_data(directory: Path) -> None:
    (directory / DATA).unlink()


def truncate_file(directory: Path) -> None:
    os.truncate(directory / DATA, 1000)


def empty_file(directory: Path) -> None:
    os.truncate(directory / "saved_model.pb", 0)


def delete_all_files(directory: Path) -> None:
    """As systemd-tmpfiles and tmpreaper do it: the directories stay."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()


def empty_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def remove_subdirectory(directory: Path) -> None:
    shutil.rmtree(directory / "variables")


def remove_cache(directory: Path) -> None:
    shutil.rmtree(directory.parent)


def empty_cache(directory: Path) -> None:
    for path in directory.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


CLEANERS = [
    delete_file, delete_data, truncate_file, empty_file, delete_all_files, empty_directory,
    remove_directory, remove_subdirectory, remove_cache, empty_cache,
]  # fmt: skip


class TestCleaned:
    @pytest.mark.parametrize("clean", CLEANERS)
    def test_under_a_mount_that_has_served_it_is_fetched_again(
        self, hub: FaultHub, cached: Cached, clean: Callable[[Path], None]
    ) -> None:
        assert_reads_right(cached.mounted)
        assert hub.log == []
        clean(cached.directory)
        assert_reads_right(cached.mounted)
        eventually(lambda: not cached.mounted.status()["transfers"], "the end of the transfer")
        assert len(hub.body_requests()) == 1
        assert_reads_right(cached.mounted)

    @pytest.mark.parametrize("clean", CLEANERS)
    def test_before_it_was_asked_for_is_fetched_again(
        self, hub: FaultHub, cached: Cached, clean: Callable[[Path], None]
    ) -> None:
        clean(cached.directory)
        assert_reads_right(cached.mounted)
        assert len(hub.body_requests()) == 1
        eventually(lambda: not cached.mounted.status()["transfers"], "the end of the transfer")
        for name, content in TREE.items():
            assert name.endswith("/") or (cached.directory / name).read_bytes() == content

    def test_keeps_files_readable_that_are_open(self, hub: FaultHub, cached: Cached) -> None:
        with (cached.mounted.path / MODEL / DATA).open("rb") as file:
            assert file.read(1000) == TREE[DATA][:1000]
            remove_cache(cached.directory)
            assert file.read() == TREE[DATA][1000:]
        assert hub.log == []

    @pytest.mark.logs("not cached")
    def test_offline_is_an_error_and_not_a_part_of_a_model(
        self, hub: FaultHub, cached: Cached, mount
    ) -> None:
        cached.mounted.unmount()
        delete_data(cached.directory)
        mounted = mount(hub, "offline", offline=True)
        with pytest.raises(OSError) as caught:
            (mounted.path / MODEL / "saved_model.pb").read_bytes()
        assert caught.value.errno == errno.ENONET
        assert hub.log == []


@pytest.fixture(params=["bind", "tmpfs"])
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Makes the cache directory one that nobody can write, root included."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    how = (
        ["mount", "--bind", str(cache), str(cache)]
        if request.param == "bind"
        else ["mount", "-t", "tmpfs", "-o", "mode=0700,size=16m", "tmpfs", str(cache)]
    )
    subprocess.run(how, check=True)

    def close() -> Path:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(cache)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (cache / "x").touch()
        return cache

    yield close
    subprocess.run(["umount", "--lazy", str(cache)], check=True)


class TestReadOnly:
    @pytest.mark.parametrize("filled_by", ["hubfs", "tensorflow_hub"])
    def test_serves_what_is_cached(
        self, hub: FaultHub, mount, tmp_path: Path, read_only: Callable[[], Path], filled_by: str
    ) -> None:
        cache = tmp_path / "cache"
        if filled_by == "hubfs":
            hub.add(MODEL, GOOD)
            hubfs.resolve(MODEL, hub=hub.url, cache_dir=str(cache))
            hub.clear_log()
        else:
            put_as_tensorflow_hub_does(cache, f"{hub.url}/{MODEL}")
        before = listing(cache)
        read_only()
        mounted = mount(hub)
        assert_reads_right(mounted)
        assert os.listdir(mounted.path / "google/demo") == ["1"]
        assert hub.log == []
        assert listing(cache) == before
        mounted.unmount()

    @pytest.mark.logs("Read-only")
    def test_says_erofs_for_what_is_not(
        self, hub: FaultHub, mount, tmp_path: Path, read_only: Callable[[], Path]
    ) -> None:
        hub.add(MODEL, GOOD)
        put_as_tensorflow_hub_does(tmp_path / "cache", f"{hub.url}/google/other/1")
        read_only()
        mounted = mount(hub)
        with pytest.raises(OSError) as caught:
            (mounted.path / MODEL / "saved_model.pb").read_bytes()
        assert caught.value.errno == errno.EROFS
        assert hub.body_requests() == []
        reason = os.getxattr(mounted.path / MODEL, "user.hubfs.error").decode()
        assert "--cache-dir" in reason
        assert_reads_right(mounted, "google/other/1")
        mounted.unmount()


class TestFilledByTensorflowHub:
    @pytest.mark.parametrize("ending", ["", "/", "?tf-hub-format=compressed"])
    def test_is_used_with_no_request(self, hub: FaultHub, mount, tmp_path: Path, ending: str) -> None:
        put_as_tensorflow_hub_does(tmp_path / "cache", f"{hub.url}/{MODEL}{ending}")
        mounted = mount(hub)
        assert_reads_right(mounted)
        assert hub.log == []

    def test_over_http_is_used_for_the_https_hub(self, mount, tmp_path: Path) -> None:
        put_as_tensorflow_hub_does(tmp_path / "cache", f"http://hub.invalid/{MODEL}")
        assert_reads_right(mount("https://hub.invalid"))

    def test_that_appears_under_a_running_mount_is_used(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        mounted = mount(hub)
        put_as_tensorflow_hub_does(tmp_path / "cache", f"{hub.url}/{MODEL}")
        assert_reads_right(mounted)
        assert hub.log == []

    def test_empty_directory_counts_as_absent(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        hub.add(MODEL, GOOD)
        directory = put_as_tensorflow_hub_does(tmp_path / "cache", f"{hub.url}/{MODEL}")
        empty_directory(directory)
        assert_reads_right(mount(hub))
        assert len(hub.body_requests()) == 1
        eventually(lambda: (directory / "saved_model.pb").exists(), "the model to be published")

    @pytest.mark.parametrize("clean", [delete_file, delete_data, empty_file, delete_all_files])
    def test_visibly_cleaned_directory_is_fetched_again(
        self, hub: FaultHub, mount, tmp_path: Path, clean: Callable[[Path], None]
    ) -> None:
        hub.add(MODEL, GOOD)
        clean(put_as_tensorflow_hub_does(tmp_path / "cache", f"{hub.url}/{MODEL}"))
        assert_reads_right(mount(hub))
        assert len(hub.body_requests()) == 1


class TestLocks:
    def test_of_a_dead_process_of_this_host_is_taken_over(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        hub.add(MODEL, GOOD)
        lock, tmp = put_lock(tmp_path / "cache", f"{hub.url}/{MODEL}", socket.gethostname(), dead_pid())
        (tmp / "saved_model.pb").write_bytes(b"half")
        mounted = mount(hub)
        assert_reads_right(mounted)
        eventually(lambda: not lock.exists(), "the lock to be gone")
        assert not tmp.exists()
        assert len(hub.body_requests()) == 1

    def test_of_another_host_is_taken_over_when_it_does_not_grow(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        hub.add(MODEL, GOOD)
        lock, tmp = put_lock(tmp_path / "cache", f"{hub.url}/{MODEL}", "elsewhere.example.org", dead_pid())
        began = time.monotonic()
        mounted = mount(hub, lock_timeout=1.5)
        assert_reads_right(mounted)
        # A lower bound: it is not taken before its time.
        assert time.monotonic() - began >= 1.5
        eventually(lambda: not lock.exists(), "the lock to be gone")
        assert not tmp.exists()

    def test_that_grows_is_waited_for_and_its_result_is_used(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        hub.add(MODEL, GOOD)
        handle = f"{hub.url}/{MODEL}"
        lock, tmp = put_lock(tmp_path / "cache", handle, "elsewhere.example.org", 1)
        mounted = mount(hub, lock_timeout=2.0, read_timeout=2.0)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((mounted.path / MODEL / "saved_model.pb").read_bytes)
            eventually(lambda: mounted.status()["transfers"], "the reader to wait")
            began, grown = time.monotonic(), 0
            # Longer than both timeouts: only that it grows keeps lock and reader alive.
            while time.monotonic() - began < 3.0:
                grown += 1000
                (tmp / "part").write_bytes(bytes(grown))
                assert not read.done()
                assert lock.exists()
                time.sleep(0.1)
            (tmp / "part").unlink()
            write_tree(TREE, tmp)
            tmp.rename(tmp_path / "cache" / key_of(handle))
            lock.unlink()
            assert read.result(SOON) == TREE["saved_model.pb"]
        assert_reads_right(mounted)
        assert hub.body_requests() == []

    def test_that_vanishes_without_a_result_is_followed_by_an_own_download(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        hub.add(MODEL, GOOD)
        lock, tmp = put_lock(tmp_path / "cache", f"{hub.url}/{MODEL}", "elsewhere.example.org", 1)
        mounted = mount(hub)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((mounted.path / MODEL / "saved_model.pb").read_bytes)
            eventually(lambda: mounted.status()["transfers"], "the reader to wait")
            assert hub.body_requests() == []
            tmp.rmdir()
            lock.unlink()
            assert read.result(SOON) == TREE["saved_model.pb"]
        assert len(hub.body_requests()) == 1

    @pytest.mark.leaves("*.lock")
    @pytest.mark.leaves("*.tmp")
    def test_of_another_model_is_left_alone(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        hub.add(MODEL, GOOD)
        lock, tmp = put_lock(tmp_path / "cache", f"{hub.url}/google/other/1", "elsewhere.example.org", 1)
        assert_reads_right(mount(hub))
        assert lock.exists()
        assert tmp.exists()

    def test_is_not_needed_for_a_cached_model(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        handle = f"{hub.url}/{MODEL}"
        put_as_tensorflow_hub_does(tmp_path / "cache", handle)
        lock, tmp = put_lock(tmp_path / "cache", handle, "elsewhere.example.org", 1)
        assert_reads_right(mount(hub))
        assert lock.exists()
        tmp.rmdir()
        lock.unlink()

    def test_and_temporary_directory_are_visible_to_others_while_it_downloads(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        """What tensorflow_hub looks at to wait for us: the lock's content and a directory that grows."""
        release = threading.Event()
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.stall(100_000, release))
        mounted = mount(hub)
        try:
            with ThreadPoolExecutor(1) as pool:
                read = pool.submit((mounted.path / MODEL / DATA).read_bytes)
                key = key_of(f"{hub.url}/{MODEL}")
                lock = mounted.cache / f"{key}.lock"
                eventually(lock.exists, "the lock")
                host, pid, uid = lock.read_text().rsplit(".", 2)
                assert (host, int(pid)) == (socket.gethostname(), mounted.pid)
                tmp = mounted.cache / f"{key}.{uid}.tmp"
                eventually(lambda: any(path.is_file() for path in tmp.rglob("*")), "the directory to grow")
                release.set()
                assert read.result(SOON) == TREE[DATA]
        finally:
            release.set()
        eventually(lambda: not lock.exists(), "the lock to be gone")
