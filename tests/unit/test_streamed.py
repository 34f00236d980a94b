"""Versions of which nothing is kept but some blocks in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs.cache.entry import Entry
from hubfs.cache.streamed import Streamed
from hubfs.errors import ConfigError, DamagedError, StoppedError
from hubfs.transfer.chunks import CHUNK
from tests.bucket_hub import BucketHub
from tests.hub import Fault
from tests.listed import MODEL, Listed, read, soon, until
from tests.models import make_tree
from tests.remote import Doubting

DATA = "variables/variables.data-00000-of-00001"
INDEX = "variables/variables.index"
MiB = 1 << 20
TREE = make_tree(1, size=24 * MiB + 99)
BODY = TREE[DATA]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    with BucketHub() as hub:
        hub.publish(MODEL, TREE)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        yield hub


@pytest.fixture
def world(hub: BucketHub, tmp_path: Path) -> Iterator[Listed]:
    with Listed(hub, tmp_path / "none/cache") as world:
        yield world


@pytest.fixture
def entry(world: Listed) -> Entry:
    return world.entry(load_format="uncompressed")


@pytest.fixture
def small(world: Listed) -> Entry:
    """With little memory."""
    return world.entry(load_format="uncompressed", memory_limit="16MiB")


def streamed(entry: Entry) -> Streamed:
    assert isinstance(entry._listed, Streamed)
    return entry._listed


def used(entry: Entry) -> int:
    return entry._store.memory.used


def test_nothing_is_taken_before_something_is_opened(world: Listed, entry: Entry) -> None:
    entry.manifest(soon())
    assert used(entry) == 0
    assert read(entry, "saved_model.pb") == TREE["saved_model.pb"]
    assert used(entry) == CHUNK
    assert not world.cache.exists()


def test_blocks_stay_for_who_opens_the_file_again(hub: BucketHub, entry: Entry) -> None:
    assert read(entry, DATA) == BODY
    asked = len(hub.requests())
    assert read(entry, DATA) == BODY
    assert len(hub.requests()) == asked


def test_memory_is_for_all_files_together(hub: BucketHub, small: Entry) -> None:
    hub.publish("google/other/1", TREE)
    other = small._store.entry(f"{hub.url}/google/other/1")
    with ThreadPoolExecutor(6) as pool:
        reads = [pool.submit(read, each, DATA) for each in (small, other, small, other)]
        most = 0
        while not all(done.done() for done in reads):
            most = max(most, used(small))
        assert all(done.result() == BODY for done in reads)
    assert 0 < most <= 16 * MiB
    assert used(small) <= 16 * MiB


@pytest.mark.parametrize("limit", ["1MiB", "0", "-1"])
def test_limit_that_is_too_small_is_refused(world: Listed, limit: str) -> None:
    with pytest.raises(ConfigError, match="memory_limit"):
        world.entry(load_format="uncompressed", memory_limit=limit)


def test_one_who_reads_in_order_is_sent_each_byte_once(hub: BucketHub, small: Entry) -> None:
    assert read(small, DATA) == BODY
    assert hub.sent(MODEL)[DATA] == len(BODY)


def test_tail_and_then_all_in_order_is_sent_hardly_more(hub: BucketHub, small: Entry) -> None:
    assert read(small, DATA, len(BODY) - 4096) == BODY[-4096:]
    assert read(small, DATA) == BODY
    assert hub.sent(MODEL)[DATA] <= len(BODY) + MiB


def test_nothing_is_read_ahead_of_a_file_that_was_closed(hub: BucketHub, entry: Entry) -> None:
    read(entry, DATA, 0, MiB)
    hub.wait_for(lambda hub: not hub.answering(), what="the end of all requests")
    assert read(entry, "saved_model.pb") == TREE["saved_model.pb"]
    assert hub.sent(MODEL)[DATA] <= len(BODY) // 3


class TestIndex:
    """Whoever opens a checkpoint's index is going to read its data."""

    def test_brings_in_the_beginning_and_the_end_of_the_data(self, hub: BucketHub, entry: Entry) -> None:
        small = {name for name, content in TREE.items() if 0 < len(content) <= CHUNK}
        file = entry.open(INDEX, soon())
        hub.wait_for(lambda hub: hub.sent(MODEL).get(DATA) == len(BODY), what="all data, as it is little")
        hub.wait_for(lambda hub: not hub.answering(), what="the end of all requests")
        assert hub.sent(MODEL).keys() == {DATA, *small}
        asked = len(hub.requests())
        assert read(entry, DATA) == BODY
        assert read(entry, INDEX) == TREE[INDEX]
        assert len(hub.requests()) == asked
        file.close()

    def test_does_not_wait_for_it(self, hub: BucketHub, entry: Entry) -> None:
        never = threading.Event()
        hub.fault_file(MODEL, DATA, Fault.hang(never, times=None))
        assert read(entry, INDEX) == TREE[INDEX]
        never.set()

    def test_brings_in_no_more_of_large_data_than_its_beginning(self, hub: BucketHub, world: Listed) -> None:
        large = {**TREE, DATA: bytes(60 * MiB)}
        hub.publish("google/large/1", large)
        entry = world.entry("google/large/1", load_format="uncompressed")
        file = entry.open(INDEX, soon())
        hub.wait_for(lambda hub: hub.sent("google/large/1").get(DATA, 0) >= 32 * MiB, what="32 MiB")
        hub.wait_for(lambda hub: not hub.answering(), what="the end of all requests")
        assert hub.sent("google/large/1")[DATA] <= 33 * MiB
        file.close()

    def test_is_only_itself_without_read_ahead(self, hub: BucketHub, world: Listed) -> None:
        entry = world.entry(load_format="uncompressed", read_ahead=False)
        assert read(entry, INDEX) == TREE[INDEX]
        assert hub.sent(MODEL).keys() == {INDEX}

    def test_is_not_every_file(self, hub: BucketHub, entry: Entry) -> None:
        entry.open(DATA, soon()).close()
        assert read(entry, "saved_model.pb") == TREE["saved_model.pb"]
        assert hub.sent(MODEL).keys() == {"saved_model.pb"}


