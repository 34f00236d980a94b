"""The shared tier in a bucket: what is found there, who goes to the hub, and what is never seen half.

S3 is answered by moto, Google Cloud Storage by `tests/google.py`; obstore asks both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from hubfs.cache import bucket as bucket_module
from hubfs.cache.holder import Lease, LeaseLostError
from hubfs.cache.lease import Policy, content_of, new_token
from hubfs.cache.manifest import FileInfo, adopt
from hubfs.cache.tier import Located, SharedTier
from hubfs.config import Settings
from hubfs.errors import DamagedError, HubfsError, NotFoundError, StoppedError
from hubfs.hubs.base import Archive, Listing
from hubfs.hubs.object_store import ObjectStores
from tests.google import Google
from tests.models import make_tree, write_tree
from tests.moto_s3 import BUCKET, MotoS3, Request
from tests.remote import read

HANDLE = "https://tfhub.dev/google/bert/9"
KEY = hashlib.sha1(HANDLE.encode()).hexdigest()
TREE = make_tree(size=200_000)
NEVER = threading.Event()
ORIGIN = Archive(HANDLE, "https://tfhub.dev/archive")
#: Others are seen dead soon; an owner is, however slow the machine is, not lost but by another's deed.
QUICK = Policy(renew=0.05, retry=0.05, safe=60, stale=2, foreign=2, first=0.02, longest=0.05)
#: Owners stop soon.
CUT_OFF = Policy(renew=0.05, retry=0.05, safe=0.3, first=0.02, longest=0.05)


@dataclass(frozen=True)
class World:
    """A store that is empty at first, with the tier's prefix."""

    url: str
    put: Callable[[Mapping[str, bytes]], None]
    remove: Callable[..., None]
    read_all: Callable[[], dict[str, bytes]]

    def below(self) -> dict[str, bytes]:
        """All objects by their names below the prefix."""
        return {name.removeprefix("tier/"): content for name, content in self.read_all().items()}

    def names(self) -> set[str]:
        return set(self.below())


@pytest.fixture(scope="module", autouse=True)  # so that its threads are there before any test's own
def moto() -> Iterator[MotoS3]:
    with MotoS3() as server:
        yield server


@pytest.fixture
def s3(moto: MotoS3, monkeypatch: pytest.MonkeyPatch) -> World:
    moto.reset()
    for name, value in moto.environ.items():
        monkeypatch.setenv(name, value)
    return World(
        f"s3://{BUCKET}/tier",
        lambda objects: moto.put({f"tier/{name}": content for name, content in objects.items()}),
        lambda *names: moto.remove(*(f"tier/{name}" for name in names)),
        lambda: {path: moto.read(path) for path in moto.objects()},
    )


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Google() as google:
        google.make(BUCKET)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)

        def put(objects: Mapping[str, bytes]) -> None:
            for name, content in objects.items():
                google.put(BUCKET, f"tier/{name}", content)

        def remove(*names: str) -> None:
            for name in names:
                google.delete(BUCKET, f"tier/{name}")

        yield World(f"gs://{BUCKET}/tier", put, remove, lambda: google.tree(BUCKET))


@pytest.fixture(params=["s3", "gs"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., SharedTier]]:
    """Makes tiers as separate machines have them."""
    with contextlib.ExitStack() as stack:

        def build(world: World, policy: Policy = QUICK, **settings: Any) -> SharedTier:
            known = Settings(
                cache_dir=str(tmp_path / "cache"), **{"retry_delay": 0.01, "retries": 2, **settings}
            )
            stores = ObjectStores(known)
            stack.callback(stores.close)
            tier = SharedTier(world.url, stores, known, policy)
            stack.callback(tier.close)
            return tier

        yield build


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Mapping[str, FileInfo]]:
    directory = write_tree(TREE, tmp_path / "model")
    return directory, adopt(directory, HANDLE).files


def locate(
    tier: SharedTier,
    ask_hub: Callable[[], Any] = lambda: ORIGIN,
    *,
    lease: bool = True,
    cancel: threading.Event = NEVER,
    waiting: Callable[[int], None] = lambda number: None,
) -> Located:
    return tier.locate(HANDLE, KEY, ask_hub, lease=lease, cancel=cancel, waiting=waiting)


