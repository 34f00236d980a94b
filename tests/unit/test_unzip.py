"""Zip archives of real writers become the same trees; others become errors, never other trees."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfs.errors import DamagedError, HostileError, HubfsError, TooLargeError
from hubfs.transfer import unzip
from hubfs.transfer.archive import Limits, extract_any
from hubfs.transfer.storage import Storage
from tests.kaggle import make_tar_gz
from tests.leaks import open_files
from tests.unit.test_archive import (
    HANDLE,
    LIMITS,
    MODEL,
    MTIME,
    Recorder,
    pieces,
    python_tar,
    tree,
    with_parents,
    write_model,
)

_STAMP = (2017, 7, 14, 2, 40, 0)  # MTIME


def unpack(data: bytes, into: Path, step: int = 1000, limits: Limits = LIMITS) -> Recorder:
    into.mkdir()
    return unpack_from(pieces(data, step), into, limits)


def unpack_from(chunks: Iterable[bytes], into: Path, limits: Limits = LIMITS) -> Recorder:
    sink, spool = Recorder(into), into.with_name("spool")
    try:
        with closing(Storage()) as storage:
            extract_any(
                iter(chunks), into, sink, storage, limits, name=HANDLE, spool=spool, stop=lambda: None
            )
    finally:
        assert not spool.exists()
    return sink


def member(name: str, **fields: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _STAMP)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o100644 << 16
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def packed(
    *members: tuple[zipfile.ZipInfo, bytes], into: io.BytesIO | None = None, comment: bytes = b""
) -> bytes:
    buffer = into or io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for info, content in members:
            # Not writestr, which would make a directory of what is called like one.
            with archive.open(info, "w") as file:
                file.write(content)
    return buffer.getvalue()


GOOD = packed(*((member(name), content) for name, content in MODEL.items()))


class Unseekable(io.BytesIO):
    """So that sizes and CRCs come behind the data."""

    def seek(self, *args: int) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
def test_the_tree_and_its_times_are_the_publishers(tmp_path: Path, step: int) -> None:
    sink = unpack(GOOD, tmp_path / "out", step)
    assert tree(tmp_path / "out") == with_parents(MODEL)
    assert {int((tmp_path / "out" / name).stat().st_mtime) for name in MODEL} == {MTIME}
    assert [event[1] for event in sink.events if event[0] == "done"] == list(MODEL)
    crcs = {event[1]: event[2] for event in sink.events if event[0] == "done"}
    assert crcs == {name: zlib.crc32(content) for name, content in MODEL.items()}
    assert {oct(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        "0o100644"
    }


@pytest.mark.parametrize("kind", ["stored", "streamed", "comment", "zip64", "reversed", "directories"])
def test_other_ways_to_write_one(tmp_path: Path, kind: str) -> None:
    if kind == "stored":
        data = packed(*((member(n, compress_type=0), c) for n, c in MODEL.items()))
    elif kind == "streamed":
        data = packed(*((member(n), c) for n, c in MODEL.items()), into=Unseekable())
    elif kind == "comment":
        data = packed(*((member(n), c) for n, c in MODEL.items()), comment=b"some PK\x05 words")
    elif kind == "zip64":
        data = with_zip64_end(GOOD)
    elif kind == "reversed":
        data = packed(*((member(n), c) for n, c in reversed(MODEL.items())))
    else:
        names = [f"{name}/" for name, content in with_parents(MODEL).items() if content is None]
        data = packed(
            *((member(n, external_attr=(0o40700 << 16) | 0x10), b"") for n in sorted(names)),
            *((member(f"./{n}"), c) for n, c in MODEL.items()),
        )
    unpack(data, tmp_path / "out")
    assert tree(tmp_path / "out") == with_parents(MODEL)


@pytest.mark.skipif(shutil.which("zip") is None, reason="there is no zip here")
def test_info_zip(tmp_path: Path) -> None:
    write_model(tmp_path / "in", MODEL)
    subprocess.run(["zip", "-qr", "../a.zip", "."], cwd=tmp_path / "in", check=True)
    unpack((tmp_path / "a.zip").read_bytes(), tmp_path / "out")
    assert tree(tmp_path / "out") == with_parents(MODEL)


def test_tars_are_taken_too(tmp_path: Path) -> None:
    files = {"a/b": b"x" * 100_000, "c": b""}
    for number, data in enumerate((make_tar_gz(files), python_tar(files))):
        unpack(data, tmp_path / f"out{number}", step=3)
        assert tree(tmp_path / f"out{number}") == with_parents(files)


def test_times(tmp_path: Path) -> None:
    utc = struct.pack("<HHBl", 0x5455, 5, 1, MTIME + 1)
    unpack(
        packed(
            (member("extended", extra=utc), b""),  # type: ignore[arg-type]
            (member("old", date_time=(1980, 1, 1, 0, 0, 0)), b""),  # type: ignore[arg-type]
            (member("never", date_time=(1980, 15, 0, 0, 0, 0)), b""),  # type: ignore[arg-type]
        ),
        tmp_path / "out",
    )
    assert (tmp_path / "out/extended").stat().st_mtime == MTIME + 1
    assert (tmp_path / "out/old").stat().st_mtime == 315532800
    assert (tmp_path / "out/never").stat().st_mtime > MTIME


def test_large_files_are_told_of_while_they_grow(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 << 20)
    sink = unpack(packed((member("large"), content)), tmp_path / "out", 1 << 20)
    grown = [event[2] for event in sink.events if event[0] == "grew"]
    assert grown == [1 << 20, 2 << 20, 3 << 20]


def with_zip64_end(data: bytes) -> bytes:
    """The same archive with the end that large ones have."""
    end = struct.unpack("<4s4H2LH", data[-22:])
    at, count, length, offset = len(data) - 22, end[4], end[5], end[6]
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    none = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:-22] + record + locator + none


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def central(data: bytes, field: int, form: str, value: int, number: int = 0) -> bytes:
    """With a field of a central header changed: `field` bytes behind its beginning."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    changed = bytearray(data)
    struct.pack_into(form, changed, at + field, value)
    return bytes(changed)


