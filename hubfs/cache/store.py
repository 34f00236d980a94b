"""All entries of one cache directory: finding, listing, adopting, cleaning up."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cachetools import LRUCache

from hubfs.cache.blocks import Memory
from hubfs.cache.entry import Entry
from hubfs.cache.fleet import Fleet
from hubfs.cache.index import Index
from hubfs.cache.jobs import EntryJobs
from hubfs.cache.kept import Kept
from hubfs.cache.landing import LOCK_POLL
from hubfs.cache.layout import Layout, LockWatch, is_present, leftovers, locked_keys, remove
from hubfs.cache.listed import Listed
from hubfs.cache.manifest import Manifest, read_or_adopt
from hubfs.cache.partial import BusyError
from hubfs.cache.state import EntryState, State
from hubfs.cache.streamed import Streamed
from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    CacheError,
    HubfsError,
    OfflineError,
    ReadOnlyCacheError,
    RefusedError,
    StoppedError,
    UnavailableError,
)
from hubfs.handles import HandleMap, cache_key, version_of
from hubfs.hubs.base import Hub, Listing, Origin
from hubfs.hubs.bucket import Buckets
from hubfs.hubs.known import hubs
from hubfs.net import Net
from hubfs.transfer.fetch import Fetcher, policy

log = logging.getLogger(__name__)

#: Transfers, and requests that look for a model, that run at the same time.
CARRIERS: Final = 16
LOCATORS: Final = 32
FLEET_LOCATORS: Final = 256
#: Files that are compared with their checksums at a time, and how far that gives way to readers (nice(2)).
CHECKS: Final = 1
NICE: Final = 19
#: Entries kept in memory that are idle. A forgotten one is read from disk again.
IDLE_ENTRIES: Final = 512
#: Failures that status remembers.
FAILURES: Final = 50


@dataclass(frozen=True)
class Failure:
    """A handle that could not be brought in, for status and extended attributes."""

    handle: str
    error: HubfsError
    when: float


class Store:
    """The backing cache. Safe to use from many threads; `close` ends what it started."""

    def __init__(self, settings: Settings, *, keep: bool = False) -> None:
        """
        Args:
            keep: files are kept in the cache even if the load format is `UNCOMPRESSED`.
        """
        self.settings = settings
        self.memory = Memory(settings)
        #: Called with a handle and what its files were when these have changed at the hub.
        self.on_outdated: Callable[[str, Manifest], None] = lambda handle, manifest: None
        self._keeps = keep or settings.load_format is not LoadFormat.UNCOMPRESSED
        self.layout = Layout(Path(settings.cache_dir))
        self.handles = HandleMap(settings.hub, settings.allow_hosts)
        self.net = Net(settings)
        # Who waits for another machine holds one.
        locators = FLEET_LOCATORS if settings.shared_cache else LOCATORS
        self.locators = ThreadPoolExecutor(locators, "hubfs-locate")
        self.carriers = ThreadPoolExecutor(CARRIERS, "hubfs-transfer")
        self.checks = ThreadPoolExecutor(CHECKS, "hubfs-check", _give_way)
        self.index = Index(self.layout, self.handles)
        self.closed = False
        self.started = time.time()
        self._buckets = Buckets(self.net, settings)
        self._fleet = Fleet(settings, keeps=self._keeps) if settings.shared_cache else None
        self._hubs = hubs(self.net, settings, self._buckets)
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # protects the four below
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._first_served: dict[str, Manifest] = {}
        self._next_forgetting = 0.0
        self._fetcher: Fetcher | None = None
        # Entries report while they hold their own lock, hence not the lock above. Protects the two below.
        self._reports_lock = threading.Lock()
        self._running: dict[str, EntryState] = {}
        self._failures: LRUCache[str, Failure] = LRUCache(FAILURES)

    # ---- entries

    def entry(self, handle: str) -> Entry:
        """The entry of a handle, known to exist or not. Nothing is asked or read."""
        forgotten: list[Entry] = []
        with self._lock:
            found = self._entries.get(handle)
            if found is None:
                found = self._entries[handle] = Entry(handle, cache_key(handle), self)
                forgotten = self._forget_idle()
            else:
                self._entries.move_to_end(handle)
        for entry in forgotten:
            entry.stop()
        return found

    def entries(self) -> list[Entry]:
        """Those that are in memory."""
        with self._lock:
            return list(self._entries.values())

    def known_entry(self, handle: str) -> Entry | None:
        """The entry if it is in memory already."""
        with self._lock:
            return self._entries.get(handle)

    def cached_entry(self, handle: str) -> Entry | None:
        """The entry if it is in memory or in the cache. Does not wait for a scan of the cache."""
        known = self.known_entry(handle)
        if known is None and (self.index.has(handle) or is_present(self.layout.model(cache_key(handle)))):
            return self.entry(handle)
        return known

    @property
    def locates_first(self) -> bool:
        """Whether to ask where a version is before its lock is taken.

        Not where it is going to be an archive: so who waits for another process's download asks nobody.
        """
        return self.settings.load_format is not LoadFormat.COMPRESSED or bool(self.settings.shared_cache)

    def locate(self, handle: str, key: str, waiting: Callable[[int], None]) -> Origin:
        """Ask where a version is: the shared cache, the hub.

        Args:
            waiting: told a number that changes while another machine brings it in.

        Raises:
            HubfsError: there is none, or no answer.
        """
        hub = next((hub for hub in self._hubs if hub.supports(handle)), None)
        if hub is None:
            raise RefusedError(f"{handle}: no hub that hubfs knows has such handles")
        if self.settings.offline:
            raise OfflineError(
                f"{handle}: not cached, and hubfs is offline", hint="leave --offline away to download it"
            )
        if self._fleet is None:
            return self._ask(hub, handle)
        return self._fleet.locate(handle, key, lambda: self._ask(hub, handle), waiting)

    def _ask(self, hub: Hub, handle: str) -> Origin:
        """Ask a hub, trying again where that can help."""
        attempt = 0
        while True:
            try:
                return hub.locate(handle, self.settings.load_format)
            except UnavailableError as error:
                attempt += 1
                if attempt > self.settings.retries:
                    raise
                log.info("%s; trying again", error)
                self.net.pause(attempt, error, self._stopping)

    def make_listed(self, entry: EntryJobs, listing: Listing, manifest: Manifest) -> Listed:
        """What reads the files of a listing for an entry.

        Raises:
            HubfsError: the cache cannot be used.
        """
        if self._keeps:
            try:
                return self._keep(entry, listing, manifest)
            except (BusyError, ReadOnlyCacheError) as error:
                log.info("%s; it is read without being kept", error.message)
        return Streamed(listing, self.memory, entry, spare=self._keeps)

    def keep_when_free(self, entry: EntryJobs, listing: Listing, manifest: Manifest) -> Kept | None:
        """Wait for another process that brings a version in; `None` if that has published it.

        Raises:
            HubfsError: the cache cannot be used, or hubfs is being stopped.
        """
        place = self.layout.partial(entry.key) / "map"
        while entry.find_on_disk() is None:
            try:
                return self._keep(entry, listing, manifest)
            except BusyError as error:
                with contextlib.suppress(OSError):
                    entry.waiting(place.stat().st_mtime_ns)
                if self._stopping.wait(LOCK_POLL):
                    raise StoppedError(f"{entry.handle}: hubfs is being stopped") from error
        return None

    def _keep(self, entry: EntryJobs, listing: Listing, manifest: Manifest) -> Kept:
        self.layout.create(self.settings.trust_cache_dir)
        with self._lock:
            if self._fetcher is None:
                self._fetcher = Fetcher(policy(self.settings))
            fetcher = self._fetcher
        return Kept(listing, manifest, entry.key, self.layout, fetcher, self.checks, self.settings, entry)

    def outdated(self, handle: str, manifest: Manifest) -> None:
        """A version's files have changed at the hub."""
        self.on_outdated(handle, manifest)

    def find_on_disk(self, entry: EntryState) -> tuple[Manifest, Path] | None:
        """The version in the cache directory, if it is there and whole."""
        found = self._whole(entry.key, entry.handle)
        for key in () if found else self.index.other_keys(entry.handle, entry.key):
            found = found or self._whole(key, entry.handle)
        return found

    def first_served(self, handle: str, manifest: Manifest) -> Manifest:
        """What an unversioned handle meant when it was first served; `manifest` if that is now."""
        if version_of(handle) is not None:
            return manifest
        with self._lock:
            return self._first_served.setdefault(handle, manifest)

    def note_running(self, entry: EntryState, runs: bool) -> None:
        """An entry's transfer begins or ends."""
        with self._reports_lock:
            if runs:
                self._running[entry.handle] = entry
            else:
                self._running.pop(entry.handle, None)
        if self._fleet is not None:
            self._fleet.note_running(entry.key, runs)

    def running(self) -> list[EntryState]:
        """Entries whose bytes are on their way."""
        with self._reports_lock:
            return list(self._running.values())

    def known_handles(self) -> list[str]:
        """Those whose bytes are on their way, or whose files are known without being in the cache."""
        with self._reports_lock:
            known = dict.fromkeys(self._running)
        for entry in self.entries():
            if entry.is_under_way():
                known[entry.handle] = None
        return list(known)

    def note_published(self, entry: EntryState, manifest: Manifest, directory: Path) -> None:
        """A version was brought into the cache."""
        self.note_use(entry.key)
        self.index.add(entry.key, entry.handle)
        if self._fleet is not None:
            self._fleet.note_published(entry.handle, entry.key, directory, manifest)

    def finish_sharing(self, stop: threading.Event) -> None:
        """Wait until what was brought in is in the shared tier too, or could not be put there."""
        if self._fleet is not None:
            self._fleet.finish(stop)

    def note_failure(self, handle: str, error: HubfsError) -> None:
        with self._reports_lock:
            self._failures[handle] = Failure(handle, error, time.time())

    def note_use(self, key: str) -> None:
        try:
            path = self.layout.last_use(key)
            path.touch()
            os.utime(path)
        except OSError as error:
            log.debug("the last use of %s cannot be noted: %s", key, error)

    def failures(self) -> list[Failure]:
        """The latest failures, oldest first."""
        with self._reports_lock:
            return sorted(self._failures.values(), key=lambda failure: failure.when)

    # ---- the whole

    def clean_up(self) -> None:
        """Remove what dead owners left behind. Others' running work is not touched."""
        for key in locked_keys(self.layout):
            watch = LockWatch(self.layout, key, self.settings.lock_timeout)
            while watch.owner_is_gone() and not self._stopping.is_set():
                if watch.is_stale():
                    log.info("removing the lock and the files of a dead download: %s", key)
                    watch.break_lock()
                    break
                self._stopping.wait(0.2)
        for path in leftovers(self.layout):
            log.info("removing a leftover of a dead process: %s", path)
            remove(path)

    def status(self) -> dict[str, Any]:
        """The parts of status.json that are about the cache."""
        # Nothing comes of a version that is only streamed but what is read just now.
        snapshots = [entry.snapshot() for entry in self.running()]
        running = [found for found in snapshots if found.state != State.LOCATED.value]
        models, size = self.index.totals()
        total, free = self.space()
        return {
            "cache": {
                "dir": str(self.layout.root),
                "size": size,
                "models": models,
                "free": free if total else None,
            },
            "shared_cache": self._fleet and {"url": self._fleet.url, "uploads": self._fleet.uploads},
            "transfers": [
                {
                    "handle": s.handle, "state": s.state, "received": s.received, "total": s.total,
                    "written": s.written, "rate": s.rate, "waiting": s.waiting,
                }
                for s in running
            ],
            "failures": [
                {
                    "handle": f.handle, "error": str(f.error), "when": f.when,
                    "until": f.when + f.error.remember,
                }
                for f in self.failures()
            ],
        }  # fmt: skip

    def space(self) -> tuple[int, int]:
        """Bytes of the file system that the cache is on: all, and free for this user."""
        try:
            usage = shutil.disk_usage(self.layout.root)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # Streaming needs no cache directory.
            return 0, 0
        return usage.total, usage.free

    def prepare(self) -> None:
        """Load what the first request to a hub needs, before there is one."""
        self.net.prepare()
        if self.settings.load_format is not LoadFormat.COMPRESSED:
            self._buckets.prepare()

    def begin_close(self) -> None:
        """Let go of everybody who waits, and tell transfers to stop."""
        self.closed = True
        self._stopping.set()
        self.net.shut_down()
        self._buckets.shut_down()
        self.memory.close()
        if self._fleet is not None:
            self._fleet.begin_close()
        for entry in self.entries():
            entry.stop()

    def close(self) -> None:
        """Stop all transfers, remove what they had written, and wait for that."""
        self.begin_close()
        self.locators.shutdown(wait=True, cancel_futures=True)
        self.carriers.shutdown(wait=True, cancel_futures=True)
        for entry in self.entries():
            entry.wait_ended()
        self.checks.shutdown(wait=True, cancel_futures=True)
        if self._fetcher is not None:
            self._fetcher.close()
        if self._fleet is not None:
            self._fleet.close()
        self._buckets.close()
        self.net.close()

    # ---- within

    def _whole(self, key: str, handle: str) -> tuple[Manifest, Path] | None:
        """The version that is cached under a key, if all of it is there."""
        directory = self.layout.model(key)
        if not is_present(directory):
            return None
        try:
            manifest, is_new = read_or_adopt(directory, self.layout.manifest(key), handle)
        except FileNotFoundError:
            return None
        except CacheError as error:
            log.warning("%s; it will be fetched again", error)
            return None
        if is_new:
            self._save_manifest(manifest, key, directory)
        return manifest, directory

    def _forget_idle(self) -> list[Entry]:
        if len(self._entries) <= IDLE_ENTRIES or time.monotonic() < self._next_forgetting:
            return []
        self._next_forgetting = time.monotonic() + 1
        # One that was given out just now may be about to be used.
        limit = time.monotonic() - 1
        idle = [h for h, e in self._entries.items() if e.touched < limit and e.is_idle]
        too_many = max(0, len(self._entries) - IDLE_ENTRIES * 3 // 4)
        return [self._entries.pop(handle) for handle in idle[:too_many]]

    def _save_manifest(self, manifest: Manifest, key: str, directory: Path) -> None:
        try:
            manifest.save(self.layout.manifest(key), directory)
        except OSError as error:
            # A shared cache that is read-only for us: its models are served all the same.
            log.debug("the manifest of %s cannot be kept: %s", key, error)


def _give_way() -> None:
    """Let all other threads go first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
