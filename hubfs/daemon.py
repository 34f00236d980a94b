"""The process behind a mount: starting it in the background, readiness, stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import logging.handlers
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from hubfs import heap, mounts
from hubfs.config import LoadFormat, Settings
from hubfs.errors import ConfigError, HubfsError, MountError
from hubfs.version import __version__

log = logging.getLogger(__name__)

#: Seconds for the daemon to come up, or to say why it does not.
START_TIMEOUT: Final = 30.0
_LOG_BYTES: Final = 5_000_000
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Readahead that the kernel is asked for where the daemon may set it, in KiB: larger requests cost the
#: daemon fewer turns. Measured (PROTOCOLS §4): three times the speed of the default of 128.
_READ_AHEAD_KIB: Final = 4096


def start(settings: Settings, mountpoint: Path) -> int:
    """Mount in the background and return when the mount answers.

    Returns:
        the daemon's process id.

    Raises:
        HubfsError: it did not come up; the message is the daemon's own reason.
    """
    mountpoint = Path(os.path.abspath(mountpoint))  # resolve() would touch a dead mount
    settings = dataclasses.replace(settings, log_file=settings.log_file or str(default_log_file(mountpoint)))
    ready, ready_in_child = os.pipe()
    order = json.dumps(
        {"settings": settings.to_flags(), "mountpoint": str(mountpoint), "ready": ready_in_child}
    ).encode()
    package_root = str(Path(__file__).resolve().parents[1])
    command = f"import sys; sys.path.insert(0, {package_root!r}); from hubfs.daemon import main; main()"
    with tempfile.TemporaryFile() as words, os.fdopen(ready, "rb", closefd=True) as answers:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
                pass_fds=[ready_in_child],
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(ready_in_child)
        # The order fits into a pipe; the process forks off the daemon and ends.
        process.communicate(order)
        answer = _read_answer(answers, words)
    if "error" in answer:
        kind = ConfigError if answer.get("config") else MountError
        raise kind(answer["error"], hint=answer.get("hint", ""))
    return int(answer["pid"])


def run(settings: Settings, mountpoint: Path, on_ready: Callable[[], None] = lambda: None) -> None:
    """Mount, and serve until unmounted or told to stop by SIGTERM, SIGINT or SIGHUP.

    Must be called from the main thread. Logs to standard error, or to the log file of the settings.

    Raises:
        HubfsError: it could not be mounted.
    """
    # Imported here: `hubfs mount` in the background does not need them.
    from hubfs.cache.manifest import Manifest
    from hubfs.cache.store import Store
    from hubfs.fs import libfuse
    from hubfs.fs.control import Control
    from hubfs.fs.operations import Operations
    from hubfs.fs.passthrough import ReadModes
    from hubfs.fs.tree import Tree

    mountpoint = Path(os.path.abspath(mountpoint))
    mounts.prepare(mountpoint)
    with _logging(settings), _Stopper() as stopper:
        _raise_file_limit()
        heap.tune()
        store = Store(settings)
        if settings.load_format is not LoadFormat.UNCOMPRESSED:
            store.layout.create(settings.trust_cache_dir)
        about = _about(settings, mountpoint, lambda: ops.open_files)
        read_modes = ReadModes(settings.passthrough)
        tree = Tree(store, Control(store, read_modes, about))

        def ready(session: int) -> None:
            def exit_session() -> None:
                try:
                    store.begin_close()
                    ops.end()
                finally:
                    libfuse.end(session)

            stopper.arm(exit_session)
            threading.Thread(
                target=_after_start,
                args=(store, read_modes, mountpoint, on_ready),
                name="hubfs-start",
                daemon=True,
            ).start()

        def outdated(handle: str, manifest: Manifest) -> None:
            ops.outdated(tree.paths_of(handle, manifest))

        store.on_outdated = outdated
        ops = Operations(tree, read_modes, store.layout.root, settings.read_timeout, ready)
        log.info(
            "hubfs %s: mounting %s on %s, cache %s", __version__, settings.hub, mountpoint, settings.cache_dir
        )
        try:
            libfuse.serve(ops, str(mountpoint), source=settings.hub, allow_other=settings.allow_other)
        except RuntimeError as error:
            raise MountError(
                f"{mountpoint}: libfuse could not mount (code {error})", hint="`hubfs doctor` finds out why"
            ) from error
        finally:
            tree.close()
            log.info("unmounted %s", mountpoint)


def default_log_file(mountpoint: Path) -> Path:
    """Where a background mount logs unless told otherwise."""
    home = os.environ.get("XDG_STATE_HOME") or os.environ.get("HOME", "") + "/.local/state"
    base = Path(home) if Path(home).is_absolute() else Path(tempfile.gettempdir())
    return base / "hubfs" / (str(mountpoint).strip("/").replace("/", "-") + ".log")


def main() -> None:
    """Entry of the background process: reads its order from standard input, forks, mounts."""
    order = json.load(sys.stdin)
    if os.fork():
        # The one that was waited for; the daemon belongs to init from now on.
        os._exit(0)
    ready: int = order["ready"]

    def answer(**found: Any) -> None:
        os.write(ready, (json.dumps(found) + "\n").encode())

    def on_ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 2)
        os.close(null)
        try:
            answer(pid=os.getpid())
        except BrokenPipeError:
            # Whoever wanted the mount has given up, and said that there is none.
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(ready)

    try:
        run(
            Settings.load(order["settings"], environ={}, config_file=Path(os.devnull)),
            Path(order["mountpoint"]),
            on_ready,
        )
    except HubfsError as error:
        with contextlib.suppress(OSError):
            answer(error=error.message, hint=error.hint, config=isinstance(error, ConfigError))
        sys.exit(1)


def _read_answer(answers: IO[bytes], words: IO[bytes]) -> dict[str, Any]:
    """What the daemon reports; if it says nothing, what it (or libfuse) wrote to standard error."""
    readable, _, _ = select.select([answers], [], [], START_TIMEOUT)
    line = answers.readline() if readable else b""
    found: dict[str, Any] = json.loads(line) if line else {
        "error": "the mount does not come up" if not readable else "the daemon ended before the mount was up",
        "hint": "try `hubfs mount --foreground`, or `hubfs doctor`",
    }  # fmt: skip
    if "error" in found:
        words.seek(0)
        said = " ".join(words.read(4096).decode("utf8", "replace").split())
        if said:
            found["error"] = f"{found['error']}: {said[-500:]}"
    return found


def _after_start(store: Any, read_modes: Any, mountpoint: Path, on_ready: Callable[[], None]) -> None:
    """What need not be done before the mount answers."""
    # This very process is asked, by way of the kernel: once that worked, everybody can.
    os.statvfs(mountpoint)
    read_modes.probe(store.layout.root)
    on_ready()
    _notify_systemd(f"READY=1\nMAINPID={os.getpid()}")
    try:
        _raise_read_ahead(mountpoint)
        store.prepare()
        store.index.refresh()
        store.clean_up()
        store.index.totals()
    except OSError as error:
        log.warning("looking through the cache failed: %s", error)


def _about(
    settings: Settings, mountpoint: Path, open_files: Callable[[], int]
) -> Callable[[], dict[str, Any]]:
    started = time.time()

    def about() -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": str(mountpoint),
            "hub": settings.hub,
            "load_format": settings.load_format.value,
            "offline": settings.offline,
            "started": started,
            "open_files": open_files(),
            "log_file": settings.log_file,
        }

    return about


class _Stopper:
    """Turns a stop signal into an orderly end.

    The main thread is inside libfuse, so a handler in Python would never run: the signals are blocked
    and a thread waits for them.
    """

    def __init__(self) -> None:
        self._exit: Callable[[], None] | None = None
        self._finished = threading.Event()
        self._main = threading.get_ident()

    def arm(self, exit_session: Callable[[], None]) -> None:
        self._exit = exit_session

    def __enter__(self) -> _Stopper:
        self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        # Wakes the main thread out of libfuse's wait, no more.
        self._old_handler = signal.signal(signal.SIGUSR1, lambda *_: None)
        self._thread = threading.Thread(target=self._wait, name="hubfs-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()
        signal.signal(signal.SIGUSR1, self._old_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)

    def _wait(self) -> None:
        while not self._finished.is_set():
            found = signal.sigtimedwait(_STOP_SIGNALS, 0.2)
            if found is None:
                continue
            log.info("%s: stopping", signal.Signals(found.si_signo).name)
            while self._exit is None:
                if self._finished.wait(0.05):
                    return
            try:
                self._exit()
            except Exception:
                log.exception("internal error while stopping")
            while not self._finished.wait(0.05):
                signal.pthread_kill(self._main, signal.SIGUSR1)
            return


@contextlib.contextmanager
def _logging(settings: Settings) -> Iterator[None]:
    handler: logging.Handler
    if settings.log_file:
        path = Path(settings.log_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(
                # Names in archives need not be UTF-8.
                path,
                maxBytes=_LOG_BYTES,
                backupCount=1,
                encoding="utf8",
                errors="backslashreplace",
            )
        except OSError as error:
            raise ConfigError(f"log_file: {path} cannot be written: {error.strerror}") from error
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("hubfs").setLevel(settings.log_level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _raise_file_limit() -> None:
    """Each open file of a reader is one of the daemon's too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _raise_read_ahead(mountpoint: Path) -> None:
    device = mountpoint.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if os.geteuid() != 0:
        return
    try:
        path.write_text(str(_READ_AHEAD_KIB))
    except OSError as error:
        log.debug("the kernel's readahead stays as it is: %s", error)


def _notify_systemd(message: str) -> None:
    """sd_notify(3), for units of Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        try:
            notifier.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError as error:
            log.warning("systemd could not be told: %s", error)
