"""Entries and their store, without a mount: one probe, one transfer, and what waiting readers get."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hubfs.cache.entry import Entry
from hubfs.cache.layout import write_descriptor
from hubfs.cache.manifest import DirectoryInfo, FileInfo
from hubfs.cache.models import Model, models, prefixed
from hubfs.cache.readable import Wait
from hubfs.cache.store import IDLE_ENTRIES, Store
from hubfs.config import Settings
from hubfs.errors import (
    AccessError,
    ChangedError,
    DamagedError,
    DiskFullError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    OfflineError,
    ProtocolError,
    ReadOnlyCacheError,
    RefusedError,
    StalledError,
    StoppedError,
    UnavailableError,
)
from hubfs.handles import cache_key
from tests.faults import Answer
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree, write_tree

PATH = "google/m/1"
TREE = make_tree(size=200_000)
ARCHIVE = make_archive(TREE)
FIRST = "saved_model.pb"
DATA = "variables/variables.data-00000-of-00001"
#: Not compressed, so that offsets are known, and with FIRST at its beginning.
PLAIN = make_archive(TREE, order=[FIRST, DATA, "variables/variables.index"], gzip=False)
WAIT = Wait(20.0)
MakeStore = Callable[..., Store]


@pytest.fixture
def make_store(hub: FaultHub, tmp_path: Path) -> Iterator[MakeStore]:
    made: list[Store] = []

    def make(**settings: Any) -> Store:
        flags = {
            "hub": hub.url,
            "cache_dir": str(tmp_path / "cache"),
            "retry_delay": 0.01,
            "retries": 2,
            **settings,
        }
        made.append(Store(Settings.load(flags, {}, Path("/dev/null"))))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store()


@pytest.fixture
def entry(hub: FaultHub, store: Store) -> Entry:
    return entry_of(store, hub)


def entry_of(store: Store, hub: FaultHub, path: str = PATH) -> Entry:
    return store.entry(f"{hub.url}/{path}")


def read(entry: Entry, inner: str, wait: Wait = WAIT) -> bytes:
    file = entry.open(inner, wait)
    try:
        return file.read(file.size, 0, wait)
    finally:
        file.close()


def content(entry: Entry) -> dict[str, bytes]:
    return {name: read(entry, name) for name in entry.manifest(WAIT).files}


def asked(hub: FaultHub) -> list[str]:
    """What the hub was asked for, in order."""
    return [request.kind for request in hub.requests()]


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def in_threads(count: int, work: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    """Each thread's result, or what it raised, is in the list once it is joined."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads: list[threading.Thread], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "it still waits"


def names_in_cache(store: Store) -> list[str]:
    return sorted(os.listdir(store.layout.root)) if store.layout.root.exists() else []


# ---- finding out whether there is such a version


