"""Versions of which some chunks are there: what is trusted after whatever ended the process."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest

from hubfs.cache.partial import CHUNK, BusyError, Partial
from hubfs.errors import DamagedError
from hubfs.hubs.base import Listing, RemoteFile

HANDLE = "https://tfhub.dev/google/demo/1"
BIG = "variables/variables.data-00000-of-00001"
CONTENT = {
    BIG: random.Random(1).randbytes(4 * CHUNK + 12345),
    "saved_model.pb": random.Random(2).randbytes(1000),
    "assets/empty": b"",
}


class NoSource:
    """A partial version never asks for anything itself."""

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        raise AssertionError("it was asked for bytes")


def listing() -> Listing:
    files = {
        path: RemoteFile(path, len(data), 1, '"e"', crc32c=google_crc32c.Checksum(data).digest())
        for path, data in CONTENT.items()
    }
    return Listing(HANDLE, files, NoSource(), "gs://bucket/demo")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Partial]]:
    made: list[Partial] = []

    def start(what: Listing | None = None) -> Partial:
        made.append(Partial(tmp_path / "partial", what or listing()))
        return made[-1]

    yield start
    for partial in made:
        partial.close()


def missing(
    partial: Partial, path: str = BIG, start: int = 0, stop: int | None = None
) -> list[tuple[int, int]]:
    return list(partial.missing(path, start, len(CONTENT[path]) if stop is None else stop))


def put(partial: Partial, path: str, *numbers: int) -> None:
    for number in numbers:
        start = number * CHUNK
        partial.write(path, start, CONTENT[path][start : start + CHUNK])


def read(partial: Partial, path: str, start: int = 0, stop: int | None = None) -> bytes:
    buffer = bytearray((len(CONTENT[path]) if stop is None else stop) - start)
    assert partial.read_into(path, memoryview(buffer), start) == len(buffer)
    return bytes(buffer)


class TestMap:
    def test_all_is_missing_at_first(self, begin) -> None:
        partial = begin()
        assert missing(partial) == [(0, len(CONTENT[BIG]))]
        assert missing(partial, "saved_model.pb") == [(0, 1000)]
        assert missing(partial, "assets/empty") == []

    @pytest.mark.parametrize(
        ("there", "start", "stop", "expected"),
        [
            ([], 0, 1, [(0, CHUNK)]),
            ([], CHUNK - 1, CHUNK + 1, [(0, 2 * CHUNK)]),
            ([1], 0, 3 * CHUNK, [(0, CHUNK), (2 * CHUNK, 3 * CHUNK)]),
            ([1, 2], CHUNK, 3 * CHUNK, []),
            ([0, 1, 2, 3], 0, 10**9, [(4 * CHUNK, len(CONTENT[BIG]))]),
            ([4], 3 * CHUNK, len(CONTENT[BIG]), [(3 * CHUNK, 4 * CHUNK)]),
            ([], 5, 5, [(0, CHUNK)]),
        ],
    )
    def test_missing_ranges_are_whole_chunks(self, begin, there, start, stop, expected) -> None:
        partial = begin()
        put(partial, BIG, *there)
        assert missing(partial, BIG, start, stop) == expected

    @pytest.mark.parametrize(("start", "size"), [(1, CHUNK), (0, CHUNK - 1), (0, CHUNK + 1), (CHUNK, 5)])
    def test_parts_of_chunks_are_refused(self, begin, start: int, size: int) -> None:
        with pytest.raises(ValueError, match="whole chunks"):
            begin().write(BIG, start, bytes(size))

    def test_files_have_their_size_and_hardly_any_blocks(self, begin) -> None:
        partial = begin()
        status = (partial.files_directory / BIG).stat()
        assert status.st_size == len(CONTENT[BIG])
        assert status.st_blocks * 512 < CHUNK

    def test_what_was_written_is_read(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 4, 0, 2)
        assert read(partial, BIG, 2 * CHUNK, 3 * CHUNK) == CONTENT[BIG][2 * CHUNK : 3 * CHUNK]
        assert read(partial, BIG, 4 * CHUNK) == CONTENT[BIG][4 * CHUNK :]


class TestGoingOn:
    def test_with_what_was_flushed(self, begin) -> None:
        first = begin()
        put(first, BIG, 0, 3)
        assert first.unstored() == 2 * CHUNK
        first.flush()
        assert first.unstored() == 0
        put(first, BIG, 1)
        first.close()
        again = begin()
        assert missing(again) == [(CHUNK, 3 * CHUNK), (4 * CHUNK, len(CONTENT[BIG]))]
        assert read(again, BIG, 3 * CHUNK, 4 * CHUNK) == CONTENT[BIG][3 * CHUNK : 4 * CHUNK]

    def test_after_a_kill(self, begin, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys; sys.path.insert(0, '.')\n"
            "from pathlib import Path\n"
            "from tests.unit import test_partial as t\n"
            "partial = t.Partial(Path(sys.argv[1]), t.listing())\n"
            "t.put(partial, t.BIG, 0, 1); partial.flush(); t.put(partial, t.BIG, 2)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "partial"], cwd=root, timeout=60)
        assert done.returncode == -9
        partial = begin()
        assert missing(partial) == [(2 * CHUNK, len(CONTENT[BIG]))]
        assert read(partial, BIG, 0, 2 * CHUNK) == CONTENT[BIG][: 2 * CHUNK]

    @pytest.mark.parametrize(
        "other",
        [
            replace(listing(), handle="https://tfhub.dev/other/1"),
            replace(
                listing(),
                files={path: replace(file, etag='"2"') for path, file in listing().files.items()},
            ),
        ],
    )
    def test_not_with_another_listing(self, begin, other: Listing) -> None:
        first = begin()
        put(first, BIG, 0)
        first.flush()
        first.close()
        again = begin(other)
        assert missing(again) == [(0, len(CONTENT[BIG]))]
        assert read(again, BIG, 0, CHUNK) == bytes(CHUNK)

    @pytest.mark.parametrize("what", ["removed", "cut"])
    def test_not_with_a_file_that_was_touched(self, begin, what: str) -> None:
        first = begin()
        put(first, BIG, 0)
        put(first, "saved_model.pb", 0)
        first.flush()
        first.close()
        place = first.files_directory / BIG
        if what == "removed":
            place.unlink()
        else:
            os.truncate(place, CHUNK)
        for _ in range(2):
            # The second time the file is as large as it should be again, and full of holes.
            again = begin()
            assert missing(again) == [(0, len(CONTENT[BIG]))]
            assert missing(again, "saved_model.pb") == []
            again.close()

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "identity": "", "chunks": {}}']
    )
    def test_not_with_a_map_that_makes_no_sense(self, begin, text: str) -> None:
        first = begin()
        put(first, BIG, 0)
        first.flush()
        first.close()
        (first.directory / "map").write_text(text)
        assert missing(begin()) == [(0, len(CONTENT[BIG]))]

    def test_not_without_the_files(self, begin) -> None:
        first = begin()
        put(first, BIG, 0)
        first.flush()
        first.close()
        shutil.rmtree(first.files_directory)
        assert missing(begin()) == [(0, len(CONTENT[BIG]))]


class TestChecks:
    def test_a_whole_file_is_checked(self, begin) -> None:
        partial = begin()
        for path in CONTENT:
            put(partial, path, *range(-(-len(CONTENT[path]) // CHUNK)))
            assert partial.is_complete(path)
            assert not partial.is_complete()
            partial.verify(path)
        assert partial.is_complete()

    def test_md5_counts_where_there_is_nothing_else(self, begin) -> None:
        digest = hashlib.md5(CONTENT["saved_model.pb"]).digest()
        file = RemoteFile("x", 1000, 1, '"e"', md5=digest)
        partial = begin(replace(listing(), files={"saved_model.pb": file}))
        partial.write("saved_model.pb", 0, bytes(1000))
        with pytest.raises(DamagedError, match=r"checksum of saved_model\.pb"):
            partial.verify("saved_model.pb")
        put(partial, "saved_model.pb", 0)
        partial.verify("saved_model.pb")
        assert partial.is_complete()

    def test_a_damaged_file_is_missing_again_for_good(self, begin) -> None:
        partial = begin()
        partial.write(BIG, 0, bytes(CHUNK))
        put(partial, BIG, 1, 2, 3, 4)
        partial.flush()
        with pytest.raises(DamagedError, match="checksum of variables"):
            partial.verify(BIG)
        assert not partial.is_complete(BIG)
        partial.close()
        assert missing(begin()) == [(0, len(CONTENT[BIG]))]


def test_one_process_at_a_time(begin) -> None:
    partial = begin()
    with pytest.raises(BusyError, match="another process"):
        begin()
    partial.close()
    begin()


def test_threads_write_side_by_side(begin) -> None:
    partial = begin()
    threads = [threading.Thread(target=put, args=(partial, BIG, number)) for number in range(5)]
    flushers = [threading.Thread(target=partial.flush) for _ in range(3)]
    for thread in threads + flushers:
        thread.start()
    for thread in threads + flushers:
        thread.join()
    partial.flush()
    partial.verify(BIG)
    partial.close()
    assert begin().is_complete(BIG)
