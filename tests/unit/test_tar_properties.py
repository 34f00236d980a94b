"""Properties of the tar reader: other readers see the same in what it takes, and so does it in any pieces."""

from __future__ import annotations

import io
import itertools
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfs.errors import DamagedError, HostileError, TooLargeError
from hubfs.transfer.tar import Member, members
from tests.tars import END, base256, file, gnu_long, header, padded, pax, raw_pax, record


def read(archive: bytes, cuts: tuple[int, ...] | list[int] = ()) -> dict[Member, bytes]:
    """What an archive holds that comes in pieces that end at `cuts`."""
    ends = [0, *sorted(min(cut, len(archive)) for cut in cuts), len(archive)]
    chunks = [archive[start:end] for start, end in itertools.pairwise(ends)]
    found = members(chunks, max_files=1000, max_bytes=1 << 40)
    return {member: b"".join(data) for member, data in found}


_COMPONENT = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
)
_PATH = st.lists(_COMPONENT.filter(lambda part: part not in (".", "..")), min_size=1, max_size=4).map(
    "/".join
)


def ordinary(paths: list[str]) -> list[str]:
    """Those of `paths` that can be files of one model together."""
    chosen: list[str] = []
    for path in paths:
        try:
            read(b"".join(pax({b"path": one.encode()}) + file(b"x") for one in [*chosen, path]) + END)
        except HostileError:
            continue
        chosen.append(path)
    return chosen


@settings(deadline=None, max_examples=150)
@given(
    paths=st.lists(_PATH, min_size=1, max_size=6),
    data=st.lists(st.binary(max_size=1500), min_size=6, max_size=6),
    mtime=st.integers(0, 8**11 - 1),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    cuts=st.lists(st.integers(0, 20_000)),
)
def test_what_tarfile_writes(
    paths: list[str], data: list[bytes], mtime: int, form: int, cuts: list[int]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as writer:
        for path, content in zip(ordinary(paths), data, strict=False):
            info = tarfile.TarInfo(path)
            info.size, info.mtime = len(content), mtime
            try:
                writer.addfile(info, io.BytesIO(content))
            except ValueError:
                continue  # Too long a name for ustar.
    archive = buffer.getvalue()
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as reader:
        expected = {}
        for info in reader:
            content = reader.extractfile(info)
            assert content is not None
            expected[Member(info.name.strip("/"), False, info.size, int(info.mtime))] = content.read()
    if not expected:
        return
    assert read(archive, cuts) == expected


_NAMES = st.sampled_from(
    [b"a", b"./a", b"d/a", b"d", b"d/", b"./d/", b"d//b", b"./", b".", b"", b"..", b"/a", b"d/../a", b"d/.",
     b"caf\xe9", "ü".encode(), b"n" * 100, b"a b", b"A", b"b", b"c", b"d/c", b"e/f"]
)  # fmt: skip
_KINDS = st.sampled_from([b"0", b"0", b"0", b"\0", b"7", b"5", b"1", b"2", b"S", b"Z"])
_DATA = st.one_of(st.just(b""), st.binary(max_size=1100))
_SPELLINGS = st.sampled_from(
    [lambda size: size, base256, lambda size: b"%12o" % size, lambda size: (b"%o" % size).ljust(12, b"\0")]
)
_BAD_SIZES = st.sampled_from([bytes(12), b"0o000000004\0", b"0000000_004\0", b"-0000000004\0", base256(-1)])
_TIMES = st.one_of(st.integers(0, 1 << 33), st.just(base256(-5)))
_MAGICS = st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\x00xx", b"other"])
_PREFIXES = st.sampled_from([b"p", b"p/q", b"/p", b".."])
_RECORDS = st.one_of(
    st.builds(record, st.just(b"path"), _NAMES),
    st.builds(record, st.just(b"size"), st.sampled_from([b"0", b"4", b"1100", b"-4", b""])),
    st.builds(record, st.just(b"mtime"), st.sampled_from([b"5", b"5.5", b"-1.5", b"1e-05", b"nan", b"0x5"])),
    st.builds(record, st.sampled_from([b"comment", b"SCHILY.xattr.user.a"]), st.binary(max_size=20)),
    st.sampled_from([record(b"hdrcharset", b"BINARY"), record(b"linkpath", b"x")]),
    st.sampled_from([record(b"GNU.sparse.major", b"1"), b"9 path=x\n", b"99 path=x\n", b"\0\0"]),
)
_MEMBERS = st.one_of(
    st.builds(file, _NAMES, _DATA, kind=_KINDS),
    st.builds(
        lambda name, data, spelt, mtime, magic: (
            header(name, size=spelt(len(data)), mtime=mtime, magic=magic) + padded(data)
        ),
        _NAMES, _DATA, _SPELLINGS, _TIMES, _MAGICS,
    ),
    # Only with the magic of POSIX: tarfile takes what others have there for a prefix, too.
    st.builds(file, _NAMES, _DATA, prefix=_PREFIXES),
    st.builds(header, _NAMES, size=_BAD_SIZES),
    st.lists(_RECORDS, max_size=2).map(b"".join).map(raw_pax),
    st.lists(_RECORDS, max_size=1).map(b"".join).map(lambda body: raw_pax(body, b"g")),
    st.builds(gnu_long, _NAMES),
)  # fmt: skip


def as_tarfile_reads(archive: bytes) -> list[tuple[str, bool, int, bytes]]:
    found = []
    options = {"encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:", **options) as reader:  # type: ignore[call-overload]
        for info in reader:
            assert info.isfile() or info.isdir()
            # It knows directories without a type only from v7.
            is_dir = info.isdir() or info.name.endswith("/")
            content = b"" if is_dir else reader.extractfile(info).read()
            name = "/".join(part for part in info.name.split("/") if part not in ("", "."))
            found.append((name, is_dir, int(info.mtime), content))
    return found


def as_gnu_tar_extracts(archive: bytes, into: Path) -> dict[str, bytes | None]:
    into.mkdir()
    command = ["tar", "-C", str(into), "--no-same-owner", "-xf", "-"]
    subprocess.run(command, input=archive, check=True, capture_output=True)
    found = {str(path.relative_to(into)): path for path in into.rglob("*")}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in found.items()}