def test_many_who_ask_at_once_send_one_probe(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    answer = threading.Event()
    hub.fault(PATH, Fault.hang(answer, on="probe"))
    threads, results = in_threads(50, lambda: entry.ensure_exists(WAIT))
    until(lambda: entry.snapshot().waiting == 50)
    answer.set()
    join(threads)
    assert results == [None] * 50
    assert asked(hub) == ["listing", "probe"]
    assert entry.snapshot().state == "located"


def test_archives_alone_are_asked_for_if_that_is_the_format(hub: FaultHub, make_store: MakeStore) -> None:
    hub.add(PATH, ARCHIVE)
    entry = entry_of(make_store(load_format="compressed"), hub)
    entry.ensure_exists(WAIT)
    assert asked(hub) == ["probe"]
    assert entry.snapshot().origin == "archive"


def test_missing_model_is_remembered(hub: FaultHub, store: Store, entry: Entry) -> None:
    for look in (entry.ensure_exists, entry.manifest, lambda wait: entry.lookup(FIRST, wait)):
        with pytest.raises(NotFoundError, match="no such model"):
            look(WAIT)
    assert asked(hub) == ["listing", "probe"]
    assert entry.snapshot().state == "failed"
    assert names_in_cache(store) == []
    assert [failure.handle for failure in store.failures()] == [entry.handle]


@pytest.mark.logs("refuses access")
def test_failure_is_remembered_and_then_tried_again(
    hub: FaultHub, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AccessError, "remember", 0.3)
    hub.add(PATH, ARCHIVE)
    hub.fault(PATH, Fault.status(403, b"licence not accepted", on="any"))
    with pytest.raises(AccessError):
        entry.ensure_exists(WAIT)
    with pytest.raises(AccessError, match="licence not accepted"):
        read(entry, FIRST)
    assert asked(hub) == ["listing", "probe"]
    until(lambda: entry.snapshot().state != "failed")
    assert read(entry, FIRST) == TREE[FIRST]


def test_hub_that_recovers_in_time_is_no_failure(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    hub.fault(PATH, Fault.status(503, on="probe"), Fault.hang_up(on="probe"))
    entry.ensure_exists(WAIT)
    assert [request.status for request in hub.requests()][-1] == 206


@pytest.mark.logs("not able to answer")
def test_hub_that_stays_away_is_given_up(hub: FaultHub, entry: Entry) -> None:
    hub.fault(PATH, Fault.status(503, b"maintenance", on="any", times=None))
    with pytest.raises(UnavailableError, match="maintenance"):
        entry.ensure_exists(WAIT)
    assert asked(hub) == ["listing", "probe"] * 3


@pytest.mark.parametrize(
    "fault", [Fault.status(503, on="listing"), Fault.status(403, on="listing"), Fault.html(on="listing")]
)
def test_hub_that_gives_no_listing_gives_the_archive(hub: FaultHub, entry: Entry, fault: Fault) -> None:
    hub.add(PATH, ARCHIVE)
    hub.fault(PATH, fault)
    assert content(entry) == TREE
    assert entry.snapshot().error is None


@pytest.mark.logs("does not offer")
def test_hub_that_gives_no_listing_has_nothing_for_who_wants_one(
    hub: FaultHub, store: Store, make_store: MakeStore
) -> None:
    hub.add(PATH, ARCHIVE)
    entry = entry_of(make_store(load_format="uncompressed"), hub)
    with pytest.raises(ProtocolError) as caught:
        entry.manifest(WAIT)
    assert "--load-format auto" in caught.value.hint
    with pytest.raises(NotFoundError):
        entry_of(make_store(load_format="uncompressed"), hub, "google/none/1").manifest(WAIT)
    assert hub.body_requests() == []
    assert names_in_cache(store) == []


@pytest.mark.logs("no hub that hubfs knows")
def test_handle_that_no_hub_speaks_for_is_refused(store: Store) -> None:
    with pytest.raises(RefusedError):
        store.entry("ftp://example.org/model").ensure_exists(WAIT)


# ---- bringing in


def test_model_is_what_was_published(hub: FaultHub, store: Store, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    assert content(entry) == TREE
    assert entry.lookup(FIRST, WAIT) == FileInfo(
        len(TREE[FIRST]), 1_500_000_000, entry.manifest(WAIT).files[FIRST].crc32
    )
    assert isinstance(entry.lookup("variables", WAIT), DirectoryInfo)
    assert entry.snapshot().state == "complete"
    path = entry.bring_in(WAIT)
    assert path == store.layout.model(cache_key(entry.handle))
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == set(TREE)
    key = entry.key
    assert names_in_cache(store) == sorted(
        [key, f"{key}.descriptor.txt", f"{key}.hubfs.json", f"{key}.hubfs.used"]
    )


def test_path_that_the_model_has_not(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    for inner in ("none", "variables/none", "saved_model.pb/x", "../x", "variables/../saved_model.pb"):
        with pytest.raises(NotFoundError):
            entry.lookup(inner, WAIT)
    assert len(hub.body_requests()) == 1
    # The model is there: that a name is not in it is no failure of the model's.
    assert entry.snapshot().error is None


def test_directory_cannot_be_opened(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    with pytest.raises(HubfsError):
        entry.open("variables", WAIT)


def test_reads_at_any_offset(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    file, whole = entry.open(DATA, WAIT), TREE[DATA]
    for size, offset in (
        (10, 0),
        (10, 5),
        (100, len(whole) - 50),
        (10, len(whole)),
        (10, len(whole) + 5),
        (0, 3),
    ):
        assert file.read(size, offset, WAIT) == whole[offset : offset + size]
    file.close()


def test_two_hundred_threads_on_a_cold_model_make_one_transfer(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    start = threading.Event()
    hub.fault(PATH, Fault.hang(start, on="any"))
    threads, results = in_threads(200, lambda: read(entry, DATA))
    until(lambda: entry.snapshot().waiting == 200)
    start.set()
    join(threads)
    assert all(result == TREE[DATA] for result in results)
    assert len(results) == 200
    assert len(hub.body_requests()) == 1
    assert asked(hub) == ["listing", "probe", "body"]


def test_cached_model_is_served_without_a_request(hub: FaultHub, make_store: MakeStore) -> None:
    hub.add(PATH, ARCHIVE)
    entry_of(make_store(), hub).bring_in(WAIT)
    hub.clear_log()
    again = entry_of(make_store(), hub)
    assert again.peek() is not None
    assert content(again) == TREE
    assert hub.requests() == []


def test_model_cached_under_another_spelling_is_used(hub: FaultHub, store: Store, entry: Entry) -> None:
    spelling = f"{entry.handle}/"
    store.layout.root.mkdir()
    write_tree(TREE, store.layout.model(cache_key(spelling)))
    write_descriptor(store.layout.descriptor(cache_key(spelling)), spelling)
    assert content(entry) == TREE
    assert entry.bring_in(WAIT) == store.layout.model(cache_key(spelling))
    assert hub.requests() == []


@pytest.mark.parametrize("damage", ["empty", "half", "cut"])
def test_cleaned_directory_is_fetched_again(hub: FaultHub, make_store: MakeStore, damage: str) -> None:
    hub.add(PATH, ARCHIVE)
    path = entry_of(make_store(), hub).bring_in(WAIT)
    if damage == "cut":
        os.truncate(path / DATA, 5)
    else:
        shutil.rmtree(path / "variables")
    if damage == "empty":
        shutil.rmtree(path)
        path.mkdir()
    assert content(entry_of(make_store(), hub)) == TREE
    assert len(hub.body_requests()) == 2


def test_directory_that_is_cleaned_while_in_use_is_fetched_again(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    path = entry.bring_in(WAIT)
    (path / DATA).unlink()
    assert read(entry, DATA) == TREE[DATA]
    assert len(hub.body_requests()) == 2


# ---- while it arrives


def both(*faults: Fault) -> Fault:
    def act(answer: Answer) -> None:
        for fault in faults:
            fault.act(answer)

    return Fault("+".join(fault.kind for fault in faults), act)


def test_file_that_has_arrived_is_read_while_the_rest_is_on_its_way(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, PLAIN)
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(len(PLAIN) // 2, go_on))
    file = entry.open(FIRST, WAIT)
    assert file.read(file.size, 0, WAIT) == TREE[FIRST]
    snapshot = entry.snapshot()
    assert snapshot.state == "transferring"
    assert 0 < snapshot.received < len(PLAIN)
    assert snapshot.total == len(PLAIN)
    data = entry.open(DATA, WAIT)
    assert data.read(100, 0, WAIT) == TREE[DATA][:100]
    go_on.set()
    assert data.read(data.size, 0, WAIT) == TREE[DATA]
    entry.bring_in(WAIT)
    # Both were opened before the version got its place in the cache.
    assert file.read(file.size, 0, WAIT) == TREE[FIRST]
    assert data.read(50, 7, WAIT) == TREE[DATA][7:57]
    file.close()
    data.close()
    assert entry.is_idle


def test_manifest_is_complete_or_waited_for(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, PLAIN)
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(len(PLAIN) // 2, go_on))
    assert read(entry, FIRST) == TREE[FIRST]
    with pytest.raises(StalledError):
        entry.manifest(Wait(0.2))
    go_on.set()
    assert set(entry.manifest(WAIT).files) == {FIRST, DATA, "variables/variables.index"}


def test_verified_only_shows_nothing_before_the_checks(hub: FaultHub, make_store: MakeStore) -> None:
    entry = entry_of(make_store(verified_only=True), hub)
    hub.add(PATH, PLAIN)
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(len(PLAIN) // 2, go_on))
    with pytest.raises(StalledError):
        entry.open(FIRST, Wait(1.0))
    go_on.set()
    assert read(entry, FIRST) == TREE[FIRST]


def test_attempt_that_fails_before_a_byte_was_given_is_not_noticed(hub: FaultHub, entry: Entry) -> None:
    # Without an ETag a connection that breaks cannot be resumed: the attempt has failed.
    hub.add(PATH, PLAIN, etag=None)
    go_on = threading.Event()
    hub.fault(PATH, both(Fault.stall(len(PLAIN) // 2, go_on), Fault.cut(len(PLAIN) * 6 // 10)))
    file = entry.open(DATA, WAIT)
    go_on.set()
    assert file.read(file.size, 0, WAIT) == TREE[DATA]
    file.close()
    assert len(hub.body_requests()) == 2
    assert entry.snapshot().error is None


def test_attempt_that_fails_after_bytes_were_given_is_an_error_to_their_reader(
    hub: FaultHub, entry: Entry
) -> None:
    # Without an ETag a connection that breaks cannot be resumed: the attempt has failed.
    hub.add(PATH, PLAIN, etag=None)
    go_on = threading.Event()
    hub.fault(PATH, both(Fault.stall(len(PLAIN) // 2, go_on), Fault.cut(len(PLAIN) * 6 // 10)))
    file = entry.open(DATA, WAIT)
    assert file.read(100, 0, WAIT) == TREE[DATA][:100]
    go_on.set()
    with pytest.raises(DamagedError) as caught:
        file.read(file.size, 0, WAIT)
    assert caught.value.errno == errno.EIO
    file.close()
    assert read(entry, DATA) == TREE[DATA]


@pytest.mark.logs("crc32c")
def test_archive_that_is_damaged_at_the_hub_is_tried_twice_and_leaves_nothing(
    hub: FaultHub, store: Store, entry: Entry
) -> None:
    hub.add(PATH, ARCHIVE)
    hub.fault(PATH, Fault.wrong_crc32c(times=None))
    with pytest.raises(DamagedError):
        entry.manifest(WAIT)
    assert len(hub.body_requests()) == 2
    assert names_in_cache(store) == []


# ---- waiting


def test_wait_is_interrupted_and_the_transfer_goes_on(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    go_on, signalled = threading.Event(), threading.Event()
    hub.fault(PATH, Fault.hang(go_on))
    threads, results = in_threads(1, lambda: entry.lookup(FIRST, Wait(20.0, signalled.is_set)))
    until(lambda: entry.snapshot().waiting == 1)
    signalled.set()
    join(threads, 5)
    assert isinstance(results[0], InterruptedWait)
    go_on.set()
    assert read(entry, FIRST) == TREE[FIRST]
    assert len(hub.body_requests()) == 1


def test_wait_without_progress_ends(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    go_on = threading.Event()
    hub.fault(PATH, Fault.hang(go_on, on="any"))
    for look in (entry.ensure_exists, entry.manifest, lambda wait: entry.lookup(FIRST, wait)):
        with pytest.raises(StalledError, match=r"nothing arrived for 0\.1 s"):
            look(Wait(0.1))
    go_on.set()
    assert content(entry) == TREE


def test_wait_with_progress_goes_on_beyond_its_timeout(hub: FaultHub, entry: Entry) -> None:
    hub.add(PATH, ARCHIVE)
    hub.rate = len(ARCHIVE) / 2
    assert len(entry.manifest(Wait(1.0)).files) == len(TREE)


# ---- stopping


@pytest.mark.parametrize("where", ["listing", "probe", "head", "body", "pause"])
def test_close_lets_everybody_go_and_leaves_nothing(
    hub: FaultHub, store: Store, entry: Entry, where: str
) -> None:
    hub.add(PATH, PLAIN)
    never = threading.Event()
    hub.fault(PATH, {
        "listing": Fault.hang(never, on="listing"),
        "probe": Fault.hang(never, on="probe"),
        "head": Fault.hang(never),
        "body": Fault.stall(len(PLAIN) // 2, never),
        "pause": Fault.status(503, headers={"Retry-After": "50"}, times=None),
    }[where])  # fmt: skip
    threads, results = in_threads(10, lambda: entry.manifest(WAIT))
    hub.wait_for(lambda hub: len(hub.requests()) == {"listing": 1, "probe": 2}.get(where, 3))
    closing, _ = in_threads(1, store.close)
    try:
        join(threads, 5)
        join(closing, 5)
    finally:
        never.set()
        join(closing, 60)
    assert {type(result) for result in results} == {StoppedError}
    assert names_in_cache(store) == []
    with pytest.raises(StoppedError):
        entry_of(store, hub, "google/other/1").manifest(WAIT)


# ---- what is remembered


def forget(store: Store, hub: FaultHub) -> None:
    """Ask for entries until the idle ones are looked for, which happens now and then."""
    for number in range(IDLE_ENTRIES * 2):
        entry_of(store, hub, f"google/m{number}/1").touched -= 100
    number = iter(range(10**9))

    def look() -> bool:
        entry_of(store, hub, f"google/more{next(number)}/1").touched -= 100
        return len(store.entries()) <= IDLE_ENTRIES

    until(look)


def test_idle_entries_are_forgotten(hub: FaultHub, store: Store) -> None:
    kept = entry_of(store, hub)
    hub.add(PATH, ARCHIVE)
    file = kept.open(FIRST, WAIT)
    kept.touched -= 100
    forget(store, hub)
    assert kept in store.entries(), "it is open"
    file.close()


def test_forgotten_model_is_found_again(hub: FaultHub, store: Store) -> None:
    hub.add(PATH, ARCHIVE)
    first = entry_of(store, hub)
    first.bring_in(WAIT)
    first.touched -= 1000
    forget(store, hub)
    second = entry_of(store, hub)
    assert second is not first
    assert content(second) == TREE
    assert len(hub.body_requests()) == 1


@pytest.mark.logs("another version now")
def test_unversioned_handle_keeps_its_meaning(hub: FaultHub, store: Store) -> None:
    hub.add("google/m", ARCHIVE)
    entry = entry_of(store, hub, "google/m")
    path = entry.bring_in(WAIT)
    shutil.rmtree(path)
    hub.republish("google/m", make_archive(make_tree(seed=1)))
    with pytest.raises(ChangedError) as caught:
        read(entry, FIRST)
    assert caught.value.errno == errno.ESTALE
    assert "mount again" in caught.value.hint


def test_unversioned_handle_that_means_the_same_is_fetched_again(hub: FaultHub, store: Store) -> None:
    hub.add("google/m", ARCHIVE)
    entry = entry_of(store, hub, "google/m")
    shutil.rmtree(entry.bring_in(WAIT))
    assert content(entry) == TREE


# ---- without a network


@pytest.mark.logs("offline")
def test_offline_serves_what_is_cached_and_sends_nothing(hub: FaultHub, make_store: MakeStore) -> None:
    hub.add(PATH, ARCHIVE)
    entry_of(make_store(), hub).bring_in(WAIT)
    hub.clear_log()
    offline = make_store(offline=True)
    assert content(entry_of(offline, hub)) == TREE
    for look in ("ensure_exists", "manifest"):
        with pytest.raises(OfflineError) as caught:
            getattr(entry_of(offline, hub, f"google/{look}/1"), look)(WAIT)
        assert caught.value.errno == errno.ENONET
    assert hub.requests() == []


# ---- models()


@pytest.mark.leaves("*.lock")
def test_models_of_a_cache(hub: FaultHub, store: Store) -> None:
    hub.add(PATH, ARCHIVE)
    entry = entry_of(store, hub)
    entry.bring_in(WAIT)
    read(entry, FIRST)
    layout, handles = store.layout, {}
    for name in ("empty", "damaged", "adopted", "coming"):
        handles[name] = f"{hub.url}/google/{name}/1"
        write_descriptor(layout.descriptor(cache_key(handles[name])), handles[name])
    layout.model(cache_key(handles["empty"])).mkdir()
    write_tree({"README": b"x"}, layout.model(cache_key(handles["damaged"])))
    write_tree(TREE, layout.model(cache_key(handles["adopted"])))
    layout.lock(cache_key(handles["coming"])).write_text("another-host.1.abc")
    write_tree(TREE, layout.model("f" * 40))
    hub.clear_log()
    found = {model.handle: model for model in models(store.layout)}
    size = sum(map(len, TREE.values()))
    assert {handle: model.state for handle, model in found.items()} == {
        f"{hub.url}/{PATH}": "complete",
        handles["empty"]: "empty",
        handles["damaged"]: "damaged",
        handles["adopted"]: "complete",
        handles["coming"]: "transferring",
        None: "complete",
    }
    complete = found[f"{hub.url}/{PATH}"]
    assert (complete.size, complete.files, complete.version) == (size, len(TREE), "1")
    assert abs((complete.last_used or 0) - time.time()) < 60
    assert found[handles["adopted"]].last_used is None
    assert found[None].key == "f" * 40
    assert hub.requests() == []


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("", 3), ("google", 2), ("/google/", 2), ("google/a", 1), ("https://tfhub.dev/google", 2), ("zzz", 0)],
)  # fmt: skip
def test_models_by_prefix(prefix: str, expected: int) -> None:
    handles = ["https://tfhub.dev/google/a/1", "https://tfhub.dev/google/b/1", "https://tfhub.dev/x/y/1"]
    models = [Model(handle, "k", "/p", "complete", "1", 1, 1, None) for handle in handles]
    assert len(prefixed(iter(models), prefix, "https://tfhub.dev")) == expected


def test_models_of_a_missing_cache(store: Store) -> None:
    assert list(models(store.layout)) == []
    assert store.status()["cache"]["models"] == 0
    assert store.space() == (0, 0)
    assert store.status()["cache"]["free"] is None


# ---- stable storage


def test_readers_do_not_wait_for_stable_storage(
    hub: FaultHub, store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(PATH, ARCHIVE)
    stored, real = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert stored.wait(20)
        real(descriptor)

    monkeypatch.setattr("hubfs.transfer.storage.os.fsync", slow)
    assert content(entry) == TREE
    assert not store.layout.model(entry.key).exists()
    stored.set()
    assert entry.bring_in(WAIT) == store.layout.model(entry.key)


@pytest.fixture
def dying_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB at the cache's place that takes all of them but can keep 6."""
    backing, path = tmp_path / "backing", tmp_path / "cache"
    backing.mkdir()
    path.mkdir(mode=0o700)
    image = backing / "image"
    with contextlib.ExitStack() as stack:
        for command, directory in (
            (["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(backing)], backing),
            (["truncate", "-s", "64M", str(image)], None),
            (["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard", str(image)], None),
            (["mount", "-o", "loop", str(image), str(path)], path),
        ):
            if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip("mounting a disk that dies needs root, mkfs.ext4 and loop devices")
            if directory is not None:
                stack.callback(subprocess.run, ["umount", str(directory)], check=True)
        path.chmod(0o700)
        yield path


@pytest.mark.logs("No space left|Input/output error")
def test_what_the_disk_did_not_keep_is_not_published(
    hub: FaultHub, store: Store, entry: Entry, dying_disk: Path
) -> None:
    tree = make_tree(size=12 << 20)
    hub.add(PATH, make_archive(tree))
    with pytest.raises(HubfsError) as caught:
        entry.bring_in(WAIT)
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    store.close()
    assert [name for name in names_in_cache(store) if name != "lost+found"] == []


# ---- disks that are full or read-only


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB at the cache's place."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.logs("No space left|free in")
@pytest.mark.parametrize("known", ["size", "nothing"])
def test_full_disk_is_told_and_nothing_stays_on_it(
    hub: FaultHub, store: Store, entry: Entry, small_disk: Path, known: str
) -> None:
    tree = (
        make_tree(size=3 << 20)
        if known == "size"
        else make_tree(files={"assets/zeros": bytes(3 << 20)}, size=10)
    )
    hub.add(PATH, make_archive(tree))
    with pytest.raises(DiskFullError) as caught:
        entry.manifest(WAIT)
    assert caught.value.errno == errno.ENOSPC
    assert "--cache-dir" in caught.value.hint
    assert names_in_cache(store) == []
    assert len(hub.body_requests()) == (0 if known == "size" else 1)
    hub.add("google/small/1", ARCHIVE)
    assert content(entry_of(store, hub, "google/small/1")) == TREE
    store.close()


@pytest.mark.logs("Read-only file system")
def test_read_only_cache_serves_what_it_has(hub: FaultHub, make_store: MakeStore, small_disk: Path) -> None:
    handle = f"{hub.url}/{PATH}"
    write_tree(TREE, small_disk / cache_key(handle))
    write_descriptor(small_disk / f"{cache_key(handle)}.descriptor.txt", handle)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = make_store()
    assert content(entry_of(store, hub)) == TREE
    assert hub.requests() == []
    hub.add("google/other/1", ARCHIVE)
    with pytest.raises(ReadOnlyCacheError) as caught:
        entry_of(store, hub, "google/other/1").manifest(WAIT)
    assert caught.value.errno == errno.EROFS
    assert hub.body_requests() == []
    assert [model.handle for model in models(store.layout)] == [handle]
    store.close()
