"""gzip or plain, in any pieces: the right bytes or DamagedError."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfs.errors import DamagedError
from hubfs.transfer.inflate import inflate

# A tar header has NULs among its first 512 bytes; so has what stands for a plain tar here.
PLAIN = b"model" + bytes(507) + b"data" * 100


def inflated(data: bytes, step: int = 0, chunk_size: int = 1 << 20) -> bytes:
    return b"".join(inflate(cut(data, step), chunk_size=chunk_size))


def cut(data: bytes, step: int) -> Iterator[bytes]:
    """`data` in pieces of `step` bytes with empty ones between; in one piece if `step` is 0."""
    for start in range(0, len(data), step or len(data) or 1):
        yield b""
        yield data[start : start + (step or len(data))]
    yield b""


def gzip_with(flags: int, payload: bytes, *, field_size: int = 300, good_crc: bool = True) -> bytes:
    """A gzip member with the header fields that `flags` names."""
    header = bytearray(b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\3")
    if flags & 0x04:
        header += struct.pack("<H", field_size) + b"e" * field_size
    if flags & 0x08:
        header += b"n" * field_size + b"\0"
    if flags & 0x10:
        header += b"c" * field_size + b"\0"
    if flags & 0x02:
        header += struct.pack("<H", (zlib.crc32(header) & 0xFFFF) ^ (not good_crc))
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(payload) + deflate.flush()
    return bytes(header) + body + struct.pack("<II", zlib.crc32(payload), len(payload))


class TestGzip:
    @pytest.mark.parametrize("level", [0, 1, 6, 9])
    @pytest.mark.parametrize("step", [0, 1, 7, 4096])
    def test_round_trip(self, level: int, step: int) -> None:
        payload = random.Random(level).randbytes(20_000) + b"a" * 50_000
        assert inflated(gzip.compress(payload, level), step) == payload

    def test_empty_payload(self) -> None:
        assert inflated(gzip.compress(b"")) == b""

    @pytest.mark.parametrize("flags", range(32))
    @pytest.mark.parametrize("step", [0, 1, 7, 250])
    def test_every_header_field_in_any_pieces(self, flags: int, step: int) -> None:
        assert inflated(gzip_with(flags, PLAIN), step) == PLAIN

    def test_wrong_header_checksum(self) -> None:
        with pytest.raises(DamagedError, match="header does not match"):
            inflated(gzip_with(0x02, PLAIN, good_crc=False))

    @pytest.mark.parametrize("flags", [0x20, 0x40, 0x80])
    def test_reserved_flags(self, flags: int) -> None:
        with pytest.raises(DamagedError, match="unknown flags"):
            inflated(gzip_with(flags, PLAIN))

    def test_unknown_method(self) -> None:
        with pytest.raises(DamagedError, match="unknown method"):
            inflated(b"\x1f\x8b\x07" + gzip.compress(PLAIN)[3:])

    def test_header_without_end(self) -> None:
        endless = b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (1 << 20)
        with pytest.raises(DamagedError, match="does not end"):
            inflated(endless)

    @pytest.mark.parametrize("step", [0, 1, 9])
    def test_concatenated_members_and_padding(self, step: int) -> None:
        parts = [gzip.compress(part) for part in (b"one", b"", PLAIN)]
        assert inflated(b"".join(parts), step) == b"one" + PLAIN
        assert inflated(b"".join(parts) + bytes(1000), step) == b"one" + PLAIN

    def test_many_tiny_members_in_one_chunk(self) -> None:
        assert inflated(gzip.compress(b"ab") * 20_000) == b"ab" * 20_000

    @pytest.mark.parametrize(
        "tail", [b"x", b"\0x", bytes(600) + b"x", b"\x1f\x8a", b"\0" + gzip.compress(b"")]
    )
    @pytest.mark.parametrize("step", [0, 1])
    def test_trailing_bytes(self, tail: bytes, step: int) -> None:
        with pytest.raises(DamagedError, match="goes on after"):
            inflated(gzip.compress(PLAIN) + tail, step)

    @pytest.mark.parametrize("level", [0, 9])
    @pytest.mark.parametrize("step", [0, 1])
    def test_any_cut_is_truncation(self, level: int, step: int) -> None:
        whole = gzip.compress(PLAIN, level)
        for size in range(1, len(whole)):
            with pytest.raises(DamagedError, match="truncated"):
                inflated(whole[:size], step)

    @pytest.mark.parametrize("step", [0, 1])
    def test_cut_in_a_second_member(self, step: int) -> None:
        first, second = gzip.compress(b"one"), gzip.compress(PLAIN)
        for size in range(1, len(second)):
            with pytest.raises(DamagedError, match="truncated"):
                inflated(first + second[:size], step)

    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_the_trailer_is_checked(self, step: int) -> None:
        whole = gzip.compress(PLAIN)
        for bit in range(64):
            damaged = bytearray(whole)
            damaged[-1 - bit // 8] ^= 1 << bit % 8
            with pytest.raises(DamagedError, match="damaged"):
                inflated(bytes(damaged), step)

    def test_a_bomb_comes_in_bounded_pieces(self) -> None:
        bomb = gzip.compress(bytes(50 << 20))
        sizes = [len(piece) for piece in inflate([bomb], chunk_size=100_000)]
        assert max(sizes) <= 100_000
        assert sum(sizes) == 50 << 20

    def test_pieces_come_before_the_input_ends(self) -> None:
        whole = gzip.compress(random.Random(1).randbytes(100_000))

        def chunks() -> Iterator[bytes]:
            yield whole[:50_000]
            raise ConnectionError("the line broke")

        pieces = inflate(chunks())
        assert next(pieces)
        with pytest.raises(ConnectionError, match="the line broke"):
            list(pieces)


class TestPlain:
    @pytest.mark.parametrize("step", [0, 1, 7])
    def test_passes_through(self, step: int) -> None:
        assert inflated(PLAIN, step) == PLAIN

    def test_chunks_are_not_copied_after_the_first(self) -> None:
        chunk = bytes(1000)
        assert list(inflate([PLAIN, chunk]))[-1] is chunk


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "empty"),
        (b"<!doctype html><html>", "web page"),
        (b"\n  <html>" + b"x" * 1000, "web page"),
        (b"\xef\xbb\xbf<HTML>", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"Not found", "text"),
        (b"\xff\xfe" * 300, "neither gzip nor tar"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\xfd7zXZ\x00" + bytes(100), "xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_what_is_no_archive(sent: bytes, said: str, step: int) -> None:
    with pytest.raises(DamagedError, match=said):
        inflated(sent, step)


def test_a_tar_may_begin_like_a_web_page() -> None:
    tar = b"<html>.txt" + bytes(502)
    assert inflated(tar) == tar


@settings(deadline=None)
@given(
    members=st.lists(st.binary(max_size=2000), min_size=1, max_size=5),
    step=st.integers(1, 600),
    chunk_size=st.integers(1, 3000),
    level=st.integers(0, 9),
)
def test_like_the_standard_library(members: list[bytes], step: int, chunk_size: int, level: int) -> None:
    data = b"".join(gzip.compress(member, level) for member in members)
    assert inflated(data, step, chunk_size) == gzip.decompress(data)