@settings(deadline=None, max_examples=1000)
@given(parts=st.lists(_MEMBERS, min_size=1, max_size=4))
def test_what_it_takes_other_readers_take_for_the_same(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    """Nothing can be hidden from one reader that another one finds."""
    archive = b"".join(parts) + END
    found = []
    try:
        for member, data in members([archive], max_files=1000, max_bytes=1 << 40):
            found.append((member.name, member.is_dir, member.mtime, b"".join(data)))
    except (DamagedError, TooLargeError):
        return
    assert as_tarfile_reads(archive) == found
    files: dict[str, bytes | None] = {}
    for name, is_dir, _, content in found:
        files.update({str(parent): None for parent in Path(name).parents if parent != Path()})
        files[name] = None if is_dir else content
    files.pop("", None)
    try:
        extracted = as_gnu_tar_extracts(archive, tmp_path_factory.mktemp("gnu") / "out")
    except subprocess.CalledProcessError as error:
        # Python writes such times; GNU tar 1.35 refuses them, 1.34 did not.
        assert b"invalid mtime=1e-05" in error.stderr
    else:
        assert extracted == files


_MIXED = (
    header(b"./", b"5")
    + pax({b"comment": b"c"}, b"g")
    + file(b"./a", b"x" * 1500)
    + gnu_long(b"n/" * 100 + b"f")
    + file(b"n", b"y" * 100)
    + pax({b"path": b"d/" * 50 + b"g", b"size": b"600"})
    + header(b"x", size=0)
    + padded(b"z" * 600)
    + file(b"empty", b"")
)


@settings(deadline=None, max_examples=300)
@given(cuts=st.lists(st.integers(0, len(_MIXED) + len(END)), max_size=40))
def test_any_pieces_give_the_same(cuts: list[int]) -> None:
    assert read(_MIXED + END, cuts) == read(_MIXED + END)


@settings(deadline=None, max_examples=300)
@given(archive=st.binary(max_size=2000), good=st.booleans())
def test_garbage_is_damaged(archive: bytes, good: bool) -> None:
    with pytest.raises((DamagedError, TooLargeError)):
        read((file(b"a") if good else b"") + archive + b"\x01")
