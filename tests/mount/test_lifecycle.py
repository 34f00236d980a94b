"""How a mount begins and ends, in order or not, and what is left of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hubfs as api
from hubfs import mounts
from hubfs.errors import ConfigError, MountError
from hubfs.handles import cache_key
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree
from tests.mount.conftest import Hubfs, cached_keys, put_into_cache, read_tree, until, until_cached

TREE = make_tree(size=2_000_000)
DATA = "variables/variables.data-00000-of-00001"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What stalled transfers wait for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def stalled(hub: FaultHub, gate: threading.Event) -> FaultHub:
    """A hub whose model stops in the middle of its archive."""
    archive = make_archive(TREE)
    hub.add("google/demo/1", archive)
    hub.fault("google/demo/1", Fault.stall(len(archive) // 2, gate))
    return hub


@contextmanager
def reader_of(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a file and says how that ended: the number of bytes or of the error."""
    code = (
        "import sys\n"
        "try:\n"
        "    with open(sys.argv[1], 'rb', 0) as file:\n"
        "        print('open', flush=True)\n"
        "        print(len(file.readall()))\n"
        "except OSError as error: print(-error.errno)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_stall(hub: FaultHub) -> None:
    hub.wait_for(
        lambda hub: any(request.bytes_sent > 900_000 for request in hub.body_requests("google/demo/1"))
    )


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def unfinished(cache: Path) -> list[str]:
    """Names of running or dead downloads."""
    return [path.name for path in cache.iterdir() if ".tmp" in path.name or path.name.endswith(".lock")]


class TestEnding:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signal_ends_the_daemon_its_transfer_and_its_readers(
        self, stalled: FaultHub, mount, number: signal.Signals
    ) -> None:
        mounted = mount(stalled)
        with reader_of(mounted.path / "google/demo/1" / DATA) as reader:
            wait_for_stall(stalled)
            assert unfinished(mounted.cache)
            os.kill(mounted.pid, number)
            until(lambda: is_gone(mounted.pid), "the end of the daemon")
            said, _ = reader.communicate(timeout=10)
            assert int(said.split()[-1]) in (-errno.ENOTCONN, -errno.ECONNABORTED)
        assert unfinished(mounted.cache) == cached_keys(mounted.cache) == []
        assert mounted.path not in mounts.find()
        assert os.listdir(mounted.path) == []

    def test_everybody_who_waits_for_a_model_is_let_go_with_an_error(self, stalled: FaultHub, mount) -> None:
        mounted = mount(stalled)
        model = mounted.path / "google/demo/1"
        commands = (
            ["cat", model / DATA],
            ["ls", model],
            ["stat", model / "nothing"],
            ["cp", "-r", model, "copy"],
        )
        waiting = [
            subprocess.Popen(command, stderr=subprocess.PIPE, cwd=mounted.cache) for command in commands
        ]
        try:
            wait_for_stall(stalled)
            until(lambda: mounted.status()["transfers"][0]["waiting"] >= 4, "all to wait")
            os.kill(mounted.pid, signal.SIGTERM)
            assert all(process.wait(15) for process in waiting)
            until(lambda: is_gone(mounted.pid), "the end of the daemon")
        finally:
            for process in waiting:
                process.kill()
                process.communicate()

    def test_unmount_while_somebody_waits_names_him_and_changes_nothing(
        self, stalled: FaultHub, mount, hubfs: Hubfs, gate: threading.Event
    ) -> None:
        mounted = mount(stalled)
        with reader_of(mounted.path / "google/demo/1" / DATA) as reader:
            assert reader.stdout is not None and reader.stdout.readline() == "open\n"
            wait_for_stall(stalled)
            assert f"pid {reader.pid}" in hubfs("unmount", mounted.path, code=1).stderr
            gate.set()
            assert reader.communicate(timeout=20)[0] == f"{len(TREE[DATA])}\n"
        assert len(stalled.body_requests()) == 1

    def test_unmount_ends_the_transfer_that_nobody_reads_any_more(
        self, stalled: FaultHub, mount, hubfs: Hubfs
    ) -> None:
        mounted = mount(stalled)
        with reader_of(mounted.path / "google/demo/1" / DATA) as reader:
            wait_for_stall(stalled)
            reader.kill()
            reader.wait(10)
        assert unfinished(mounted.cache)
        hubfs("unmount", mounted.path)
        assert is_gone(mounted.pid)
        assert unfinished(mounted.cache) == cached_keys(mounted.cache) == []

    def test_stopped_transfer_is_done_by_the_next_mount(
        self, stalled: FaultHub, mount, gate: threading.Event
    ) -> None:
        first = mount(stalled)
        with reader_of(first.path / "google/demo/1" / DATA) as reader:
            wait_for_stall(stalled)
            os.kill(first.pid, signal.SIGTERM)
            until(lambda: is_gone(first.pid), "the end of the daemon")
            reader.wait(10)
        second = mount(stalled)
        assert os.listdir(second.path) == []
        assert read_tree(second.path / "google/demo/1") == TREE

    def test_busy_unmount_names_who_is_there_and_lazy_takes_it_away(
        self, stalled: FaultHub, mount, hubfs: Hubfs
    ) -> None:
        mounted = mount(stalled)
        with subprocess.Popen(["sleep", "600"], cwd=mounted.path) as user:
            try:
                until(lambda: os.readlink(f"/proc/{user.pid}/cwd") == str(mounted.path), "its directory")
                refused = hubfs("unmount", mounted.path, code=1)
                assert "busy" in refused.stderr and "sleep 600" in refused.stderr
                assert f"pid {user.pid}" in refused.stderr and "--lazy" in refused.stderr
                assert mounted.status()["pid"] == mounted.pid
                hubfs("unmount", "--lazy", mounted.path)
                assert mounted.path not in mounts.find()
                assert not is_gone(mounted.pid)
            finally:
                user.kill()
        until(lambda: is_gone(mounted.pid), "the end of the daemon")

    def test_lazy_unmount_lets_an_open_file_be_read_to_its_end(
        self, stalled: FaultHub, mount, hubfs: Hubfs, gate: threading.Event
    ) -> None:
        mounted = mount(stalled)
        with reader_of(mounted.path / "google/demo/1" / DATA) as reader:
            assert reader.stdout is not None and reader.stdout.readline() == "open\n"
            wait_for_stall(stalled)
            hubfs("unmount", "--lazy", mounted.path)
            gate.set()
            assert reader.communicate(timeout=20)[0] == f"{len(TREE[DATA])}\n"
        until(lambda: is_gone(mounted.pid), "the end of the daemon")

    def test_unmount_from_within_by_a_relative_path(self, hub: FaultHub, mount, hubfs: Hubfs) -> None:
        mounted = mount(hub)
        done = subprocess.run(
            [sys.executable, "-m", "hubfs", "unmount", "."], cwd=mounted.path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert is_gone(mounted.pid)

    def test_what_is_no_mount_cannot_be_unmounted(self, hubfs: Hubfs, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "missing", "/proc"):
            refused = hubfs("unmount", path, code=1)
            assert "not a mount of hubfs" in refused.stderr
        assert Path("/proc/self").exists()


class TestKilled:
    @pytest.fixture
    def killed(self, stalled: FaultHub, mount):
        """A mount whose daemon was killed in the middle of a transfer; a cached model is there too."""
        stalled.add("google/other/1", make_archive(TREE))
        mounted = mount(stalled)
        assert read_tree(mounted.path / "google/other/1") == TREE
        until_cached(mounted.cache)
        with reader_of(mounted.path / "google/demo/1" / DATA) as reader:
            wait_for_stall(stalled)
            os.kill(mounted.pid, signal.SIGKILL)
            said, _ = reader.communicate(timeout=10)
        assert int(said.split()[-1]) in (-errno.ENOTCONN, -errno.ECONNABORTED), "a reader got a short file"
        until(lambda: is_gone(mounted.pid), "the end of the daemon")
        assert len(unfinished(mounted.cache)) == 2
        with pytest.raises(OSError) as caught:
            os.listdir(mounted.path)
        assert caught.value.errno == errno.ENOTCONN
        return mounted

    def test_next_mount_repairs_the_mount_point_and_brings_the_model_in(
        self, stalled: FaultHub, killed, mount
    ) -> None:
        again = mount(stalled)
        assert mounts.find().count(again.path) == 1
        assert os.listdir(again.path / "google") == ["other"], "the half-done model is listed"
        assert read_tree(again.path / "google/other/1") == TREE
        assert read_tree(again.path / "google/demo/1") == TREE
        assert len(stalled.body_requests("google/other/1")) == 1
        until_cached(again.cache, 2)

    def test_next_mount_removes_what_the_dead_one_left(self, stalled: FaultHub, killed, mount) -> None:
        again = mount(stalled)
        until(lambda: not unfinished(again.cache), "the leftovers to go")
        assert len(cached_keys(again.cache)) == 1
        assert len(stalled.body_requests()) == 2

    def test_commands_see_the_dead_mount_and_can_take_it_away(
        self, stalled: FaultHub, killed, hubfs: Hubfs
    ) -> None:
        assert "dead" in hubfs("status", killed.path, code=1).stderr
        assert "dead" in hubfs("status").stdout
        listed = hubfs("ls", "--cache-dir", killed.cache).stdout
        assert [line.split()[3] for line in listed.splitlines() if "/other/1" in line] == ["complete"]
        assert not any("complete" in line for line in listed.splitlines() if "/demo/1" in line)
        hubfs("unmount", killed.path)
        assert killed.path not in mounts.find()
        hubfs("pull", "google/demo/1", "--cache-dir", killed.cache, "--hub", stalled.url)
        assert read_tree(killed.cache / cache_key(f"{stalled.url}/google/demo/1")) == TREE

    def test_another_living_daemon_keeps_its_transfer(
        self, stalled: FaultHub, mount, gate: threading.Event
    ) -> None:
        first = mount(stalled, "one")
        with reader_of(first.path / "google/demo/1" / DATA) as reader:
            wait_for_stall(stalled)
            before = sorted(unfinished(first.cache))
            second = mount(stalled, "two")
            with reader_of(second.path / "google/demo/1/saved_model.pb") as another:
                until(lambda: second.status()["transfers"], "the second to wait")
                assert sorted(name for name in unfinished(first.cache) if "lock.tmp" not in name) == before
                gate.set()
                assert another.communicate(timeout=20)[0].split()[-1] == str(len(TREE["saved_model.pb"]))
            assert reader.communicate(timeout=20)[0].split()[-1] == str(len(TREE[DATA]))
        assert len(stalled.body_requests()) == 1


class TestMountPoint:
    def flags(self, hub: FaultHub, tmp_path: Path) -> list[object]:
        return ["--hub", hub.url, "--cache-dir", tmp_path / "cache"]

    def test_missing_one_is_made_with_its_parents(self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path) -> None:
        path = tmp_path / "not/there/yet"
        hubfs("mount", *self.flags(hub, tmp_path), path)
        assert path in mounts.find()
        assert (path / ".hubfs/status.json").exists()

    @pytest.mark.parametrize(
        "name", ["two words", "a,b=c", "mod\u00e8le", "back\\slash", "-dash", "tab\there"]
    )
    def test_any_name_will_do(self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path, name: str) -> None:
        hub.add("google/demo/1", make_archive(TREE))
        hubfs("mount", *self.flags(hub, tmp_path), tmp_path / name)
        assert read_tree(tmp_path / name / "google/demo/1") == TREE
        assert hubfs("status", tmp_path / name).stdout.startswith(str(tmp_path / name))
        hubfs("unmount", tmp_path / name)
        assert mounts.find() == [] or tmp_path / name not in mounts.find()

    def test_relative_one_and_one_behind_a_link(self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        hubfs("mount", *self.flags(hub, tmp_path), "link")
        assert tmp_path / "real" in mounts.find()
        hubfs("unmount", "link")
        assert tmp_path / "real" not in mounts.find()

    def test_mounting_twice_is_refused_and_the_first_goes_on(
        self, hub: FaultHub, mount, hubfs: Hubfs, tmp_path: Path
    ) -> None:
        mounted = mount(hub)
        refused = hubfs("mount", *self.flags(hub, tmp_path), mounted.path, code=1)
        assert "mounted there already" in refused.stderr and "hubfs unmount" in refused.stderr
        assert mounted.status()["pid"] == mounted.pid
        assert mounts.find().count(mounted.path) == 1

    def test_directory_that_is_not_empty_is_refused(
        self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path
    ) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full/precious").touch()
        refused = hubfs("mount", *self.flags(hub, tmp_path), tmp_path / "full", code=1)
        assert "not empty" in refused.stderr and "precious" in refused.stderr
        assert os.listdir(tmp_path / "full") == ["precious"]

    @pytest.mark.parametrize("below", ["", "/deeper"])
    def test_file_is_refused(self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("mine")
        refused = hubfs("mount", *self.flags(hub, tmp_path), f"{tmp_path}/file{below}", code=1)
        assert str(tmp_path / "file") in refused.stderr
        assert (tmp_path / "file").read_text() == "mine"

    def test_another_file_system_there_is_refused(self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path) -> None:
        refused = hubfs("mount", *self.flags(hub, tmp_path), "/proc", code=1)
        assert "something is mounted there already" in refused.stderr

    def test_cache_that_cannot_be_one_is_told_before_mounting(
        self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        refused = hubfs("mount", "--hub", hub.url, "--cache-dir", tmp_path / "file", tmp_path / "mnt", code=1)
        assert str(tmp_path / "file") in refused.stderr
        assert tmp_path / "mnt" not in mounts.find()


class TestPythonApi:
    def test_mount_lasts_as_long_as_its_block(self, hub: FaultHub, tmp_path: Path) -> None:
        hub.add("google/demo/1", make_archive(TREE))
        with api.mount(tmp_path / "mnt", hub=hub.url, cache_dir=str(tmp_path / "cache")) as path:
            assert path == tmp_path / "mnt"
            assert read_tree(path / "google/demo/1") == TREE
        assert tmp_path / "mnt" not in mounts.find()

    def test_mount_ends_when_its_block_fails(self, hub: FaultHub, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), api.mount(tmp_path / "mnt", hub=hub.url):
            _ = 1 / 0
        assert tmp_path / "mnt" not in mounts.find()

    def test_mount_that_is_not_possible_raises(self, hub: FaultHub, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(MountError), api.mount(tmp_path / "file", hub=hub.url):
            pass
        with pytest.raises(ConfigError), api.mount(tmp_path / "mnt", hub="nonsense"):
            pass


def test_daemon_never_imports_tensorflow_nor_the_command_line(
    hub: FaultHub, mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traps, sprung = tmp_path / "traps", tmp_path / "sprung"
    traps.mkdir()
    for name in ("tensorflow", "tensorflow_hub", "typer", "click", "rich", "numpy"):
        code = f"import os\nopen({str(sprung)!r}, 'a').write(f'{{os.getpid()}} {name}\\n')\nraise ImportError"
        (traps / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(traps))
    subprocess.run([sys.executable, "-c", "import typer"], stderr=subprocess.DEVNULL, check=False)
    assert sprung.read_text().split()[1:] == ["typer"], "the traps do not work"
    sprung.unlink()
    hub.add("google/demo/1", make_archive(TREE))
    put_into_cache(tmp_path / "cache", f"{hub.url}/google/theirs/1", TREE)
    mounted = mount(hub)
    for path in ("google/demo/1", "google/theirs/1"):
        assert read_tree(mounted.path / path) == TREE
    with pytest.raises(FileNotFoundError):
        (mounted.path / "google/none/1").stat()
    until_cached(mounted.cache, 2)
    assert mounted.status()["cache"]["models"] == 2
    mounted.unmount()
    assert not sprung.exists(), sprung.read_text()