def leased(tier: SharedTier) -> Lease:
    found = locate(tier)
    assert (found.origin, found.shared) == (ORIGIN, False)
    assert found.lease is not None
    return found.lease


def contents(listing: Listing | None) -> dict[str, bytes]:
    assert listing is not None
    return {name: read(listing.source, HANDLE, file) for name, file in listing.files.items()}


def fail() -> Any:
    raise AssertionError("the hub is not to be asked")


def as_tensorflow_hub(tree: Mapping[str, bytes] = TREE, handle: str = HANDLE) -> dict[str, bytes]:
    """What tensorflow_hub leaves in a bucket: markers of directories among it."""
    return {
        f"{KEY}/": b"",
        f"{KEY}/variables/": b"",
        f"{KEY}/assets.extra/": b"",
        **{f"{KEY}/{name}": content for name, content in tree.items()},
        f"{KEY}.descriptor.txt": f"Module: {handle}\nDownload Time: now\n".encode(),
    }


class TestPut:
    def test_others_find_it(self, world: World, machine: Any, model: Any) -> None:
        first, second = machine(world), machine(world)
        assert second.find(HANDLE, KEY) is None
        lease = leased(first)
        first.put(lease, *model, NEVER)
        assert world.names() == {
            *(f"{KEY}/{name}" for name in TREE), f"{KEY}.descriptor.txt", f"{KEY}.hubfs.json"
        }  # fmt: skip
        assert world.below()[f"{KEY}.descriptor.txt"].startswith(f"Module: {HANDLE}\n".encode())
        found = second.find(HANDLE, KEY)
        assert contents(found) == TREE
        assert found is not None and found.where == f"{world.url}/{KEY}"
        for name, file in found.files.items():
            crc32c = google_crc32c.value(TREE[name]).to_bytes(4, "big")
            assert (file.crc32c, file.md5) == (crc32c, hashlib.md5(TREE[name]).digest())
            assert file.mtime == model[1][name].mtime
        located = locate(second, fail)
        assert (located.shared, located.lease, contents(located.origin)) == (True, None, TREE)

    def test_files_of_many_sizes_and_names(self, world: World, machine: Any, tmp_path: Path) -> None:
        part = bucket_module._MIN_PART
        tree = {
            "saved_model.pb": TREE["saved_model.pb"],
            "assets/empty": b"",
            "assets/ü x#?%+": b"odd",
            **{f"data/{n}": os.urandom(size) for n, size in enumerate((1, part, part + 1, 3 * part + 17))},
            **{f"many/{n}": str(n).encode() for n in range(40)},
        }
        directory = write_tree(tree, tmp_path / "sizes")
        tier = machine(world)
        tier.put(leased(tier), directory, adopt(directory, HANDLE).files, NEVER)
        found = tier.find(HANDLE, KEY)
        assert contents(found) == tree
        assert found is not None
        for name, file in found.files.items():
            assert file.crc32c == google_crc32c.value(tree[name]).to_bytes(4, "big")

    def test_order_is_such_that_nobody_takes_a_part_for_the_whole(
        self, s3: World, moto: MotoS3, machine: Any, model: Any
    ) -> None:
        tier, other = machine(s3), machine(s3)
        lease = leased(tier)
        seen: list[set[str]] = []

        def look(request: Request) -> None:
            if request.method in ("PUT", "POST", "DELETE") and threading.current_thread() not in looking:
                looking.add(threading.current_thread())
                seen.append({path.removeprefix("tier/") for path in moto.objects("tier")})
                looking.discard(threading.current_thread())

        looking: set[threading.Thread] = set()
        moto.fault = look
        tier.put(lease, *model, NEVER)
        moto.fault = lambda request: None
        assert contents(other.find(HANDLE, KEY)) == TREE
        names = [f"{KEY}/{name}" for name in TREE if name != "saved_model.pb"]
        for now in seen:
            if f"{KEY}/saved_model.pb" in now:
                assert now.issuperset(names)
            if f"{KEY}.descriptor.txt" in now:
                assert f"{KEY}/saved_model.pb" in now
            if f"{KEY}.hubfs.json" in now:
                assert f"{KEY}.descriptor.txt" in now
            else:
                assert f"{KEY}.lock" in now
        assert any(f"{KEY}.hubfs.json" in now for now in seen)

    @pytest.mark.parametrize("change", ["size", "content"])
    def test_damaged_cache_is_not_shared(self, world: World, machine: Any, model: Any, change: str) -> None:
        directory, files = model
        if change == "size":
            files = {**files, "fingerprint.pb": FileInfo(56, 0)}
        else:
            files = {**files, "fingerprint.pb": FileInfo(55, 0, crc32=1)}
        tier = machine(world)
        with pytest.raises(DamagedError, match="not what its manifest says"):
            tier.put(leased(tier), directory, files, NEVER)
        assert world.names() == set()

    def test_file_that_vanished(self, world: World, machine: Any, model: Any) -> None:
        directory, files = model
        (directory / "assets/vocab.txt").unlink()
        tier = machine(world)
        with pytest.raises(HubfsError, match=r"reading the cache.*vocab\.txt"):
            tier.put(leased(tier), directory, files, NEVER)
        assert world.names() == set()

    def test_store_that_changed_a_byte(self, gs: World, machine: Any, model: Any) -> None:
        tier = machine(gs)
        lease = leased(tier)
        real = bucket_module._upload

        async def wrong(*args: Any) -> None:
            await real(*args)
            gs.put({name: b"y" * 55 for name in gs.names() if name.endswith("tmp/fingerprint.pb")})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket_module, "_upload", wrong)
            with pytest.raises(DamagedError, match=r"fingerprint\.pb has another content"):
                tier.put(lease, *model, NEVER)
        assert gs.names() == set()

    def test_passing_faults_are_tried_again(self, s3: World, moto: MotoS3, machine: Any, model: Any) -> None:
        tier = machine(s3)
        failed: set[Request] = set()

        def once(request: Request) -> int | None:
            if request in failed:
                return None
            failed.add(request)
            return 503

        moto.fault = once
        tier.put(leased(tier), *model, NEVER)
        moto.fault = lambda request: None
        assert contents(tier.find(HANDLE, KEY)) == TREE
        assert not any(".tmp/" in name or name.endswith(".lock") for name in s3.names())

    @pytest.mark.parametrize("part", [".tmp/fingerprint.pb", f"{KEY}/", "descriptor.txt", "hubfs.json"])
    def test_failure_leaves_nothing(
        self, s3: World, moto: MotoS3, machine: Any, model: Any, part: str
    ) -> None:
        tier = machine(s3)
        lease = leased(tier)

        def refuse(request: Request) -> int | None:
            return 403 if request.method == "PUT" and part in request.path else None

        moto.fault = refuse
        with pytest.raises(HubfsError):
            tier.put(lease, *model, NEVER)
        assert s3.names() == set()
        assert locate(machine(s3)).lease is not None

    def test_cancelled_upload_leaves_nothing(self, s3: World, moto: MotoS3, machine: Any, model: Any) -> None:
        tier, cancel = machine(s3), threading.Event()
        lease = leased(tier)

        def stop(request: Request) -> None:
            if ".tmp/variables" in request.path:
                cancel.set()

        moto.fault = stop
        with pytest.raises(StoppedError):
            tier.put(lease, *model, cancel)
        moto.fault = lambda request: None
        # What was on its way when it was given up may arrive yet: the next owner removes it.
        assert not any(name.startswith(f"{KEY}/") or name.endswith(".lock") for name in s3.names())

    def test_damaged_copy_is_repaired(self, world: World, machine: Any, model: Any) -> None:
        tier = machine(world)
        tier.put(leased(tier), *model, NEVER)
        world.put({f"{KEY}/more": b"x"})
        assert tier.find(HANDLE, KEY) is None
        tier.put(leased(tier), *model, NEVER)
        assert contents(tier.find(HANDLE, KEY)) == TREE
        world.remove(f"{KEY}/fingerprint.pb")
        assert tier.find(HANDLE, KEY) is None
        world.put({f"{KEY}/fingerprint.pb": b"x"})
        assert tier.find(HANDLE, KEY) is None
        for junk in (b"", b"null", b"{", b'{"format": "tier-1", "handle": 1, "files": {"a": 1}}'):
            world.put({f"{KEY}.hubfs.json": junk})
            assert tier.find(HANDLE, KEY) is None
        tier.put(leased(tier), *model, NEVER)
        assert contents(tier.find(HANDLE, KEY)) == TREE

    def test_same_size_with_another_content_is_damage_where_the_store_tells(
        self, gs: World, machine: Any, model: Any
    ) -> None:
        tier = machine(gs)
        tier.put(leased(tier), *model, NEVER)
        gs.put({f"{KEY}/fingerprint.pb": TREE["fingerprint.pb"][::-1]})
        assert tier.find(HANDLE, KEY) is None


