"""Names, descriptor and lock of the cache directory, as tensorflow_hub 0.16.1 has them (PROTOCOLS §2).

Source: tensorflow_hub's `resolver.py`, `atomic_download` and what it calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hubfs.errors import CacheError, from_os_error

_KEY = re.compile(r"[0-9a-f]{40}")
_TMP = re.compile(r"([0-9a-f]{40})\.([0-9a-f]{32})\.tmp")


@dataclass(frozen=True)
class Layout:
    """The names below one cache directory.

    `<key>/` is the model, `<key>.descriptor.txt` tells its handle, `<key>.lock` who downloads it, into
    `<key>.<uid>.tmp/`. What hubfs adds begins with `<key>.hubfs`.
    """

    root: Path

    def model(self, key: str) -> Path:
        return self.root / key

    def descriptor(self, key: str) -> Path:
        return self.root / f"{key}.descriptor.txt"

    def lock(self, key: str) -> Path:
        return self.root / f"{key}.lock"

    def tmp(self, key: str, uid: str) -> Path:
        return self.root / f"{key}.{uid}.tmp"

    def manifest(self, key: str) -> Path:
        return self.root / f"{key}.hubfs.json"

    def partial(self, key: str) -> Path:
        """A version of which some bytes are there (hubfs.cache.partial)."""
        return self.root / f"{key}.hubfs.partial"

    def last_use(self, key: str) -> Path:
        """An empty file; its modification time is the last use."""
        return self.root / f"{key}.hubfs.used"

    def outgoing(self, key: str) -> Path:
        """Where a damaged model is moved to before it is removed."""
        return self.root / f"{key}.hubfs.{uuid.uuid4().hex}.old"

    def keys(self) -> list[str]:
        """Keys with a directory of their own, in no order."""
        try:
            with os.scandir(self.root) as entries:
                return [e.name for e in entries if _KEY.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def partial_keys(self) -> list[str]:
        """Keys of which there is a partial version, in no order."""
        try:
            with os.scandir(self.root) as entries:
                names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [n[:40] for n in names if re.fullmatch(r"[0-9a-f]{40}\.hubfs\.partial", n)]

    def create(self, trust: bool) -> None:
        """Make the cache directory, private to its user, if it is missing, and see that it can be trusted.

        Raises:
            CacheError: it belongs to somebody else, or everybody may write in it.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.stat()
        except OSError as error:
            raise from_os_error(error, "the cache directory", "creating it") from error
        if not stat.S_ISDIR(status.st_mode):
            raise CacheError(f"{self.root} is not a directory", hint="choose another one with --cache-dir")
        hint = "choose another one with --cache-dir, or set trust_cache_dir if you know who writes there"
        if status.st_uid not in (os.geteuid(), 0) and not trust:
            raise CacheError(f"{self.root} belongs to another user (uid {status.st_uid})", hint=hint)
        if status.st_mode & stat.S_IWOTH and not trust:
            raise CacheError(f"{self.root} may be written by everybody", hint=hint)


def is_present(directory: Path) -> bool:
    """tensorflow_hub's own test: the directory exists and is not empty."""
    try:
        with os.scandir(directory) as entries:
            return next(iter(entries), None) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that nobody ever sees a part of it."""
    temporary = path.with_name(f"{path.name}.tmp{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def descriptor_text(handle: str) -> str:
    """What a descriptor says: which handle a key stands for, and who brought it in."""
    return (
        f"Module: {handle}\nDownload Time: {datetime.now()}\n"
        f"Downloader Hostname: {socket.gethostname()} (PID:{os.getpid()})"
    )


def handle_in(descriptor: bytes) -> str | None:
    """The handle that a descriptor names, `None` if it names none."""
    match = re.match(rb"Module: ([^\r\n]+)", descriptor)
    return match[1].decode("utf8", "surrogateescape") if match else None


def write_descriptor(path: Path, handle: str) -> None:
    """Tell which handle a key stands for."""
    write_atomically(path, descriptor_text(handle))


def read_descriptor(path: Path) -> str | None:
    """The handle that a descriptor names, `None` if there is no readable descriptor."""
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError:
        return None
    return handle_in(head)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, from the lock's content `<host>.<pid>.<uid>`."""

    host: str
    pid: int
    uid: str

    @classmethod
    def of(cls, content: str) -> Owner | None:
        # A host name may have dots in it.
        match = re.fullmatch(r"(.*)\.(\d+)\.([0-9a-zA-Z]+)", content.strip())
        return cls(match[1], int(match[2]), match[3]) if match else None

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to be dead. Of another host's processes nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return _is_zombie(self.pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process is dead and only not reaped yet, for which kill(2) still finds it (proc(5))."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    # The name in parentheses may hold anything.
    return status.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


