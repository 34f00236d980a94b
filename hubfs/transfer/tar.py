"""A strict reader of tar streams: members and their data, in order, without seeking.

It reads what honest writers write (v7, ustar, pax, GNU long names) and refuses everything else, since two
readers that understand one archive differently are how an archive gets past a check. Header layouts are
those of POSIX.1-2001 (pax) and of GNU tar's manual, "Basic Tar Format". `tarfile.TarInfo.frombuf` is not
used: it takes numbers such as `0o17` and `1_0`, and reads GNU tar's time fields as a name prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hubfs.errors import DamagedError, HostileError, TooLargeError
from hubfs.names import Names, clean, show

BLOCK = 512

#: The most bytes of one pax or long name body.
MAX_EXTENDED = 1 << 20
#: The most headers that may come for each allowed file: a pax and two GNU ones, itself, and repetitions.
_HEADERS_PER_FILE = 8
#: Bytes of padding behind the end marker, beyond `max_bytes`: writers fill a record, a few MiB at most.
_MAX_PADDING = 16 << 20

_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"S": "a sparse file",
}
#: POSIX, GNU and v7. Only the first has a name prefix.
_MAGICS = (b"ustar\0", b"ustar ", bytes(6))
_FILE_TYPES = (b"0", b"\0", b"7")
_SPARSE_KEYS = (b"GNU.sparse.", b"SCHILY.realsize", b"SUN.holesdata")
_CHARSETS = (b"ISO-IR 10646 2000 UTF-8", b"BINARY")

_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_SIZE = re.compile(rb"-?[0-9]{1,20}")
_PAX_TIME = re.compile(rb"(-?[0-9]{1,20})(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Member:
    """One file or directory of an archive.

    Attributes:
        name: relative POSIX path without `.` components; empty for the root. Bytes that are not UTF-8
            are kept as surrogates (PEP 383).
        size: bytes of data; 0 for a directory.
        mtime: seconds since 1970, as the publisher wrote it, however odd.
    """

    name: str
    is_dir: bool
    size: int
    mtime: int


def members(
    chunks: Iterable[bytes], *, max_files: int, max_bytes: int
) -> Iterator[tuple[Member, Iterator[memoryview]]]:
    """Read a tar stream to its very end.

    Each member comes with an iterator over its data, as slices of the chunks. It is valid until the next
    member is asked for; what was not taken from it is skipped then.

    Args:
        chunks: the tar in pieces of any size, also empty ones.
        max_files: the most files and directories, with those that are only implied by others' names.
        max_bytes: the most bytes of all files together.

    Raises:
        HostileError: a member that is not a plain file or directory in a place of its own.
        TooLargeError: more than the limits allow.
        DamagedError: a bad or truncated header, missing data or end marker, bytes after the end marker,
            or no file at all. Errors of `chunks` go up unchanged.
    """
    stream = _Stream(chunks)
    names = Names(max_files)
    extended = _Extended()
    headers = files = total = 0
    while header := _next_header(stream):
        headers += 1
        if headers > _HEADERS_PER_FILE * (max_files + 1):
            raise TooLargeError("the archive has too many headers for the number of files that is allowed")
        if header.kind in b"xgLK":
            extended.read(header, stream)
            continue
        member = extended.apply(header)
        names.add(member.name, is_dir=member.is_dir)
        files += not member.is_dir
        total += member.size
        if total > max_bytes:
            raise TooLargeError(f"the archive holds more than {max_bytes} bytes of files")
        data = stream.pieces(member.size, member.name)
        yield member, data
        for _ in data:
            pass
        stream.skip(-member.size % BLOCK, member.name)
    extended.check_none()
    stream.expect_zeros(max_bytes + _MAX_PADDING)
    if not files:
        raise DamagedError("the archive holds no files")


class _Stream:
    """The chunks as one stream; slices are views, nothing is copied but headers."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._view = memoryview(b"")

    def _fill(self) -> bool:
        while not self._view:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._view = memoryview(chunk)
        return True

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the stream."""
        if len(self._view) < size:
            parts = []
            while size and self._fill():
                parts.append(bytes(self._view[:size]))
                size -= len(parts[-1])
                self._view = self._view[len(parts[-1]) :]
            return b"".join(parts)
        data = bytes(self._view[:size])
        self._view = self._view[size:]
        return data

    def pieces(self, size: int, name: str) -> Iterator[memoryview]:
        """Views of the next `size` bytes, which are data of the member `name`."""
        while size:
            if not self._fill():
                raise DamagedError(f"the archive is truncated in the data of {show(name)}")
            piece = self._view[:size]
            self._view = self._view[len(piece) :]
            size -= len(piece)
            yield piece

    def skip(self, size: int, name: str) -> None:
        for _ in self.pieces(size, name):
            pass

    def expect_zeros(self, limit: int) -> None:
        """Read to the end, where only zeros are allowed, and `limit` of them at most."""
        while self._fill():
            data = bytes(self._view)
            self._view = self._view[:0]
            if data != bytes(len(data)):
                raise DamagedError("the archive goes on after its end marker")
            limit -= len(data)
            if limit < 0:
                raise TooLargeError("the archive has too much padding after its end marker")


@dataclass(frozen=True)
class _Header:
    kind: bytes
    name: bytes
    size: int
    mtime: int

    @property
    def is_v7_directory(self) -> bool:
        return self.kind == b"\0" and self.name.endswith(b"/")


def _next_header(stream: _Stream) -> _Header | None:
    """The next header; None at the end marker.

    Two zero blocks end an archive. One is taken too, as some writers leave it at that, but none at all
    is how an archive looks that was cut between two members.
    """
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise DamagedError(
            "the archive is truncated in a header"
            if block
            else "the archive is truncated: it has no end marker"
        )
    if not any(block):
        return None
    return _decode(block)


def _decode(block: bytes) -> _Header:
    name = block[:100].split(b"\0", 1)[0]
    stored = _number(block[148:156], "checksum", name)
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old writers summed up signed characters.
    if stored != sum(rest) and stored != sum(rest) - 256 * sum(byte >> 7 for byte in rest):
        raise DamagedError(f"the archive has a header with a wrong checksum, or is not a tar: {show(name)}")
    magic = block[257:263]
    if magic not in _MAGICS:
        raise DamagedError(f"the archive has a header of an unknown tar format: {show(name)}")
    if magic == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _Header(
        kind=block[156:157],
        name=name,
        size=_number(block[124:136], "size", name),
        mtime=_number(block[136:148], "time", name),
    )


def _number(text: bytes, what: str, name: bytes) -> int:
    """An octal field, or a base-256 one where the top bit is set (two's complement in the other bits)."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big") - (1 << (8 * len(text) - 1))
        return value - (1 << (8 * len(text) - 1)) if text[0] & 0x40 else value
    match = _OCTAL.fullmatch(text)
    if not match:
        raise DamagedError(f"the archive has a header with a bad {what}: {show(name)}")
    return int(match[1] or b"0", 8)


@dataclass
class _Extended:
    """What pax and GNU headers say about the member that follows them."""

    _local: dict[bytes, bytes] = field(default_factory=dict)
    _global_mtime: int | None = None
    _long_name: bytes | None = None
    _seen: set[bytes] = field(default_factory=set)

    def read(self, header: _Header, stream: _Stream) -> None:
        """Read the body of an extended header."""
        what = show(header.name)
        if not 0 <= header.size <= MAX_EXTENDED:
            raise HostileError(f"the archive has an extended header of {header.size} bytes: {what}")
        if header.kind in self._seen and header.kind != b"g":
            raise DamagedError(f"the archive has two extended headers of one kind for one member: {what}")
        padded = stream.read(header.size + -header.size % BLOCK)
        if len(padded) % BLOCK or len(padded) < header.size:
            raise DamagedError(f"the archive is truncated in an extended header: {what}")
        body, padding = padded[: header.size], padded[header.size :]
        if any(padding):
            # tarfile reads on into the padding: records there would mean one thing here, another there.
            raise HostileError(f"the archive hides bytes behind an extended header: {what}")
        self._seen.add(header.kind)
        if header.kind == b"g":
            self._read_global(body)
        elif header.kind == b"x":
            self._local = _records(body)
        elif header.kind == b"L":
            self._long_name = body.rstrip(b"\0")
        # K, the name of a link, goes with a member that is refused anyway.

    def _read_global(self, body: bytes) -> None:
        records = _records(body)
        if b"path" in records or b"size" in records:
            # POSIX allows it, nobody writes it, and readers disagree on what it means.
            raise HostileError("the archive has one name or size for all of its members")
        if b"mtime" in records:
            self._global_mtime = _pax_time(records[b"mtime"])

    def apply(self, header: _Header) -> Member:
        """The member that `header` and the extended headers before it describe."""
        local, self._local = self._local, {}
        long_name, self._long_name = self._long_name, None
        self._seen.clear()
        raw = local.get(b"path", header.name if long_name is None else long_name)
        if long_name is not None and b"path" in local:
            raise HostileError(f"the archive has a member with two names: {show(raw)}")
        _check_kind(header.kind, raw)
        name = clean(raw)
        size = _pax_size(local[b"size"]) if b"size" in local else header.size
        mtime = header.mtime if self._global_mtime is None else self._global_mtime
        if b"mtime" in local:
            mtime = _pax_time(local[b"mtime"])
        # Before ustar a directory was a file with a slash at its end.
        is_dir = header.kind == b"5" or raw.endswith(b"/")
        named_before = long_name is not None or b"path" in local
        if named_before and header.kind != b"5" and (is_dir or header.is_v7_directory):
            # Only in a header of its own: with a second name readers disagree.
            raise HostileError(f"the archive has a file that some take for a directory: {show(raw)}")
        if min(size, header.size) < 0 or (size and is_dir):
            raise HostileError(f"the archive has a member of an impossible size ({size}): {show(raw)}")
        if not is_dir and raw.rpartition(b"/")[2] == b".":
            raise HostileError(f"the archive has a file in the place of a directory: {show(raw)}")
        return Member(name, is_dir, size, mtime)

    def check_none(self) -> None:
        if self._seen:
            raise DamagedError("the archive ends after an extended header, where a member was expected")


def _records(body: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, `<length> <key>=<value>\\n` each."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 8)
        digits = body[position : max(space, position)]
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = body[space + 1 : max(end - 1, 0)].partition(b"=")
        if not key or not equals or body[end - 1 : end] != b"\n":
            raise DamagedError(
                f"the archive has a damaged pax header: {show(body[position : position + 200])}"
            )
        if key.startswith(_SPARSE_KEYS):
            raise HostileError("the archive has a sparse file, which hubfs does not take")
        if key == b"hdrcharset" and value not in _CHARSETS:
            raise HostileError(f"the archive has names in an unknown character set: {show(value)}")
        if key in (b"path", b"size", b"mtime") and (not value or key in records):
            # Readers disagree on what that means.
            what = "two values" if value else "an empty value"
            raise HostileError(f"the archive has a pax header with {what} of {key.decode()}")
        records[key] = value
        position = end
    return records


def _pax_size(value: bytes) -> int:
    if not _PAX_SIZE.fullmatch(value):
        raise DamagedError(f"the archive has a pax header with a bad size: {show(value)}")
    return int(value)


def _pax_time(value: bytes) -> int:
    match = _PAX_TIME.fullmatch(value)
    if not match:
        raise DamagedError(f"the archive has a pax header with a bad time: {show(value)}")
    # Python writes an exponent only for times that are next to 1970 or beyond all calendars.
    return 0 if match[3] else int(match[1])


def _check_kind(kind: bytes, raw: bytes) -> None:
    if kind in _FILE_TYPES or kind == b"5":
        return
    what = _REFUSED.get(kind, f"a member of unknown type {kind!r}")
    raise HostileError(f"the archive has {what}, and hubfs takes only files and directories: {show(raw)}")
