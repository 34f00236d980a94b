"""The shared tier: a bucket behind the backing cache, common to many machines, in tensorflow_hub's layout.

`<key>/` is a version, `<key>.descriptor.txt` tells its handle, `<key>.lock` who brings it in, by way of
`<key>.<uid>.tmp/` (PROTOCOLS §2). hubfs adds `<key>.hubfs.json`, with the checksums of all files.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubfs.cache.bucket import Bucket
from hubfs.cache.holder import Holder, Lease, uptime
from hubfs.cache.layout import handle_in
from hubfs.cache.lease import MAX_LOCK, Action, Policy, Seen, Watch, lock_of, tmp_of, token_of, uid_of
from hubfs.cache.manifest import FileInfo, incomplete
from hubfs.cache.publish import Publication, SharedManifest, descriptor_of, manifest_of
from hubfs.config import Settings
from hubfs.errors import (
    AccessError,
    DamagedError,
    HubfsError,
    OfflineError,
    StoppedError,
    TooLargeError,
)
from hubfs.hubs.base import Listing, Origin, RemoteFile
from hubfs.hubs.bucket import md5_of
from hubfs.hubs.object_store import ObjectStores

if TYPE_CHECKING:
    from obstore import UpdateVersion

log = logging.getLogger(__name__)

#: A manifest has some 150 bytes a file.
_MAX_MANIFEST = 64 << 20
_MAX_DESCRIPTOR = 8192
#: How long a bucket that failed is left alone, so that each reader does not wait for it anew; in seconds.
_LEFT_ALONE = 30.0
#: The same for leases in a bucket that may only be read.
_READ_ONLY = 600.0


@dataclass(frozen=True)
class Located:
    """
    Attributes:
        origin: the version in the shared tier, or at its hub.
        lease: to bring it into the tier, or to be released.
        shared: whether `origin` is in the tier.
    """

    origin: Origin
    lease: Lease | None = None
    shared: bool = False


class SharedTier:
    """Versions in a bucket. Safe to use from many threads.

    Args:
        url: `gs://bucket/prefix` or `s3://bucket/prefix`.
        stores: closed by its owner, after this.

    Raises:
        RefusedError: the URL is no such path.
    """

    def __init__(
        self, url: str, stores: ObjectStores, settings: Settings, policy: Policy | None = None
    ) -> None:
        self._settings = settings
        self._policy = policy or Policy(foreign=settings.lock_timeout)
        # A reader waits for these: who has another place to ask does not insist.
        patience = replace(settings, retries=1)
        self._bucket = Bucket(url, stores, patience)
        self._uploads = Bucket(url, stores, settings)
        self._holder = Holder(self._bucket, self._policy)
        self._lock = threading.Lock()  # protects what follows
        self._left_alone = 0.0
        self._read_only = 0.0

    def find(self, handle: str, key: str, cancel: threading.Event | None = None) -> Listing | None:
        """The version, if it is complete there; its files have the manifest's checksums.

        `None` too if the bucket cannot be asked: that is logged.

        Raises:
            StoppedError: `cancel` was set, or hubfs is being stopped.
        """
        if not self._is_usable():
            return None
        try:
            return self._complete(handle, key, cancel)
        except StoppedError:
            raise
        except HubfsError as error:
            self._leave_alone(error)
        return None

    def locate(
        self,
        handle: str,
        key: str,
        ask_hub: Callable[[], Origin],
        *,
        lease: bool,
        cancel: threading.Event,
        waiting: Callable[[int], None],
    ) -> Located:
        """Where the version is: in the tier, or at its hub, which one machine at a time is sent to.

        Args:
            ask_hub: called at most once. What it raises goes up, and others may try.
            lease: whether the version will be put into the tier. If not, nobody is waited for.
            cancel: ends the wait.
            waiting: told a number that is another one whenever the machine that is waited for has moved on.

        Raises:
            StoppedError: `cancel` was set, or hubfs is being stopped.
            HubfsError: from `ask_hub`. That the bucket fails is logged only, and the hub is asked.
        """
        taken: Listing | Lease | None = None
        if self._is_usable():
            try:
                taken = self._complete(handle, key, cancel)
                if taken is None and lease and self._may_write():
                    taken = self._wait(handle, key, cancel, waiting)
            except StoppedError:
                raise
            except HubfsError as error:
                self._leave_alone(error)
        if isinstance(taken, Listing):
            return Located(taken, shared=True)
        try:
            return Located(ask_hub(), taken)
        except BaseException:
            if taken is not None:
                taken.release()
            raise

    def put(
        self, lease: Lease, directory: Path, files: Mapping[str, FileInfo], cancel: threading.Event
    ) -> None:
        """Bring the lease's version in, complete or not at all, and release the lease in any case.

        Args:
            directory: where the files are; they must not change meanwhile.
            files: all of them.

        Raises:
            LeaseLostError: another machine may be doing the same now.
            StoppedError: `cancel` was set, or hubfs is being stopped.
            DamagedError: a file on this disk is not what `files` says, or one in the bucket is not it.
            HubfsError: the bucket cannot be written.
        """
        try:
            Publication(self._uploads, lease, directory, files, cancel).run()
        finally:
            lease.release()

    def close(self) -> None:
        """Give all leases back. The stores are to be closed after this, and nothing asked for."""
        self._holder.close()

    def _wait(
        self, handle: str, key: str, cancel: threading.Event, waiting: Callable[[int], None]
    ) -> Listing | Lease | None:
        """The version once it is complete, or the lease; `None` if this machine may have none."""
        watch = Watch(self._policy, random.random)
        was_there = False
        while True:
            seen, version = self._seen(handle, key, cancel)
            action = watch.look(uptime(), seen)
            waiting(watch.moved)
            if seen is None:
                # The lock's owner has published it, or given up.
                found = self._complete(handle, key, cancel) if was_there else None
            else:
                found = self._published(handle, key, cancel)
            if found is not None:
                return found
            was_there = True
            if action is not Action.WAIT:
                try:
                    lease = self._holder.acquire(handle, key, version, cancel)
                except AccessError as error:
                    self._note_read_only(error)
                    return None
                if lease is not None:
                    return self._found_or(lease, cancel)
            if cancel.wait(watch.pause()):
                raise StoppedError(f"{handle}: the wait for another machine was given up")

    def _found_or(self, lease: Lease, cancel: threading.Event) -> Listing | Lease:
        """Look again, now that nobody else may bring it in."""
        try:
            found = self._complete(lease.handle, lease.key, cancel, mine=True)
        except BaseException:
            lease.release()
            raise
        if found is None:
            return lease
        lease.release()
        return found

    def _seen(
        self, handle: str, key: str, cancel: threading.Event
    ) -> tuple[Seen | None, UpdateVersion | None]:
        """The lock, and what it is to be overwritten by."""
        lock = self._bucket.get(handle, lock_of(key), MAX_LOCK, cancel)
        if lock is None:
            return None, None
        content = lock.content.decode("utf-8", "replace")
        uid = uid_of(content)
        if uid is None or token_of(content) is not None:
            return Seen(content), lock.version
        return Seen(content, self._bucket.size(handle, tmp_of(key, uid), cancel)), lock.version

    def _complete(
        self, handle: str, key: str, cancel: threading.Event | None, *, mine: bool = False
    ) -> Listing | None:
        """The version, whoever has put it there.

        Args:
            mine: the lock, if there is one, is this machine's.
        """
        try:
            content = self._bucket.get(handle, manifest_of(key), _MAX_MANIFEST, cancel)
            if content is not None:
                return self._checked(handle, key, content.content, cancel)
            return self._adopted(handle, key, cancel, mine)
        except (DamagedError, TooLargeError) as error:
            log.warning("%s: what is in the shared tier is not used: %s", handle, error)
            return None

    def _published(self, handle: str, key: str, cancel: threading.Event) -> Listing | None:
        """The version, if hubfs has put it there; looked for while there is a lock."""
        there = self._bucket.get(handle, manifest_of(key), _MAX_MANIFEST, cancel) is not None
        return self._complete(handle, key, cancel) if there else None

    def _checked(
        self, handle: str, key: str, content: bytes, cancel: threading.Event | None
    ) -> Listing | None:
        manifest = SharedManifest.decode(content)
        if manifest is None or manifest.handle != handle:
            problem: str | None = "its manifest cannot be understood"
        else:
            files, _ = self._bucket.files(handle, key, cancel)
            problem = manifest.disagreement(self._bucket.place.scheme, files)
            if problem is None:
                return self._listing(handle, key, manifest.located(files))
        log.info("%s: %s is damaged: %s", handle, self._bucket.where(key), problem)
        return None

    def _adopted(self, handle: str, key: str, cancel: threading.Event | None, mine: bool) -> Listing | None:
        """The version, if tensorflow_hub has put it there and looks to have come to an end.

        In this order: it writes the descriptor, then fills `<key>/`, then removes its lock.
        """
        bucket = self._bucket
        descriptor = bucket.get(handle, descriptor_of(key), _MAX_DESCRIPTOR, cancel)
        if descriptor is None or handle_in(descriptor.content) != handle:
            return None
        if not mine and bucket.get(handle, lock_of(key), MAX_LOCK, cancel) is not None:
            return None
        files, directories = bucket.files(handle, key, cancel)
        problem = incomplete({n: FileInfo(f.size, f.mtime) for n, f in files.items()}, directories)
        if problem is None and bucket.uploads(handle, key, cancel):
            problem = "was left by an owner who died"
        if problem is not None:
            log.info("%s: %s %s", handle, bucket.where(key), problem)
            return None
        scheme = bucket.place.scheme
        return self._listing(
            handle, key, {name: replace(f, md5=md5_of(scheme, f.etag)) for name, f in files.items()}
        )

    def _listing(self, handle: str, key: str, files: Mapping[str, RemoteFile]) -> Listing:
        return Listing(handle, files, self._bucket.source(key), self._bucket.where(key))

    def _is_usable(self) -> bool:
        with self._lock:
            return not self._settings.offline and time.monotonic() >= self._left_alone

    def _may_write(self) -> bool:
        with self._lock:
            return time.monotonic() >= self._read_only

    def _leave_alone(self, error: HubfsError) -> None:
        """Ask hubs only for a while."""
        with self._lock:
            known = time.monotonic() < self._left_alone
            self._left_alone = time.monotonic() + _LEFT_ALONE
        if not known and not isinstance(error, OfflineError):
            log.warning("the shared tier %s cannot be used now: %s", self._bucket.place, error)

    def _note_read_only(self, error: AccessError) -> None:
        with self._lock:
            self._read_only = time.monotonic() + _READ_ONLY
        log.info("the shared tier %s is only read: %s", self._bucket.place, error)
