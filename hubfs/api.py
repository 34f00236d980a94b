"""The Python API: what the command line does, for programs. Imports nothing heavy before it is used."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hubfs.config import Settings
from hubfs.errors import HubfsError, InterruptedWait, StoppedError
from hubfs.handles import host_to_allow

if TYPE_CHECKING:
    from hubfs.cache.models import Model
    from hubfs.cache.state import Snapshot
    from hubfs.cache.store import Store

#: Models that `pull` brings in at the same time.
PARALLEL: Final = 4
_PROGRESS_INTERVAL: Final = 0.1


@dataclass(frozen=True)
class TransferStatus:
    """How far a model is.

    Attributes:
        state: waiting, transferring, complete, cached or failed.
        received, total: bytes of the archive; `total` is `None` if the hub does not say.
        written: bytes of files.
        rate: bytes a second.
    """

    handle: str
    state: str
    received: int
    total: int | None
    written: int
    rate: float


@dataclass(frozen=True)
class Pulled:
    """What became of one handle.

    Attributes:
        path: the model's directory in the cache, `None` if it could not be brought in.
        size: bytes of its files.
        cached: it was there already.
    """

    handle: str
    path: str | None
    size: int
    cached: bool
    error: HubfsError | None


@contextmanager
def mount(mountpoint: str | Path, settings: Settings | None = None, **overrides: Any) -> Iterator[Path]:
    """Mount for the length of a `with` block; gives the mount point.

    Args:
        settings: as loaded from environment and config file if not given.
        overrides: single settings by name, such as `hub="http://127.0.0.1:8500"`.

    Raises:
        HubfsError: it could not be mounted, or not be unmounted at the end (then it is detached lazily).
    """
    from hubfs import daemon, mounts

    path = Path(mountpoint).absolute()
    daemon.start(_settings(settings, overrides), path)
    try:
        yield path
    finally:
        try:
            mounts.unmount(path)
        except HubfsError:
            mounts.unmount(path, lazy=True)
            raise


def resolve(handle: str, settings: Settings | None = None, **overrides: Any) -> str:
    """The model's directory in the cache, as `hub.resolve` would give it; downloaded if needed.

    Raises:
        HubfsError: there is no such model, or it could not be brought in.
    """
    [found] = pull([handle], _settings(settings, overrides))
    if found.error is not None:
        raise found.error
    assert found.path is not None
    return found.path


def pull(
    handles: Sequence[str],
    settings: Settings | None = None,
    *,
    on_progress: Callable[[TransferStatus], None] | None = None,
    cancel: threading.Event | None = None,
    **overrides: Any,
) -> list[Pulled]:
    """Bring models into the cache, several at once.

    Args:
        handles: URLs, or paths at the default hub. A host that is named here may be asked.
        on_progress: called about ten times a second for each handle that is not done, and once at its end.
        cancel: setting it stops all transfers; nothing half-done is left.

    Returns:
        one result a handle, in their order. Failures are in the results, not raised.
    """
    from hubfs.cache.store import Store

    settings = _settings(settings, overrides)
    named = {host_to_allow(handle) for handle in handles}
    settings = dataclasses.replace(settings, allow_hosts=(*settings.allow_hosts, *sorted(named - {""})))
    store = Store(settings, keep=True)
    pool = ThreadPoolExecutor(PARALLEL, "hubfs-pull")
    stop = cancel or threading.Event()
    try:
        jobs = [pool.submit(_pull_one, store, handle, stop, on_progress) for handle in handles]
        results = [job.result() for job in jobs]
        store.finish_sharing(stop)
        return results
    finally:
        store.begin_close()
        pool.shutdown(wait=True, cancel_futures=True)
        store.close()


def models(settings: Settings | None = None, prefix: str = "") -> list[Model]:
    """Models in the cache whose handle, or path at the default hub, begins with `prefix`."""
    from hubfs.cache import models as cached
    from hubfs.cache.layout import Layout

    settings = _settings(settings, {})
    return list(cached.prefixed(cached.models(Layout(Path(settings.cache_dir))), prefix, settings.hub))


def _settings(settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    if settings is None:
        return Settings.load(overrides)
    return dataclasses.replace(settings, **overrides)


def _pull_one(
    store: Store, text: str, stop: threading.Event, on_progress: Callable[[TransferStatus], None] | None
) -> Pulled:
    from hubfs.cache.readable import Wait

    report = on_progress or (lambda status: None)
    cached = False
    try:
        handle = store.handles.handle_of(text)
        entry = store.entry(handle)
        cached = entry.peek() is not None
        timer = _Reporter(lambda: report(_status(text, entry.snapshot())))
        with timer:
            path = entry.bring_in(Wait(store.settings.read_timeout, stop.is_set))
        manifest = entry.peek()
        size = manifest.size if manifest else 0
    except HubfsError as error:
        if isinstance(error, InterruptedWait):
            error = StoppedError(f"{text}: stopped")
        report(TransferStatus(text, "failed", 0, None, 0, 0.0))
        return Pulled(text, None, 0, False, error)
    report(TransferStatus(text, "cached" if cached else "complete", size, size, size, 0.0))
    return Pulled(text, str(path), size, cached, None)


def _status(text: str, snapshot: Snapshot) -> TransferStatus:
    state = "transferring" if snapshot.received else "waiting"
    return TransferStatus(text, state, snapshot.received, snapshot.total, snapshot.written, snapshot.rate)


class _Reporter:
    """Calls a function at intervals, in a thread of its own."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hubfs-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_PROGRESS_INTERVAL):
            self._function()
