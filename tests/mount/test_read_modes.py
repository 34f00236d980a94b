"""Right bytes in every mode in which the kernel reads a file, and in mixtures of them.

Passthrough needs libfuse 3.17.2, which Debian 12 lacks: `scripts/debian13.sh` runs these tests where it is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import Tree, make_archive, make_tree
from tests.mount.conftest import put_into_cache, read_tree, until, until_cached

DATA = "variables/variables.data-00000-of-00001"
MODEL = "google/demo/1"
SIZE = 9_000_001
Mount = Callable[..., Mounted]


@pytest.fixture
def tree() -> Tree:
    return make_tree(size=SIZE)


@pytest.fixture
def passing(hub: FaultHub, mount: Mount) -> Callable[..., Mounted]:
    """Makes mounts in which the kernel reads by itself; skips the test where it cannot."""

    def start(**settings: object) -> Mounted:
        mounted = mount(hub, **settings)
        status = mounted.status()
        if status["read_mode"] != "passthrough":
            pytest.skip(f"no passthrough here: {status['read_mode_reason']}")
        return mounted

    return start


@pytest.fixture(params=["passthrough", "cached"])
def mounted(request: pytest.FixtureRequest, hub: FaultHub, mount: Mount) -> Mounted:
    """A mount in each of the modes that complete files are opened in."""
    if request.param == "passthrough":
        made: Mounted = request.getfixturevalue("passing")()
        return made
    return mount(hub, passthrough=False)


def mode(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.read_mode").decode()


def reason(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.read_mode_reason").decode()


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def whole(descriptor: int) -> bytes:
    found = bytearray()
    while part := os.pread(descriptor, 1 << 20, len(found)):
        found += part
    return bytes(found)


class TestTelling:
    def test_status_and_attributes_tell_the_mode(self, hub: FaultHub, tree: Tree, mount: Mount) -> None:
        hub.add(MODEL, make_archive(tree))
        mounted = mount(hub)
        path = mounted.path / MODEL
        (path / DATA).read_bytes()
        until_cached(mounted.cache)
        status = mounted.status()
        for place in (path, path / DATA):
            assert mode(place) == status["read_mode"]
            names = os.listxattr(place)
            assert ("user.hubfs.read_mode_reason" in names) == bool(status["read_mode_reason"])
        assert (status["read_mode"] == "passthrough") == (status["read_mode_reason"] == "")

    def test_the_reason_is_that_it_was_turned_off(self, hub: FaultHub, mount: Mount) -> None:
        status = mount(hub, passthrough=False).status()
        assert status["read_mode"] == "cached"
        assert status["read_mode_reason"] == "turned off with --no-passthrough"

    def test_a_user_without_privilege_reads_through_the_daemon(self, passing, tmp_path: Path) -> None:
        """The kernel, libfuse and file system are fit; only the capability is missing."""
        passing()
        drop = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
        told = subprocess.run(
            [*drop, "python3", "-m", "hubfs", "doctor", "--offline"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert "CAP_SYS_ADMIN" in told.stdout


class TestEveryMode:
    def test_a_model_is_read_while_it_arrives_and_again(
        self, hub: FaultHub, tree: Tree, mounted: Mounted
    ) -> None:
        hub.add(MODEL, make_archive(tree))
        assert read_tree(mounted.path / MODEL) == tree
        until_cached(mounted.cache)
        for _ in range(2):
            assert read_tree(mounted.path / MODEL) == tree

    @pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
    def test_mmap(self, tree: Tree, mounted: Mounted, hub: FaultHub, flags: int) -> None:
        put_into_cache(mounted.cache, f"{hub.url}/{MODEL}", tree)
        with (
            opened(mounted.path / MODEL / DATA) as descriptor,
            mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ) as mapped,
        ):
            assert mapped[SIZE - 1] == tree[DATA][-1]
            assert mapped[:] == tree[DATA]
            # Both at once, and the other kind too.
            assert whole(descriptor) == tree[DATA]

    def test_many_processes_read_one_file(self, tree: Tree, mounted: Mounted, hub: FaultHub) -> None:
        put_into_cache(mounted.cache, f"{hub.url}/{MODEL}", tree)
        path = mounted.path / MODEL / DATA
        readers = [
            subprocess.Popen(["sha256sum", path], stdout=subprocess.PIPE, text=True) for _ in range(12)
        ]
        digests = {reader.communicate(timeout=60)[0].split()[0] for reader in readers}
        assert digests == {hashlib.sha256(tree[DATA]).hexdigest()}

    def test_dup_and_fork_read_on(self, tree: Tree, mounted: Mounted, hub: FaultHub) -> None:
        put_into_cache(mounted.cache, f"{hub.url}/{MODEL}", tree)
        path = mounted.path / MODEL / DATA
        code = (
            "import hashlib, os, sys\n"
            "first = os.open(sys.argv[1], os.O_RDONLY)\n"
            "again = os.dup(first)\n"
            "os.close(first)\n"
            "child = os.fork()\n"
            "found = hashlib.sha256()\n"
            "offset = 0\n"
            "while part := os.pread(again, 1 << 20, offset):\n"
            "    found.update(part); offset += len(part)\n"
            "if not child:\n"
            "    os._exit(0 if found.hexdigest() == sys.argv[2] else 1)\n"
            "os.close(again)\n"
            "status = os.waitpid(child, 0)[1]\n"
            "sys.exit(status or found.hexdigest() != sys.argv[2])\n"
        )
        digest = hashlib.sha256(tree[DATA]).hexdigest()
        subprocess.run(["python3", "-S", "-c", code, path, digest], check=True, timeout=60)

    def test_what_is_open_outlives_its_eviction(self, tree: Tree, mounted: Mounted, hub: FaultHub) -> None:
        """And the version is brought in again while its old file is still open."""
        hub.add(MODEL, make_archive(tree))
        path = mounted.path / MODEL / DATA
        path.read_bytes()
        until_cached(mounted.cache)
        with opened(path) as before:
            shutil.rmtree(next(entry for entry in mounted.cache.iterdir() if entry.is_dir()))
            with opened(path) as after:
                assert whole(before) == whole(after) == tree[DATA]
                with opened(path) as third:
                    assert whole(third) == tree[DATA]
        until_cached(mounted.cache)
        assert path.read_bytes() == tree[DATA]


class TestPassthrough:
    def test_the_daemon_is_not_asked(self, tree: Tree, hub: FaultHub, passing) -> None:
        mounted = passing()
        put_into_cache(mounted.cache, f"{hub.url}/{MODEL}", tree)
        with opened(mounted.path / MODEL / DATA) as descriptor:
            os.kill(mounted.pid, signal.SIGSTOP)
            try:
                digest = subprocess.check_output(["sha256sum"], stdin=descriptor, text=True, timeout=30)
            finally:
                os.kill(mounted.pid, signal.SIGCONT)
        assert digest.split()[0] == hashlib.sha256(tree[DATA]).hexdigest()

    def test_a_file_opened_while_arriving_and_again_when_complete(
        self, tree: Tree, hub: FaultHub, passing
    ) -> None:
        release = threading.Event()
        archive = make_archive(tree)
        hub.add(MODEL, archive)
        hub.fault(MODEL, Fault.stall(len(archive) - 1000, release))
        mounted = passing()
        path = mounted.path / MODEL / DATA
        try:
            with opened(path) as early:
                assert os.pread(early, 1000, 0) == tree[DATA][:1000]
                assert mode(path) == "cached"
                assert "before it was complete" in reason(path)
                release.set()
                until_cached(mounted.cache)
                with opened(path) as late:
                    # The kernel would refuse passthrough beside a cached open.
                    assert mode(path) == "cached"
                    assert whole(late) == whole(early) == tree[DATA]
        finally:
            release.set()
        until(lambda: mode(path) == "passthrough", "the release of both")
        with opened(path) as descriptor:
            assert mode(path) == "passthrough"
            assert whole(descriptor) == tree[DATA]

    def test_a_file_that_is_mapped_while_arriving(self, tree: Tree, hub: FaultHub, passing) -> None:
        release = threading.Event()
        archive = make_archive(tree)
        hub.add(MODEL, archive)
        hub.fault(MODEL, Fault.stall(len(archive) - 1000, release))
        mounted = passing()
        path = mounted.path / MODEL / DATA
        try:
            with opened(path) as early:
                mapped = mmap.mmap(early, 0, prot=mmap.PROT_READ)
        finally:
            release.set()
        with mapped:
            until_cached(mounted.cache)
            # The mapping alone keeps the file open.
            with opened(path) as late:
                assert whole(late) == mapped[:] == tree[DATA]
        until(lambda: mode(path) == "passthrough", "the end of the mapping")
        assert path.read_bytes() == tree[DATA]

    def test_nothing_holds_a_file_that_is_closed_and_removed(
        self, tree: Tree, hub: FaultHub, passing, tmp_path: Path
    ) -> None:
        """A backing id that is not given back would keep the file's space."""
        with file_system("tmpfs", tmp_path) as directory:
            mounted = passing(cache_dir=directory)
            model = put_into_cache(mounted.cache, f"{hub.url}/{MODEL}", tree)
            for _ in range(3):
                assert (mounted.path / MODEL / DATA).read_bytes() == tree[DATA]
            full = os.statvfs(directory).f_bfree
            shutil.rmtree(model)
            block = os.statvfs(directory).f_frsize
            until(
                lambda: (os.statvfs(directory).f_bfree - full) * block >= SIZE, "the space of the closed file"
            )
            mounted.unmount()

    @pytest.mark.parametrize("kind", ["tmpfs", "overlay", "ext4"])
    def test_on_this_file_system(self, tree: Tree, hub: FaultHub, passing, tmp_path: Path, kind: str) -> None:
        with file_system(kind, tmp_path) as directory:
            mounted = passing(cache_dir=directory)
            hub.add(MODEL, make_archive(tree))
            path = mounted.path / MODEL
            assert read_tree(path) == tree
            until_cached(mounted.cache)
            until(lambda: mode(path / DATA) == "passthrough", "the release of what was opened early")
            with opened(path / DATA) as descriptor:
                assert mode(path / DATA) == "passthrough"
                assert whole(descriptor) == tree[DATA]
            mounted.unmount()


@contextmanager
def file_system(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of its own."""
    place = tmp_path / "own"
    place.mkdir()
    options: list[str | Path]
    if kind == "tmpfs":
        options = ["-t", "tmpfs", "-o", "size=64m", "tmpfs"]
    elif kind == "overlay":
        # Not on another overlay: there may be one below the tests in a container.
        layers = Path(subprocess.check_output(["mktemp", "-d", "-p", "/dev/shm"], text=True).strip())
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        names = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        options = ["-t", "overlay", "-o", names, "overlay"]
    elif shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        options = ["-o", "loop", image]
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {kind} can be mounted here: {done.stderr.strip()}")
    directory = place / "cache"
    directory.mkdir(mode=0o700)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        if kind == "overlay":
            shutil.rmtree(layers)
