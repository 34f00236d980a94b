"""Versions of which some chunks are there: what is trusted after whatever ended the process."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest

from hubfs.cache.partial import BusyError, Partial, Summary, summary
from hubfs.errors import CacheError, DamagedError
from hubfs.hubs.base import Listing, RemoteFile
from hubfs.transfer.chunks import CHUNK
from tests.leaks import open_files

HANDLE = "https://tfhub.dev/google/demo/1"
BIG = "variables/variables.data-00000-of-00001"
CONTENT = {
    BIG: random.Random(1).randbytes(4 * CHUNK + 12345),
    "saved_model.pb": random.Random(2).randbytes(1000),
    "assets/empty": b"",
}


class NoSource:
    """A partial version never asks for anything itself."""

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes, None, None]:
        raise AssertionError("it was asked for bytes")

    def declared(self, file: RemoteFile) -> RemoteFile:
        raise AssertionError("it was asked what it knows")


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


def chunks(path: str = BIG) -> list[int]:
    """Numbers of all chunks of a file."""
    return list(range(-(-len(CONTENT[path]) // CHUNK)))


def put(partial: Partial, path: str, *numbers: int) -> None:
    for number in numbers:
        start = number * CHUNK
        partial.write(path, start, CONTENT[path][start : start + CHUNK])


def read(partial: Partial, path: str, start: int = 0, stop: int | None = None) -> bytes:
    descriptor = partial.reader(path)
    try:
        return os.pread(descriptor, (len(CONTENT[path]) if stop is None else stop) - start, start)
    finally:
        os.close(descriptor)


def verify(partial: Partial, path: str) -> None:
    for _ in partial.verify(path, partial.file(path)):
        pass


class TestMap:
    def test_nothing_is_there_at_first(self, begin) -> None:
        partial = begin()
        assert [partial.present(path) for path in CONTENT] == [[], [], []]
        assert list(partial.files_directory.iterdir()) == [], "files are made when they are needed"

    @pytest.mark.parametrize("flushed", [(), (0,), (4,), (1, 2), (0, 1, 2, 3, 4)])
    @pytest.mark.parametrize("fresh", [(), (0,), (4, 1)])
    def test_what_was_written_is_there(self, begin, flushed, fresh) -> None:
        partial = begin()
        put(partial, BIG, *flushed)
        partial.flush()
        put(partial, BIG, *fresh)
        assert partial.present(BIG) == sorted({*flushed, *fresh})
        assert partial.present("saved_model.pb") == []

    @pytest.mark.parametrize("size", [1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
    def test_chunk_is_there_with_its_last_byte(self, begin, size: int) -> None:
        data, step = CONTENT[BIG][CHUNK:], size if size > 1 else CHUNK - 1
        partial = begin()
        for start in range(0, len(data), step):
            partial.write(BIG, CHUNK + start, data[start : start + step])
            came = CHUNK + min(start + step, len(data))
            whole = -(-came // CHUNK) if came == len(CONTENT[BIG]) else came // CHUNK
            assert partial.present(BIG) == list(range(1, whole))
        assert read(partial, BIG, CHUNK) == data
        partial.close()
        assert begin().present(BIG) == chunks()[1:]

    def test_file_has_its_size_and_hardly_any_blocks(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 2)
        status = (partial.files_directory / BIG).stat()
        assert status.st_size == len(CONTENT[BIG])
        assert status.st_blocks * 512 < 2 * CHUNK

    def test_room_of_a_large_file_can_be_claimed(self, begin) -> None:
        large = RemoteFile(BIG, 2 << 20, 1, '"e"')
        partial = begin(replace(listing(), files={**listing().files, BIG: large}))
        partial.write(BIG, CHUNK, CONTENT[BIG][CHUNK : 2 * CHUNK])
        for path in CONTENT:
            partial.reserve(path)
        place = partial.files_directory / BIG
        assert place.stat().st_size == large.size <= 512 * place.stat().st_blocks
        assert place.read_bytes()[CHUNK : 2 * CHUNK] == CONTENT[BIG][CHUNK : 2 * CHUNK]
        assert partial.present(BIG) == [1]
        assert not (partial.files_directory / "saved_model.pb").exists()

    def test_reader_of_a_file_that_nobody_wrote_finds_its_size(self, begin) -> None:
        assert read(begin(), BIG) == bytes(len(CONTENT[BIG]))

    def test_reader_goes_on_when_the_file_is_released(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 0)
        descriptor = partial.reader(BIG)
        partial.release(BIG)
        put(partial, BIG, 1)
        assert os.pread(descriptor, 2 * CHUNK, 0) == CONTENT[BIG][: 2 * CHUNK]
        os.close(descriptor)

    def test_released_file_holds_no_descriptor_and_loses_nothing(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 3)
        put(partial, "saved_model.pb", 0)
        files = [str(partial.files_directory / path) for path in (BIG, "saved_model.pb")]
        assert open_files(partial.files_directory) == sorted(files)
        for path in CONTENT:
            partial.release(path)
        assert open_files(partial.files_directory) == []
        partial.close()
        again = begin()
        assert (again.present(BIG), again.present("saved_model.pb")) == ([3], [0])

    def test_nothing_is_made_after_it_was_closed(self, begin) -> None:
        partial = begin()
        partial.close()
        with pytest.raises(CacheError, match="not being brought in"):
            put(partial, BIG, 0)

    def test_link_in_the_place_of_a_file_is_not_followed(self, begin, tmp_path: Path) -> None:
        partial = begin()
        (tmp_path / "elsewhere").write_bytes(b"precious")
        (partial.files_directory / "saved_model.pb").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic"):
            put(partial, "saved_model.pb", 0)
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"

    def test_what_was_written_is_read(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 4, 0, 2)
        assert read(partial, BIG, 2 * CHUNK, 3 * CHUNK) == CONTENT[BIG][2 * CHUNK : 3 * CHUNK]
        assert read(partial, BIG, 4 * CHUNK) == CONTENT[BIG][4 * CHUNK :]


class TestGoingOn:
    def test_with_what_was_written(self, begin) -> None:
        first = begin()
        put(first, BIG, 0, 3)
        assert first.unstored() == 2 * CHUNK
        first.flush()
        assert first.unstored() == 0
        put(first, BIG, 1)
        first.close()
        again = begin()
        assert again.present(BIG) == [0, 1, 3]
        # Though it is there, it is not on stable storage yet.
        assert again.unstored() == CHUNK
        assert read(again, BIG, 3 * CHUNK, 4 * CHUNK) == CONTENT[BIG][3 * CHUNK : 4 * CHUNK]

    @pytest.mark.parametrize("what", ["another boot", "another mount", "nothing of it"])
    def test_only_with_what_was_flushed_after_the_machine_ended(self, begin, what: str) -> None:
        first = begin()
        put(first, BIG, 0, 3)
        first.flush()
        put(first, BIG, 1)
        first.close()
        written = first.directory / "written"
        head, _, rest = written.read_bytes().partition(b"\n")
        identity, boot, mount = head.split(b" ")
        assert boot.decode() in Path("/proc/sys/kernel/random/boot_id").read_text()
        if what == "another boot":
            boot = boot[::-1]
        elif what == "another mount":
            mount = bytes(reversed(mount)) if mount != mount[::-1] else b"1" + mount[:-1]
        else:
            written.unlink()
        if written.exists():
            changed = b" ".join((identity, boot, mount))
            assert changed != head
            written.write_bytes(changed + b"\n" + rest)
        assert begin().present(BIG) == [0, 3]

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
        assert partial.present(BIG) == [0, 1, 2]
        assert read(partial, BIG, 0, 3 * CHUNK) == CONTENT[BIG][: 3 * CHUNK]

    def test_without_an_etag_only_with_what_the_map_knows(self, begin) -> None:
        """Nobody could tell otherwise whether the rest is of the same file."""
        plain = replace(
            listing(), files={path: replace(file, etag=None) for path, file in listing().files.items()}
        )
        first = begin(plain)
        first.remember(BIG, replace(plain.files[BIG], etag='"learned"'))
        put(first, BIG, 0)
        first.close()
        again = begin(plain)
        assert again.present(BIG) == []
        again.remember(BIG, replace(plain.files[BIG], etag='"learned"'))
        put(again, BIG, 0)
        again.flush()
        put(again, BIG, 1)
        again.close()
        last = begin(plain)
        assert last.present(BIG) == [0, 1]
        assert last.file(BIG).etag == '"learned"'

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
        assert again.present(BIG) == []
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
            assert again.present(BIG) == []
            assert again.present("saved_model.pb") == [0]
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
        assert begin().present(BIG) == []

    def test_not_without_the_files(self, begin) -> None:
        first = begin()
        put(first, BIG, 0)
        first.flush()
        first.close()
        shutil.rmtree(first.files_directory)
        assert begin().present(BIG) == []

    def test_with_what_came_with_the_bytes(self, begin) -> None:
        """The ETag and checksums of files whose listing tells neither."""
        plain = replace(listing(), files={BIG: RemoteFile(BIG, len(CONTENT[BIG]), 1)})
        learned = replace(plain.files[BIG], etag='"e"', md5=hashlib.md5(CONTENT[BIG]).digest())
        first = begin(plain)
        assert first.file(BIG) == plain.files[BIG]
        first.remember(BIG, learned)
        put(first, BIG, 0)
        first.flush()
        first.close()
        again = begin(plain)
        assert again.file(BIG) == learned
        put(again, BIG, 1, 2, 3, 4)
        verify(again, BIG)

    def test_what_was_learned_is_forgotten_with_damaged_bytes(self, begin) -> None:
        plain = replace(listing(), files={BIG: RemoteFile(BIG, len(CONTENT[BIG]), 1)})
        partial = begin(plain)
        partial.remember(BIG, replace(plain.files[BIG], etag='"e"', md5=bytes(16)))
        put(partial, BIG, *chunks())
        with pytest.raises(DamagedError):
            verify(partial, BIG)
        assert partial.file(BIG) == plain.files[BIG]


class TestChecks:
    def test_a_whole_file_is_checked(self, begin) -> None:
        partial = begin()
        for number, path in enumerate(CONTENT):
            assert not partial.is_complete()
            put(partial, path, *chunks(path))
            assert not partial.is_verified(path)
            verify(partial, path)
            assert partial.is_verified(path)
            so_far = sum(len(list(chunks(each))) for each in list(CONTENT)[: number + 1])
            assert partial.there == so_far * CHUNK
        assert partial.is_complete()
        assert (partial.files_directory / "assets/empty").read_bytes() == b""

    @pytest.mark.parametrize(
        ("given", "wrong"),
        [("md5", False), ("md5", True), ("crc32c", True), ("both", False), ("both", True), ("none", False)],
    )
    def test_by_the_checksum_that_there_is(self, begin, given: str, wrong: bool) -> None:
        content = CONTENT[BIG]
        md5 = hashlib.md5(content).digest() if given in ("md5", "both") else None
        crc32c = google_crc32c.Checksum(content).digest() if given in ("crc32c", "both") else None
        file = RemoteFile("x", len(content), 1, '"e"', md5=md5, crc32c=crc32c)
        partial = begin(replace(listing(), files={BIG: file}))
        put(partial, BIG, *chunks())
        if wrong:
            partial.write(BIG, CHUNK, bytes(CHUNK))
            with pytest.raises(DamagedError, match="checksum of variables"):
                verify(partial, BIG)
            assert partial.present(BIG) == []
            put(partial, BIG, *chunks())
        verify(partial, BIG)
        assert partial.is_complete()

    def test_check_can_be_left_in_the_middle(self, begin) -> None:
        large = bytes(20 << 20)
        file = RemoteFile("x", len(large), 1, crc32c=google_crc32c.Checksum(large).digest())
        partial = begin(replace(listing(), files={"large": file}))
        partial.write("large", 0, large)
        checking = partial.verify("large", file)
        next(checking)
        checking.close()
        assert not partial.is_verified("large")

    def test_a_damaged_file_is_missing_again_for_good(self, begin) -> None:
        partial = begin()
        partial.write(BIG, 0, bytes(CHUNK))
        put(partial, BIG, 1, 2, 3, 4)
        put(partial, "saved_model.pb", 0)
        partial.flush()
        with pytest.raises(DamagedError, match="checksum of variables"):
            verify(partial, BIG)
        assert not partial.is_verified(BIG)
        partial.close()
        again = begin()
        assert (again.present(BIG), again.present("saved_model.pb")) == ([], [0])


class TestSummary:
    def test_tells_whose_it_is_and_what_is_there(self, begin) -> None:
        partial = begin()
        put(partial, BIG, 0, 1)
        put(partial, "saved_model.pb", 0)
        assert summary(partial.directory) == Summary(HANDLE, 0, 3)
        partial.flush()
        assert summary(partial.directory) == Summary(HANDLE, 3 * CHUNK, 3)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "chunks": []}'])
    def test_of_no_map_is_nothing(self, tmp_path: Path, text: str) -> None:
        assert summary(tmp_path) is None
        (tmp_path / "map").write_text(text)
        assert summary(tmp_path) is None


class TestDiscarding:
    def test_leaves_nothing_and_no_descriptor(self, begin, tmp_path: Path) -> None:
        partial = begin()
        put(partial, BIG, 0)
        partial.discard()
        assert not partial.directory.exists()
        assert open_files(tmp_path) == []
        assert begin().present(BIG) == []

    def test_new_one_in_its_place_is_guarded_by_itself(self, begin) -> None:
        old = begin()
        descriptor = os.open(old.directory / "lock", os.O_RDONLY)
        old.discard()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the lock that is gone
        begin()
        with pytest.raises(BusyError):
            begin()
        os.close(descriptor)


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
    verify(partial, BIG)
    partial.close()
    assert begin().present(BIG) == chunks()
