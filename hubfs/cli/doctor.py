"""`hubfs doctor`: what this machine needs for a mount, whether it is there, and what to do about it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from hubfs.cli.options import with_settings
from hubfs.cli.output import print_json, size
from hubfs.config import Settings
from hubfs.errors import HubfsError
from hubfs.fs.passthrough import obstacle, version

if TYPE_CHECKING:
    import ctypes

#: Below these a download is likely to fail, or to fail soon.
_LITTLE_SPACE = 10 * 2**30
_NO_SPACE = 2**30


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        state: only a "problem" keeps hubfs from working.
        found: what was seen.
        advice: what to do about it; empty if there is nothing to do.
    """

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


@with_settings(
    "hub",
    "cache_dir",
    "shared_cache",
    "trust_cache_dir",
    "offline",
    "verify_certificates",
    "passthrough",
    "allow_other",
)
def doctor(
    settings: Settings,
    as_json: bool = typer.Option(False, "--json", help="print a JSON list, one object a check"),
) -> None:
    """Check this machine, and say what to do about each fault."""
    found = []
    for check in _checks(settings):
        found.append(check)
        if not as_json:
            # One by one: the last of them may wait for the network.
            print(f"{check.state:<8} {check.name}: {check.found}", flush=True)
            if check.advice:
                print(f"         next: {check.advice}", flush=True)
    if as_json:
        print_json([dataclasses.asdict(check) for check in found])
    if any(check.state == "problem" for check in found):
        raise typer.Exit(1)


def _checks(settings: Settings) -> Iterator[Check]:
    directory = Path(settings.cache_dir)
    library = _load_libfuse()
    yield check_python()
    yield check_kernel()
    yield check_device()
    yield check_fusermount()
    yield check_libfuse(library)
    yield check_passthrough(library, settings.passthrough)
    yield check_allow_other(settings.allow_other)
    yield check_cache(directory, settings.trust_cache_dir, settings.cache_is_temporary)
    yield check_space(directory)
    if settings.shared_cache:
        yield check_shared_cache(settings)
    yield check_hub(settings)


def check_python() -> Check:
    """Whether this Python is new enough."""
    found = f"{platform.python_version()} at {sys.executable}"
    if version(platform.python_version()) >= (3, 10):
        return Check("Python", "ok", found)
    return Check("Python", "problem", found, "install hubfs with Python 3.10 or newer")


def check_kernel() -> Check:
    """Whether the kernel is one that hubfs runs on."""
    found = f"{platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        return Check("kernel", "problem", found, "hubfs mounts on Linux only; `hubfs pull` works anywhere")
    if version(platform.release()) < (4, 18):
        return Check(
            "kernel", "warning", found, "use Linux 4.18 or newer: before it, containers cannot mount"
        )
    return Check("kernel", "ok", found)


