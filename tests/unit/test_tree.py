"""DESIGN §4 on the tree itself, without a mount: what a path is, and which paths send requests."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubfs.cache.layout import write_descriptor
from hubfs.cache.readable import Wait
from hubfs.cache.store import Store
from hubfs.config import Settings
from hubfs.errors import HubfsError, NotFoundError, RefusedError, StalledError
from hubfs.fs.control import Control
from hubfs.fs.passthrough import ReadModes
from hubfs.fs.tree import Attributes, Tree, inode
from hubfs.handles import cache_key
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree, write_tree

PATH = "google/m/1"
TREE = make_tree(size=50_000, empty_directory=True)
ARCHIVE = make_archive(TREE)
FILES = {name: content for name, content in TREE.items() if not name.endswith("/")}
WAIT = Wait(20.0)


class Shown:
    """A tree over a store of its own."""

    def __init__(self, settings: Settings) -> None:
        self.store = Store(settings)
        self.tree = Tree(self.store, Control(self.store, ReadModes(True), lambda: {"pid": 7}))

    def stat(self, path: str) -> Attributes:
        return self.tree.attributes(path, WAIT)

    def names(self, path: str) -> list[str]:
        rows = self.tree.list(path, WAIT).rows
        assert [name for name, _ in rows[:2]] == [".", ".."]
        return [name for name, _ in rows[2:]]

    def read(self, path: str) -> bytes:
        file = self.tree.open(path, WAIT)
        try:
            return file.read(1 << 20, 0, WAIT)
        finally:
            file.close()

    def error(self, path: str, look: Callable[[str], object] | None = None) -> int:
        """The errno that a look at the path gives."""
        with pytest.raises((HubfsError, OSError)) as caught:
            (look or self.stat)(path)
        assert caught.value.errno is not None
        return caught.value.errno


@pytest.fixture
def shows(hub: FaultHub, tmp_path: Path) -> Iterator[Callable[..., Shown]]:
    made: list[Shown] = []

    def make(**settings: Any) -> Shown:
        flags = {"hub": hub.url, "cache_dir": str(tmp_path / "cache"), "retry_delay": 0.01, "retries": 1}
        made.append(Shown(Settings.load({**flags, **settings}, {}, Path("/dev/null"))))
        return made[-1]

    yield make
    for shown in made:
        shown.tree.close()


@pytest.fixture
def shown(shows: Callable[..., Shown], hub: FaultHub) -> Shown:
    hub.add(PATH, ARCHIVE)
    return shows()


def cache(shown: Shown, handle: str, tree: dict[str, bytes] = FILES) -> None:
    """Put a model into the cache as tensorflow_hub does."""
    layout, key = shown.store.layout, cache_key(handle)
    layout.root.mkdir(exist_ok=True)
    write_descriptor(layout.descriptor(key), handle)
    write_tree(tree, layout.root / "new").rename(layout.model(key))


# ---- what is there


def test_model_is_a_directory_of_the_publishers_files(shown: Shown) -> None:
    assert shown.names(f"/{PATH}") == sorted({name.partition("/")[0] for name in TREE})
    for name, content in FILES.items():
        assert shown.read(f"/{PATH}/{name}") == content
    assert shown.names(f"/{PATH}/assets.extra") == []


def test_whole_handle_is_a_path(shown: Shown, hub: FaultHub) -> None:
    assert shown.read(f"/{hub.url}/{PATH}/saved_model.pb") == FILES["saved_model.pb"]
    assert shown.read(f"/http:/{hub.host}/{PATH}/saved_model.pb") == FILES["saved_model.pb"]
    assert len(hub.body_requests()) == 1


def test_default_hub_is_a_link_to_the_top(shown: Shown, hub: FaultHub) -> None:
    for scheme in ("http:", "https:"):
        path = f"/{scheme}/{hub.host}"
        assert stat.S_ISLNK(shown.stat(path).mode)
        assert shown.tree.link_target(path) == ".."
        assert shown.stat(path).size == len("..")
        assert shown.error(path, shown.names) == errno.ENOTDIR
    assert shown.error("/google", shown.tree.link_target) == errno.EINVAL
    assert hub.requests() == []


def test_archive_of_an_allowed_host_is_a_directory(shows: Callable[..., Shown], hub: FaultHub) -> None:
    with FaultHub() as other:
        other.add("x/model.tar.gz", ARCHIVE)
        shown = shows(allow_hosts=(other.host,))
        path = f"/http:/{other.host}/x/model.tar.gz"
        assert shown.read(f"{path}/saved_model.pb") == FILES["saved_model.pb"]
        assert shown.names("/") == ["http:"]
        assert shown.names(f"/http:/{other.host}/x") == ["model.tar.gz"]
        assert len(other.body_requests()) == 1
    assert hub.requests() == []


def test_host_that_is_not_allowed_is_not_there(shown: Shown) -> None:
    with FaultHub() as other:
        other.add("x/model.tar.gz", ARCHIVE)
        for path in (f"/http:/{other.host}", f"/http:/{other.host}/x", f"/http:/{other.host}/x/model.tar.gz"):
            assert shown.error(path) == errno.ENOENT
        assert other.requests() == []


def test_why_a_host_is_not_there_is_told_at_the_top(shown: Shown) -> None:
    with pytest.raises(RefusedError):
        shown.stat("/https:/other.example.org")
    [why] = shown.tree.extended_attributes("/").values()
    assert b"other.example.org" in why
    assert b"--allow-host" in why


# ---- rule 1: only what can be a model is asked for


def test_directories_above_versions_need_no_request(shown: Shown, hub: FaultHub) -> None:
    for path in ("/", "/google", "/google/m", "/any/thing/at/all", "/https:", "/http:"):
        assert stat.S_ISDIR(shown.stat(path).mode)
        assert shown.names(path) == []
        assert shown.tree.extended_attributes(path) == {}
    assert hub.requests() == []


@pytest.mark.parametrize("directory", ["", "/google", "/google/m"])
@pytest.mark.parametrize(
    "name",
    [".git", ".svn", ".hg", ".Trash", ".Trash-0", ".hidden", ".directory", "x~", "autorun.inf", "HEAD.lock"],
)
def test_litter_is_not_there_and_not_asked_for(
    shown: Shown, hub: FaultHub, directory: str, name: str
) -> None:
    assert shown.error(f"{directory}/{name}") == errno.ENOENT
    assert hub.requests() == []


@pytest.mark.parametrize("name", [".git", ".hg", ".Trash-0", ".DS_Store", ".python-version"])
def test_litter_in_a_version_starts_no_download(shown: Shown, hub: FaultHub, name: str) -> None:
    shown.stat(f"/{PATH}")
    assert shown.error(f"/{PATH}/{name}") == errno.ENOENT
    assert hub.body_requests() == []


def test_version_is_asked_for_with_one_probe(shown: Shown, hub: FaultHub) -> None:
    for _ in range(3):
        assert stat.S_ISDIR(shown.stat(f"/{PATH}").mode)
    assert [request.kind for request in hub.requests()] == ["listing", "probe"]


def test_version_that_the_hub_has_not_is_asked_for_once(shown: Shown, hub: FaultHub) -> None:
    for path in ("/google/m/9", "/google/m/9", "/google/m/9/saved_model.pb"):
        assert shown.error(path) == errno.ENOENT
    assert [request.kind for request in hub.requests()] == ["listing", "probe"]


def test_extended_attributes_and_links_start_nothing(shown: Shown, hub: FaultHub) -> None:
    assert shown.tree.extended_attributes(f"/{PATH}")["user.hubfs.state"] == b"absent"
    assert shown.error(f"/{PATH}", shown.tree.link_target) == errno.EINVAL
    assert hub.requests() == []


# ---- rule 2: unversioned paths


@pytest.mark.parametrize("name", ["saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb"])
def test_model_file_in_an_unversioned_path_brings_the_latest_version(
    shown: Shown, hub: FaultHub, name: str
) -> None:
    hub.add("google/m", make_archive({**FILES, name: b"latest"}))
    assert shown.read(f"/google/m/{name}") == b"latest"
    assert shown.read("/google/m/assets/vocab.txt") == FILES["assets/vocab.txt"]
    assert stat.S_ISDIR(shown.stat("/google/m/variables").mode)
    assert shown.error("/google/m/none.txt") == errno.ENOENT
    assert {request.path for request in hub.requests()} == {"google/m"}
    assert len(hub.body_requests()) == 1


def test_other_files_in_an_unversioned_path_bring_nothing(shown: Shown, hub: FaultHub) -> None:
    hub.add("google/m", ARCHIVE)
    for name in ("fingerprint.pb", "vocab.txt"):
        assert shown.error(f"/google/m/{name}") == errno.ENOENT
    # What might be a model's name is a directory, and nothing more.
    assert stat.S_ISDIR(shown.stat("/google/m/variables").mode)
    assert hub.requests() == []


def test_model_file_where_no_model_can_be_is_not_there(shown: Shown, hub: FaultHub) -> None:
    for path in ("/saved_model.pb", "/google/saved_model.pb"):
        assert shown.error(path) == errno.ENOENT
    assert hub.requests() == []


def test_versions_stay_reachable_below_an_unversioned_model(shown: Shown, hub: FaultHub) -> None:
    hub.add("google/m", make_archive({**FILES, "fingerprint.pb": b"latest"}))
    shown.read("/google/m/saved_model.pb")
    assert shown.read(f"/{PATH}/fingerprint.pb") == FILES["fingerprint.pb"]
    assert shown.read("/google/m/fingerprint.pb") == b"latest"
    shown.store.entry(f"{hub.url}/{PATH}").bring_in(WAIT)
    assert set(shown.names("/google/m")) == {"1", "assets", "fingerprint.pb", "saved_model.pb", "variables"}
    kinds = {name: stat.S_IFMT(row.mode) for name, row in shown.tree.list("/google/m", WAIT).rows}
    assert kinds["1"] == kinds["variables"] == stat.S_IFDIR
    assert kinds["saved_model.pb"] == stat.S_IFREG


def test_unversioned_model_of_the_cache_is_shown_without_a_request(shown: Shown, hub: FaultHub) -> None:
    cache(shown, f"{hub.url}/google/m")
    assert shown.names("/google") == ["m"]
    assert "saved_model.pb" in shown.names("/google/m")
    assert shown.read("/google/m/assets/vocab.txt") == FILES["assets/vocab.txt"]
    assert hub.requests() == []


# ---- rule 3: listings


def test_listing_of_a_version_is_complete_or_waits(shown: Shown, hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(len(ARCHIVE) // 2, go_on))
    with pytest.raises(StalledError):
        shown.tree.list(f"/{PATH}", Wait(0.8))
    go_on.set()
    assert shown.names(f"/{PATH}") == sorted({name.partition("/")[0] for name in TREE})


def test_listing_shows_what_is_cached_without_a_request(shown: Shown, hub: FaultHub) -> None:
    for path in ("google/m/1", "google/m/2", "google/other/3", "acme/deep/er/4"):
        cache(shown, f"{hub.url}/{path}")
    assert shown.names("/") == ["acme", "google"]
    assert shown.names("/google") == ["m", "other"]
    assert shown.names("/google/m") == ["1", "2"]
    assert shown.names("/acme/deep/er") == ["4"]
    assert shown.names("/acme/deep/er/4") == sorted({name.partition("/")[0] for name in FILES})
    assert hub.requests() == []


def test_listing_shows_what_is_on_its_way(shown: Shown, hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.hang(go_on))
    with pytest.raises(StalledError):
        shown.tree.list(f"/{PATH}", Wait(0.1))
    assert [shown.names(path) for path in ("/", "/google", "/google/m")] == [["google"], ["m"], ["1"]]
    go_on.set()


def test_what_the_hub_has_not_is_not_listed(shown: Shown) -> None:
    shown.error("/google/m/9")
    assert shown.names("/") == []


def test_file_is_no_directory(shown: Shown) -> None:
    assert shown.error(f"/{PATH}/saved_model.pb", shown.names) == errno.ENOTDIR
    assert shown.error(f"/{PATH}/saved_model.pb/x") == errno.ENOENT


def test_directory_is_not_opened_as_a_file(shown: Shown) -> None:
    for path in ("/", "/google", f"/{PATH}", f"/{PATH}/variables"):
        assert shown.error(path, shown.read) in (errno.EISDIR, errno.EIO)


# ---- rule 5: attributes


def test_attributes_of_a_file(shown: Shown) -> None:
    found = shown.stat(f"/{PATH}/saved_model.pb")
    assert found.mode == stat.S_IFREG | 0o444
    assert found.links == 1
    assert found.size == len(FILES["saved_model.pb"])
    assert found.stored == found.size
    assert found.mtime == 1_500_000_000


def test_attributes_of_directories(shown: Shown) -> None:
    before = time.time()
    for path in ("/", "/google", f"/{PATH}", f"/{PATH}/variables"):
        found = shown.stat(path)
        assert found.mode == stat.S_IFDIR | 0o555
        assert found.size == 0
    assert shown.stat(f"/{PATH}/variables").mtime == 1_500_000_000
    assert abs(shown.stat("/").mtime - before) < 60


def test_directory_of_a_known_version_counts_its_children_and_has_the_publishers_time(shown: Shown) -> None:
    shown.store.entry(f"{shown.store.settings.hub}/{PATH}").bring_in(WAIT)
    root = shown.stat(f"/{PATH}")
    assert (root.links, root.mtime) == (2 + 3, 1_500_000_000)
    assert shown.stat(f"/{PATH}/variables").links == 2


def test_attributes_that_were_shown_do_not_change_when_the_version_arrives(shown: Shown) -> None:
    """Tools such as tar take a directory for changed otherwise, and the kernel keeps what it was told."""
    early = shown.stat(f"/{PATH}")
    shown.store.entry(f"{shown.store.settings.hub}/{PATH}").bring_in(WAIT)
    assert shown.stat(f"/{PATH}") == early


@pytest.mark.parametrize("directory", ["/", "/google", "/google/m", f"/{PATH}", f"/{PATH}/variables"])
def test_what_a_listing_tells_is_what_stat_tells(shown: Shown, directory: str) -> None:
    listing = shown.tree.list(directory, WAIT)
    assert listing.settled == directory.startswith(f"/{PATH}")
    for name, row in listing.rows:
        found = shown.stat(os.path.normpath(f"{directory}/{name}"))
        assert row.inode == found.inode
        assert stat.S_IFMT(row.mode) == stat.S_IFMT(found.mode)
        if listing.settled and name != "..":
            assert row == found


def test_inode_is_the_same_after_a_remount() -> None:
    code = "from hubfs.fs.tree import inode; print(inode('/a/b/1'))"
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == inode("/a/b/1")


@given(st.sets(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=50))
def test_inodes_differ_and_fit(names: set[str]) -> None:
    numbers = [inode(f"/{name}/x") for name in names]
    assert len(set(numbers)) == len(names)
    assert all(1 < number < 2**63 for number in numbers)


def test_ten_thousand_inodes_are_distinct() -> None:
    assert len({inode(f"/publisher/model{n}/{v}") for n in range(2500) for v in range(4)}) == 10_000


def test_trailing_slash_is_the_same_inode() -> None:
    assert inode("/a/b/") == inode("/a/b")
    assert inode("/") == inode("")


def test_space_is_that_of_the_caches_disk(shown: Shown, hub: FaultHub) -> None:
    cache(shown, f"{hub.url}/google/a/1")
    disk = os.statvfs(shown.store.layout.root)
    blocks, free, _ = shown.tree.space(4096)
    assert blocks == disk.f_blocks * disk.f_frsize // 4096
    assert 0 < free <= blocks


# ---- what the tree tells about itself


def test_control_directory_is_there_and_not_listed(shown: Shown) -> None:
    assert shown.stat("/.hubfs").mode == stat.S_IFDIR | 0o555
    assert ".hubfs" not in shown.names("/")
    assert shown.names("/.hubfs") == ["status.json"]
    assert shown.stat("/.hubfs/status.json").mode == stat.S_IFREG | 0o444
    assert shown.error("/.hubfs/none") == errno.ENOENT
    assert shown.error("/.hubfs/none", shown.read) == errno.ENOENT
    assert shown.error("/.hubfs2") == errno.ENOENT
    assert shown.tree.extended_attributes("/.hubfs") == {}


def test_status_tells_of_mount_and_cache(shown: Shown) -> None:
    shown.error("/google/m/9")
    shown.store.entry(f"{shown.store.settings.hub}/{PATH}").bring_in(WAIT)
    status = json.loads(shown.read("/.hubfs/status.json"))
    assert status["pid"] == 7
    assert status["cache"]["dir"] == str(shown.store.layout.root)
    assert (status["cache"]["models"], status["cache"]["size"]) == (1, sum(map(len, FILES.values())))
    assert status["cache"]["free"] > 0
    assert status["transfers"] == []
    assert [failure["handle"] for failure in status["failures"]] == [f"{shown.store.settings.hub}/google/m/9"]


def test_status_is_that_of_the_moment_it_was_opened(shown: Shown) -> None:
    file = shown.tree.open("/.hubfs/status.json", WAIT)
    whole = file.read(1 << 20, 0, WAIT)
    shown.error("/google/m/9")
    assert file.read(10, 5, WAIT) == whole[5:15]
    assert file.read(1 << 20, 0, WAIT) == whole
    assert file.read(10, len(whole), WAIT) == b""
    file.close()
    assert shown.read("/.hubfs/status.json") != whole


def test_status_tells_of_transfers(shown: Shown, hub: FaultHub) -> None:
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(len(ARCHIVE) // 2, go_on))
    with pytest.raises(StalledError):
        shown.tree.list(f"/{PATH}", Wait(0.3))
    [transfer] = json.loads(shown.read("/.hubfs/status.json"))["transfers"]
    assert transfer["handle"] == f"{hub.url}/{PATH}"
    assert transfer["state"] == "transferring"
    assert (transfer["received"], transfer["total"]) == (len(ARCHIVE) // 2, len(ARCHIVE))
    attributes = shown.tree.extended_attributes(f"/{PATH}/variables")
    assert attributes["user.hubfs.received"] == str(len(ARCHIVE) // 2).encode()
    assert attributes["user.hubfs.total"] == str(len(ARCHIVE)).encode()
    go_on.set()


def test_extended_attributes_of_a_version(shown: Shown, hub: FaultHub) -> None:
    handle = f"{hub.url}/{PATH}"
    shown.names(f"/{PATH}")
    for path in (f"/{PATH}", f"/{PATH}/variables", f"/{PATH}/saved_model.pb"):
        assert shown.tree.extended_attributes(path) == {
            "user.hubfs.handle": handle.encode(),
            "user.hubfs.key": cache_key(handle).encode(),
            "user.hubfs.state": b"complete",
            "user.hubfs.origin": b"archive",
            "user.hubfs.read_mode": b"cached",
            "user.hubfs.read_mode_reason": b"not mounted yet",
        }


@pytest.mark.logs("licence")
def test_extended_attribute_tells_why_a_version_cannot_be_read(shown: Shown, hub: FaultHub) -> None:
    hub.fault("acme/secret/1", Fault.status(403, b"accept the licence first", on="any", times=None))
    assert shown.error("/acme/secret/1") == errno.EACCES
    attributes = shown.tree.extended_attributes("/acme/secret/1")
    assert attributes["user.hubfs.state"] == b"failed"
    assert b"accept the licence first" in attributes["user.hubfs.error"]
    # A path that cannot be looked up cannot be asked: the directories above it tell.
    for path in ("/acme/secret", "/acme", "/"):
        assert b"accept the licence first" in shown.tree.extended_attributes(path)["user.hubfs.error"]
    assert "user.hubfs.error" not in shown.tree.extended_attributes("/google")
    with pytest.raises(NotFoundError):
        shown.stat("/google/none/1")
    assert b"none" in shown.tree.extended_attributes("/google")["user.hubfs.error"]
