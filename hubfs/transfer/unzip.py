"""A strict reader of zip archives, with the face of `hubfs.transfer.tar`.

The standard library's `zipfile` takes the archive apart, and checks the CRC-32 of each member. Refused is
here what it would let pass: links, other places, two names for one member, more than the limits allow.
Layouts are those of PKWARE's APPNOTE.TXT 6.3.
"""

from __future__ import annotations

import calendar
import itertools
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from hubfs.errors import DamagedError, HostileError, TooLargeError
from hubfs.names import Names, clean, show
from hubfs.transfer.tar import Member

#: How a zip begins, with a member or (an empty one) with its end.
BEGINNINGS: Final = (b"PK\x03\x04", b"PK\x05\x06")

#: Bytes of one read.
_BLOCK = 1 << 20
#: The most bytes of the central directory, which is held in memory: about 1 KiB for each of 64,000 members.
_MAX_DIRECTORY = 64 << 20
#: The most bytes by which the archive may be larger than the files in it may be.
_MAX_OVERHEAD = 64 << 20
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UTF_8 = 0x800
_DOS_DIRECTORY, _DOS_VOLUME, _DOS_REPARSE = 0x10, 0x08, 0x400
_EXTENDED_TIME, _UNICODE_PATH = 0x5455, 0x7075
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_LOCAL_HEADER = 30
#: What `zipfile` and `zlib` raise for bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error,
    OverflowError,
)  # fmt: skip


@contextmanager
def spooled(chunks: Iterable[bytes], path: Path, *, max_bytes: int) -> Iterator[BinaryIO]:
    """The archive in a file, since its directory is at its end. The file is removed at the end of the block.

    Args:
        path: of the file, which must not exist.
        max_bytes: the most bytes of all files in the archive together.

    Raises:
        TooLargeError: the archive is larger than one of such files could be.
        OSError: it cannot be written. Errors of `chunks` go up unchanged.
    """
    with os.fdopen(os.open(path, _NEW_FILE, 0o600), "w+b", buffering=0) as file:
        try:
            size = 0
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes + _MAX_OVERHEAD:
                    raise TooLargeError(f"the archive has more than {max_bytes} bytes")
                view = memoryview(chunk)
                while view:
                    view = view[os.write(file.fileno(), view) :]
            yield file
        finally:
            path.unlink(missing_ok=True)


def members(
    file: BinaryIO, *, max_files: int, max_bytes: int
) -> Iterator[tuple[Member, Iterator[memoryview]]]:
    """The members of a zip, in the order of their bytes. All names are checked before the first one comes.

    Each comes with an iterator over its data, valid until the next member is asked for. To its end it must
    be read, for the check of its length and CRC-32.

    Args:
        max_files: the most files and directories, with those that are only implied by others' names.
        max_bytes: the most bytes of all files together.

    Raises:
        HostileError: a member that is not a plain file or directory in a place of its own, or is encrypted.
        TooLargeError: more than the limits allow.
        DamagedError: it is no zip, is truncated, fails a check, or holds no file.
    """
    count = _check_end(file, max_files)
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise DamagedError(f"the archive is no whole zip: {error}") from error
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len(infos) != count:
        # One member's comment may hide others from readers that do not count.
        raise DamagedError(f"the archive lists {len(infos)} members, and its end says {count}")
    _check_places(infos)
    names = Names(max_files)
    found = []
    for info in infos:
        member = _member(info)
        names.add(member.name, is_dir=member.is_dir)
        found.append((member, info))
    if sum(member.size for member, _ in found) > max_bytes:
        raise TooLargeError(
            f"the archive holds more than {max_bytes} bytes of files",
            hint="a larger --max-model-size allows it",
        )
    if all(member.is_dir for member, _ in found):
        raise DamagedError("the archive holds no files")
    for member, info in found:
        yield member, iter(()) if member.is_dir else _data(archive, info, member)


def _data(archive: zipfile.ZipFile, info: zipfile.ZipInfo, member: Member) -> Iterator[memoryview]:
    left = member.size
    try:
        with archive.open(info) as data:
            while piece := data.read(_BLOCK):
                left -= len(piece)
                yield memoryview(piece)
    except _DAMAGE as error:
        raise DamagedError(f"the archive is damaged in {show(member.name)}: {error}") from error
    if left:
        raise DamagedError(f"the archive has less data than it says in {show(member.name)}")


