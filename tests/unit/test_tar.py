"""The tar reader: what it takes, what it refuses, and that no cut goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hubfs import names as names_module
from hubfs.errors import DamagedError, HostileError, TooLargeError
from hubfs.transfer import tar
from hubfs.transfer.tar import Member, members
from tests.tars import END, base256, file, gnu_long, header, padded, pax, raw_pax, record


def cut(data: bytes, step: int) -> Iterator[bytes]:
    for start in range(0, len(data), step or len(data) or 1):
        yield data[start : start + (step or len(data))]
        yield b""


def read(
    data: bytes, step: int = 0, *, max_files: int = 1000, max_bytes: int = 1 << 40
) -> dict[Member, bytes]:
    found = members(cut(data, step), max_files=max_files, max_bytes=max_bytes)
    return {member: b"".join(pieces) for member, pieces in found}


def names(data: bytes) -> list[str]:
    return [member.name for member, _ in members([data], max_files=1000, max_bytes=1 << 40)]


class TestTaken:
    @pytest.mark.parametrize("step", [0, 1, 3, 511, 512, 513])
    def test_files_and_directories(self, step: int) -> None:
        archive = header(b"./", b"5") + header(b"./d/", b"5") + file(b"./d/f", b"x" * 1000) + file(b"e", b"")
        assert read(archive + END, step) == {
            Member("", True, 0, 1_600_000_000): b"",
            Member("d", True, 0, 1_600_000_000): b"",
            Member("d/f", False, 1000, 1_600_000_000): b"x" * 1000,
            Member("e", False, 0, 1_600_000_000): b"",
        }

    def test_data_is_not_copied(self) -> None:
        chunk = file(b"f", b"x" * 512) + END
        ((_, pieces),) = [
            (member, list(pieces)) for member, pieces in members([chunk], max_files=9, max_bytes=999)
        ]
        assert [piece.obj for piece in pieces] == [chunk]

    def test_data_that_is_not_taken_is_skipped(self) -> None:
        found = members([file(b"a", b"x" * 5000) + file(b"b") + END], max_files=9, max_bytes=9999)
        assert [member.name for member, _ in found] == ["a", "b"]

    def test_data_that_is_taken_in_part_is_skipped(self) -> None:
        got = []
        for member, pieces in members(
            cut(file(b"a", b"x" * 5000) + file(b"b") + END, 100), max_files=9, max_bytes=9999
        ):
            got.append((member.name, len(next(pieces))))
        assert got[0][0] == "a"
        assert got[1] == ("b", 4)

    def test_type_7_and_nul_are_files(self) -> None:
        assert names(file(b"a", kind=b"7") + file(b"b", kind=b"\0") + END) == ["a", "b"]

    @pytest.mark.parametrize("kind", [b"\0", b"0"])
    def test_v7_directory(self, kind: bytes) -> None:
        archive = header(b"d/", kind, magic=b"") + file(b"d/f", magic=b"") + END
        assert [(member.name, member.is_dir) for member in read(archive)] == [("d", True), ("d/f", False)]

    def test_ustar_prefix(self) -> None:
        assert names(file(b"f", prefix=b"p/q") + END) == ["p/q/f"]

    def test_gnu_times_are_no_prefix(self) -> None:
        assert names(file(b"f", magic=b"ustar  \0", prefix=b"14371501234\0") + END) == ["f"]

    def test_gnu_long_name_and_link(self) -> None:
        long = b"n/" * 60 + b"f" * 200
        assert names(gnu_long(b"link", b"K") + gnu_long(long) + file(b"n/n/n") + END) == [long.decode()]

    def test_pax_path_size_mtime(self) -> None:
        extended = pax(
            {b"path": b"long", b"size": b"4", b"mtime": b"1234567890.987654321", b"comment": b"a\nb"}
        )
        archive = extended + header(b"short", size=0) + padded(b"data") + END
        assert read(archive) == {Member("long", False, 4, 1234567890): b"data"}

    def test_pax_counts_for_one_member(self) -> None:
        assert names(pax({b"path": b"a"}) + file(b"x") + file(b"b") + END) == ["a", "b"]

    def test_first_name_cut_behind_a_slash(self) -> None:
        name = b"d/" * 60 + b"f"
        assert names(gnu_long(name) + file(name[:100]) + pax({b"path": b"e/f"}) + file(b"e/") + END) == [
            name.decode(),
            "e/f",
        ]

    def test_pax_records_of_other_keys_may_be_empty_or_repeated(self) -> None:
        body = record(b"path", b"a") + record(b"comment", b"") + record(b"comment", b"x")
        assert names(raw_pax(body) + file(b"x") + END) == ["a"]

    def test_pax_size_beyond_octal(self) -> None:
        archive = pax({b"size": b"%d" % (9 << 30)}) + header(b"big")
        member, _ = next(members([archive], max_files=9, max_bytes=1 << 40))
        assert member.size == 9 << 30

    def test_pax_globals_in_a_row(self) -> None:
        archive = pax({b"mtime": b"5"}, b"g") + pax({b"mtime": b"6"}, b"g") + file(b"a") + END
        assert [member.mtime for member in read(archive)] == [6]

    def test_pax_global_mtime(self) -> None:
        archive = pax({b"mtime": b"5", b"comment": b"commit"}, b"g") + file(b"a")
        archive += pax({b"mtime": b"6"}) + file(b"b") + file(b"c") + END
        assert [member.mtime for member in read(archive)] == [5, 6, 5]

    @pytest.mark.parametrize(("text", "mtime"), [(b"-1.5", -1), (b"7.", 7), (b"1e-05", 0), (b"1e+20", 0)])
    def test_pax_times(self, text: bytes, mtime: int) -> None:
        assert [member.mtime for member in read(pax({b"mtime": text}) + file(b"a") + END)] == [mtime]

    @pytest.mark.parametrize("charset", [b"BINARY", b"ISO-IR 10646 2000 UTF-8"])
    def test_pax_charsets(self, charset: bytes) -> None:
        archive = pax({b"hdrcharset": charset, b"path": b"\xff\xc3\xa9"}) + file(b"x") + END
        assert names(archive) == ["\udcff\xe9"]

    @pytest.mark.parametrize("value", [0, 4, 8**11 - 1, 9 << 30, 1 << 70])
    def test_base_256_size(self, value: int) -> None:
        member, _ = next(members([header(b"f", size=base256(value))], max_files=9, max_bytes=1 << 80))
        assert member.size == value

    def test_base_256_mtime(self) -> None:
        archive = file(b"a", mtime=base256(-5)) + file(b"b", mtime=base256(1 << 40)) + END
        assert [member.mtime for member in read(archive)] == [-5, 1 << 40]

    @pytest.mark.parametrize(
        "size", [b"000000004\0\0\0", b"          4 ", b"000000000004", b"4".ljust(12, b"\0")]
    )
    def test_octal_spellings(self, size: bytes) -> None:
        assert list(read(header(b"f", size=size) + padded(b"data") + END).values()) == [b"data"]

    def test_signed_checksum(self) -> None:
        assert names(file("é".encode(), signed=True) + END) == ["é"]

    def test_root_and_directories_may_be_repeated(self) -> None:
        root, directory = header(b"./", b"5") + header(b".", b"5"), header(b"d", b"5")
        found = names(root + directory + file(b"d/f") + root + directory + END)
        assert found == ["", "", "d", "d/f", "", "", "d"]

    def test_implied_directories(self) -> None:
        assert names(file(b"a/b/c") + header(b"a/", b"5") + header(b"a/b", b"5") + END) == [
            "a/b/c",
            "a",
            "a/b",
        ]

    def test_names_are_cleaned(self) -> None:
        assert names(file(b".//a/./b//c") + END) == ["a/b/c"]

    def test_longest_names(self) -> None:
        component = b"c" * names_module.MAX_COMPONENT
        path = b"/".join([component] * 16)[: names_module.MAX_PATH]
        assert names(pax({b"path": path}) + file(b"x") + END) == [path.decode()]
        assert names(pax({b"path": b"/".join([b"d"] * names_module.MAX_DEPTH)}) + file(b"x") + END)

    @pytest.mark.parametrize("zeros", [512, 513, 1024, 10240, 1 << 20])
    def test_end_markers(self, zeros: int) -> None:
        assert names(file(b"a") + bytes(zeros)) == ["a"]


BIG = bytes(tar.MAX_EXTENDED + 1)

HOSTILE = {
    "absolute": file(b"/etc/passwd"),
    "absolute by prefix": file(b"f", prefix=b"/etc"),
    "absolute by pax": pax({b"path": b"/x"}) + file(b"x"),
    "absolute by long name": gnu_long(b"/x") + file(b"x"),
    "absolute directory": header(b"/", b"5"),
    "dotdot": file(b"../x"),
    "dotdot inside": file(b"a/../b"),
    "dotdot at the end": header(b"a/..", b"5"),
    "dotdot by prefix": file(b"f", prefix=b".."),
    "dotdot by pax": pax({b"path": b"a/../../x"}) + file(b"x"),
    "dotdot split between prefix and name": file(b"./x", prefix=b"a/.."),
    "NUL by pax": pax({b"path": b"a\0b"}) + file(b"x"),
    "NUL by long name": gnu_long(b"a\0b") + file(b"x"),
    "hard link": header(b"l", b"1", link=b"f"),
    "symbolic link": header(b"l", b"2", link=b"/etc"),
    "character device": header(b"l", b"3"),
    "block device": header(b"l", b"4"),
    "fifo": header(b"l", b"6"),
    "GNU sparse": header(b"l", b"S", magic=b"ustar  \0"),
    "pax sparse": pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}) + file(b"x"),
    "pax sparse map": pax({b"GNU.sparse.map": b"0,1"}) + file(b"x"),
    "star sparse": pax({b"SCHILY.realsize": b"9"}) + file(b"x"),
    "pax sparse, global": pax({b"GNU.sparse.map": b"0,1"}, b"g") + file(b"x"),
    "GNU volume label": header(b"l", b"V"),
    "GNU multi volume": header(b"l", b"M"),
    "GNU incremental directory": header(b"l", b"D"),
    "unknown type": header(b"l", b"Z"),
    "Solaris pax": header(b"l", b"X"),
    "duplicate file": file(b"b") + file(b"b"),
    "duplicate file, spelled otherwise": file(b"b") + file(b"./b"),
    "file over directory": header(b"d", b"5") + file(b"d"),
    "file over implied directory": file(b"d/f") + file(b"d"),
    "directory over file": file(b"d") + header(b"d", b"5"),
    "file as parent": file(b"d") + file(b"d/f"),
    "file as grandparent": file(b"d") + file(b"d/e/f"),
    "file as root": file(b"."),
    "file as root, spelled otherwise": file(b"./."),
    "file as directory": file(b"d/."),
    "file as directory, by prefix": file(b".", prefix=b"d"),
    "case": file(b"Readme") + file(b"README"),
    "case of a directory": file(b"dir/a") + file(b"Dir/b"),
    "case of a directory and a file": header(b"dir", b"5") + file(b"DIR"),
    "case beyond ASCII": file("É".encode()) + file("é".encode()),
    "case folding to two letters": file("straße".encode()) + file(b"strasse"),
    "normalisation": file("é".encode()) + file("e\u0301".encode()),
    "normalisation and case": file("É".encode()) + file("e\u0301".encode()),
    "long component": pax({b"path": b"c" * 256}) + file(b"x"),
    "long component in bytes": pax({b"path": "é".encode() * 128}) + file(b"x"),
    "long path": pax({b"path": b"/".join([b"c" * 63] * 65)}) + file(b"x"),
    "deep path": pax({b"path": b"a/" * names_module.MAX_DEPTH + b"f"}) + file(b"x"),
    "big pax": raw_pax(BIG) + file(b"x"),
    "big global pax": raw_pax(BIG, b"g") + file(b"x"),
    "big long name": gnu_long(BIG) + file(b"x"),
    "record hidden behind pax": raw_pax(record(b"path", b"x"))[:-500]
    + record(b"path", b"y").ljust(500)
    + file(b"z"),
    "bytes hidden behind a long name": gnu_long(b"x")[:-1] + b"y" + file(b"z"),
    "endless pax": header(b"x", b"x", base256(1 << 60)),
    "negative size": header(b"f", size=base256(-512)),
    "negative size behind a pax size": pax({b"size": b"0"}) + header(b"f", size=base256(-512)),
    "negative pax size": pax({b"size": b"-512"}) + header(b"f"),
    "negative extended size": header(b"f", b"x", base256(-512)),
    "directory with data": header(b"d/", b"5", 512) + bytes(512),
    "v7 directory with data": header(b"d/", b"0", 512) + bytes(512),
    "global name": pax({b"path": b"x"}, b"g") + file(b"y"),
    "global size": pax({b"size": b"0"}, b"g") + file(b"y"),
    "empty name by pax": pax({b"path": b""}) + file(b"x"),
    "empty size by pax": pax({b"size": b""}) + file(b"x"),
    "empty time by pax": pax({b"mtime": b""}) + file(b"x"),
    "two names by pax": raw_pax(record(b"path", b"a") + record(b"path", b"b")) + file(b"x"),
    "two sizes by pax": raw_pax(record(b"size", b"0") * 2) + file(b"x", b""),
    "directory by pax name only": pax({b"path": b"d/"}) + header(b"d"),
    "directory by long name only": gnu_long(b"d/") + header(b"d"),
    "directory by two names only": pax({b"path": b"d/"}) + header(b"d/"),
    "directory by its first name only": pax({b"path": b"d"}) + header(b"d/", b"\0"),
    "two names": pax({b"path": b"x"}) + gnu_long(b"y") + file(b"z"),
    "unknown charset": pax({b"hdrcharset": b"ISO-IR 8859 1 1998"}) + file(b"z"),
}


@pytest.mark.parametrize("step", [0, 100])
@pytest.mark.parametrize("archive", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(archive: bytes, step: int) -> None:
    with pytest.raises(HostileError):
        read(file(b"good") + archive + END, step)


DAMAGED = {
    "nothing": b"",
    "no file": END,
    "only a directory": header(b"d", b"5") + END,
    "no end marker": file(b"a"),
    "half an end marker": file(b"a") + bytes(511),
    "bytes after the end marker": file(b"a") + END + file(b"b"),
    "bytes after a lone zero block": file(b"a") + bytes(512) + file(b"b") + END,
    "bytes late after the end marker": file(b"a") + bytes(5000) + b"x",
    "wrong checksum": file(b"a") + b"X" + header(b"b")[1:] + END,
    "no tar": b"\0binary" * 1000,
    "bad size": header(b"a", size=b"0o000000004\0") + END,
    "underscore in size": header(b"a", size=b"0000000_004\0") + END,
    "sign in size": header(b"a", size=b"-0000000004\0") + END,
    "bytes after size": header(b"a", size=b"0000\0000004\0"[:11] + b"9") + END,
    "NUL before size": header(b"a", size=b"\x0000000000004") + padded(b"data") + END,
    "unknown magic": file(b"a", magic=b"ustar1") + END,
    "bad time": header(b"a", mtime=b"99999999999\0") + END,
    "no name": file(b"") + END,
    "pax without member": file(b"a") + pax({b"path": b"x"}) + END,
    "global pax without member": file(b"a") + pax({b"comment": b"x"}, b"g") + END,
    "long name without member": file(b"a") + gnu_long(b"x") + END,
    "two pax": pax({b"path": b"x"}) + pax({b"path": b"y"}) + file(b"a") + END,
    "two long names": gnu_long(b"x") + gnu_long(b"y") + file(b"a") + END,
    "pax cut": header(b"x", b"x", 600) + bytes(100),
    "pax size": pax({b"size": b"0x10"}) + file(b"a") + END,
    "pax time": pax({b"mtime": b"nan"}) + file(b"a") + END,
    "pax record without length": raw_pax(b"path=x\n") + file(b"a") + END,
    "pax record too long": raw_pax(b"99 path=x\n") + file(b"a") + END,
    "pax record too short": raw_pax(b"3 path=x\n") + file(b"a") + END,
    "pax record of no length": raw_pax(b"0 path=x\n") + file(b"a") + END,
    "pax record without end of line": raw_pax(b"9 path=xy") + file(b"a") + END,
    "pax record without value": raw_pax(b"7 path\n") + file(b"a") + END,
    "pax record without key": raw_pax(b"5 =x\n") + file(b"a") + END,
    "pax record with a sign": raw_pax(b"+9 path=x\n") + file(b"a") + END,
    "pax with zeros": raw_pax(record(b"path", b"x") + bytes(10)) + file(b"a") + END,
}


@pytest.mark.parametrize("step", [0, 100])
@pytest.mark.parametrize("archive", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged(archive: bytes, step: int) -> None:
    with pytest.raises(DamagedError) as caught:
        read(archive, step)
    assert not isinstance(caught.value, HostileError)


class TestLimits:
    def test_bytes(self) -> None:
        archive = file(b"a", b"x" * 60) + file(b"b", b"x" * 40) + END
        assert len(read(archive, max_bytes=100)) == 2
        with pytest.raises(TooLargeError, match="99 bytes"):
            read(archive, max_bytes=99)

    def test_declared_size_is_refused_before_its_data(self) -> None:
        with pytest.raises(TooLargeError):
            read(header(b"a", size=base256(9 << 30)), max_bytes=8 << 30)
        with pytest.raises(DamagedError, match="truncated in the data of 'a'"):
            read(header(b"a", size=base256(9 << 30)) + bytes(5000))

    def test_files_with_implied_directories(self) -> None:
        archive = header(b"./", b"5") + file(b"a/b/c") + file(b"a/b/d") + END
        assert len(read(archive, max_files=4)) == 3
        with pytest.raises(TooLargeError, match="3 files"):
            read(archive, max_files=3)

    def test_headers_that_are_no_files(self) -> None:
        with pytest.raises(TooLargeError, match="too many headers"):
            read(header(b"./", b"5") * 1000 + file(b"a") + END, max_files=10)
        with pytest.raises(TooLargeError, match="too many headers"):
            read(pax({b"comment": b"x"}, b"g") * 1000 + file(b"a") + END, max_files=10)

    def test_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(names_module, "MAX_NAMES", 10)
        assert names(file(b"abcde") + file(b"fghij") + END)
        with pytest.raises(TooLargeError, match="characters together"):
            names(file(b"abcde") + file(b"fghijk") + END)

    def test_padding(self) -> None:
        with pytest.raises(TooLargeError, match="padding"):
            read(file(b"a") + bytes(17 << 20), 1 << 20, max_bytes=100)


def test_messages_show_the_member_briefly() -> None:
    with pytest.raises(HostileError) as caught:
        read(pax({b"path": b"/\x1b[31m\n\xff" + b"\x01" * 3000}) + file(b"x") + END)
    message = str(caught.value)
    assert message.isprintable()
    assert "'/\\x1b[31m\\n\\udcff\\x01" in message
    assert len(message) < 300


@pytest.mark.parametrize("step", [0, 700])
def test_every_cut_is_noticed(step: int) -> None:
    long = b"n" * 150
    archive = header(b"./", b"5") + file(b"a", b"x" * 700) + gnu_long(long) + file(b"b")
    archive += pax({b"path": b"c"}) + file(b"x", b"") + file(b"d")
    expected = read(archive + END)
    for size in range(len(archive) + 512):
        with pytest.raises(DamagedError):
            read((archive + END)[:size], step)
    for size in range(len(archive) + 512, len(archive) + 1025):
        assert read((archive + END)[:size], step) == expected


def test_every_damaged_header_byte_is_noticed() -> None:
    archive = file(b"a", b"x") + file(b"b", b"y") + END
    for position in (*range(512), *range(1024, 1536)):
        for bit in (0, 3, 7):
            damaged = bytearray(archive)
            damaged[position] ^= 1 << bit
            if 148 <= position % 1024 < 156:
                # The checksum's own padding may change from NUL to space and the like: same value.
                try:
                    assert read(bytes(damaged)) == read(archive)
                except DamagedError:
                    continue
            else:
                with pytest.raises(DamagedError):
                    read(bytes(damaged))
