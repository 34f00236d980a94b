"""A compressed or plain archive -> the bytes of its tar, checked, in bounded memory.

gzip is RFC 1952. isal reads the deflate data and checks the trailer (CRC-32 and length). The header is
read here, because isal 1.9 misreads optional header fields that are split between two inputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from isal import igzip_lib

from hubfs.errors import DamagedError

# isal's stubs declare the exception class as an instance.
_IsalError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]

_GZIP_MAGIC = b"\x1f\x8b"
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0

#: A gzip header has no length limit of its own; file name and comment beyond this are nonsense.
_MAX_HEADER = 1 << 18

#: isal keeps a copy of what it has not used yet: small steps keep that copy small and in the CPU's cache.
_INPUT_STEP = 256 << 10
#: The first step of a gzip member is smaller still: what lies behind the member's end is copied, and an
#: archive may be made of millions of tiny members.
_FIRST_STEP = 4 << 10

#: As many bytes as a tar header has. There are always NUL bytes among them, and never in a text.
_HEAD = 512

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}


def inflate(chunks: Iterable[bytes], *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
    """Decompress an archive if it is gzip, else pass it through as a plain tar; read it to its end.

    Concatenated gzip members make one stream, and zero padding after the last one is allowed.

    Args:
        chunks: the archive in pieces of any size, also empty ones.
        chunk_size: the most bytes of one decompressed piece. To hand on smaller ones costs more CPU time:
            256 KiB 5 % and 64 KiB 20 % of a whole transfer's. Pieces of a plain tar stay as they come.

    Raises:
        DamagedError: empty, truncated, failing a check, followed by other bytes, or neither gzip nor
            tar. Errors of `chunks` go up unchanged.
    """
    # glibc gets what is larger than all it was given back before from the kernel, page fault by page fault,
    # for every piece anew: a tenth of a transfer's CPU time. From here on, pieces are not that large. (With
    # much more than that it would keep more freed memory than is worth it.)
    bytearray(chunk_size + (64 << 10))
    source = _Source(chunks)
    head = source.peek(_HEAD)
    if not head:
        raise DamagedError("the archive is empty: the hub sent no bytes")
    if not _GZIP_MAGIC.startswith(head[:2]):
        _refuse_other(head)
        yield from source.rest()
        return
    while head := source.peek(2):
        if head[0] == 0:
            _check_padding(source)
            return
        if not _GZIP_MAGIC.startswith(head):
            raise DamagedError("the archive goes on after the end of its gzip data with other bytes")
        _skip_header(source)
        yield from _member(source, chunk_size)


class _Source:
    """The chunks as one stream that can be looked at before it is taken."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._view = memoryview(b"")
        self._at = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of input. They stay in place."""
        have = len(self._view) - self._at
        if have < size:
            parts: list[bytes | memoryview] = [self._view[self._at :]]
            for chunk in self._chunks:
                parts.append(chunk)
                have += len(chunk)
                if have >= size:
                    break
            self._view, self._at = memoryview(b"".join(parts)), 0
        return bytes(self._view[self._at : self._at + size])

    def take(self, limit: int) -> memoryview:
        """The next bytes that are at hand, at most `limit`; empty only at the end of input."""
        if self._at == len(self._view):
            self._view, self._at = memoryview(next(filter(None, self._chunks), b"")), 0
        piece = self._view[self._at : self._at + limit]
        self._at += len(piece)
        return piece

    def move(self, count: int) -> None:
        """Drop `count` bytes that were peeked at; if negative, put back bytes of the last piece taken."""
        self._at += count

    def rest(self) -> Iterator[bytes]:
        """All that is left, as it comes."""
        if self._at < len(self._view):
            yield bytes(self._view[self._at :])
        self._view, self._at = memoryview(b""), 0
        yield from self._chunks


def _skip_header(source: _Source) -> None:
    """Read one gzip member's header."""
    head = source.peek(10)
    if len(head) < 10:
        raise _truncated()
    if head[2] != 8:
        raise DamagedError(f"the archive's gzip header names an unknown method ({head[2]})")
    flags = head[3]
    if flags & _RESERVED:
        raise DamagedError(f"the archive's gzip header has unknown flags ({flags:#04x})")
    size = 10
    if flags & _FEXTRA:
        length = _need(source, size + 2)[size:]
        size += 2 + int.from_bytes(length, "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            size = _end_of_text(source, size)
    header = _need(source, size)
    if flags & _FHCRC:
        stored = _need(source, size + 2)[size:]
        if int.from_bytes(stored, "little") != zlib.crc32(header) & 0xFFFF:
            raise DamagedError("the archive's gzip header does not match its checksum")
        size += 2
    source.move(size)


def _end_of_text(source: _Source, start: int) -> int:
    """The offset behind the NUL that ends the text at `start`."""
    reach = start + 64
    while True:
        head = source.peek(reach)
        end = head.find(b"\0", start)
        if end >= 0:
            return end + 1
        if len(head) < reach:
            raise _truncated()
        if reach > _MAX_HEADER:
            raise DamagedError("the archive's gzip header does not end")
        reach *= 2


def _need(source: _Source, size: int) -> bytes:
    head = source.peek(size)
    if len(head) < size:
        raise _truncated()
    return head


def _member(source: _Source, chunk_size: int) -> Iterator[bytes]:
    """Decompress one gzip member, up to and with its trailer."""
    inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP_NO_HDR_VER)
    limit = _FIRST_STEP
    while not inflater.eof:
        step = memoryview(b"")
        if inflater.needs_input:
            step = source.take(limit)
            limit = min(limit * 4, _INPUT_STEP)
            if not step:
                raise _truncated()
        try:
            data = inflater.decompress(step, chunk_size)
        except _IsalError as error:
            raise DamagedError(f"the archive's gzip data is damaged: {error}") from error
        if data:
            yield data
    source.move(-len(inflater.unused_data))


def _check_padding(source: _Source) -> None:
    """After gzip data only zeros may follow once they have begun."""
    for piece in source.rest():
        if piece != bytes(len(piece)):
            raise DamagedError("the archive goes on after the zero padding behind its gzip data")


def _refuse_other(head: bytes) -> None:
    """Say what it is that is neither gzip nor tar, as far as the first bytes tell."""
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DamagedError(f"the hub sent {what} instead of a tar or tar.gz archive")
    if b"\0" in head:
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        raise DamagedError("the hub sent a web page instead of an archive")
    if text.startswith((b"{", b"[")):
        raise DamagedError("the hub sent JSON instead of an archive")
    if head.isascii():
        raise DamagedError("the hub sent text instead of an archive")
    raise DamagedError("the hub sent something that is neither gzip nor tar")


def _truncated() -> DamagedError:
    return DamagedError("the archive is truncated: its gzip data ends too early")
