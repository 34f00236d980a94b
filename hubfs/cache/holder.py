"""Leases that this machine holds in the shared tier, and the thread that renews them."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from hubfs.cache.bucket import Bucket, UnsupportedError
from hubfs.cache.lease import MAX_LOCK, Policy, Term, content_of, lock_of, new_token, token_of
from hubfs.errors import HubfsError, ProtocolError, StoppedError

if TYPE_CHECKING:
    from obstore import UpdateVersion

log = logging.getLogger(__name__)

#: How long a renewal may take: others can be told in time that it failed.
_RENEWAL_SECONDS = 5.0
#: How long giving leases back may take when hubfs is being stopped; who is late leaves them to grow stale.
_CLOSING_SECONDS = 5.0


def uptime() -> float:
    """Seconds, going on while the machine is suspended: others go on as well."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseLostError(HubfsError):
    """Others have taken this machine for dead, or may do so any moment."""


class Lease:
    """The right to bring one version into the shared tier.

    Attributes:
        lost: set when others may have it. Nothing may be published then.
        token: the part of the lock's content, and of the temporary names, that is its owner's alone.
    """

    def __init__(self, holder: Holder, handle: str, key: str, term: Term) -> None:
        self.handle = handle
        self.key = key
        self.token = new_token(uuid.uuid4().hex)
        self.lost = threading.Event()
        self._holder = holder
        # Only its holder uses what follows, in one thread at a time.
        self._term = term
        self._renewals = 0
        self._version: UpdateVersion = {}

    def check(self) -> None:
        """
        Raises:
            LeaseLostError: it is lost.
        """
        if self.lost.is_set() or self._term.is_over(self._holder.clock()):
            raise LeaseLostError(
                f"{self.handle}: another machine may have taken over the shared tier's lease"
            )

    def release(self) -> None:
        """Let others have it. Harmless if it is lost, or was released before."""
        self._holder.release(self)


class Holder:
    """All leases of this machine. Safe to use from many threads.

    Args:
        clock: seconds; never that of the wall.
    """

    def __init__(self, bucket: Bucket, policy: Policy, clock: Callable[[], float] = uptime) -> None:
        self.clock = clock
        self._bucket = bucket
        self._policy = policy
        self._closing = threading.Event()
        #: Protects the two attributes below; not held while the bucket is asked.
        self._changed = threading.Condition(threading.Lock())
        self._held: list[Lease] = []
        self._thread: threading.Thread | None = None

    def acquire(
        self, handle: str, key: str, instead_of: UpdateVersion | None, cancel: threading.Event
    ) -> Lease | None:
        """The lease, if nobody has it; `None` if somebody else was faster.

        Args:
            instead_of: the version of a dead owner's lock.

        Raises:
            AccessError: the bucket cannot be written.
            HubfsError: it cannot be reached.
        """
        lease = Lease(self, handle, key, Term(self._policy, self.clock()))
        try:
            version = self._write(lease, instead_of, cancel)
        except UnsupportedError as error:
            raise ProtocolError(
                f"{handle}: {self._bucket.place}: the store cannot create an object on a condition: {error}",
                hint="use another store as shared tier",
            ) from error
        if version is None:
            return None
        lease._version = version
        with self._changed:
            if not self._closing.is_set():
                self._held.append(lease)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="hubfs-leases", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
                return lease
        self._give_back(lease, _CLOSING_SECONDS)
        raise StoppedError(f"{handle}: hubfs is being stopped")

    def release(self, lease: Lease) -> None:
        with self._changed:
            if lease not in self._held:
                return
            self._held.remove(lease)
        self._give_back(lease, _RENEWAL_SECONDS)

    def close(self) -> None:
        """Give all leases back, and end the thread."""
        with self._changed:
            self._closing.set()
            held, thread = self._held, self._thread
            self._held, self._thread = [], None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        end = time.monotonic() + _CLOSING_SECONDS
        for lease in held:
            self._give_back(lease, max(0.1, end - time.monotonic()))

    def _write(
        self, lease: Lease, instead_of: UpdateVersion | None, cancel: threading.Event
    ) -> UpdateVersion | None:
        name, content = lock_of(lease.key), _content(lease)
        try:
            return self._bucket.write(lease.handle, name, content, instead_of, cancel)
        except UnsupportedError:
            if instead_of is None:
                raise
        # A store that only knows conditional creation. Of two who do this, one creates.
        self._bucket.remove(lease.handle, [name], cancel)
        return self._bucket.write(lease.handle, name, content, None, cancel)

    def _run(self) -> None:
        while (lease := self._next_due()) is not None:
            self._renew(lease)

    def _next_due(self) -> Lease | None:
        """Waits until a lease must be renewed; `None` when all is over."""
        with self._changed:
            while not self._closing.is_set():
                first = min(self._held, key=lambda lease: lease._term.due, default=None)
                left = None if first is None else first._term.due - self.clock()
                if first is not None and left is not None and left <= 0:
                    return first
                # Bounded: a suspended machine's clock goes on, and this wait does not.
                self._changed.wait(None if left is None else min(left, self._policy.renew))
        return None

    def _renew(self, lease: Lease) -> None:
        started = self.clock()
        try:
            lease.check()
            lease._renewals += 1
            version = self._confirm(lease)
            if version is None:
                raise LeaseLostError(f"{lease.handle}: another machine has the shared tier's lease now")
        except LeaseLostError as error:
            self._lose(lease, error)
        except StoppedError:
            lease._term.failed(self.clock())
        except HubfsError as error:
            log.info("%s: the lease in the shared tier could not be renewed: %s", lease.handle, error)
            lease._term.failed(self.clock())
        else:
            lease._version = version
            lease._term.renewed(started)

    def _confirm(self, lease: Lease) -> UpdateVersion | None:
        """The lock's new version; `None` if it is another owner's."""
        name, content = lock_of(lease.key), _content(lease)
        try:
            version = self._bucket.write(
                lease.handle, name, content, lease._version, self._closing, _RENEWAL_SECONDS
            )
            conditional = True
        except UnsupportedError:
            version, conditional = None, False
        if version is not None:
            return version
        found = self._bucket.get(lease.handle, name, MAX_LOCK, self._closing, _RENEWAL_SECONDS)
        if found is None or token_of(found.content.decode("utf-8", "replace")) != lease.token:
            return None
        if conditional:
            return found.version  # An earlier renewal did arrive; only its answer was lost.
        return self._bucket.overwrite(lease.handle, name, content, self._closing, _RENEWAL_SECONDS)

    def _lose(self, lease: Lease, error: LeaseLostError) -> None:
        with self._changed:
            if lease not in self._held:
                return  # It was released meanwhile, and its lock is gone.
            self._held.remove(lease)
        log.warning("%s", error)
        lease.lost.set()

    def _give_back(self, lease: Lease, seconds: float) -> None:
        """Remove the lock, if it is still this lease's."""
        name = lock_of(lease.key)
        try:
            lease.check()
            found = self._bucket.get(lease.handle, name, MAX_LOCK, seconds=seconds)
            if found is not None and token_of(found.content.decode("utf-8", "replace")) == lease.token:
                self._bucket.remove(lease.handle, [name], seconds=seconds)
        except HubfsError as error:
            log.info("%s: the lease in the shared tier is left to grow stale: %s", lease.handle, error)


def _content(lease: Lease) -> bytes:
    return content_of(socket.gethostname(), os.getpid(), lease.token, lease._renewals).encode()
