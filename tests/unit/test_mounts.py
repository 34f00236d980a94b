"""hubfs.mounts: reading /proc, preparing a directory, and ending real mounts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hubfs import mounts
from hubfs.errors import MountError

MOUNTINFO = r"""22 28 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
42 28 0:39 / /mnt/tf\040hub ro,nosuid,nodev,relatime - fuse.hubfs hubfs ro,user_id=0,group_id=0
43 28 0:40 / /mnt/back\134slash\011tab ro shared:3 master:4 - fuse.hubfs hub\040fs ro
44 28 0:41 / /mnt/other rw - fuse.sshfs me@host:/ rw
45 28 0:42 / /mnt/caf\303\251 ro - fuse.hubfs hubfs ro
46 42 0:43 / /mnt/tf\040hub ro - fuse.hubfs hubfs ro
"""

# A mount of type fuse.hubfs whose status.json tells only the pid.
FILE_SYSTEM = """
import json, os, stat, sys
os.environ["FUSE_LIBRARY_NAME"] = "fuse3"
import mfusepy

class Files(mfusepy.Operations):
    use_ns = True
    content = json.dumps({"pid": os.getpid(), "mountpoint": sys.argv[1]}).encode()

    def getattr(self, path, fh=None):
        if path in ("/", "/.hubfs"):
            return {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2}
        if path == "/.hubfs/status.json":
            return {"st_mode": stat.S_IFREG | 0o444, "st_nlink": 1, "st_size": len(self.content)}
        raise mfusepy.FuseOSError(2)

    def readdir(self, path, fh):
        return [".", ".."]

    def read(self, path, size, offset, fh):
        return self.content[offset : offset + size]

mfusepy.FUSE(Files(), sys.argv[1], foreground=True, fsname="hubfs", subtype="hubfs", ro=True)
if len(sys.argv) > 2:
    import time
    time.sleep(float(sys.argv[2]))