class TestAdoption:
    def test_what_tensorflow_hub_has_put(self, world: World, machine: Any) -> None:
        world.put(as_tensorflow_hub())
        tier = machine(world)
        assert contents(tier.find(HANDLE, KEY)) == TREE
        assert locate(tier, fail).shared

    @pytest.mark.parametrize(
        ("without", "more"),
        [
            (f"{KEY}.descriptor.txt", {}),
            (f"{KEY}/saved_model.pb", {}),
            (f"{KEY}/variables/variables.index", {}),
            (f"{KEY}/variables/variables.data-00000-of-00001", {}),
            ("", {f"{KEY}.lock": b"host.1." + b"a" * 32}),
            ("", {f"{KEY}.{'a' * 32}.tmp/rest": b"x"}),
            ("", {f"{KEY}.descriptor.txt": b"Module: https://tfhub.dev/another/1\n"}),
        ],
        ids=["descriptor", "model", "index", "data", "lock", "tmp", "other handle"],
    )
    def test_what_is_not_whole(
        self, world: World, machine: Any, without: str, more: Mapping[str, bytes]
    ) -> None:
        objects = {**as_tensorflow_hub(), **more}
        objects.pop(without, None)
        world.put(objects)
        assert machine(world).find(HANDLE, KEY) is None

    def test_lock_that_is_left_behind_a_whole_model(self, world: World, machine: Any) -> None:
        """Its owner died after all was there: who takes over finds it, and asks nobody."""
        world.put({**as_tensorflow_hub(), f"{KEY}.lock": b"host.1." + b"a" * 32})
        tier = machine(world)
        assert contents(locate(tier, fail).origin) == TREE
        assert f"{KEY}.lock" not in world.names()

    def test_names_that_lead_elsewhere(self, s3: World, machine: Any, caplog: Any) -> None:
        s3.put({**as_tensorflow_hub(), f"{KEY}/A": b"x", f"{KEY}/a": b"x"})
        tier = machine(s3)
        assert tier.find(HANDLE, KEY) is None
        assert "take for one" in caplog.text
        tier.put(leased(tier), *_model_of(s3, Path(tier._settings.cache_dir).parent), NEVER)
        assert contents(tier.find(HANDLE, KEY)) == TREE


