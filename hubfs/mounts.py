"""The mounts of this machine: which there are, how they are, who uses them, and how they end.

Everything here works from outside of a mount and must get along with one whose daemon is dead or
hangs. So nothing in this process opens or stats a path below a mount point: a child does it
(`_read_with_deadline`), and only `readlink` and `/proc` are asked here, which never reach the daemon.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hubfs.errors import MountError

#: What `/proc/self/mountinfo` calls the file system of hubfs: "fuse." and the subtype of the mount.
FILESYSTEM = "fuse.hubfs"

#: Seconds that the commands which unmount may take. They do not wait for the daemon, so this is ample.
_COMMAND_TIMEOUT = 15.0

Use = Literal["cwd", "root", "open file", "mapped file"]


@dataclass(frozen=True)
class User:
    """A process that keeps a mount busy, and by what."""

    pid: int
    command: str
    what: Use


@dataclass(frozen=True)
class _Mount:
    path: Path
    filesystem: str
    source: str


def find(mountinfo: str | None = None) -> list[Path]:
    """The mount points of hubfs, dead ones too, in the order in which they were mounted.

    Args:
        mountinfo: text to read instead of `/proc/self/mountinfo`, whose format is that of proc(5).
    """
    return list(dict.fromkeys(mount.path for mount in _mounts(mountinfo) if mount.filesystem == FILESYSTEM))


def status(mountpoint: Path, timeout: float = 2.0) -> dict[str, Any]:
    """What a mount tells about itself: the content of its `.hubfs/status.json`.

    Args:
        mountpoint: where it is mounted.
        timeout: seconds after which a mount that does not answer is given up.

    Raises:
        MountError: nothing is mounted there, the daemon is dead or does not answer, or the mount
            belongs to another user.
    """
    path = canonical(mountpoint)
    try:
        content = _read_with_deadline(path / ".hubfs" / "status.json", timeout)
    except TimeoutError as error:
        raise MountError(
            f"{path}: the mount does not answer within {timeout:g} s", hint=f"hubfs unmount --lazy {path}"
        ) from error
    except OSError as error:
        raise _status_error(path, error) from error
    try:
        found = json.loads(content)
    except ValueError as error:
        raise MountError(f"{path}: the mount's status is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise MountError(f"{path}: the mount's status is not an object")
    return found


def is_dead(mountpoint: Path) -> bool:
    """Whether the daemon of the mount is gone: "Transport endpoint is not connected".

    A mount that merely does not answer within two seconds is not dead.
    """
    try:
        _read_with_deadline(canonical(mountpoint) / ".hubfs" / "status.json", 2.0)
    except TimeoutError:
        return False
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def prepare(mountpoint: Path) -> bool:
    """Make `mountpoint` ready to be mounted on; returns whether it was created.

    A mount point whose daemon died is repaired: what is left there is unmounted.

    Raises:
        MountError: it is not an empty directory, is in use already, or cannot be created.
    """
    path = canonical(mountpoint)
    while (mount := _top_mount(path)) is not None:
        if mount.filesystem != FILESYSTEM:
            raise MountError(
                f"{path}: something is mounted there already: {mount.source} ({mount.filesystem})",
                hint=f"choose another directory, or `umount {path}`",
            )
        if not is_dead(path):
            raise MountError(f"{path}: hubfs is mounted there already", hint=f"hubfs unmount {path}")
        _run_unmount(path, lazy=True)
    try:
        return _make_empty_directory(path)
    except OSError as error:
        raise MountError(
            f"{path}: cannot be a mount point: {error.strerror}", hint="choose another directory"
        ) from error


def users_of(mountpoint: Path) -> list[User]:
    """The processes that keep `mountpoint` busy, as far as this user may see them.

    A process appears once for each kind of use. One that vanishes meanwhile, or may not be read, is
    left out.
    """
    path = str(canonical(mountpoint))
    users: list[User] = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            kinds = _uses_of(process, path)
            users += [User(int(process.name), _command_of(process), kind) for kind in kinds]
    return sorted(users, key=lambda user: user.pid)


def unmount(mountpoint: Path, *, lazy: bool = False, timeout: float = 20.0) -> None:
    """End a mount, and wait until its daemon is gone.

    Args:
        mountpoint: where it is mounted.
        lazy: take it out of the tree at once, though it is in use. The daemon then lives until its
            last user is gone, and is not waited for while there is one.
        timeout: seconds to wait for the daemon.

    Raises:
        MountError: hubfs is not mounted there, it is busy, or the daemon does not end.
    """
    path = canonical(mountpoint)
    mount = _top_mount(path)
    if mount is None or mount.filesystem != FILESYSTEM:
        what = f"that is {mount.source} ({mount.filesystem})" if mount else "nothing is mounted there"
        raise MountError(f"{path}: not a mount of hubfs: {what}", hint="`hubfs status` lists the mounts")
    pid = _daemon_pid(path)
    # Open the handle before the daemon can go, or its pid may be another process's by then.
    daemon = _Process(pid) if pid else None
    try:
        # Who is in there must be asked before: afterwards /proc no longer shows the mount's path.
        in_use = lazy and bool(users_of(path))
        _run_unmount(path, lazy=lazy)
        if daemon and not in_use and not daemon.wait(timeout):
            raise MountError(
                f"{path}: unmounted, but the daemon (pid {pid}) is still there after {timeout:g} s",
                hint=f"look into its log, or `kill {pid}`",
            )
    finally:
        if daemon:
            daemon.close()


def canonical(mountpoint: Path) -> Path:
    """The path as the kernel lists it, found without asking the file system that is mounted there."""
    path = Path(os.path.abspath(mountpoint))  # Path.absolute leaves `..` in
    for _ in range(40):  # as many links as the kernel follows
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            target = path.readlink()
        except OSError:
            return path  # not a link, or not there: both are its final name
        path = Path(os.path.abspath(path.parent / target))
    raise MountError(f"{mountpoint}: too many symbolic links")


def _mounts(mountinfo: str | None = None) -> list[_Mount]:
    if mountinfo is None:
        mountinfo = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    found = []
    for line in mountinfo.split("\n"):
        before, separator, after = line.partition(" - ")
        mine, behind = before.split(" "), after.split(" ")
        if separator and len(mine) > 4 and len(behind) > 1:
            found.append(_Mount(Path(_unescape(mine[4])), _unescape(behind[0]), _unescape(behind[1])))
    return found


def _unescape(text: str) -> str:
    # The kernel writes space, tab, newline and backslash as three octal digits, byte by byte.
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), os.fsencode(text))
    return os.fsdecode(raw)


def _top_mount(path: Path) -> _Mount | None:
    # Of several mounts on one directory the last one is seen.
    return next((mount for mount in reversed(_mounts()) if mount.path == path), None)


def _read_with_deadline(path: Path, timeout: float) -> bytes:
    """The content of a file below a mount point.

    A system call on a mount whose daemon hangs may not even end for SIGKILL, and a thread in it would
    keep this process from exiting. So a child reads, and is left behind if need be.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
        OSError: it cannot be read; `errno` is ENOTCONN, ENOENT, EACCES, or EIO for anything else.
    """
    reader = subprocess.Popen(
        ["cat", "--", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        cwd="/",
    )
    try:
        content, complaint = reader.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _leave_behind(reader)
        raise TimeoutError(errno.ETIMEDOUT, "no answer", str(path)) from None
    if reader.returncode == 0:
        return content
    text = complaint.decode(errors="replace").strip()
    for number in (errno.ENOTCONN, errno.ENOENT, errno.ENOTDIR, errno.EACCES):
        if text.endswith(os.strerror(number)):
            raise OSError(number, os.strerror(number), str(path))
    raise OSError(errno.EIO, text, str(path))


def _leave_behind(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdout, child.stderr):
        if pipe:
            pipe.close()
    try:
        child.wait(0.2)
    except subprocess.TimeoutExpired:
        pass  # it hangs in the kernel, and is reaped with the next child after the daemon has answered


def _status_error(path: Path, error: OSError) -> MountError:
    if error.errno == errno.ENOTCONN:
        return MountError(
            f"{path}: the mount is dead, its daemon is gone",
            hint=f"mount it again, or `hubfs unmount {path}`",
        )
    if path not in find():
        return MountError(f"{path}: hubfs is not mounted there", hint="`hubfs status` lists the mounts")
    if error.errno == errno.EACCES:
        return MountError(
            f"{path}: the mount belongs to another user", hint="ask as that user, or mount with --allow-other"
        )
    return MountError(f"{path}: the mount's status cannot be read: {error.strerror}")


def _make_empty_directory(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
        return True
    except FileExistsError:
        pass  # the common case; what is there is looked at below
    if not path.is_dir():
        raise MountError(f"{path}: is not a directory", hint="choose an empty directory")
    with os.scandir(path) as entries:
        for entry in entries:
            raise MountError(
                f"{path}: is not empty: {entry.name!r} is in it", hint="choose an empty or a new directory"
            )
    # fusermount3 demands this; root may mount anywhere, also on a read-only file system.
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise MountError(f"{path}: you may not write to it", hint="choose a directory of your own")
    return False


def _uses_of(process: Path, mountpoint: str) -> list[Use]:
    found: list[Use] = []
    if _leads_into(process / "cwd", mountpoint):
        found.append("cwd")
    if _leads_into(process / "root", mountpoint):
        found.append("root")
    try:
        if any(_leads_into(descriptor, mountpoint) for descriptor in (process / "fd").iterdir()):
            found.append("open file")
        with (process / "maps").open("rb") as maps:
            # Address, rights, offset, device, inode, path.
            if any(
                _is_below(os.fsdecode(parts[5].strip()), mountpoint)
                for parts in (line.split(None, 5) for line in maps)
                if len(parts) == 6
            ):
                found.append("mapped file")
    except OSError:
        pass  # it is gone, or is another user's: what is known of it stands
    return found


def _leads_into(link: Path, mountpoint: str) -> bool:
    try:
        return _is_below(os.readlink(link), mountpoint)
    except OSError:
        return False  # gone, or not ours to read


def _is_below(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _command_of(process: Path) -> str:
    try:
        words = os.fsdecode((process / "cmdline").read_bytes()).replace("\0", " ").split()
        return " ".join(words) or (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _daemon_pid(path: Path) -> int | None:
    try:
        pid = status(path).get("pid")
    except MountError:
        return None  # a dead or hanging mount has no daemon to wait for, but can be unmounted
    return pid if isinstance(pid, int) and pid > 0 else None


def _run_unmount(path: Path, *, lazy: bool) -> None:
    if shutil.which("fusermount3"):
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
    elif os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), "--", str(path)]
    else:
        raise MountError(f"{path}: fusermount3 is missing", hint="install it: apt-get install fuse3")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
            cwd="/",
        )
    except subprocess.TimeoutExpired as error:
        raise MountError(f"{path}: {command[0]} does not end", hint=f"hubfs unmount --lazy {path}") from error
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip()
        raise _busy_error(path) if "busy" in complaint else MountError(f"{path}: {complaint}")


def _busy_error(path: Path) -> MountError:
    users = users_of(path)
    shown = [f"{user.command[:60]} (pid {user.pid}, {user.what})" for user in users[:10]]
    if len(users) > len(shown):
        shown.append(f"{len(users) - len(shown)} more")
    who = ", ".join(shown) or "a process that you may not see"
    return MountError(f"{path}: is busy: {who}", hint=f"end what uses it, or `hubfs unmount --lazy {path}`")


class _Process:
    """Waits for the end of a process that need not be a child.

    The handle is a pidfd, which cannot come to mean another process. Where the kernel or a sandbox
    does not give one, the pid is asked for now and then.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except OSError:
            pass  # ESRCH: it is gone, and wait() sees that; ENOSYS, EPERM: wait() polls

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within `timeout` seconds."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(timeout * 1000))
        deadline = time.monotonic() + timeout
        while True:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass  # another user's process is still a process
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