"""


def can_mount():
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


needs_fuse = pytest.mark.skipif(not can_mount(), reason="/dev/fuse cannot be opened")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")


@pytest.fixture
def mounted(tmp_path):
    """Mounts the test's file system at `tmp_path / "mnt"`; whatever is left is removed."""
    daemons = []
    where = tmp_path / "mnt"
    where.mkdir()

    def start(*arguments):
        daemon = subprocess.Popen(
            [sys.executable, "-c", FILE_SYSTEM, str(where), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        daemons.append(daemon)
        deadline = time.monotonic() + 10
        while where not in mounts.find():
            assert daemon.poll() is None, "the test's file system did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return where, daemon

    yield start
    for daemon in daemons:
        daemon.kill()
        daemon.wait()
    while where in mounts.find():
        subprocess.run(["fusermount3", "-u", "-z", "--", where], check=True)


class TestFind:
    def test_finds_hubfs_only_decodes_names_and_lists_stacked_mounts_once(self):
        assert mounts.find(MOUNTINFO) == [
            Path("/mnt/tf hub"),
            Path("/mnt/back\\slash\ttab"),
            Path("/mnt/café"),
        ]

    def test_bytes_that_are_not_utf8_survive(self):
        line = r"42 28 0:39 / /mnt/\377 ro - fuse.hubfs hubfs ro"
        assert [os.fsencode(path) for path in mounts.find(line)] == [b"/mnt/\xff"]

    @pytest.mark.parametrize("text", ["", "\n", "42 28 0:39 /\n", "no separator at all here and there\n"])
    def test_ignores_what_is_not_a_mount(self, text):
        assert mounts.find(text) == []

    def test_reads_this_machine(self):
        assert all(path.is_absolute() for path in mounts.find())


class TestCanonical:
    def test_follows_links_and_dots(self, tmp_path, monkeypatch):
        (tmp_path / "real" / "mnt").mkdir(parents=True)
        (tmp_path / "parent").symlink_to("real")
        (tmp_path / "link").symlink_to("parent/mnt")
        monkeypatch.chdir(tmp_path)
        for name in ("real/mnt", "real/mnt/", "parent/mnt", "link", "./link", "real/../link"):
            assert mounts.canonical(Path(name)) == tmp_path / "real" / "mnt"
        monkeypatch.chdir("real/mnt")
        assert mounts.canonical(Path(".")) == tmp_path / "real" / "mnt"

    def test_a_loop_of_links_is_an_error(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(MountError, match="symbolic links"):
            mounts.canonical(tmp_path / "a")


class TestPrepare:
    def test_creates_a_missing_directory_with_its_parents(self, tmp_path):
        assert mounts.prepare(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        assert not mounts.prepare(tmp_path / "a" / "b")

    def test_refuses_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(MountError, match="is not a directory"):
            mounts.prepare(tmp_path / "file")
        with pytest.raises(MountError, match="Not a directory"):
            mounts.prepare(tmp_path / "file" / "below")

    def test_refuses_a_directory_that_is_not_empty(self, tmp_path):
        (tmp_path / ".hidden").touch()
        with pytest.raises(MountError, match=r"is not empty: '.hidden'"):
            mounts.prepare(tmp_path)

    def test_refuses_where_something_else_is_mounted(self):
        with pytest.raises(MountError, match=r"something is mounted there already: \S+ \(proc\)"):
            mounts.prepare(Path("/proc"))

    @needs_fuse
    def test_refuses_where_hubfs_is_mounted_and_repairs_a_dead_mount(self, mounted):
        where, daemon = mounted()
        with pytest.raises(MountError, match="mounted there already") as caught:
            mounts.prepare(where)
        assert caught.value.hint == f"hubfs unmount {where}"
        assert not mounts.is_dead(where)
        daemon.kill()
        daemon.wait()
        assert mounts.is_dead(where)
        assert not mounts.prepare(where)
        assert where not in mounts.find()
        assert list(where.iterdir()) == []


class TestStatus:
    def test_a_plain_directory_is_not_a_mount(self, tmp_path):
        with pytest.raises(MountError, match="hubfs is not mounted there"):
            mounts.status(tmp_path)
        assert not mounts.is_dead(tmp_path)

    @pytest.mark.parametrize("content", ["", "[1]", "{"])
    def test_nonsense_is_an_error(self, tmp_path, content):
        (tmp_path / ".hubfs").mkdir()
        (tmp_path / ".hubfs" / "status.json").write_text(content)
        with pytest.raises(MountError, match="the mount's status is not"):
            mounts.status(tmp_path)

    @needs_fuse
    def test_of_a_mount_alive_and_dead(self, mounted):
        where, daemon = mounted()
        assert mounts.status(where) == {"pid": daemon.pid, "mountpoint": str(where)}
        daemon.kill()
        daemon.wait()
        with pytest.raises(MountError, match="daemon is gone") as caught:
            mounts.status(where)
        assert "hubfs unmount" in caught.value.hint

    @needs_fuse
    def test_a_mount_that_hangs_does_not_hang_the_caller(self, mounted):
        where, daemon = mounted()
        daemon.send_signal(signal.SIGSTOP)
        with pytest.raises(MountError, match=r"does not answer within 0\.3 s") as caught:
            mounts.status(where, timeout=0.3)
        assert caught.value.hint == f"hubfs unmount --lazy {where}"
        assert not mounts.is_dead(where)


@pytest.fixture
def busy(request):
    """Starts a Python process that does something, says so, and sleeps."""
    started = []

    def start(code, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import mmap, os, time\n{code}\nprint(flush=True)\ntime.sleep(60)"],
            stdout=subprocess.PIPE,
            **options,
        )
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class TestUsersOf:
    def test_tells_who_and_what(self, tmp_path, busy):
        where = tmp_path / "mnt"
        where.mkdir()
        (where / "file").write_bytes(b"x" * 5000)
        sibling = tmp_path / "mnt2"
        sibling.mkdir()
        inside = busy("", cwd=where)
        reader = busy(f"f = open({str(where / 'file')!r}); g = open({str(where / 'file')!r})")
        mapper = busy(
            f"f = open({str(where / 'file')!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
            # mmap keeps a descriptor of its own: close every one, so that only the mapping is left.
            "os.closerange(3, 64)"
        )
        busy("", cwd=sibling)
        assert {(user.pid, user.what) for user in mounts.users_of(where)} == {
            (inside.pid, "cwd"),
            (reader.pid, "open file"),
            (mapper.pid, "mapped file"),
        }
        assert all("time.sleep(60)" in user.command for user in mounts.users_of(where))

    @needs_root
    def test_a_changed_root_counts(self, tmp_path, busy):
        process = busy(f"os.chroot({str(tmp_path)!r})")
        assert mounts.User(process.pid, mounts.users_of(tmp_path)[0].command, "root") in mounts.users_of(
            tmp_path
        )

    def test_an_unused_directory_has_none(self, tmp_path):
        assert mounts.users_of(tmp_path) == []

    @needs_root
    def test_on_a_real_mount(self, tmp_path, busy):
        where = tmp_path / "mnt"
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", where], check=True)
        try:
            process = busy("", cwd=where)
            assert [(user.pid, user.what) for user in mounts.users_of(where)] == [(process.pid, "cwd")]
            process.kill()
            process.wait()
        finally:
            subprocess.run(["umount", "-l", where], check=True)


class TestUnmount:
    def test_refuses_what_is_not_a_mount_of_hubfs(self, tmp_path):
        with pytest.raises(MountError, match="nothing is mounted there"):
            mounts.unmount(tmp_path)
        with pytest.raises(MountError, match=r"not a mount of hubfs: that is \S+ \(proc\)"):
            mounts.unmount(Path("/proc"))

    @needs_fuse
    def test_waits_for_the_daemon(self, mounted):
        where, daemon = mounted("0.5")
        started = time.monotonic()
        mounts.unmount(where)
        assert time.monotonic() - started >= 0.4
        assert daemon.wait(1) == 0
        assert where not in mounts.find()

    @needs_fuse
    def test_waits_without_pidfd_too(self, mounted, monkeypatch):
        def no_pidfd(pid):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", no_pidfd)
        where, daemon = mounted("0.3")
        # It is a child of this process: unless reaped, it would be a zombie and look alive.
        monkeypatch.setattr(os, "kill", lambda pid, number: _reaped(daemon))
        mounts.unmount(where)
        assert daemon.returncode == 0

    @needs_fuse
    def test_a_daemon_that_stays_is_an_error(self, mounted):
        where, daemon = mounted("30")
        with pytest.raises(MountError, match=rf"daemon \(pid {daemon.pid}\) is still there"):
            mounts.unmount(where, timeout=0.3)
        assert where not in mounts.find()

    @needs_fuse
    def test_a_busy_mount_names_its_users_and_can_be_taken_away_lazily(self, mounted, busy):
        where, daemon = mounted()
        user = busy("", cwd=where)
        with pytest.raises(MountError, match=rf"is busy: .*\(pid {user.pid}, cwd\)") as caught:
            mounts.unmount(where)
        assert f"hubfs unmount --lazy {where}" in caught.value.hint
        assert where in mounts.find()
        mounts.unmount(where, lazy=True)
        assert where not in mounts.find()
        assert daemon.poll() is None, "it serves its last user"
        user.kill()
        user.wait()
        assert daemon.wait(10) == 0

    @needs_fuse
    def test_lazily_without_users_waits(self, mounted):
        where, daemon = mounted("0.2")
        mounts.unmount(where, lazy=True)
        assert daemon.wait(1) == 0

    @needs_fuse
    def test_a_dead_mount_goes_at_once(self, mounted):
        where, daemon = mounted()
        daemon.kill()
        daemon.wait()
        mounts.unmount(where)
        assert where not in mounts.find()

    @needs_fuse
    def test_by_another_name(self, mounted, tmp_path):
        where, _ = mounted()
        (tmp_path / "link").symlink_to(where)
        mounts.unmount(tmp_path / "link")
        assert where not in mounts.find()

    @needs_fuse
    @needs_root
    def test_without_fusermount3_root_uses_umount(self, mounted, monkeypatch, tmp_path):
        where, _ = mounted()
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, path in (("umount", "/usr/bin/umount"), ("cat", "/usr/bin/cat")):
            (programs / name).symlink_to(path)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(programs))
            mounts.unmount(where)
        assert where not in mounts.find()


def _reaped(daemon):
    if daemon.poll() is not None:
        raise ProcessLookupError