def _model_of(world: World, directory: Path) -> tuple[Path, Mapping[str, FileInfo]]:
    made = write_tree(TREE, directory / "again")
    return made, adopt(made, HANDLE).files


class TestLease:
    def test_one_of_many_threads_asks_the_hub(self, world: World, machine: Any, model: Any) -> None:
        tiers = [machine(world) for _ in range(6)]
        asked: list[int] = []
        together = threading.Barrier(12)

        def bring(number: int) -> dict[str, bytes]:
            tier = tiers[number % len(tiers)]
            together.wait(30)

            def ask() -> Any:
                asked.append(number)
                return ORIGIN

            found = locate(tier, ask)
            if found.lease is not None:
                tier.put(found.lease, *model, NEVER)
                return contents(tier.find(HANDLE, KEY))
            assert found.shared
            return contents(found.origin)  # type: ignore[arg-type]

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(bring, range(12))) == [TREE] * 12
        assert len(asked) == 1
        assert not any(".tmp/" in name or name.endswith(".lock") for name in world.names())

    def test_one_of_several_processes_asks_the_hub(self, s3: World, model: Any, tmp_path: Path) -> None:
        script = (
            "import sys, json, threading\n"
            "from pathlib import Path\n"
            "from tests.unit.test_shared_tier import *\n"
            "stores = ObjectStores(Settings(cache_dir=sys.argv[2]))\n"
            "tier = SharedTier(sys.argv[1], stores, Settings(cache_dir=sys.argv[2]), QUICK)\n"
            "def ask():\n"
            "    with open(sys.argv[4], 'a') as file: file.write('x')\n"
            "    return ORIGIN\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "found = locate(tier, ask)\n"
            "directory = Path(sys.argv[3])\n"
            "if found.lease: tier.put(found.lease, directory, adopt(directory, HANDLE).files, NEVER)\n"
            "print(contents(tier.find(HANDLE, KEY)) == TREE)\n"
            "tier.close(); stores.close()\n"
        )
        asked = tmp_path / "asked"
        command = [sys.executable, "-c", script, s3.url, str(tmp_path / "cache"), str(model[0]), str(asked)]
        started = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        try:
            for process in started:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            for process in started:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            assert [process.communicate(timeout=60)[0] for process in started] == ["True\n"] * 4
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert asked.read_text() == "x"
        assert not any(".tmp/" in name or name.endswith(".lock") for name in s3.names())

    def test_lease_is_renewed_with_another_uid(self, world: World, machine: Any) -> None:
        tier = machine(world)
        lease = leased(tier)
        seen: set[bytes] = set()
        until(lambda: seen.add(world.below()[f"{KEY}.lock"]) or len(seen) > 5)
        assert len({content.rpartition(b".")[2] for content in seen}) > 5
        lease.check()
        lease.release()
        lease.release()
        assert world.names() == set()

    def test_waiter_sees_the_owner_move_and_does_not_take_over(self, world: World, machine: Any) -> None:
        owner, other = machine(world), machine(world)
        lease = leased(owner)
        numbers: list[int] = []
        cancel = threading.Event()

        def waiting(number: int) -> None:
            numbers.append(number)
            if time.monotonic() > end:
                cancel.set()

        # Longer than a dead owner's lease lasts.
        end = time.monotonic() + 1.2 * QUICK.stale
        with pytest.raises(StoppedError, match="given up"):
            locate(other, fail, cancel=cancel, waiting=waiting)
        assert numbers == sorted(numbers)
        assert numbers[-1] > 3
        lease.check()

    @pytest.mark.parametrize("dead", [content_of("h", 1, new_token("a" * 32), 3), "h.1." + "a" * 32, ""])
    def test_dead_owner_is_taken_over_by_one(self, world: World, machine: Any, model: Any, dead: str) -> None:
        uid = dead.rpartition(".")[2].partition("n")[0] or "b" * 32
        world.put({f"{KEY}.lock": dead.encode(), f"{KEY}.{uid}.tmp/part": b"x"})
        tiers = [machine(world) for _ in range(4)]
        asked: list[int] = []

        def bring(tier: SharedTier) -> None:
            def ask() -> Any:
                asked.append(1)
                return ORIGIN

            found = locate(tier, ask)
            if found.lease is not None:
                tier.put(found.lease, *model, NEVER)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(bring, tiers))
        assert len(asked) == 1
        assert contents(tiers[0].find(HANDLE, KEY)) == TREE
        assert not any(".tmp/" in name or name.endswith(".lock") for name in world.names())

    def test_lost_lease_publishes_nothing(self, world: World, machine: Any, model: Any) -> None:
        tier = machine(world)
        lease = leased(tier)
        taken = content_of("another", 1, new_token("c" * 32), 0).encode()
        world.put({f"{KEY}.lock": taken})
        assert lease.lost.wait(30)
        with pytest.raises(LeaseLostError):
            tier.put(lease, *model, NEVER)
        assert world.below() == {f"{KEY}.lock": taken}

    @pytest.mark.parametrize("part", [".tmp/variables", f"{KEY}/variables", f"{KEY}/saved_model.pb"])
    def test_lease_lost_in_the_middle_publishes_nothing(
        self, s3: World, moto: MotoS3, machine: Any, model: Any, part: str
    ) -> None:
        tier = machine(s3)
        lease = leased(tier)
        taken = content_of("another", 1, new_token("c" * 32), 0).encode()

        def lose(request: Request) -> None:
            if request.method == "PUT" and part in request.path:
                moto.fault = lambda request: None
                s3.put({f"{KEY}.lock": taken})
                assert lease.lost.wait(30)

        moto.fault = lose
        with pytest.raises(LeaseLostError):
            tier.put(lease, *model, NEVER)
        there = s3.below()
        assert there.pop(f"{KEY}.lock") == taken
        # What was copied before stays for the next owner: it is not this one's place any more.
        assert part != ".tmp/variables" or not there
        assert not {f"{KEY}.hubfs.json", f"{KEY}.descriptor.txt"} & there.keys()
        assert machine(s3).find(HANDLE, KEY) is None
        moto.fault = lambda request: None

    def test_owner_that_is_cut_off_stops_by_itself(
        self, s3: World, moto: MotoS3, machine: Any, model: Any
    ) -> None:
        tier = machine(s3, CUT_OFF)
        lease = leased(tier)
        moto.fault = lambda request: 503 if request.path.endswith(".lock") else None
        assert lease.lost.wait(30)
        with pytest.raises(LeaseLostError):
            tier.put(lease, *model, NEVER)
        moto.fault = lambda request: None
        assert s3.names() == {f"{KEY}.lock"}

    def test_answers_that_are_lost_do_not_lose_the_lease(
        self, s3: World, moto: MotoS3, machine: Any, model: Any
    ) -> None:
        """The store did what it was asked for, and said that it could not."""
        real, count, often = moto._app, [0], threading.Event()

        def forgetful(environ: dict[str, Any], start: Any) -> Any:
            if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(".lock"):
                count[0] += 1
                if count[0] > 8:
                    often.set()
                if count[0] % 2:
                    list(real(environ, lambda *args: None))
                    start("503 Service Unavailable", [("Content-Length", "0")])
                    return [b""]
            return real(environ, start)

        moto._app = forgetful  # type: ignore[assignment]
        try:
            tier = machine(s3)
            lease = leased(tier)
            assert often.wait(30)
            lease.check()
            tier.put(lease, *model, NEVER)
        finally:
            moto._app = real
        assert contents(tier.find(HANDLE, KEY)) == TREE

    def test_store_without_conditional_overwriting(
        self, s3: World, moto: MotoS3, machine: Any, model: Any
    ) -> None:
        s3.put({f"{KEY}.lock": content_of("h", 1, new_token("a" * 32), 3).encode()})
        moto.fault = lambda request: 501 if request.conditional and request.method == "PUT" else None
        tier = machine(s3)
        lease = leased(tier)
        seen: set[bytes] = set()
        until(lambda: seen.add(s3.below()[f"{KEY}.lock"]) or len(seen) > 3)
        lease.check()
        tier.put(lease, *model, NEVER)
        assert contents(tier.find(HANDLE, KEY)) == TREE

    def test_hub_that_fails_gives_the_lease_back(self, world: World, machine: Any) -> None:
        def ask() -> Any:
            raise NotFoundError("no such model")

        tier = machine(world)
        with pytest.raises(NotFoundError):
            locate(tier, ask)
        assert world.names() == set()

    def test_closing_gives_leases_back(self, world: World, machine: Any, model: Any) -> None:
        tier = machine(world)
        leased(tier)
        tier.close()
        assert world.names() == set()
        with pytest.raises(StoppedError):
            locate(tier)
        assert world.names() == set()

    def test_owner_killed_in_the_middle_of_a_put(
        self, s3: World, machine: Any, model: Any, tmp_path: Path
    ) -> None:
        """Whatever it had published until then, nobody takes it for the version; the next one cleans up."""
        script = (
            "import os, sys\n"
            "from tests.unit.test_shared_tier import *\n"
            "from hubfs.cache.publish import Publication\n"
            "stores = ObjectStores(Settings(cache_dir=sys.argv[2]))\n"
            "tier = SharedTier(sys.argv[1], stores, Settings(cache_dir=sys.argv[2]), QUICK)\n"
            "setattr(Publication, sys.argv[4], lambda self: os._exit(7))\n"
            "lease = locate(tier).lease\n"
            "directory = Path(sys.argv[3])\n"
            "tier.put(lease, directory, adopt(directory, HANDLE).files, NEVER)\n"
        )
        for step in ("_place", "_finish"):
            command = [sys.executable, "-c", script, s3.url, str(tmp_path / "cache"), str(model[0]), step]
            assert subprocess.run(command, timeout=60, check=False).returncode == 7
            tier = machine(s3)
            assert any(".tmp/" in name for name in s3.names())
            assert tier.find(HANDLE, KEY) is None
            # As if tensorflow_hub had broken the dead owner's lock.
            s3.remove(f"{KEY}.lock")
            assert tier.find(HANDLE, KEY) is None
            lease = leased(tier)
            tier.put(lease, *model, NEVER)
            assert contents(tier.find(HANDLE, KEY)) == TREE
            assert not any(".tmp/" in name or name.endswith(".lock") for name in s3.names())
            s3.remove(*s3.names())