def test_retired_version_goes_with_its_last_reader(entry: Entry) -> None:
    file = entry.open(DATA, soon())
    version = streamed(entry)
    assert file.read(10, 0, soon()) == BODY[:10]
    version.retire()
    assert file.read(10, 9 * MiB, soon()) == BODY[9 * MiB : 9 * MiB + 10]
    file.close()
    assert entry._listed is None
    until(lambda: used(entry) == 0, "its memory to be given back")


def test_version_that_was_closed_ends_its_readers(hub: BucketHub, entry: Entry) -> None:
    never = threading.Event()
    hub.fault_file(MODEL, DATA, Fault.hang(never))
    file = entry.open(DATA, soon())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(file.read, 10, 0, soon())
        hub.wait_for(lambda hub: hub.reads(MODEL, DATA))
        streamed(entry).close()
        with pytest.raises(StoppedError):
            waiting.result(20)
    never.set()
    file.close()
    assert read(entry, "saved_model.pb") == TREE["saved_model.pb"]


def test_source_that_takes_back_what_it_gave_ends_the_version_for_those_who_have_it_open(
    hub: BucketHub, entry: Entry
) -> None:
    file, other = entry.open(DATA, soon()), entry.open("saved_model.pb", soon())
    version = streamed(entry)
    remote = version._files[DATA].remote
    remote.source = Doubting(remote.source)
    with pytest.raises(DamagedError, match="not what was declared"):
        file.read(10, 9 * MiB, soon())
    for each in (file, other):
        with pytest.raises(DamagedError):
            each.read(10, 0, soon())
    new = entry.open(DATA, soon())
    assert streamed(entry) is not version
    assert new.direct
    assert new.read(10, 9 * MiB, soon()) == BODY[9 * MiB : 9 * MiB + 10]
    for each in (file, other, new):
        each.close()
    assert len(hub.listings()) == 2
