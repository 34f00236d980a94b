"""tensorflow_hub's names, lock and descriptor: exactly its own, and safe where it is not."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from hubfs.cache.layout import (
    DownloadLock,
    Layout,
    LockWatch,
    Owner,
    is_present,
    leftovers,
    locked_keys,
    read_descriptor,
    read_lock,
    tree_size,
    write_atomically,
    write_descriptor,
)
from hubfs.errors import CacheError, HubfsError

KEY = "0123456789abcdef0123456789abcdef01234567"
HOST = socket.gethostname()
OLD = 10_000.0


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    return Layout(root)


@pytest.fixture
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def hold(layout: Layout, content: str, size: int | None = 100) -> Path:
    """Somebody else's lock, and the directory he downloads into unless `size` is None."""
    layout.lock(KEY).write_text(content)
    directory = layout.tmp(KEY, content.rpartition(".")[2])
    if size is not None:
        directory.mkdir()
        (directory / "data").write_bytes(b"x" * size)
    return directory


def stale_within(watch: LockWatch, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if watch.is_stale():
            return True
        time.sleep(0.02)
    return False


# ---- names


def test_names_are_tensorflow_hubs(layout: Layout) -> None:
    uid = uuid.uuid4().hex
    assert layout.model(KEY).name == KEY
    assert layout.descriptor(KEY).name == f"{KEY}.descriptor.txt"
    assert layout.lock(KEY).name == f"{KEY}.lock"
    assert layout.tmp(KEY, uid).name == f"{KEY}.{uid}.tmp"


def test_our_own_names_are_marked_as_ours(layout: Layout) -> None:
    for path in (layout.manifest(KEY), layout.last_use(KEY), layout.outgoing(KEY)):
        assert path.name.startswith(f"{KEY}.hubfs.")
        assert path.parent == layout.root


@pytest.mark.leaves("*.tmp")
def test_keys_are_directories_named_like_a_sha1(layout: Layout) -> None:
    layout.model(KEY).mkdir()
    (layout.root / ("f" * 40)).write_text("a file")
    (layout.root / ("e" * 40)).symlink_to(layout.model(KEY))
    for name in ("A" * 40, "a" * 39, "a" * 41, f"{KEY}.{'0' * 32}.tmp", "other"):
        (layout.root / name).mkdir()
    assert layout.keys() == [KEY]


def test_missing_cache_has_no_keys_locks_or_leftovers(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "none")
    assert layout.keys() == []
    assert locked_keys(layout) == []
    assert list(leftovers(layout)) == []


# ---- the directory itself


def test_cache_directory_is_made_private(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a/b/cache")
    old = os.umask(0)
    try:
        layout.create(trust=False)
    finally:
        os.umask(old)
    assert layout.root.stat().st_mode & 0o777 == 0o700
    layout.create(trust=False)


def test_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    Layout(tmp_path / "cache").create(trust=False)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o755


def test_directory_that_everybody_may_write_is_refused_unless_trusted(layout: Layout) -> None:
    for mode in (0o777, 0o1777, 0o702):
        layout.root.chmod(mode)
        with pytest.raises(CacheError, match=r"written by everybody.*trust_cache_dir"):
            layout.create(trust=False)
        layout.create(trust=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused_unless_trusted(layout: Layout) -> None:
    os.chown(layout.root, 12345, 12345)
    with pytest.raises(CacheError, match=r"another user \(uid 12345\)"):
        layout.create(trust=False)
    layout.create(trust=True)


def test_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    for path in (tmp_path / "cache", tmp_path / "cache/below"):
        with pytest.raises(CacheError):
            Layout(path).create(trust=False)


def test_directory_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(HubfsError):
        Layout(Path("/proc/hubfs/cache")).create(trust=False)


def test_present_means_not_empty(layout: Layout) -> None:
    model = layout.model(KEY)
    assert not is_present(model)
    model.mkdir()
    assert not is_present(model)
    (model / "x").touch()
    assert is_present(model)
    assert not is_present(model / "x")


# ---- descriptor


def test_descriptor_reads_as_tensorflow_hub_writes_it(layout: Layout) -> None:
    write_descriptor(layout.descriptor(KEY), "https://tfhub.dev/google/m/1")
    text = layout.descriptor(KEY).read_text()
    assert re.fullmatch(
        r"Module: https://tfhub\.dev/google/m/1\n"
        r"Download Time: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\n"
        rf"Downloader Hostname: {re.escape(HOST)} \(PID:{os.getpid()}\)",
        text,
    )


@pytest.mark.parametrize(
    "handle",
    ["https://tfhub.dev/a/b/1", "https://h/модель/1", "https://h/a b/1", "gs://bucket/x", "/local/path"],
)
def test_descriptor_gives_the_handle_back(layout: Layout, handle: str) -> None:
    write_descriptor(layout.descriptor(KEY), handle)
    assert read_descriptor(layout.descriptor(KEY)) == handle


@pytest.mark.parametrize(
    ("content", "handle"),
    [
        (b"Module: https://h/a/b/1\nDownload Time: x\nDownloader Hostname: y (PID:1)", "https://h/a/b/1"),
        (b"Module: https://h/a/b/1\r\nDownload Time: x", "https://h/a/b/1"),
        (b"Module: https://h/a/b/1", "https://h/a/b/1"),
        (b"Module: \xff\xfe/1\n", "\udcff\udcfe/1"),
        (b"", None),
        (b"Module:", None),
        (b"Module: \n", None),
        (b"\x00" * 5000, None),
        (b"Download Time: x\nModule: https://h/a/b/1", None),
    ],
)
def test_descriptor_of_any_content(layout: Layout, content: bytes, handle: str | None) -> None:
    layout.descriptor(KEY).write_bytes(content)
    assert read_descriptor(layout.descriptor(KEY)) == handle


def test_descriptor_that_is_missing_or_a_directory(layout: Layout) -> None:
    assert read_descriptor(layout.descriptor(KEY)) is None
    layout.descriptor(KEY).mkdir()
    assert read_descriptor(layout.descriptor(KEY)) is None


def test_atomic_write_leaves_nothing_when_it_fails(layout: Layout) -> None:
    target = layout.root / "target"
    target.mkdir()
    with pytest.raises(OSError, match="director"):
        write_atomically(target, "text")
    assert os.listdir(layout.root) == ["target"]


# ---- the lock


def test_lock_has_tensorflow_hubs_content(layout: Layout) -> None:
    lock = DownloadLock(layout, KEY)
    assert lock.try_acquire()
    assert re.fullmatch(rf"{re.escape(HOST)}\.{os.getpid()}\.[0-9a-f]{{32}}", layout.lock(KEY).read_text())
    assert lock.tmp == layout.tmp(KEY, layout.lock(KEY).read_text().rpartition(".")[2])
    lock.release()
    assert os.listdir(layout.root) == []


def test_lock_is_not_given_twice(layout: Layout) -> None:
    first, second = DownloadLock(layout, KEY), DownloadLock(layout, KEY)
    assert first.try_acquire()
    assert not second.try_acquire()
    second.release()
    assert first.is_ours
    first.release()
    assert second.try_acquire()
    second.release()


def test_one_of_twenty_threads_gets_the_lock(layout: Layout) -> None:
    for _ in range(20):
        start, won = threading.Barrier(20), []

        def race(start: threading.Barrier = start, won: list[DownloadLock] = won) -> None:
            lock = DownloadLock(layout, KEY)
            start.wait()
            if lock.try_acquire():
                won.append(lock)

        threads = [threading.Thread(target=race) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert os.listdir(layout.root) == [f"{KEY}.lock"]
        won[0].release()


def _race(root: Path, rounds: int, start: object, results: object) -> None:
    for _ in range(rounds):
        start.wait()  # type: ignore[attr-defined]
        lock = DownloadLock(Layout(root), KEY)
        won = lock.try_acquire()
        start.wait()  # type: ignore[attr-defined]
        results.put(won)  # type: ignore[attr-defined]
        if won:
            lock.release()
        start.wait()  # type: ignore[attr-defined]


def test_one_of_twenty_processes_gets_the_lock(layout: Layout) -> None:
    context = multiprocessing.get_context("fork")
    start, results, rounds = context.Barrier(20), context.Queue(), 5
    processes = [context.Process(target=_race, args=(layout.root, rounds, start, results)) for _ in range(20)]
    for process in processes:
        process.start()
    won = [results.get(timeout=30) for _ in range(20 * rounds)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    assert won.count(True) == rounds
    assert os.listdir(layout.root) == []


def test_release_leaves_the_lock_of_whoever_took_over(layout: Layout) -> None:
    lock = DownloadLock(layout, KEY)
    assert lock.try_acquire()
    lock.tmp.mkdir()
    other = f"other.1.{uuid.uuid4().hex}"
    layout.lock(KEY).write_text(other)
    assert not lock.is_ours
    lock.release()
    assert read_lock(layout.lock(KEY)) == other
    assert not lock.tmp.exists()
    layout.lock(KEY).unlink()


def test_release_twice_and_of_a_removed_lock_is_harmless(layout: Layout) -> None:
    lock = DownloadLock(layout, KEY)
    assert lock.try_acquire()
    layout.lock(KEY).unlink()
    lock.release()
    lock.release()
    assert os.listdir(layout.root) == []


@pytest.mark.parametrize(
    ("content", "owner"),
    [
        (f"host.123.{'a' * 32}", Owner("host", 123, "a" * 32)),
        (f"host.example.org.123.{'a' * 32}", Owner("host.example.org", 123, "a" * 32)),
        (f"10.0.0.1.5.{'a' * 32}", Owner("10.0.0.1", 5, "a" * 32)),
        (f".123.{'a' * 32}", Owner("", 123, "a" * 32)),
        (f"host.123.{'a' * 32}\n", Owner("host", 123, "a" * 32)),
        ("", None),
        ("garbage", None),
        ("host.x.abc", None),
        ("host.1.../../etc", None),
    ],
)
def test_owner_of_a_lock(content: str, owner: Owner | None) -> None:
    assert Owner.of(content) == owner


def test_owner_is_gone_only_if_that_is_known(dead_pid: int) -> None:
    assert Owner(HOST, dead_pid, "a").is_gone
    assert not Owner(HOST, os.getpid(), "a").is_gone
    assert not Owner(HOST, 1, "a").is_gone
    assert not Owner("another-host", dead_pid, "a").is_gone
    assert not Owner(HOST, 10**30, "a").is_gone


# ---- watching somebody else's lock


@pytest.fixture
def uid() -> str:
    return uuid.uuid4().hex


@pytest.mark.leaves("*.lock")
@pytest.mark.leaves("*.tmp")
def test_lock_of_a_dead_process_is_taken_after_a_quiet_moment(
    layout: Layout, dead_pid: int, uid: str
) -> None:
    directory = hold(layout, f"{HOST}.{dead_pid}.{uid}")
    watch = LockWatch(layout, KEY, timeout=600)
    assert watch.owner_is_gone()
    assert not watch.is_stale(), "a first look proves nothing"
    assert stale_within(watch, 5)
    watch.break_lock()
    assert not layout.lock(KEY).exists()
    assert not directory.exists()


@pytest.mark.leaves("*.lock")
@pytest.mark.leaves("*.tmp")
def test_lock_of_a_dead_process_whose_directory_grows_is_left_alone(
    layout: Layout, dead_pid: int, uid: str
) -> None:
    directory = hold(layout, f"{HOST}.{dead_pid}.{uid}")
    watch = LockWatch(layout, KEY, timeout=600)
    deadline = time.monotonic() + LockWatch.QUIET * 2
    while time.monotonic() < deadline:
        with (directory / "data").open("ab") as file:
            file.write(b"more")
        assert not watch.is_stale()
        time.sleep(0.05)


@pytest.mark.leaves("*.lock")
@pytest.mark.leaves("*.tmp")
@pytest.mark.parametrize("host", [HOST, "another-host"])
def test_lock_that_stands_still_is_stale_after_the_timeout(layout: Layout, host: str, uid: str) -> None:
    hold(layout, f"{host}.{os.getpid()}.{uid}")
    watch = LockWatch(layout, KEY, timeout=0.2)
    assert not watch.is_stale()
    assert stale_within(watch, 5)
    assert not stale_within(LockWatch(layout, KEY, timeout=600), 0.3)


@pytest.mark.leaves("*.lock")
def test_lock_without_a_directory_or_of_unknown_content_times_out_too(layout: Layout, uid: str) -> None:
    hold(layout, f"another-host.1.{uid}", size=None)
    assert stale_within(LockWatch(layout, KEY, timeout=0.1), 5)
    layout.lock(KEY).write_bytes(b"\xff\xfe garbage")
    assert not LockWatch(layout, KEY, timeout=600).owner_is_gone()
    watch = LockWatch(layout, KEY, timeout=0.1)
    assert stale_within(watch, 5)
    watch.break_lock()
    assert not layout.lock(KEY).exists()


def test_no_lock_is_not_stale(layout: Layout) -> None:
    watch = LockWatch(layout, KEY, timeout=0.0)
    assert not watch.is_stale()
    assert not watch.owner_is_gone()
    watch.break_lock()


@pytest.mark.leaves("*.lock")
def test_newer_lock_is_never_broken(layout: Layout, dead_pid: int, uid: str) -> None:
    hold(layout, f"{HOST}.{dead_pid}.{uid}", size=None)
    watch = LockWatch(layout, KEY, timeout=0.1)
    assert stale_within(watch, 5)
    newer = f"another-host.1.{uuid.uuid4().hex}"
    directory = hold(layout, newer)
    watch.break_lock()
    assert read_lock(layout.lock(KEY)) == newer
    assert directory.exists()
    assert sorted(os.listdir(layout.root)) == sorted([f"{KEY}.lock", directory.name])
    directory.joinpath("data").unlink()
    directory.rmdir()


@pytest.mark.leaves("*.lock")
def test_lock_that_was_not_watched_is_not_broken(layout: Layout, dead_pid: int, uid: str) -> None:
    hold(layout, f"{HOST}.{dead_pid}.{uid}", size=None)
    LockWatch(layout, KEY, timeout=0.0).break_lock()
    assert layout.lock(KEY).exists()


def test_many_who_break_one_lock_leave_one_owner(layout: Layout, dead_pid: int) -> None:
    """Nobody's new lock is broken by another who still means the old one."""
    for _ in range(20):
        hold(layout, f"{HOST}.{dead_pid}.{uuid.uuid4().hex}", size=None)
        start, won = threading.Barrier(8), []

        def take(start: threading.Barrier = start, won: list[DownloadLock] = won) -> None:
            watch = LockWatch(layout, KEY, timeout=0.0)
            watch.is_stale()
            start.wait()
            watch.break_lock()
            lock = DownloadLock(layout, KEY)
            if lock.try_acquire():
                won.append(lock)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([lock for lock in won if lock.is_ours]) == 1
        for lock in won:
            lock.release()
        assert os.listdir(layout.root) == []


def test_size_of_a_tree(layout: Layout) -> None:
    assert tree_size(layout.root / "none") == 0
    (layout.root / "a/b").mkdir(parents=True)
    (layout.root / "a/x").write_bytes(b"12345")
    (layout.root / "a/b/y").write_bytes(b"123")
    assert tree_size(layout.root / "a") == 8


# ---- leftovers


def age(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    for one in (*path.rglob("*"), path):
        os.utime(one, (then, then))
    return path


@pytest.mark.leaves("*.tmp")
@pytest.mark.leaves("*.lock")
def test_old_temporary_directories_without_an_owner_are_leftovers(layout: Layout, uid: str) -> None:
    directory = layout.tmp(KEY, uid)
    directory.mkdir()
    (directory / "data").touch()
    assert list(leftovers(layout)) == []
    age(directory, OLD)
    assert list(leftovers(layout)) == [directory]
    (directory / "data").touch()
    assert list(leftovers(layout)) == [], "somebody writes in it"
    age(directory, OLD)
    layout.lock(KEY).write_text(f"another-host.1.{uid}")
    assert list(leftovers(layout)) == [], "it has an owner"
    layout.lock(KEY).write_text(f"another-host.1.{uuid.uuid4().hex}")
    assert list(leftovers(layout)) == [directory], "the lock is of another download"


@pytest.mark.leaves("*.old")
@pytest.mark.leaves("*.tmp*")
def test_old_temporary_names_of_ours_are_leftovers(layout: Layout, uid: str) -> None:
    outgoing = layout.outgoing(KEY)
    outgoing.mkdir()
    ours = [outgoing]
    for name in (f"{KEY}.lock.tmp{uid}", f"{KEY}.descriptor.txt.tmp{uid}", f"{KEY}.hubfs.json.tmp{uid}"):
        ours.append(layout.root / name)
        ours[-1].touch()
    assert list(leftovers(layout)) == []
    for path in ours:
        age(path, OLD)
    assert sorted(leftovers(layout)) == sorted(ours)


def test_nothing_else_is_ever_a_leftover(layout: Layout, uid: str) -> None:
    for name in (
        KEY,
        f"{KEY}.descriptor.txt",
        f"{KEY}.hubfs.json",
        f"{KEY}.hubfs.used",
        "mine.tmp",
        f"x.{uid}.tmp",
    ):
        age_of = layout.root / name
        age_of.touch()
        age(age_of, OLD)
    assert list(leftovers(layout)) == []


@pytest.mark.leaves("*.lock")
def test_locked_keys(layout: Layout) -> None:
    layout.lock(KEY).touch()
    (layout.root / "other.lock").touch()
    assert locked_keys(layout) == [KEY]
