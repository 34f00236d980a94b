"""What can go wrong, with the errno a reader sees for it.

Every error hubfs raises on purpose is a `HubfsError`. It carries its errno, whether trying again can
help, and for how long an entry remembers it; the FUSE adapter and the CLI only translate.
"""

from __future__ import annotations

import errno
import os

#: Seconds for which a failure is remembered: the next reader gets the same answer without a new request.
REMEMBER_NOT_FOUND = 60.0
REMEMBER_FAILURE = 10.0
#: Long enough that all who wait for an answer get it, and no longer.
REMEMBER_BRIEFLY = 1.0


class HubfsError(Exception):
    """Base of all expected failures.

    Attributes:
        errno: the number that a system call on the mount returns.
        temporary: the same request may succeed if it is repeated.
        remember: seconds for which the answer stands.
    """

    errno: int = errno.EIO
    temporary: bool = False
    remember: float = REMEMBER_FAILURE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class NotFoundError(HubfsError):
    """The hub has no such model or version (404, 410)."""

    errno = errno.ENOENT
    remember = REMEMBER_NOT_FOUND


class RefusedError(HubfsError):
    """A name or host that hubfs does not ask for. No packet was sent."""

    errno = errno.ENOENT
    remember = REMEMBER_NOT_FOUND


class OfflineError(HubfsError):
    """Not cached, and the network is not to be used."""

    errno = errno.ENONET
    remember = REMEMBER_BRIEFLY


class AccessError(HubfsError):
    """The hub refused access (401, 403). The message holds the hub's own words."""

    errno = errno.EACCES


class UnavailableError(HubfsError):
    """The hub or the line failed in a way that may pass: 408, 429, 5xx, reset, timeout, short body."""

    temporary = True

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class ProtocolError(HubfsError):
    """The hub answered something that its protocol does not allow."""


class DamagedError(HubfsError):
    """Bytes that are not what the publisher declared: checksum, gzip, tar or manifest mismatch."""


class ChangedOriginError(DamagedError):
    """What the hub gives is another file or archive than when it was found: find it anew."""


class HostileError(DamagedError):
    """An archive that tries to leave its directory or to overwrite: never tried again."""


class TooLargeError(HubfsError):
    """The model is larger than the limits allow."""

    errno = errno.EFBIG


class DiskFullError(HubfsError):
    """No space left where the cache is."""

    errno = errno.ENOSPC


class CacheError(HubfsError):
    """The cache directory cannot be used as it is."""


class ReadOnlyCacheError(CacheError):
    """The model is not cached and the cache directory cannot be written."""

    errno = errno.EROFS


class StalledError(HubfsError):
    """A wait passed its deadline without any progress."""


class ChangedError(HubfsError):
    """An unversioned handle means another version now than when this mount first served it."""

    errno = errno.ESTALE


class InterruptedWait(HubfsError):
    """The reader was signalled while it waited."""

    errno = errno.EINTR
    remember = REMEMBER_BRIEFLY


class StoppedError(HubfsError):
    """The mount is being taken down, or the command was cancelled."""

    errno = errno.ENOTCONN
    remember = REMEMBER_BRIEFLY


class ConfigError(HubfsError):
    """A setting has a value that cannot be used."""

    errno = errno.EINVAL


class MountError(HubfsError):
    """Mounting or unmounting failed."""


def from_status(status: int, handle: str, *, words: str = "", retry_after: float | None = None) -> HubfsError:
    """The error for an HTTP answer that is not a success.

    Args:
        status: HTTP status code.
        handle: the handle that was asked for.
        words: the beginning of the hub's own answer, as plain text.
        retry_after: seconds of the answer's `Retry-After`, if it had one.
    """
    said = f": {words}" if words else ""
    if status in (404, 410):
        return NotFoundError(
            f"{handle}: the hub has no such model (HTTP {status})",
            hint="check the spelling and the version, or open the handle in a browser",
        )
    if status in (401, 403):
        return AccessError(
            f"{handle}: the hub refuses access (HTTP {status}){said}",
            hint="the model may need a licence to be accepted, or credentials",
        )
    if status in (408, 425, 429) or status >= 500:
        return UnavailableError(
            f"{handle}: the hub is not able to answer now (HTTP {status}){said}",
            hint="try again later",
            retry_after=retry_after,
        )
    return ProtocolError(
        f"{handle}: the hub gave an answer that hubfs does not understand (HTTP {status}){said}",
        hint="is this host a model hub?",
    )


def from_os_error(error: OSError, handle: str, doing: str) -> HubfsError:
    """The error for a failed system call on the cache directory while `doing` something for `handle`."""
    path = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes)) else ""
    text = f"{handle}: {doing} failed: {error.strerror}{path}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(text, hint="free some space or choose another directory with --cache-dir")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnlyCacheError(text, hint="choose a writable directory with --cache-dir")
    return CacheError(text)


def internal_error(error: Exception, handle: str) -> HubfsError:
    """What readers get for a bug, which the caller logs with its traceback."""
    return HubfsError(
        f"{handle}: internal error: {error!r}", hint="this is a bug in hubfs; the log has details"
    )
