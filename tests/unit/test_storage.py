"""Stable storage: all of it, contents first, and no error of it lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hubfs.transfer import storage as storage_module
from hubfs.transfer.storage import BACKLOG, Storage
from tests.leaks import open_files


@pytest.fixture
def storage() -> Iterator[Storage]:
    with closing(Storage()) as made:
        yield made


def make(path: Path) -> int:
    path.write_bytes(b"content")
    return os.open(path, os.O_RDWR)


def die(descriptor: int) -> None:
    raise OSError(errno.EIO, "the disk died")


def test_everything_is_stored_contents_first(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("f", "d/f", "d/e/f", "d/e/g", "empty/"):
        path = tmp_path / "model" / name
        path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
    synced: list[str] = []
    monkeypatch.setattr(
        storage_module.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    before = open_files(tmp_path)
    storage.sync(tmp_path / "model")
    assert open_files(tmp_path) == before
    everything = {str(path) for path in (tmp_path / "model").rglob("*")} | {str(tmp_path / "model")}
    assert sorted(synced) == sorted(everything)
    for path in everything - {str(tmp_path / "model")}:
        assert synced.index(path) < synced.index(str(Path(path).parent))


def test_error_at_the_end_is_told(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setattr(storage_module.os, "fsync", die)
    before = open_files(tmp_path)
    with pytest.raises(OSError, match="the disk died"):
        storage.sync(tmp_path)
    assert open_files(tmp_path) == before


def test_early_error_is_told_at_the_end(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once: a later fsync of the same file may find nothing wrong."""
    descriptor = make(tmp_path / "f")
    monkeypatch.setattr(storage_module.os, "fdatasync", die)
    before = open_files(tmp_path)
    assert storage.begin(descriptor)
    with pytest.raises(OSError, match="the disk died"):
        storage.sync(tmp_path)
    assert open_files(tmp_path) == before
    os.close(descriptor)


def test_early_error_ends_the_writing_soon(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = make(tmp_path / "f")
    monkeypatch.setattr(storage_module.os, "fdatasync", die)
    with pytest.raises(OSError, match="the disk died"):
        while True:
            storage.begin(descriptor)
    os.close(descriptor)


def test_busy_disk_holds_up_nobody(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = make(tmp_path / "f")
    release = threading.Event()
    synced: list[str] = []

    def slow(fd: int) -> None:
        assert release.wait(20)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(storage_module.os, "fdatasync", slow)
    before = open_files(tmp_path)
    assert [storage.begin(descriptor) for _ in range(BACKLOG + 2)] == [True] * BACKLOG + [False] * 2
    assert open_files(tmp_path) == before * (1 + BACKLOG)
    os.close(descriptor)
    release.set()
    storage.sync(tmp_path)
    assert synced == [str(tmp_path / "f")] * BACKLOG
    assert open_files(tmp_path) == []


def test_closing_leaves_out_what_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = make(tmp_path / "f")
    begun, release = threading.Event(), threading.Event()
    synced: list[int] = []

    def slow(fd: int) -> None:
        begun.set()
        synced.append(fd)
        assert release.wait(20)

    monkeypatch.setattr(storage_module.os, "fdatasync", slow)
    before, threads = open_files(tmp_path), threading.active_count()
    storage = Storage()
    for _ in range(BACKLOG):
        storage.begin(descriptor)
    assert begun.wait(5)
    closer = threading.Thread(target=storage.close)
    closer.start()
    while not storage._over:
        assert closer.is_alive()
    release.set()
    closer.join(5)
    assert len(synced) == 1
    assert open_files(tmp_path) == before
    assert threading.active_count() == threads
    os.close(descriptor)


@pytest.mark.parametrize("known", [True, False])
def test_room_is_claimed_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        monkeypatch.setattr(storage_module, "_fallocate", None)
    with (tmp_path / "f").open("wb+") as file:
        file.truncate(1 << 20)
        storage_module.allocate(file.fileno(), 1 << 20)
        status = os.fstat(file.fileno())
    assert (status.st_size, status.st_blocks * 512 >= 1 << 20) == (1 << 20, known)