def two(one: str, other: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        return packed((member(one), b"1"), (member(other), b"2"))


ONE = packed((member("name"), b"content"))
HOSTILE: dict[str, bytes] = {
    "absolute": packed((member("/etc/passwd"), b"x")),
    "climbs": packed((member("../x"), b"x")),
    "climbs inside": packed((member("a/../../x"), b"x")),
    "NUL": patched(packed((member("aXb"), b"x")), b"aXb", b"a\0b"),
    "backslash": packed((member("a\\b"), b"x")),
    "drive": packed((member("..\\x"), b"x")),
    "long name": packed((member("x" * 256), b"x")),
    "deep": packed((member("d/" * 128 + "f"), b"x")),
    "twice": two("name", "name"),
    "twice, another spelling": two("./a", "a"),
    "case": two("name", "NAME"),
    "case of directories": two("d/x", "D/y"),
    "unicode": two("\u00e9", "e\u0301"),
    "file and directory": two("name", "name/x"),
    "directory and file": two("name/x", "name"),
    "dot": packed((member("a/."), b"x")),
    "link": packed((member("name", external_attr=0o120777 << 16), b"/etc/passwd")),
    "link of another system": packed(
        (member("name", external_attr=0o120777 << 16, create_system=0), b"/etc/passwd")
    ),
    "junction": packed((member("name", external_attr=0x400, create_system=0), b"x")),
    "device": packed((member("name", external_attr=0o060644 << 16), b"")),
    "fifo": packed((member("name", external_attr=0o010644 << 16), b"")),
    "socket": packed((member("name", external_attr=0o140644 << 16), b"")),
    "volume": packed((member("name", external_attr=0x08, create_system=0), b"")),
    "directory by mode": packed((member("name", external_attr=0o040755 << 16), b"")),
    "directory by attribute": packed((member("name", external_attr=0x10, create_system=0), b"x")),
    "file by mode": packed((member("name/", external_attr=0o100644 << 16), b"")),
    "directory with data": packed((member("name/", external_attr=0o040755 << 16), b"xyz")),
    "encrypted": central(ONE, 8, "<H", 1),
    "strongly encrypted": central(ONE, 8, "<H", 0x41),
    "masked": central(ONE, 8, "<H", 0x2000),
    "bzip2": packed((member("name", compress_type=zipfile.ZIP_BZIP2), b"x")),
    "lzma": packed((member("name", compress_type=zipfile.ZIP_LZMA), b"x")),
    "unknown method": central(ONE, 10, "<H", 99),
    "two names": packed(
        (member("name", extra=struct.pack("<HHBL", 0x7075, 10, 1, zlib.crc32(b"name")) + b"other"), b"x")  # type: ignore[arg-type]
    ),
    "overlap": central(packed((member("aaaa"), b"1"), (member("bbbb"), b"2")), 42, "<L", 0, 1),
}
DAMAGED: dict[str, bytes] = {
    "nothing in it": packed(),
    "directories only": packed((member("a/", external_attr=0o40755 << 16), b"")),
    "no end": ONE[:-22],
    "cut in the end": ONE[:-1],
    "cut in the data": ONE[:33],
    "only its beginning": ONE[:4],
    "goes on": ONE + b"x",
    "wrong CRC": central(ONE, 16, "<L", 1),
    "wrong data": packed((member("name", compress_type=0), b"content")).replace(b"content", b"contenT"),
    "broken deflate data": ONE[:34] + b"\xff" * 4 + ONE[38:],
    "longer than it is": central(ONE, 24, "<L", 8),
    "shorter than it is": central(ONE, 24, "<L", 6),
    "other name inside": ONE[:30] + b"eman" + ONE[34:],
    "bytes before it": b"PK\x03\x04" + ONE,
    "directory elsewhere": ONE[:-6] + struct.pack("<L", 1) + ONE[-2:],
    "several disks": ONE[:-18] + struct.pack("<H", 1) + ONE[-16:],
    "no UTF-8": central(patched(packed((member("näm"), b"x")), "ä".encode(), b"\xff\xff"), 8, "<H", 0x800),
    "member elsewhere": central(ONE, 42, "<L", 5),
    "member behind the end": central(ONE, 42, "<L", 5000),
    "zip64 end without its record": with_zip64_end(ONE).replace(b"PK\x06\x06", b"PK\x06\x05"),
    "zip64 end that lies": with_zip64_end(ONE)[:-50] + bytes(8) + with_zip64_end(ONE)[-42:],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(tmp_path: Path, kind: str) -> None:
    with pytest.raises(HostileError) as caught:
        unpack(HOSTILE[kind], tmp_path / "out")
    assert caught.value.message.startswith(f"{HANDLE}: ")
    assert tree(tmp_path / "out") == {}, "nothing is written before all names are checked"


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DamagedError) as caught:
        unpack(DAMAGED[kind], tmp_path / "out")
    assert caught.value.message.startswith(f"{HANDLE}: ")
    assert not isinstance(caught.value, HostileError)


class TestLimits:
    def test_files(self, tmp_path: Path) -> None:
        names = len(with_parents(MODEL))
        unpack(GOOD, tmp_path / "fits", limits=Limits(names, 1 << 20))
        with pytest.raises(TooLargeError, match="files and directories"):
            unpack(GOOD, tmp_path / "out", limits=Limits(names - 1, 1 << 20))
        with pytest.raises(TooLargeError, match="files and directories"):
            unpack(GOOD, tmp_path / "out2", limits=Limits(len(MODEL) - 1, 1 << 20))
        assert tree(tmp_path / "out") == tree(tmp_path / "out2") == {}

    def test_bytes(self, tmp_path: Path) -> None:
        size = sum(map(len, MODEL.values()))
        unpack(GOOD, tmp_path / "fits", limits=Limits(1000, size))
        with pytest.raises(TooLargeError, match=f"more than {size - 1} bytes of files; .*--max-model-size"):
            unpack(GOOD, tmp_path / "out", limits=Limits(1000, size - 1))
        assert tree(tmp_path / "out") == {}

    def test_bytes_of_the_archive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unzip, "_MAX_OVERHEAD", 10)
        taken = []

        def endless() -> Iterator[bytes]:
            while True:
                taken.append(100)
                yield b"PK\x03\x04" + bytes(96)

        (tmp_path / "out").mkdir()
        with pytest.raises(TooLargeError, match="more than 1000 bytes"):
            unpack_from(endless(), tmp_path / "out", Limits(10, 1000))
        assert sum(taken) == 1100

    def test_directory(self, tmp_path: Path) -> None:
        lying = ONE[:-10] + struct.pack("<L", 65 << 20) + ONE[-6:]
        with pytest.raises(TooLargeError, match="directory has more than"):
            unpack(lying, tmp_path / "out")


