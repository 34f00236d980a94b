"""Entries of versions that are read by range: what readers see, without a mount."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.cache.entry import OPENS, Entry, is_data
from hubfs.cache.kept import Kept
from hubfs.cache.manifest import DirectoryInfo, FileInfo
from hubfs.cache.readable import Wait
from hubfs.cache.state import State
from hubfs.cache.streamed import Streamed
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    DamagedError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    OfflineError,
    StalledError,
    UnavailableError,
)
from tests.bucket_hub import MTIME, BucketHub
from tests.hub import Fault
from tests.listed import MODEL, Listed, error_of, read, soon, until
from tests.models import make_tree, write_tree

DATA = "variables/variables.data-00000-of-00001"
MiB = 1 << 20
TREE = make_tree(1, size=6 * MiB + 99)
SIZE = sum(map(len, TREE.values()))
BODY = TREE[DATA]
PB = "saved_model.pb"


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


@pytest.fixture(params=["auto", "uncompressed"])
def entry(request: pytest.FixtureRequest, world: Listed) -> Entry:
    """An entry that brings in nothing that is not touched."""
    return world.entry(load_format=request.param, read_ahead=False)


def sent(hub: BucketHub) -> int:
    return sum(hub.sent(MODEL).values())


def complete(entry: Entry) -> bool:
    return entry.snapshot().state == State.COMPLETE


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [
        (DATA, 10, True), ("variables/variables.index", 10, True), ("saved_model.pb", 10, False),
        ("saved_model.pb", 1 << 30, False), ("assets/vocab.txt", 4 * MiB - 1, False),
        ("model.bin", 4 * MiB, True),
        ("x/saved_model.pb", 1 << 30, False), ("tfhub_module.pb", 1 << 30, False),
    ],
)  # fmt: skip
def test_what_counts_as_data(path: str, size: int, expected: bool) -> None:
    assert is_data(path, size) is expected


class TestLookingAround:
    def test_needs_the_listing_only(self, hub: BucketHub, entry: Entry) -> None:
        entry.ensure_exists(soon())
        manifest = entry.manifest(soon())
        sizes = {path: info.size for path, info in manifest.files.items()}
        assert sizes == {path: len(content) for path, content in TREE.items()}
        assert entry.lookup(PB, soon()) == FileInfo(len(TREE[PB]), MTIME)
        assert entry.lookup("variables", soon()) == DirectoryInfo(MTIME, 0)
        assert set(entry.directory("", soon()) or ()) == {"assets", "fingerprint.pb", PB, "variables"}
        assert entry.stored(PB, FileInfo(1, 1)) == 0
        assert hub.reads() == [] and len(hub.locations()) == len(hub.listings()) == 1
        assert entry.snapshot().state == State.LOCATED

    def test_names_that_it_lacks_ask_for_nothing(self, hub: BucketHub, entry: Entry) -> None:
        entry.manifest(soon())
        asked = len(hub.requests())
        for name in ("debug/saved_model_debug_info.pb", "x", "variables/x", f"{PB}/x"):
            with pytest.raises(NotFoundError):
                entry.lookup(name, soon())
        assert len(hub.requests()) == asked

    def test_makes_no_cache_directory(self, world: Listed, entry: Entry) -> None:
        entry.manifest(soon())
        assert not world.cache.exists()

    def test_is_known_and_the_archive_is_not_asked_for(self, hub: BucketHub, entry: Entry) -> None:
        entry.manifest(soon())
        assert entry.known_manifest() is not None and entry.peek() is None
        assert entry.is_under_way()
        assert hub.archive_requests() == []


class TestReading:
    @pytest.mark.parametrize("path", sorted(TREE))
    def test_gives_the_bytes(self, entry: Entry, path: str) -> None:
        assert read(entry, path) == TREE[path]

    @pytest.mark.parametrize(
        ("start", "size"),
        [(0, 1), (MiB - 1, 2), (len(BODY) - 5, 100), (len(BODY), 10), (3 * MiB + 7, 2 * MiB)],
    )
    def test_of_a_range_gives_the_range(self, hub: BucketHub, entry: Entry, start: int, size: int) -> None:
        assert read(entry, DATA, start, size) == BODY[start : start + size]
        assert set(hub.sent(MODEL)) <= {DATA}

    def test_of_one_range_by_many_is_one_request(
        self, hub: BucketHub, entry: Entry, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        with ThreadPoolExecutor(12) as pool:
            reads = [pool.submit(read, entry, DATA, 3 * MiB + n, 100) for n in range(12)]
            until(lambda: entry.snapshot().waiting == 12, "all readers to wait")
            release.set()
            assert [r.result() for r in reads] == [BODY[3 * MiB + n : 3 * MiB + n + 100] for n in range(12)]
        assert [request.range for request in hub.reads(MODEL)] == [f"bytes={3 * MiB}-{4 * MiB - 1}"]

    def test_again_asks_for_nothing(self, hub: BucketHub, entry: Entry) -> None:
        read(entry, DATA)
        asked = len(hub.requests())
        assert read(entry, DATA) == BODY
        assert len(hub.requests()) == asked

    def test_that_is_interrupted_ends(self, hub: BucketHub, entry: Entry, release: threading.Event) -> None:
        hub.fault_file(MODEL, DATA, Fault.hang(release))
        file = entry.open(DATA, soon())
        signalled = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(file.read, 10, 0, soon(signalled.is_set))
            hub.wait_for(lambda hub: hub.reads(MODEL))
            signalled.set()
            with pytest.raises(InterruptedWait):
                waiting.result(20)
        release.set()
        assert file.read(10, 0, soon()) == BODY[:10]
        file.close()
        assert len(hub.reads(MODEL)) == 1

    def test_that_brings_nothing_for_too_long_ends(
        self, hub: BucketHub, entry: Entry, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.hang(release))
        file = entry.open(DATA, soon())
        with pytest.raises(StalledError):
            file.read(10, 0, Wait(0.2))
        release.set()
        assert file.read(10, 0, soon()) == BODY[:10]
        file.close()

    def test_that_fails_can_be_tried_again(self, hub: BucketHub, entry: Entry) -> None:
        hub.fault_file(MODEL, DATA, Fault.status(503, times=3))
        file = entry.open(DATA, soon())
        with pytest.raises(UnavailableError):
            file.read(10, 0, soon())
        assert file.read(10, 0, soon()) == BODY[:10]
        file.close()

    @pytest.mark.logs("Nobody may")
    def test_that_is_refused_asks_where_it_is_anew(self, hub: BucketHub, entry: Entry) -> None:
        hub.fault_file(MODEL, PB, Fault.status(403, b"<Error><Code>Nobody may</Code></Error>"))
        with pytest.raises(AccessError, match="Nobody may"):
            read(entry, PB)
        until(lambda: error_of(lambda: read(entry, PB)) is None, "access")
        assert read(entry, PB) == TREE[PB]
        assert len(hub.listings()) == 2

    def test_after_the_store_was_closed_ends(
        self, hub: BucketHub, world: Listed, entry: Entry, release: threading.Event
    ) -> None:
        hub.fault_file(MODEL, DATA, Fault.hang(release))
        file = entry.open(DATA, soon())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(file.read, 10, 0, soon())
            hub.wait_for(lambda hub: hub.reads(MODEL))
            world.close()
            with pytest.raises(HubfsError, match="stop"):
                waiting.result(20)
        file.close()


class TestChange:
    @pytest.fixture
    def told(self, entry: Entry) -> list[str]:
        """Handles that the store says have changed."""
        told: list[str] = []
        entry._store.on_outdated = lambda handle, manifest: told.append(handle)
        return told

    def test_fails_who_has_it_open_and_gives_others_the_new_one(
        self, hub: BucketHub, entry: Entry, told: list[str]
    ) -> None:
        file, small = entry.open(DATA, soon()), entry.open(PB, soon())
        assert file.read(10, 0, soon()) == BODY[:10]
        other = make_tree(9, size=7 * MiB)
        hub.publish(MODEL, other)
        with pytest.raises(ChangedOriginError):
            file.read(10, 4 * MiB, soon())
        for handle in (file, small):
            with pytest.raises(ChangedOriginError):
                handle.read(10, 0, soon())
        info = entry.lookup(DATA, soon())
        assert isinstance(info, FileInfo) and info.size == 7 * MiB
        assert {path: read(entry, path) for path in other} == other
        new = entry.open(DATA, soon())
        assert new.direct, "the kernel may have pages of the old one"
        for handle in (file, small, new):
            handle.close()
        assert told == [entry.handle]

    def test_to_a_version_without_the_file_is_enoent(self, hub: BucketHub, entry: Entry) -> None:
        read(entry, PB)
        hub.delete(f"{MODEL}/{DATA}")
        with pytest.raises(ChangedOriginError):
            read(entry, DATA)
        with pytest.raises(NotFoundError):
            read(entry, DATA)
        assert read(entry, PB) == TREE[PB]

    @pytest.mark.parametrize("what", [Fault.truncate(2 * MiB), Fault.short_length(5), Fault.html()])
    def test_answers_that_are_another_files_are_not_taken(
        self, hub: BucketHub, entry: Entry, what: Fault
    ) -> None:
        hub.fault_file(MODEL, DATA, what)
        found: list[bytes] = []
        for _ in range(3):
            error = error_of(lambda: found.append(read(entry, DATA)))
            assert error is None or error.errno == 5
        assert found and set(found) == {BODY}


class TestKeeping:
    def test_all_of_a_version_that_was_read_is_published(self, world: Listed) -> None:
        entry = world.entry(read_ahead=False)
        for path in TREE:
            read(entry, path)
        until(lambda: complete(entry), "the version in the cache")
        assert sent(world.hub) == SIZE

    def test_opening_data_brings_in_the_rest(self, world: Listed) -> None:
        entry = world.entry()
        entry.open(DATA, soon()).close()
        until(lambda: complete(entry), "the version in the cache")
        assert {path: read(entry, path) for path in TREE} == TREE
        assert sent(world.hub) == SIZE

    def test_opening_something_else_does_not(self, world: Listed) -> None:
        entry = world.entry()
        read(entry, PB)
        assert entry.snapshot().state == State.PARTIAL
        assert set(world.hub.sent(MODEL)) == {PB}

    def test_bring_in_does_whatever_the_settings(self, world: Listed) -> None:
        for settings in ({"read_ahead": False}, {"load_format": "uncompressed"}):
            entry = world.entry(keep=True, **settings)
            directory = entry.bring_in(soon())
            assert (directory / DATA).read_bytes() == BODY
        assert sent(world.hub) == SIZE

    def test_bring_in_tells_why_it_cannot(self, world: Listed) -> None:
        world.hub.fault_file(MODEL, PB, Fault.status(503, times=None))
        with pytest.raises(UnavailableError):
            world.entry().bring_in(soon())
        until(lambda: not list(world.cache.glob("*.lock")), "others to be let in")
        assert [path.suffix for path in world.cache.iterdir()] == [".partial"]

    def test_an_open_file_goes_on_when_the_version_is_published(
        self, world: Listed, release: threading.Event
    ) -> None:
        world.hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        entry = world.entry()
        file = entry.open(DATA, soon())
        assert file.read(10, MiB, soon()) == BODY[MiB : MiB + 10]
        release.set()
        until(lambda: complete(entry), "the version in the cache")
        assert file.read(MiB, 3 * MiB, soon()) == BODY[3 * MiB : 4 * MiB]
        assert file.backing is not None
        file.close()

    @pytest.mark.parametrize("read_ahead", [True, False])
    def test_an_open_file_goes_on_when_another_process_publishes_the_version(
        self, world: Listed, release: threading.Event, read_ahead: bool
    ) -> None:
        """As hub.load would; what is still missing comes from there, or from the hub."""
        world.hub.fault_file(MODEL, DATA, Fault.hang(release, times=None))
        entry = world.entry(read_ahead=read_ahead)
        world.cache.mkdir()
        lock = world.cache / f"{entry.key}.lock"
        lock.write_text(f"elsewhere.1.{'0' * 32}")
        file = entry.open(DATA, soon())
        write_tree(TREE, world.cache / "new").rename(world.cache / entry.key)
        lock.unlink()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(file.read, 10, 5 * MiB, soon())
            if read_ahead:
                until(lambda: complete(entry), "it to be noticed")
            release.set()
            assert reading.result(30) == BODY[5 * MiB : 5 * MiB + 10]
        assert file.read(10, 2 * MiB, soon()) == BODY[2 * MiB : 2 * MiB + 10]
        file.close()
        assert {path: read(entry, path) for path in TREE} == TREE

    def test_another_process_reads_without_keeping(self, world: Listed, release: threading.Event) -> None:
        world.hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        one, two = world.entry(), world.entry()
        file = one.open(DATA, soon())
        assert isinstance(one._listed, Kept)
        assert {path: read(two, path) for path in TREE.keys() - {"assets/vocab.txt"}} == {
            path: content for path, content in TREE.items() if path != "assets/vocab.txt"
        }
        assert isinstance(two._listed, Streamed)
        release.set()
        until(lambda: complete(one), "the version in the cache")
        file.close()
        assert {path: read(two, path) for path in TREE} == TREE
        assert complete(two)

    def test_verified_only_waits_for_all(self, world: Listed, release: threading.Event) -> None:
        world.hub.fault_file(MODEL, "assets/vocab.txt", Fault.hang(release))
        entry = world.entry(verified_only=True)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, entry, PB)
            world.hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY))
            assert not reading.done()
            release.set()
            assert reading.result(30) == TREE[PB]
        assert complete(entry)

    def test_offline_goes_by_what_is_complete(self, world: Listed) -> None:
        read(world.entry(read_ahead=False), PB)
        world.close()
        with pytest.raises(OfflineError):
            world.entry(offline=True).manifest(soon())

    @pytest.mark.logs("md5")
    def test_damage_that_stays_is_told_and_nothing_is_published(self, world: Listed) -> None:
        world.hub.put(f"{MODEL}/{PB}", TREE[PB], etag=f'"{"0" * 32}"', digests=False)
        entry = world.entry()
        with pytest.raises(DamagedError):
            entry.bring_in(soon())
        assert len(world.hub.reads(MODEL, PB)) == 2
        until(lambda: not list(world.cache.glob("*.partial")), "nothing of it to be left")
        assert not (world.cache / entry.key).exists()

    def test_hub_that_never_gives_what_it_lists(self, world: Listed) -> None:
        world.hub.put(f"{MODEL}/{PB}", TREE[PB], etag=f'"{"0" * 32}"')
        entry = world.entry()
        with pytest.raises(ChangedOriginError, match=f"{PB} is not the file that was listed"):
            entry.bring_in(soon())
        assert len(world.hub.reads(MODEL, PB)) <= OPENS
        assert not (world.cache / entry.key).exists()

    def test_damage_that_passes_is_mended(self, world: Listed) -> None:
        world.hub.fault_file(MODEL, PB, Fault.flip(7))
        entry = world.entry()
        directory = entry.bring_in(soon())
        assert (directory / PB).read_bytes() == TREE[PB]
        file = entry.open(PB, soon())
        assert file.direct
        file.close()


class TestForgetting:
    def test_what_is_read_or_comes_is_not_idle(self, hub: BucketHub, world: Listed, entry: Entry) -> None:
        assert entry.is_idle
        file = entry.open(PB, soon())
        assert not entry.is_idle
        file.close()
        until(lambda: entry.is_idle, "the entry to be idle")

    def test_partial_version_is_given_free_by_who_does_not_read_it(self, world: Listed) -> None:
        one = world.entry(read_ahead=False)
        read(one, DATA, 0, 10)
        until(lambda: one._listed is None, "the version to be given free")
        two = world.entry(read_ahead=False)
        read(two, PB)
        assert isinstance(two._listed, Kept)
        # And the first one goes on, as soon as the second gave it free.
        until(lambda: two._listed is None, "the version to be given free")
        assert read(one, DATA) == BODY
        assert isinstance(one._listed, Kept) or complete(one)
        assert world.hub.sent(MODEL)[DATA] == len(BODY)