def _check_end(file: BinaryIO, max_files: int) -> int:
    """Look at the end record, before all that it announces is read into memory; returns how many members."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _END.size - _END_64.size - _LOCATOR_64.size - 0xFFFF)
    file.seek(start)
    tail = file.read(size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise DamagedError("the archive is truncated: it is a zip without an end")
    _, disk, disk_of_directory, here, count, length, offset, comment = _END.unpack_from(tail, at)
    if disk or disk_of_directory or here != count:
        raise DamagedError("the archive is one of several parts of a zip")
    if at + _END.size + comment != len(tail):
        raise DamagedError("the archive goes on after its end")
    end = start + at
    if tail.startswith(b"PK\x06\x07", max(0, at - _LOCATOR_64.size)):
        before = at - _LOCATOR_64.size - _END_64.size
        if before < 0 or not tail.startswith(b"PK\x06\x06", before):
            raise DamagedError("the archive has a damaged end")
        *_, count, length, offset = _END_64.unpack_from(tail, before)
        end = start + before
    if count > max_files:
        raise TooLargeError(
            f"the archive holds more than {max_files} files and directories",
            hint="a larger --max-model-files allows it",
        )
    if length > _MAX_DIRECTORY:
        raise TooLargeError(f"the archive's directory has more than {_MAX_DIRECTORY} bytes")
    if offset + length != end:
        raise DamagedError("the archive's directory is not where its end says")
    return int(count)


def _check_places(infos: list[zipfile.ZipInfo]) -> None:
    """No byte of the archive stands for two members: that is how a small one unpacks to a huge one."""
    for info, following in itertools.pairwise(infos):
        least = _LOCAL_HEADER + len(info.orig_filename) + info.compress_size
        if info.header_offset + least > following.header_offset:
            raise HostileError(
                f"the archive has members that overlap: {show(info.orig_filename)}, "
                f"{show(following.orig_filename)}"
            )


def _member(info: zipfile.ZipInfo) -> Member:
    raw = _raw_name(info)
    extra = dict(_extra_fields(info.extra))
    if info.flag_bits & _ENCRYPTED:
        raise HostileError(f"the archive is encrypted, and hubfs has no password: {show(raw)}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise HostileError(
            f"the archive has a member compressed by a method that hubfs does not know "
            f"({info.compress_type}): {show(raw)}"
        )
    if b"\\" in raw:
        # A part of the name for some readers, and for others what a slash is.
        raise HostileError(f"the archive has a member with a backslash in its name: {show(raw)}")
    other = extra.get(_UNICODE_PATH)
    if other is not None and other[5:] != raw:
        raise HostileError(f"the archive has a member with two names: {show(raw)}")
    is_dir = raw.endswith(b"/")
    _check_kind(info, is_dir)
    if is_dir and (info.file_size or info.compress_size > 2):  # the deflated form of nothing has two bytes
        raise HostileError(f"the archive has a directory with data in it: {show(raw)}")
    if not is_dir and raw.rpartition(b"/")[2] == b".":
        raise HostileError(f"the archive has a file in the place of a directory: {show(raw)}")
    return Member(clean(raw), is_dir, info.file_size, _time(info, extra))


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    """A member's name in UTF-8, which many writers use without saying so; it is cp437 then, by the book."""
    name = info.orig_filename
    if info.flag_bits & _UTF_8:
        return name.encode()
    raw = name.encode("cp437")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return name.encode()
    return raw


def _check_kind(info: zipfile.ZipInfo, is_dir: bool) -> None:
    """Refuse what the attributes of whatever system made it say to be no plain file or directory."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    dos = info.external_attr & 0xFFFF
    # Of Unix only the upper half counts; what others have there is no mode.
    if stat.S_ISLNK(kind) or dos & _DOS_REPARSE:
        what = "a symbolic link"
    elif dos & _DOS_VOLUME:
        what = "a volume label"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a device or the like"
    elif (stat.S_ISDIR(kind) and not is_dir) or (stat.S_ISREG(kind) and is_dir):
        what = "a member that some take for a directory and some for a file"
    elif dos & _DOS_DIRECTORY and not is_dir:
        what = "a file that some take for a directory"
    else:
        return
    raise HostileError(
        f"the archive has {what}, and hubfs takes only files and directories: {show(info.orig_filename)}"
    )


def _time(info: zipfile.ZipInfo, extra: dict[int, bytes]) -> int:
    """Seconds since 1970: from the extended time stamp, or from the plain one as if it were UTC."""
    stamp = extra.get(_EXTENDED_TIME, b"")
    if len(stamp) >= 5 and stamp[0] & 1:
        return int.from_bytes(stamp[1:5], "little", signed=True)
    try:
        return calendar.timegm((*info.date_time, 0, 0, 0))
    except ValueError:
        return 0  # no day of any calendar


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        yield kind, extra[at + 4 : at + 4 + length]
        at += 4 + length
