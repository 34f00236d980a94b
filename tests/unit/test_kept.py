"""Versions on their way into the cache, file by file: what is on disk meanwhile, and who may be there too."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfs.cache.entry import Entry
from hubfs.cache.kept import DESCRIPTORS, FLUSH, Kept
from hubfs.cache.kept_file import KeptFile
from hubfs.cache.layout import read_lock
from hubfs.cache.partial import summary
from hubfs.cache.state import State
from hubfs.errors import DamagedError, HubfsError
from hubfs.transfer.chunks import CHUNK
from tests.bucket_hub import MTIME, BucketHub
from tests.hub import Fault
from tests.leaks import open_files
from tests.listed import MODEL, Listed, error_of, read, soon, until
from tests.models import make_tree
from tests.remote import Doubting

DATA = "variables/variables.data-00000-of-00001"
LAST = "assets/vocab.txt"
MiB = 1 << 20
TREE = make_tree(1, size=20 * MiB + 99)
SIZE = sum(map(len, TREE.values()))
BODY = TREE[DATA]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    with BucketHub() as hub:
        hub.publish(MODEL, TREE)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        yield hub


@pytest.fixture
def world(hub: BucketHub, tmp_path: Path) -> Iterator[Listed]:
    with Listed(hub, tmp_path / "cache") as world:
        yield world


def partial(world: Listed, entry: Entry) -> Path:
    return world.cache / f"{entry.key}.hubfs.partial"


def complete(entry: Entry) -> bool:
    return entry.snapshot().state == State.COMPLETE


def kept(entry: Entry) -> Kept:
    assert isinstance(entry._listed, Kept)
    return entry._listed


class TestOnDisk:
    def test_what_came_is_on_stable_storage_soon(self, world: Listed, release: threading.Event) -> None:
        """All but a bounded part of it, though nobody closes anything."""
        world.hub.fault_file(MODEL, LAST, Fault.hang(release))
        entry = world.entry()
        file = entry.open(DATA, soon())
        world.hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="the data")

        def noted() -> int:
            told = summary(partial(world, entry))
            return told.there if told else 0

        until(lambda: noted() >= len(BODY), "the map to tell of it")
        assert kept(entry).partial.unstored() < FLUSH
        file.close()

    def test_little_is_on_stable_storage_soon(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        file.read(10, 5 * MiB, soon())
        until(lambda: (told := summary(partial(world, entry))) and told.there == 4 * CHUNK, "the map")
        file.close()

    def test_stored_counts_what_came(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        info = entry.lookup(DATA, soon())
        file.read(10, 5 * MiB, soon())
        assert entry.stored(DATA, info) == MiB  # type: ignore[arg-type]
        assert kept(entry).received == MiB
        file.close()

    def test_is_published_with_the_publishers_times_and_nothing_beside_it(self, world: Listed) -> None:
        entry = world.entry()
        directory = entry.bring_in(soon())
        until(lambda: entry._listed is None, "the end of it")
        for name in (*TREE, "variables", "assets", "."):
            assert int((directory / name).stat().st_mtime) == MTIME, name
        assert {path.name for path in world.cache.iterdir()} == {
            entry.key, f"{entry.key}.descriptor.txt", f"{entry.key}.hubfs.json", f"{entry.key}.hubfs.used",
        }  # fmt: skip

    def test_few_descriptors_are_held_for_many_files(self, world: Listed, release: threading.Event) -> None:
        many = {f"assets/{number:04}": b"x" for number in range(2 * DESCRIPTORS)}
        world.hub.publish("google/many/1", {**many, DATA: TREE[DATA]})
        world.hub.fault_file("google/many/1", DATA, Fault.hang(release, times=None))
        entry = world.entry("google/many/1")
        file = entry.open(DATA, soon())
        world.hub.wait_for(lambda hub: len(hub.sent("google/many/1")) == len(many) + 1, timeout=60)
        until(lambda: len(kept(entry)._files) <= DESCRIPTORS, "files that are whole to be let go")
        held = [path for path in open_files(world.cache) if "hubfs.partial/files" in path]
        assert len(held) <= DESCRIPTORS + 40
        file.close()
        release.set()
        until(lambda: complete(entry), "the version in the cache", 60)


class TestOrder:
    def test_of_filling_is_the_smallest_first(self, world: Listed) -> None:
        world.entry(connections=2).bring_in(soon())
        names = [request.path.partition(f"{MODEL}/")[2] for request in world.hub.reads(MODEL)]
        assert list(dict.fromkeys(names)) == sorted(TREE, key=lambda name: len(TREE[name]))

    def test_demand_comes_before_filling(self, world: Listed, release: threading.Event) -> None:
        world.hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        entry = world.entry()
        file = entry.open(DATA, soon())
        world.hub.wait_for(lambda hub: hub.reads(MODEL, DATA))
        assert read(entry, LAST) == TREE[LAST]
        file.close()
        release.set()
        until(lambda: complete(entry), "the version in the cache")


class TestLock:
    """tensorflow_hub's, which keeps it from downloading the same."""

    def test_is_held_while_all_is_brought_in(self, world: Listed, release: threading.Event) -> None:
        world.hub.fault_file(MODEL, LAST, Fault.hang(release))
        entry = world.entry()
        entry.open(DATA, soon()).close()
        world.hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="the data")
        content = read_lock(world.cache / f"{entry.key}.lock")
        assert content is not None
        (growing,) = world.cache.glob(f"{entry.key}.*.tmp")
        assert growing.name == f"{entry.key}.{content.rpartition('.')[2]}.tmp"
        release.set()
        until(lambda: complete(entry), "the version in the cache")
        until(lambda: not list(world.cache.glob("*.lock")) and not growing.exists(), "the lock to go")

    def test_is_not_held_for_what_is_only_read(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        file.read(MiB, 0, soon())
        assert list(world.cache.glob("*.lock")) == []
        file.close()

    def test_of_another_does_not_keep_readers_waiting(self, world: Listed) -> None:
        world.cache.mkdir()
        entry = world.entry()
        lock = world.cache / f"{entry.key}.lock"
        lock.write_text(f"elsewhere.1.{'0' * 32}")
        for name in TREE:
            assert read(entry, name) == TREE[name]
        assert lock.read_text() == f"elsewhere.1.{'0' * 32}"
        assert not (world.cache / entry.key).exists()
        lock.unlink()
        until(lambda: complete(entry), "the version in the cache")


class TestFailures:
    def test_filling_that_fails_is_tried_again_by_who_opens_a_data_file(self, world: Listed) -> None:
        world.hub.fault_file(MODEL, LAST, Fault.status(403, b"<Error><Code>No</Code></Error>"))
        entry = world.entry()
        entry.open(DATA, soon()).close()
        until(lambda: entry._listed is None, "the end of the attempt")

        def comes() -> bool:
            # While the first one ends, it may be that all is only streamed.
            error_of(lambda: entry.open(DATA, soon()).close())
            return complete(entry)

        until(comes, "the version in the cache")
        # What was on its way when the first one ended is lost with it.
        assert sum(world.hub.sent(MODEL).values()) < 2 * SIZE

    def test_file_that_comes_anew_while_its_check_still_ends_is_checked_too(self, world: Listed) -> None:
        world.hub.fault_file(MODEL, LAST, Fault.flip(7))
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        version = kept(entry)
        verify = version._verify

        def and_wait(checked: KeptFile) -> None:
            verify(checked)
            until(lambda: version._files[checked.path].remote.complete, "the file to come")

        version._verify = and_wait  # type: ignore[method-assign]
        directory = entry.bring_in(soon())
        assert (directory / LAST).read_bytes() == TREE[LAST]
        file.close()

    def test_source_that_takes_back_what_it_gave_is_asked_once_more(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        remote = kept(entry)._files[DATA].remote
        source, remote.source = remote.source, Doubting(remote.source)
        with pytest.raises(DamagedError, match="not what was declared"):
            file.read(10, 0, soon())
        until(lambda: kept(entry)._files[DATA].remote is not remote, "another attempt")
        with pytest.raises(DamagedError):
            file.read(10, 9 * MiB, soon())
        assert remote.source is not source
        other = entry.open(DATA, soon())
        assert other.direct
        assert other.read(10, 0, soon()) == BODY[:10]
        for each in (file, other):
            each.close()

    @pytest.mark.logs("cut off|internal|writing")
    def test_cache_that_is_removed_under_it_is_an_error_and_not_for_good(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        file = entry.open(DATA, soon())
        file.read(10, 0, soon())
        shutil.rmtree(world.cache)
        found: list[object] = []
        for name in TREE:
            error = error_of(lambda name=name: found.append(read(entry, name) == TREE[name]))  # type: ignore[misc]
            assert error is None or isinstance(error, HubfsError)
        file.close()
        assert set(found) <= {True}

        def works() -> bool:
            return error_of(lambda: found.append(read(entry, LAST))) is None

        until(works, "it to work again", 30)
        assert found[-1] == TREE[LAST]
