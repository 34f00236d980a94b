"""Tar archives made header by header, for tests that want them odd."""

from __future__ import annotations

END = bytes(1024)


def header(
    name: bytes,
    kind: bytes = b"0",
    size: int | bytes = 0,
    *,
    mtime: int | bytes = 1_600_000_000,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    link: bytes = b"",
    signed: bool = False,
) -> bytes:
    """One header block. A `size` or `mtime` of bytes is put in as it is."""
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    time_field = mtime if isinstance(mtime, bytes) else b"%011o\0" % mtime
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field + time_field
    block += b" " * 8 + kind + link.ljust(100, b"\0") + magic.ljust(8, b"\0") + bytes(80)
    block = (block + prefix).ljust(512, b"\0")
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def base256(value: int) -> bytes:
    return ((value & ((1 << 95) - 1)) | 1 << 95).to_bytes(12, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"data", **fields: object) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    while len(b"%d" % size) + len(key) + len(value) + 3 != size:
        size = len(b"%d" % size) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (size, key, value)


def pax(records: dict[bytes, bytes], kind: bytes = b"x") -> bytes:
    return raw_pax(b"".join(record(key, value) for key, value in records.items()), kind)


def raw_pax(body: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeaders/x", kind, len(body)) + padded(body)


def gnu_long(name: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", kind, len(name) + 1, magic=b"ustar  \0") + padded(name + b"\0")