class TestWithoutTheBucket:
    def test_no_lease_wanted(self, world: World, machine: Any) -> None:
        world.put({f"{KEY}.lock": b"somebody.1.x"})
        assert locate(machine(world), lease=False) == Located(ORIGIN)

    def test_unreachable_bucket_costs_one_try(self, machine: Any, monkeypatch: Any, caplog: Any) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        world = World(f"s3://{BUCKET}/tier", lambda o: None, lambda *n: None, dict)
        tier = machine(world)
        for _ in range(3):
            assert locate(tier) == Located(ORIGIN)
            assert tier.find(HANDLE, KEY) is None
        assert caplog.text.count("cannot be used now") == 1

    def test_bucket_that_fails_while_waiting(self, s3: World, moto: MotoS3, machine: Any) -> None:
        leased(machine(s3))

        def waiting(number: int) -> None:
            moto.fault = lambda request: 503

        assert locate(machine(s3), waiting=waiting) == Located(ORIGIN)
        moto.fault = lambda request: None

    def test_no_such_bucket(self, s3: World, machine: Any, caplog: Any) -> None:
        world = World("s3://nobucket/tier", s3.put, s3.remove, s3.read_all)
        assert locate(machine(world)) == Located(ORIGIN)
        assert "cannot be used now" in caplog.text

    def test_bucket_that_may_only_be_read(
        self, s3: World, moto: MotoS3, machine: Any, model: Any, caplog: Any
    ) -> None:
        caplog.set_level(logging.INFO)
        tier = machine(s3)
        moto.fault = lambda request: 403 if request.method in ("PUT", "POST", "DELETE") else None
        assert locate(tier) == locate(tier) == Located(ORIGIN)
        assert caplog.text.count("is only read") == 1
        moto.fault = lambda request: None
        owner = machine(s3)
        owner.put(leased(owner), *model, NEVER)
        assert locate(tier, fail).shared

    def test_offline(self, s3: World, moto: MotoS3, machine: Any, caplog: Any) -> None:
        tier = machine(s3, offline=True)
        assert tier.find(HANDLE, KEY) is None
        assert locate(tier) == Located(ORIGIN)
        assert (moto.requests, caplog.text) == ([], "")

    def test_cancelled_wait_ends_at_once(self, world: World, machine: Any) -> None:
        leased(machine(world))
        cancel = threading.Event()
        with pytest.raises(StoppedError):
            locate(machine(world, Policy()), fail, cancel=cancel, waiting=lambda number: cancel.set())


def until(ready: Callable[[], Any]) -> None:
    """Call, which takes a request or more, until it gives something true."""
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end


def test_manifest_is_what_the_docs_say(s3: World, machine: Any, model: Any) -> None:
    tier = machine(s3)
    tier.put(leased(tier), *model, NEVER)
    manifest = json.loads(s3.below()[f"{KEY}.hubfs.json"])
    assert (manifest["format"], manifest["handle"]) == ("tier-1", HANDLE)
    assert manifest["files"]["saved_model.pb"] == {
        "size": len(TREE["saved_model.pb"]),
        "mtime": model[1]["saved_model.pb"].mtime,
        "crc32c": google_crc32c.value(TREE["saved_model.pb"]).to_bytes(4, "big").hex(),
        "md5": hashlib.md5(TREE["saved_model.pb"]).hexdigest(),
    }


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, hubfs.cache.tier; print([n for n in ('obstore', 'asyncio') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
