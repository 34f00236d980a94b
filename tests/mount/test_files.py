"""What a reader may do with a model's files: read them in every way, and change nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from isal import igzip

from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree
from tests.mount.conftest import put_into_cache, raw_listing, read_tree, until_cached

SIZE = 3_000_001
TREE = make_tree(size=SIZE)
DATA = "variables/variables.data-00000-of-00001"


@pytest.fixture
def model(hub: FaultHub, mount) -> Path:
    """A model below a mount that nobody has touched yet."""
    hub.add("google/demo/1", make_archive(TREE))
    return mount(hub).path / "google/demo/1"


class TestReading:
    @pytest.fixture(autouse=True)
    def one_download(self, hub: FaultHub) -> Iterator[None]:
        yield
        assert len(hub.body_requests()) == 1

    @pytest.mark.parametrize("name", TREE)
    def test_cat_gives_the_publishers_bytes(self, model: Path, name: str) -> None:
        assert subprocess.check_output(["cat", model / name], timeout=30) == TREE[name]

    def test_cp_copies_an_uncached_model(self, model: Path, tmp_path: Path) -> None:
        subprocess.run(["cp", "-r", model, tmp_path / "copy"], check=True, timeout=30)
        assert read_tree(tmp_path / "copy") == TREE

    def test_shutil_copies_an_uncached_model(self, model: Path, tmp_path: Path) -> None:
        shutil.copytree(model, tmp_path / "copy")
        assert read_tree(tmp_path / "copy") == TREE

    @pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
    def test_rsync_copies_an_uncached_model_and_finds_it_unchanged(self, model: Path, tmp_path: Path) -> None:
        copy = ["rsync", "-a", "--itemize-changes", f"{model}/", f"{tmp_path}/copy/"]
        assert subprocess.check_output(copy, timeout=30)
        assert read_tree(tmp_path / "copy") == TREE
        assert subprocess.check_output(copy, timeout=30) == b""

    def test_tar_packs_an_uncached_model(self, model: Path, tmp_path: Path) -> None:
        packed = tmp_path / "packed.tar"
        subprocess.run(["tar", "-C", model, "-cf", packed, "."], check=True, timeout=30)
        with tarfile.open(packed) as tar:
            files = {info.name[2:]: tar.extractfile(info) for info in tar if info.isfile()}
            assert {name: file.read() for name, file in files.items() if file} == TREE

    def test_find_tells_names_and_sizes_of_an_uncached_model(self, model: Path) -> None:
        found = subprocess.check_output(
            ["find", model, "-type", "f", "-printf", "%P %s\\n"], text=True, timeout=30
        )
        assert sorted(found.splitlines()) == sorted(f"{name} {len(TREE[name])}" for name in TREE)

    @pytest.mark.parametrize("kind", ["shared", "private"])
    def test_mmap_reads_anywhere(self, model: Path, kind: str) -> None:
        flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
        with (
            (model / DATA).open("rb") as file,
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped,
        ):
            assert mapped[SIZE - 1] == TREE[DATA][-1]
            assert mapped[1_000_000:1_000_100] == TREE[DATA][1_000_000:1_000_100]
            assert mapped[:] == TREE[DATA]

    def test_writing_into_a_private_mapping_changes_nothing_for_others(self, model: Path) -> None:
        with (model / DATA).open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
                mapped[:4] = b"mine"
            with pytest.raises(PermissionError):
                mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert (model / DATA).read_bytes() == TREE[DATA]

    def test_sendfile_to_a_socket(self, model: Path) -> None:
        ours, theirs = socket.socketpair()
        received = bytearray()

        def receive() -> None:
            while block := theirs.recv(1 << 20):
                received.extend(block)

        receiver = threading.Thread(target=receive)
        receiver.start()
        with ours, theirs:
            with (model / DATA).open("rb") as file:
                sent = 0
                while sent < SIZE:
                    sent += os.sendfile(ours.fileno(), file.fileno(), sent, SIZE - sent)
                assert os.sendfile(ours.fileno(), file.fileno(), SIZE, 100) == 0
            ours.shutdown(socket.SHUT_WR)
            receiver.join(30)
        assert received == TREE[DATA]

    def test_pipe_gives_the_publishers_bytes(self, model: Path) -> None:
        piped = f"cat {model / DATA} | sha256sum"
        digest = subprocess.check_output(piped, shell=True, text=True, timeout=30).split()[0]
        assert digest == hashlib.sha256(TREE[DATA]).hexdigest()

    def test_reads_at_any_offset_give_what_a_local_file_gives(self, model: Path, tmp_path: Path) -> None:
        local = tmp_path / "local"
        local.write_bytes(TREE[DATA])
        with (model / DATA).open("rb", 0) as ours, local.open("rb", 0) as theirs:
            for offset in (0, 1, 4095, 4096, 131_071, SIZE - 5000, SIZE - 1, SIZE, SIZE + 1, 2**40):
                for size in (0, 1, 4096, 200_000):
                    wanted = os.pread(theirs.fileno(), size, offset)
                    assert os.pread(ours.fileno(), size, offset) == wanted, (offset, size)
            assert ours.seek(0, os.SEEK_END) == SIZE
            assert ours.seek(0, os.SEEK_DATA) == 0
            assert ours.seek(0, os.SEEK_HOLE) == SIZE

    def test_empty_file_and_empty_directory(self, hub: FaultHub, mount) -> None:
        hub.add("google/empty/1", make_archive({**TREE, "assets.extra/": b"", "nothing": b""}))
        base = mount(hub).path / "google/empty/1"
        assert (base / "nothing").read_bytes() == b""
        assert os.listdir(base / "assets.extra") == []

    def test_program_in_a_model_is_not_run(self, hub: FaultHub, mount) -> None:
        hub.add("google/demo/1", make_archive({**TREE, "run": b"#!/bin/sh\necho ran\n"}))
        program = mount(hub).path / "google/demo/1/run"
        # Brought in before: during an exec of a cold path this process, and with it the hub, may stand still.
        assert program.read_bytes()
        with pytest.raises(PermissionError):
            subprocess.run([program], check=False)

    def test_python_imports_and_unicode_names(self, hub: FaultHub, mount) -> None:
        names = {
            "assets/mod\u00e8le \u6a21\u578b.txt": b"1",
            "assets/two words": b"2",
            "assets/module_of_ours.py": b"X = 5",
        }
        hub.add("google/demo/1", make_archive({**TREE, **names}))
        base = mount(hub).path / "google/demo/1"
        assert read_tree(base) == {**TREE, **names}
        told = subprocess.check_output(
            [sys.executable, "-c", "import module_of_ours as m; print(m.X)"],
            env={**os.environ, "PYTHONPATH": str(base / "assets")}, text=True,
        )  # fmt: skip
        assert told == "5\n"


BLOCK = 1 << 20
BLOCKS = 2200


def big_block(number: int) -> bytes:
    return number.to_bytes(8, "big") * 2 + bytes(BLOCK - 16)


class _Numbered:
    """A file of blocks that are all different, without holding it in memory."""

    def __init__(self) -> None:
        self._number, self._rest = 0, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._rest += big_block(self._number)
            self._number += 1
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


def test_file_of_more_than_2_gib(hub: FaultHub, mount, tmp_path: Path) -> None:
    archive, size = tmp_path / "big.tar.gz", BLOCKS * BLOCK + 5
    with (
        igzip.open(archive, "wb", compresslevel=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", bufsize=BLOCK) as tar,
    ):
        info = tarfile.TarInfo("./variables/variables.data-00000-of-00001")
        info.size = size
        tar.copybufsize = BLOCK  # type: ignore[attr-defined]
        tar.addfile(info, _Numbered())  # type: ignore[arg-type]
        info = tarfile.TarInfo("./saved_model.pb")
        info.size = len(TREE["saved_model.pb"])
        tar.addfile(info, io.BytesIO(TREE["saved_model.pb"]))
    hub.add("google/big/1", archive)
    path = mount(hub).path / "google/big/1" / DATA
    assert path.stat().st_size == size > 2**31
    with path.open("rb", 0) as file:
        file.seek(2**31 + BLOCK)
        assert file.read(BLOCK) == big_block(2049)
        file.seek(0)
        buffer = bytearray(BLOCK)
        for number in range(BLOCKS):
            assert file.readinto(buffer) == BLOCK
            assert buffer == big_block(number), number
        assert file.read() == BLOCKS.to_bytes(8, "big")[:5]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[2**31 + 5 * BLOCK : 2**31 + 6 * BLOCK] == big_block(2053)
    assert (path.parents[1] / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
    assert sum(request.bytes_sent for request in hub.body_requests()) < 1.1 * archive.stat().st_size


# ---- attributes and listings


class TestAttributes:
    @pytest.fixture
    def used(self, hub: FaultHub, mount):
        hub.add("google/demo/1", make_archive(TREE, mtime=1_234_567_890))
        hub.add("google/demo/2", make_archive(make_tree(2)))
        mounted = mount(hub)
        assert read_tree(mounted.path / "google/demo/1") == TREE
        assert len(read_tree(mounted.path / "google/demo/2")) == len(TREE)
        until_cached(mounted.cache, 2)
        return mounted

    @staticmethod
    def walk(directory: Path) -> dict[str, os.stat_result]:
        paths = [directory, *directory.rglob("*"), directory / ".hubfs", directory / ".hubfs/status.json"]
        return {str(path): path.lstat() for path in paths}

    def test_modes_owner_and_sizes_are_those_of_a_read_only_tree(self, used) -> None:
        for path, found in self.walk(used.path).items():
            assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid()), path
            if stat.S_ISDIR(found.st_mode):
                assert stat.S_IMODE(found.st_mode) == 0o555, path
                below = sum(entry.is_dir(follow_symlinks=False) for entry in os.scandir(path))
                assert found.st_nlink in (1, 2 + below), path
            else:
                assert found.st_mode == stat.S_IFREG | 0o444, path
                assert found.st_nlink == 1, path
        for name, content in TREE.items():
            found = (used.path / "google/demo/1" / name).stat()
            assert (found.st_size, found.st_blocks) == (len(content), -(-len(content) // 512))

    def test_times_are_the_publishers(self, used, hub: FaultHub, mount) -> None:
        used.unmount()
        base = mount(hub).path / "google/demo/1"
        for path in (base, *base.rglob("*")):
            assert path.stat().st_mtime == 1_234_567_890, path

    @pytest.mark.parametrize("directories", [True, False])
    def test_times_do_not_change_while_a_model_arrives(self, hub: FaultHub, mount, directories: bool) -> None:
        gate, archive = threading.Event(), make_archive(TREE, dirs=directories)
        hub.add("google/new/1", archive)
        hub.fault("google/new/1", Fault.stall(len(archive) // 2, gate))
        base = mount(hub).path / "google/new/1"
        paths = [base, base / "assets", base / "assets/vocab.txt", base / "variables"]
        before = [(path.stat().st_mtime, path.stat().st_ctime) for path in paths]
        gate.set()
        assert read_tree(base) == TREE
        # Longer than the kernel believes what it was told.
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert [(path.stat().st_mtime, path.stat().st_ctime) for path in paths] == before

    def test_inode_numbers_are_unique_and_survive_a_remount(self, used, hub: FaultHub, mount) -> None:
        before = {path: found.st_ino for path, found in self.walk(used.path).items()}
        assert len(set(before.values())) == len(before)
        used.unmount()
        assert {path: found.st_ino for path, found in self.walk(mount(hub).path).items()} == before

    def test_listings_tell_the_type_and_number_that_stat_tells(self, used) -> None:
        for folder in [used.path, *(path for path in used.path.rglob("*") if path.is_dir())]:
            listed = raw_listing(folder)
            assert set(listed) == {".", "..", *os.listdir(folder)}
            if folder == used.path:
                del listed[".."]  # it is outside
            for name, (number, kind) in listed.items():
                found = os.lstat(folder / name)
                assert (number, kind) == (found.st_ino, stat.S_IFMT(found.st_mode) >> 12), folder / name

    def test_file_system_is_read_only_and_its_size_is_the_caches(self, used) -> None:
        found, cache = os.statvfs(used.path), os.statvfs(used.cache)
        assert found.f_flag & os.ST_RDONLY and found.f_flag & os.ST_NOSUID and found.f_flag & os.ST_NODEV
        assert found.f_namemax == 255
        assert found.f_bsize and found.f_frsize
        assert found.f_blocks * found.f_frsize == pytest.approx(cache.f_blocks * cache.f_frsize, rel=0.01)
        assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
        assert subprocess.run(["df", used.path], capture_output=True).returncode == 0

    def test_listing_under_way_is_not_disturbed_by_a_model_that_gets_cached(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        names = [f"publisher{number:04}" for number in range(1500)]
        for name in names:
            put_into_cache(tmp_path / "cache", f"{hub.url}/{name}/m/1", {"saved_model.pb": b"x"})
        hub.add("aaa/demo/1", make_archive(TREE))
        mounted = mount(hub)
        with os.scandir(mounted.path) as entries:
            seen = [next(entries).name]
            assert read_tree(mounted.path / "aaa/demo/1") == TREE
            seen += [entry.name for entry in entries]
        assert seen == names
        assert os.listdir(mounted.path) == ["aaa", *names]


# ---- changing nothing

#: Each is tried with the path of a file, of a directory and of a new name in that.
MUTATIONS: dict[str, Callable[[Path, Path, Path], object]] = {
    "open for writing": lambda file, folder, new: os.open(file, os.O_WRONLY),
    "open for reading and writing": lambda file, folder, new: os.open(file, os.O_RDWR),
    "open for appending": lambda file, folder, new: os.open(file, os.O_WRONLY | os.O_APPEND),
    "open and truncate": lambda file, folder, new: os.open(file, os.O_RDONLY | os.O_TRUNC),
    "open or create": lambda file, folder, new: os.open(file, os.O_WRONLY | os.O_CREAT),
    "create": lambda file, folder, new: os.open(new, os.O_WRONLY | os.O_CREAT, 0o644),
    "create exclusively": lambda file, folder, new: os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
    "create for reading": lambda file, folder, new: os.open(new, os.O_RDONLY | os.O_CREAT, 0o644),
    "create without a name": lambda file, folder, new: os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o644),
    "mkdir": lambda file, folder, new: os.mkdir(new),
    "rmdir": lambda file, folder, new: os.rmdir(folder),
    "unlink": lambda file, folder, new: os.unlink(file),
    "unlink a missing name": lambda file, folder, new: os.unlink(new),
    "rename": lambda file, folder, new: os.rename(file, new),
    "rename a directory": lambda file, folder, new: os.rename(folder, new.parent.parent / new.name),
    "replace": lambda file, folder, new: os.replace(file, folder / "vocab.txt"),
    "link": lambda file, folder, new: os.link(file, new),
    "symlink": lambda file, folder, new: os.symlink(file, new),
    "mknod": lambda file, folder, new: os.mknod(new, stat.S_IFREG | 0o600),
    "mkfifo": lambda file, folder, new: os.mkfifo(new),
    "chmod": lambda file, folder, new: os.chmod(file, 0o777),
    "chmod of a directory": lambda file, folder, new: os.chmod(folder, 0o777),
    "chown": lambda file, folder, new: os.chown(file, 1, 1),
    "utime": lambda file, folder, new: os.utime(file),
    "truncate": lambda file, folder, new: os.truncate(file, 0),
    "setxattr": lambda file, folder, new: os.setxattr(file, "user.hubfs.state", b"x"),
    "setxattr of a directory": lambda file, folder, new: os.setxattr(folder, "user.mine", b"x"),
    "removexattr": lambda file, folder, new: os.removexattr(file, "user.hubfs.state"),
    "fchmod": lambda file, folder, new: with_descriptor(file, lambda number: os.fchmod(number, 0o777)),
    "futimens": lambda file, folder, new: with_descriptor(file, os.utime),
    "fsetxattr": lambda file, folder, new: with_descriptor(
        file, lambda number: os.setxattr(number, "user.mine", b"x")
    ),
}


def with_descriptor(path: Path, action: Callable[[int], object]) -> None:
    with path.open("rb") as file:
        action(file.fileno())


class TestChanging:
    @pytest.mark.parametrize("mutation", MUTATIONS)
    def test_every_change_in_a_model_is_refused(self, model: Path, mutation: str) -> None:
        assert read_tree(model) == TREE
        with pytest.raises(OSError) as caught:
            MUTATIONS[mutation](model / DATA, model / "assets", model / "assets/new")
        assert caught.value.errno == errno.EROFS, caught.value
        assert read_tree(model) == TREE

    def test_every_change_above_models_is_refused(self, model: Path, hub: FaultHub) -> None:
        top = model.parents[2]
        assert read_tree(model) == TREE
        for mutation in (
            "mkdir",
            "create",
            "symlink",
            "mknod",
            "chmod of a directory",
            "setxattr of a directory",
        ):
            # A name that cannot be a model's: other names above models are directories already.
            for folder in (top, top / "google", top / ".hubfs"):
                with pytest.raises(OSError) as caught:
                    MUTATIONS[mutation](model / DATA, folder, folder / ".new")
                assert caught.value.errno == errno.EROFS, (mutation, folder)
        for folder in (top / "google", top / "google/demo", model):
            with pytest.raises(OSError) as caught:
                os.rmdir(folder)
            assert caught.value.errno == errno.EROFS, folder
        assert [request.kind for request in hub.requests()] == ["listing", "probe", "body"]

    def test_control_file_cannot_be_written(self, model: Path) -> None:
        with pytest.raises(OSError) as caught:
            (model.parents[2] / ".hubfs/status.json").write_text("{}")
        assert caught.value.errno == errno.EROFS

    @pytest.mark.parametrize(
        "command",
        ["fallocate -l 10 {}", "truncate -s 0 {}", "touch {}", "rm -f {}", "chmod +w {}", "mv {} {}.old"],
    )
    def test_commands_say_that_it_is_read_only(self, model: Path, command: str) -> None:
        file = model / DATA
        done = subprocess.run(
            command.format(file, file), shell=True, capture_output=True, text=True, timeout=30,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        assert done.returncode != 0
        assert "Read-only file system" in done.stderr
        assert read_tree(model) == TREE

    def test_nothing_can_be_moved_in(self, model: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        mine.write_bytes(b"mine")
        assert subprocess.run(["mv", mine, model / "assets"], capture_output=True, timeout=30).returncode != 0
        assert mine.read_bytes() == b"mine"
        assert read_tree(model) == TREE