def check_device(path: Path = Path("/dev/fuse")) -> Check:
    """Whether this user may open the device through which a file system serves the kernel."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        advice = "load the module: modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN"
        return Check(str(path), "problem", "is not there", advice)
    except PermissionError:
        mode = stat.filemode(path.stat().st_mode)
        advice = f"as root: chmod 0666 {path}; in a container, allow the device: --device {path}"
        return Check(str(path), "problem", f"this user may not open it ({mode})", advice)
    except OSError as error:
        advice = "load the module: modprobe fuse; in a container: --device /dev/fuse"
        return Check(str(path), "problem", f"cannot be opened: {error.strerror}", advice)
    return Check(str(path), "ok", "there, and this user may open it")


def check_fusermount() -> Check:
    """Whether the program that mounts for users is there, and allowed to."""
    found = shutil.which("fusermount3")
    if found is None:
        state: Literal["warning", "problem"] = "warning" if os.geteuid() == 0 else "problem"
        return Check("fusermount3", state, "is not in PATH", "install it: apt-get install fuse3")
    mode = Path(found).stat().st_mode
    if os.geteuid() != 0 and not mode & stat.S_ISUID:
        return Check("fusermount3", "problem", f"{found} is not setuid root", f"as root: chmod u+s {found}")
    return Check("fusermount3", "ok", found)


def check_libfuse(library: ctypes.CDLL | None) -> Check:
    """Whether libfuse 3 can be loaded."""
    if library is None:
        advice = "install it: apt-get install fuse3 (or libfuse3-3), dnf install fuse3-libs"
        if os.environ.get("FUSE_LIBRARY_PATH"):
            advice += "; or unset FUSE_LIBRARY_PATH, which names another file"
        return Check("libfuse", "problem", "libfuse 3 is not found", advice)
    found = f"{_libfuse_version(library)} ({library._name})"
    if os.environ.get("FUSE_LIBRARY_PATH"):
        return Check("libfuse", "warning", f"{found}, from FUSE_LIBRARY_PATH", "unset it unless you mean it")
    if (name := os.environ.get("FUSE_LIBRARY_NAME")) not in (None, "", "fuse3"):
        advice = "unset it: hubfs needs libfuse 3 and takes `fuse3`"
        return Check("libfuse", "warning", f"{found}, but FUSE_LIBRARY_NAME is {name}", advice)
    if version(_libfuse_version(library)) < (3, 14):
        # hubfs.fs.parallel needs fuse_session_custom_io.
        advice = "a newer distribution (Debian 12, Ubuntu 24.04) has one that does not"
        return Check("libfuse", "warning", f"{found} looks up names of one directory one at a time", advice)
    return Check("libfuse", "ok", found)


def check_passthrough(library: ctypes.CDLL | None, wanted: bool = True) -> Check:
    """Whether the kernel can read cached files by itself. Nothing depends on it but speed."""
    if not wanted:
        return Check("passthrough", "ok", "turned off")
    reason = obstacle(version(_libfuse_version(library)) if library else (0,))
    if reason:
        return Check("passthrough", "ok", f"not to be had ({reason}); files are read through the daemon")
    return Check("passthrough", "ok", "the kernel reads complete files by itself")


def check_allow_other(wanted: bool, path: Path = Path("/etc/fuse.conf")) -> Check:
    """Whether a mount may be shown to other users."""
    if os.geteuid() == 0:
        return Check("--allow-other", "ok", "root may show a mount to other users")
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []  # not there or not readable is the same as not allowed
    if any(line.strip() == "user_allow_other" for line in lines):
        return Check("--allow-other", "ok", f"allowed by user_allow_other in {path}")
    advice = f"if you need it, let root add the line user_allow_other to {path}"
    return Check("--allow-other", "problem" if wanted else "ok", f"not allowed by {path}", advice)


def check_cache(directory: Path, trusted: bool, temporary: bool) -> Check:
    """Whether the cache directory can be used, and lasts."""
    existing = _nearest(directory)
    if existing != directory:
        if not os.access(existing, os.W_OK | os.X_OK):
            found = f"{directory} is not there, and {existing} cannot be written"
            return Check("cache", "problem", found, "choose another directory with --cache-dir")
        found = f"{directory} is not there yet, and can be made"
    elif not directory.is_dir():
        return Check("cache", "problem", f"{directory} is not a directory", "choose another with --cache-dir")
    else:
        about = directory.stat()
        found = f"{directory}, owner {about.st_uid}, {stat.filemode(about.st_mode)}"
        foreign = about.st_uid != os.geteuid() or bool(about.st_mode & stat.S_IWOTH)
        if foreign and not trusted:
            found += ", belongs to another user or can be written by everybody"
            return Check(
                "cache", "problem", found, "use one of your own, or --trust-cache-dir if you mean it"
            )
        if not os.access(directory, os.W_OK | os.X_OK):
            advice = "cached models are served, but none can be added: choose another with --cache-dir"
            return Check("cache", "warning", f"{found}, cannot be written", advice)
    if temporary:
        advice = "to keep it across reboots: export TFHUB_CACHE_DIR=~/.cache/tfhub_modules"
        return Check("cache", "warning", f"{found}, is temporary", advice)
    return Check("cache", "ok", found)


def check_space(directory: Path) -> Check:
    """Whether there is room for models."""
    existing = _nearest(directory)
    try:
        about = os.statvfs(existing)
    except OSError as error:
        return Check("free space", "problem", f"{existing}: {error.strerror}", "choose another --cache-dir")
    free = about.f_bavail * about.f_frsize
    found = f"{size(free)} at {existing}"
    advice = "free some, or choose a directory on a larger disk with --cache-dir"
    if free < _NO_SPACE:
        return Check("free space", "problem", found, advice)
    if free < _LITTLE_SPACE:
        return Check("free space", "warning", found, advice)
    return Check("free space", "ok", found)


def check_shared_cache(settings: Settings) -> Check:
    """Whether the bucket that many machines share can be read. Whether it can be written shows later."""
    name, url = "shared cache", settings.shared_cache
    if settings.offline:
        return Check(name, "ok", f"{url}: not asked (offline)")
    from hubfs.cache.bucket import Bucket
    from hubfs.hubs.object_store import ObjectStores

    stores = ObjectStores(settings)
    try:
        # Of an object that nobody has, a bucket that may be read says that it is not there.
        Bucket(url, stores, settings).get(url, "hubfs-doctor", 1)
    except HubfsError as error:
        return Check(name, "warning", error.message, error.hint or "hubs are asked without it")
    finally:
        stores.close()
    return Check(name, "ok", f"{url} can be read")


def check_hub(settings: Settings, timeout: float = 5.0) -> Check:
    """Whether the hub answers at all. What it answers does not matter here."""
    if settings.offline:
        return Check("hub", "ok", f"{settings.hub}: not asked (offline)")
    import requests

    try:
        with requests.get(
            settings.hub,
            timeout=timeout,
            allow_redirects=False,
            stream=True,
            verify=settings.verify_certificates,
        ) as answer:
            return Check("hub", "ok", f"{settings.hub} answers (HTTP {answer.status_code})")
    except requests.exceptions.SSLError as error:
        advice = "if a proxy re-signs the traffic, name its certificate in SSL_CERT_FILE"
        return Check(
            "hub", "problem", f"{settings.hub}: its certificate is refused: {_reason(error)}", advice
        )
    except requests.RequestException as error:
        advice = "check the network and https_proxy; without a network use --offline or `hubfs serve`"
        return Check("hub", "problem", f"{settings.hub} does not answer: {_reason(error)}", advice)


def _load_libfuse() -> ctypes.CDLL | None:
    import ctypes.util

    # As mfusepy finds it: a path wins, and hubfs sets the name to fuse3.
    path = os.environ.get("FUSE_LIBRARY_PATH") or ctypes.util.find_library("fuse3")
    if not path:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    return library if hasattr(library, "fuse_session_mount") else None  # libfuse 2 has no such function


def _libfuse_version(library: ctypes.CDLL) -> str:
    import ctypes

    library.fuse_pkgversion.restype = ctypes.c_char_p
    return str(library.fuse_pkgversion().decode())


def _nearest(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next((parent for parent in (path, *path.parents) if os.path.lexists(parent)), Path("/"))


def _reason(error: Exception) -> str:
    # requests wraps the cause in urllib3's own words; the innermost text is what tells.
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return str(cause) or type(error).__name__