class DownloadLock:
    """One key's lock, taken by this process for one download."""

    def __init__(self, layout: Layout, key: str) -> None:
        self.uid = uuid.uuid4().hex
        self.path = layout.lock(key)
        self.tmp = layout.tmp(key, self.uid)
        self._layout = layout
        self._key = key
        self._content = f"{socket.gethostname()}.{os.getpid()}.{self.uid}"

    def try_acquire(self) -> bool:
        """Create the lock unless somebody has it. Its content appears together with its name.

        Raises:
            OSError: the directory cannot be written.
        """
        temporary = self.path.with_name(f"{self.path.name}.tmp{uuid.uuid4().hex}")
        try:
            temporary.write_text(self._content, encoding="utf8")
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                # A file system without hard links. Others may see the lock before its content.
                try:
                    with self.path.open("x", encoding="utf8") as file:
                        file.write(self._content)
                except FileExistsError:
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        # tensorflow_hub looks and then renames over: it may have taken the place of our lock just now.
        return self.is_ours

    @property
    def is_ours(self) -> bool:
        return read_lock(self.path) == self._content

    def release(self) -> None:
        """Remove the temporary directory, and the lock if it is still ours."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        if self.is_ours:
            self.path.unlink(missing_ok=True)


def read_lock(path: Path) -> str | None:
    """The content of a lock file, `None` if there is none."""
    try:
        return path.read_text(encoding="utf8", errors="replace")
    except FileNotFoundError:
        return None


def tree_size(directory: Path) -> int:
    """Bytes of all files below; what vanishes meanwhile does not count."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total


class LockWatch:
    """Watches somebody else's lock, to tell when its owner has given up."""

    #: A dead owner's directory must stand still so long before it is taken over, in seconds: a process
    #: of another PID name space may only look dead.
    QUIET = 1.0

    def __init__(self, layout: Layout, key: str, timeout: float) -> None:
        self._layout, self._key, self._timeout = layout, key, timeout
        self._seen: tuple[str, int] | None = None
        self._since = time.monotonic()

    @property
    def size(self) -> int:
        """Bytes in the owner's temporary directory when last looked at."""
        return self._seen[1] if self._seen else 0

    def owner_is_gone(self) -> bool:
        """Whether there is a lock, of a process that is known to be dead."""
        content = read_lock(self._layout.lock(self._key))
        owner = Owner.of(content) if content else None
        return owner is not None and owner.is_gone

    def is_stale(self) -> bool:
        """Whether lock and temporary directory stood still for too long. Call it every second or so."""
        content = read_lock(self._layout.lock(self._key))
        if content is None:
            return False
        owner = Owner.of(content)
        size = tree_size(self._layout.tmp(self._key, owner.uid)) if owner else 0
        if (content, size) != self._seen:
            self._seen, self._since = (content, size), time.monotonic()
            return False
        limit = self.QUIET if owner and owner.is_gone else self._timeout
        return time.monotonic() - self._since >= limit

    def break_lock(self) -> None:
        """Remove the lock and what its owner left, if it is still the one that was watched."""
        if self._seen is None:
            return
        with _exclusive(self._layout.root):
            path, content = self._layout.lock(self._key), self._seen[0]
            if read_lock(path) != content:
                return
            path.unlink()
            owner = Owner.of(content)
        if owner:
            shutil.rmtree(self._layout.tmp(self._key, owner.uid), ignore_errors=True)


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One thread of one process at a time: else who breaks a dead lock could break its successor."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def leftovers(layout: Layout, age: float = 3600.0) -> Iterator[Path]:
    """What dead owners left behind and nobody is going to use: temporary and outgoing names.

    A temporary directory without a lock is only given when nothing changed in it for `age` seconds.
    """
    now = time.time()
    try:
        names = sorted(os.listdir(layout.root))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        path = layout.root / name
        if re.fullmatch(r"[0-9a-f]{40}\.(hubfs\.[0-9a-f]{32}\.old|.*\.tmp[0-9a-f]{32})", name):
            if _newest(path) < now - age:
                yield path
            continue
        match = _TMP.fullmatch(name)
        if match:
            content = read_lock(layout.lock(match[1]))
            owner = Owner.of(content) if content else None
            if (owner is None or owner.uid != match[2]) and _newest(path) < now - age:
                yield path


def locked_keys(layout: Layout) -> list[str]:
    """Keys that have a lock file."""
    try:
        return [n[: -len(".lock")] for n in os.listdir(layout.root) if re.fullmatch(r"[0-9a-f]{40}\.lock", n)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(path: Path) -> None:
    """Remove a file or a directory with all below it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _newest(path: Path) -> float:
    """The latest modification time of a path and what is below it, in epoch seconds."""
    times = [0.0]
    with contextlib.suppress(FileNotFoundError):
        times.append(path.lstat().st_mtime)
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            with contextlib.suppress(FileNotFoundError):
                times.append((Path(folder) / name).lstat().st_mtime)
    return max(times)
