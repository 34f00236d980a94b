"""Have the kernel look up several names of one directory at the same time.

By default it does one look-up or listing of a directory at a time, so that one which waits for the
network would block a cached model beside it, in a wait that not even SIGKILL ends. The kernel does better
when the answer to FUSE_INIT has the flag FUSE_PARALLEL_DIROPS. libfuse 3.14 to 3.16 drop that flag from
the answer (libfuse pull request 861 mended it in 3.17, where it is off unless wanted), so here it is put
in on the way to the kernel.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Final

log = logging.getLogger(__name__)

#: FUSE_PARALLEL_DIROPS, and libfuse's FUSE_CAP_PARALLEL_DIROPS, which has the same value.
PARALLEL: Final = 1 << 18


class _IoVec(ctypes.Structure):
    """struct iovec of writev(2)."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_WRITEV = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(_IoVec), ctypes.c_int, ctypes.c_void_p
)


class _CustomIo(ctypes.Structure):
    """struct fuse_custom_io of libfuse 3.14."""

    _fields_ = [
        ("writev", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("splice_receive", ctypes.c_void_p),
        ("splice_send", ctypes.c_void_p),
    ]


class _InitOut(ctypes.Structure):
    """The beginning of struct fuse_init_out."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("max_readahead", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    ]


class ParallelLookups:
    """Turns the flag on. Must live as long as the mount: libfuse keeps a pointer into it."""

    def __init__(self, libfuse: Any, version: tuple[int, ...]) -> None:
        self._lib = libfuse
        self._version = version
        self._session = 0
        self._callback: Any = None

    def enable(self, conn: Any, fuse: int) -> bool:
        """Called from the init callback; False where this libfuse cannot do it.

        Args:
            conn: libfuse's `fuse_conn_info`.
            fuse: libfuse's handle of the mount.
        """
        if self._version >= (3, 17):
            # It takes wishes from one of its two fields only, and the other has no room for passthrough.
            conn.want_ext |= conn.capable_ext & PARALLEL
            return True
        conn.want |= conn.capable & PARALLEL
        if not hasattr(self._lib, "fuse_session_custom_io") or not conn.capable & PARALLEL:
            log.warning(
                "libfuse %d.%d lets look-ups of one directory wait for each other", *self._version[:2]
            )
            return False
        self._lib.fuse_get_session.restype = ctypes.c_void_p
        self._session = self._lib.fuse_get_session(ctypes.c_void_p(fuse))
        descriptor = self._lib.fuse_session_fd(ctypes.c_void_p(self._session))
        self._callback = _WRITEV(self._answer_init)
        return self._use_writer(self._callback, descriptor) == 0

    def _answer_init(self, descriptor: int, vectors: Any, count: int, _: Any) -> int:
        """Write the answer to FUSE_INIT with the flag in it, and take Python out of the way again."""
        libc = ctypes.CDLL(None, use_errno=True)
        # The first vector is the header that all answers have.
        if count == 2 and vectors[1].length >= ctypes.sizeof(_InitOut):
            _InitOut.from_address(vectors[1].base).flags |= PARALLEL
        else:
            log.warning("libfuse's answer to FUSE_INIT has an unknown form; look-ups are not parallel")
        self._use_writer(libc.writev, descriptor)
        return int(libc.writev(descriptor, vectors, count))

    def _use_writer(self, writev: Any, descriptor: int) -> int:
        libc = ctypes.CDLL(None)
        # libfuse copies the structure.
        io = _CustomIo(_address(writev), _address(libc.read), None, None)
        return int(
            self._lib.fuse_session_custom_io(ctypes.c_void_p(self._session), ctypes.byref(io), descriptor)
        )


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
