"""What an HTTP status or a failed system call becomes, and which errno a reader sees for it."""

from __future__ import annotations

import errno
import inspect

import pytest

from hubfs import errors
from hubfs.errors import (
    AccessError,
    CacheError,
    ChangedError,
    DamagedError,
    DiskFullError,
    HostileError,
    HubfsError,
    InterruptedWait,
    NotFoundError,
    OfflineError,
    ProtocolError,
    ReadOnlyCacheError,
    RefusedError,
    StalledError,
    TooLargeError,
    UnavailableError,
    from_os_error,
    from_status,
)

HANDLE = "https://tfhub.dev/google/m/1"
ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, HubfsError)]


@pytest.mark.parametrize(
    ("kind", "number", "temporary"),
    [
        (NotFoundError, errno.ENOENT, False),
        (RefusedError, errno.ENOENT, False),
        (AccessError, errno.EACCES, False),
        (OfflineError, errno.ENONET, False),
        (UnavailableError, errno.EIO, True),
        (ProtocolError, errno.EIO, False),
        (DamagedError, errno.EIO, False),
        (HostileError, errno.EIO, False),
        (TooLargeError, errno.EFBIG, False),
        (DiskFullError, errno.ENOSPC, False),
        (ReadOnlyCacheError, errno.EROFS, False),
        (CacheError, errno.EIO, False),
        (StalledError, errno.EIO, False),
        (ChangedError, errno.ESTALE, False),
        (InterruptedWait, errno.EINTR, False),
    ],
)
def test_reader_sees(kind: type[HubfsError], number: int, temporary: bool) -> None:
    error = kind("it failed")
    assert (error.errno, error.temporary) == (number, temporary)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_an_errno_a_memory_and_one_line_to_say(kind: type[HubfsError]) -> None:
    error = kind("it failed", hint="do this")
    assert str(error) == "it failed; do this"
    assert str(kind("it failed")) == "it failed"
    assert error.errno in errno.errorcode
    assert 0 < error.remember <= 60
    assert kind.__doc__


def test_only_missing_models_are_remembered_for_a_minute() -> None:
    assert {kind for kind in ALL if kind.remember == 60.0} == {NotFoundError, RefusedError}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFoundError),
        (410, NotFoundError),
        (401, AccessError),
        (403, AccessError),
        (408, UnavailableError),
        (425, UnavailableError),
        (429, UnavailableError),
        (500, UnavailableError),
        (502, UnavailableError),
        (503, UnavailableError),
        (504, UnavailableError),
        (599, UnavailableError),
        (204, ProtocolError),
        (304, ProtocolError),
        (400, ProtocolError),
        (405, ProtocolError),
        (418, ProtocolError),
    ],
)
def test_status_becomes(status: int, kind: type[HubfsError]) -> None:
    error = from_status(status, HANDLE)
    assert type(error) is kind
    assert HANDLE in error.message
    assert str(status) in error.message
    assert error.hint


@pytest.mark.parametrize("status", [401, 403, 429, 500, 400])
def test_hubs_own_words_are_passed_on(status: int) -> None:
    assert "SignatureDoesNotMatch" in str(from_status(status, HANDLE, words="SignatureDoesNotMatch"))


def test_retry_after_is_kept() -> None:
    error = from_status(503, HANDLE, retry_after=7.0)
    assert isinstance(error, UnavailableError)
    assert error.retry_after == 7.0


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EROFS, ReadOnlyCacheError),
        (errno.EACCES, ReadOnlyCacheError),
        (errno.EPERM, ReadOnlyCacheError),
        (errno.EIO, CacheError),
        (errno.ENAMETOOLONG, CacheError),
    ],
)
def test_failed_system_call_becomes(number: int, kind: type[HubfsError]) -> None:
    error = from_os_error(OSError(number, "why", "/cache/x"), HANDLE, "writing to the cache")
    assert type(error) is kind
    for part in (HANDLE, "writing to the cache", "why", "/cache/x"):
        assert part in error.message


def test_failed_system_call_without_a_file_name_reads_well() -> None:
    error = from_os_error(OSError(errno.ENOSPC, "No space left on device"), HANDLE, "writing to the cache")
    assert error.message == f"{HANDLE}: writing to the cache failed: No space left on device"
    assert "--cache-dir" in error.hint


def test_bytes_file_name_is_shown_as_text() -> None:
    error = from_os_error(OSError(errno.EIO, "why", b"/cache/x"), HANDLE, "reading")
    assert "(/cache/x)" in error.message
