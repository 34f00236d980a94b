"""Control files and attributes as they are put together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfs.cache.readable import Wait
from hubfs.cache.store import Store
from hubfs.config import Settings
from hubfs.errors import AccessError, NotFoundError
from hubfs.fs.control import Control, ControlFile
from hubfs.fs.passthrough import ReadModes

HUB = "https://tfhub.dev"
WAIT = Wait(1.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    flags = {"hub": HUB, "cache_dir": str(tmp_path / "cache"), "offline": True}
    made = Store(Settings.load(flags, {}, Path("/dev/null")))
    yield made
    made.close()


@pytest.fixture
def control(store: Store) -> Control:
    return Control(store, ReadModes(False), lambda: {"pid": 7, "mountpoint": "/mnt"})


def text_of(file: ControlFile) -> str:
    return file.read(1 << 20, 0, WAIT).decode()


def test_status_joins_what_mount_and_cache_say(control: Control, tmp_path: Path) -> None:
    status = json.loads(text_of(control.open("status.json")))
    assert status["pid"] == 7
    assert status["mountpoint"] == "/mnt"
    assert status["cache"]["dir"] == str(tmp_path / "cache")
    assert status["transfers"] == status["failures"] == []


def test_status_is_text_for_people_too(control: Control) -> None:
    text = text_of(control.open("status.json"))
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize("name", ["", "none", "status", "status.json/x", "../x"])
def test_unknown_control_file(control: Control, name: str) -> None:
    with pytest.raises(NotFoundError, match="no such control file"):
        control.open(name)


def test_every_name_can_be_opened(control: Control) -> None:
    for name in control.names():
        file = control.open(name)
        assert text_of(file)
        file.close()


def test_control_file_is_never_kept_by_the_kernel(control: Control) -> None:
    file = control.open("status.json")
    assert file.direct


def test_reads_of_a_control_file_are_plain_slices() -> None:
    file = ControlFile(b"0123456789")
    assert file.read(4, 3, WAIT) == b"3456"
    assert file.read(100, 8, WAIT) == b"89"
    assert file.read(5, 10, WAIT) == file.read(5, 99, WAIT) == file.read(0, 0, WAIT) == b""


def test_latest_failure_below_a_directory_is_told(control: Control, store: Store) -> None:
    for number, path in enumerate(("google/a/1", "google/b/1", "other/c/1")):
        store.note_failure(f"{HUB}/{path}", AccessError(f"reason {number}"))
    told = {
        directory: control.attributes_below(tuple(filter(None, directory.split("/"))))
        for directory in ("google/a", "google/b", "google", "other", "", "goo", "nobody")
    }
    assert told == {
        "google/a": {"user.hubfs.error": b"reason 0"},
        "google/b": {"user.hubfs.error": b"reason 1"},
        "google": {"user.hubfs.error": b"reason 1"},
        "other": {"user.hubfs.error": b"reason 2"},
        "": {"user.hubfs.error": b"reason 2"},
        "goo": {},
        "nobody": {},
    }


def test_attributes_of_a_version_that_nobody_asked_for(control: Control, store: Store) -> None:
    entry = store.entry(f"{HUB}/google/a/1")
    assert control.attributes_of(entry, "/google/a/1") == {
        "user.hubfs.handle": b"https://tfhub.dev/google/a/1",
        "user.hubfs.key": entry.key.encode(),
        "user.hubfs.state": b"absent",
        "user.hubfs.read_mode": b"cached",
        "user.hubfs.read_mode_reason": b"turned off with --no-passthrough",
    }


def test_attributes_of_a_version_that_failed(control: Control, store: Store) -> None:
    entry = store.entry(f"{HUB}/google/a/1")
    with pytest.raises(Exception, match="offline"):
        entry.ensure_exists(WAIT)
    found = control.attributes_of(entry, "/google/a/1")
    assert found["user.hubfs.state"] == b"failed"
    assert b"offline" in found["user.hubfs.error"]