def test_errors_of_the_download_go_up(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield GOOD[:100]
        raise ConnectionError("gone")

    (tmp_path / "out").mkdir()
    with pytest.raises(ConnectionError, match="gone"):
        unpack_from(broken(), tmp_path / "out")


def test_nothing_stays_open(tmp_path: Path) -> None:
    unpack(GOOD, tmp_path / "good")
    for number, data in enumerate((HOSTILE["twice"], DAMAGED["wrong CRC"], DAMAGED["no end"])):
        with pytest.raises(HubfsError):
            unpack(data, tmp_path / str(number))
    assert open_files(tmp_path) == []


def test_spool_is_never_somebody_elses_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    for make in (lambda path: path.symlink_to(tmp_path / "victim"), lambda path: path.write_bytes(b"x")):
        make(tmp_path / "spool")
        with pytest.raises(FileExistsError), unzip.spooled([b"data"], tmp_path / "spool", max_bytes=10):
            pass
        (tmp_path / "spool").unlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_gives_another_tree(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever byte is changed: the same files, or an error."""
    small = packed((member("a/b"), b"some content"), (member("c", compress_type=0), b"other content"))
    changed = bytearray(small)
    at = data.draw(st.integers(4, len(small) - 1))
    changed[at] = data.draw(st.integers(0, 255))
    into = tmp_path_factory.mktemp("zip") / "out"
    try:
        unpack(bytes(changed), into)
    except HubfsError:
        return
    found = {name: content for name, content in tree(into).items() if content is not None}
    assert sorted(filter(None, found.values())) == [b"other content", b"some content"]
