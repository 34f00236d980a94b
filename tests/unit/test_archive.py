"""Archives of real writers become the same trees; broken ones become errors, never other trees."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubfs.errors import DamagedError, HostileError, HubfsError, TooLargeError
from hubfs.transfer import archive as archive_module
from hubfs.transfer.archive import Limits, extract
from hubfs.transfer.inflate import inflate
from hubfs.transfer.storage import REST, STEP, Storage
from tests.leaks import open_files

HANDLE = "https://tfhub.dev/google/model/1"
LIMITS = Limits(max_files=1000, max_bytes=1 << 30)
MTIME = 1_500_000_000

#: A small SavedModel with what makes names hard.
MODEL = {
    "saved_model.pb": b"pb" * 700,
    "variables/variables.data-00000-of-00001": random.Random(0).randbytes(5000),
    "variables/variables.index": b"",
    "assets/ü 語.txt": b"vocabulary",
    "assets/" + "n" * 120: b"longer than ustar's name field",
    "deep/" + "d" * 90 + "/" + "e" * 90 + "/" + "f" * 120: b"longer than 256",
}


@dataclass
class Recorder:
    """A sink that checks on every call that the disk is as far as it is told."""

    root: Path
    events: list[tuple[object, ...]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def directory(self, path: str, mtime: int) -> None:
        assert (self.root / path).is_dir()
        self.events.append(("directory", path, mtime))

    def file_started(self, path: str, size: int, mtime: int) -> None:
        assert (self.root / path).stat().st_size == 0
        self.sizes[path] = size
        self.events.append(("started", path, size, mtime))

    def file_grew(self, path: str, written: int) -> None:
        assert (self.root / path).stat().st_size == written <= self.sizes[path]
        self.events.append(("grew", path, written))

    def file_done(self, path: str, crc32: int) -> None:
        assert zlib.crc32((self.root / path).read_bytes()) == crc32
        self.events.append(("done", path, crc32))


def pieces(data: bytes, step: int) -> Iterator[bytes]:
    for start in range(0, len(data), step):
        yield data[start : start + step]


def unpack(data: bytes, into: Path, step: int = 1000, limits: Limits = LIMITS) -> Recorder:
    into.mkdir(mode=0o700)
    return unpack_from(pieces(data, step), into, limits)


def unpack_from(chunks: Iterable[bytes], into: Path, limits: Limits = LIMITS) -> Recorder:
    sink = Recorder(into)
    with closing(Storage()) as storage:
        extract(inflate(chunks), into, sink, storage, limits, name=HANDLE)
    return sink


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below `root`: the content of files, None for directories."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in found.items()}


def with_parents(files: dict[str, bytes]) -> dict[str, bytes | None]:
    parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    return {**dict.fromkeys(parents), **files}


def write_model(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in (root, *root.rglob("*")):
        os.utime(path, (MTIME, MTIME))


def python_tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mtime: float = MTIME) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as writer:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            writer.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("step", [100, 1 << 20])
def test_the_tree_and_its_times_are_the_publishers(tmp_path: Path, form: str, step: int) -> None:
    """What all writers make is in test_tar_writers.py."""
    source, into = tmp_path / "in", tmp_path / "out"
    write_model(source, MODEL)
    command = ["tar", "-C", str(source), f"--format={form}", "-czf", "-", "."]
    unpack(subprocess.run(command, check=True, capture_output=True).stdout, into, step)
    assert tree(into) == with_parents(MODEL)
    assert {int(path.stat().st_mtime) for path in (into, *into.rglob("*"))} == {MTIME}


class TestWriting:
    def test_events_come_in_order(self, tmp_path: Path) -> None:
        sink = unpack(python_tar({"d/e/f": b"x" * 10, "g": b""}), tmp_path / "out", 1 << 20)
        crc = zlib.crc32(b"x" * 10)
        assert [event[:2] for event in sink.events[:2]] == [("directory", "d"), ("directory", "d/e")]
        assert sink.events[2:] == [
            ("started", "d/e/f", 10, MTIME),
            ("grew", "d/e/f", 10),
            ("done", "d/e/f", crc),
            ("started", "g", 0, MTIME),
            ("done", "g", 0),
        ]

    def test_growth_is_told_every_mebibyte(self, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(3_500_000)
        sink = unpack(python_tar({"f": data}), tmp_path / "out", 10 << 20)
        steps = [event[2] for event in sink.events if event[0] == "grew"]
        assert steps[-1] == len(data)
        assert max(after - before for before, after in zip([0, *steps], steps, strict=False)) <= 1 << 20

    def test_short_writes_are_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.write
        monkeypatch.setattr(archive_module.os, "write", lambda fd, data: real(fd, data[:7]))
        unpack(python_tar({"f": b"0123456789" * 10}), tmp_path / "out")
        assert (tmp_path / "out/f").read_bytes() == b"0123456789" * 10

    @pytest.mark.parametrize("umask", [0, 0o077])
    def test_modes_are_fixed(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            unpack(python_tar({"d/f": b""}), tmp_path / "out")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out/d").stat().st_mode) == 0o755
        assert stat.S_IMODE((tmp_path / "out/d/f").stat().st_mode) == 0o644

    @pytest.mark.parametrize("mtime", [-5, 0, 4102444800, 1 << 60])
    def test_odd_times_become_now(self, tmp_path: Path, mtime: int) -> None:
        sink = unpack(python_tar({"f": b"x"}, mtime=mtime), tmp_path / "out")
        told = sink.events[0][3]
        actual = (tmp_path / "out/f").stat().st_mtime
        assert told == actual
        assert mtime != told > MTIME

    def test_implied_directories_have_the_told_time(self, tmp_path: Path) -> None:
        sink = unpack(python_tar({"d/f": b"x"}), tmp_path / "out")
        assert sink.events[0] == ("directory", "d", int((tmp_path / "out/d").stat().st_mtime))

    def test_a_directory_named_late_keeps_its_time(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as writer:
            writer.addfile(tarfile.TarInfo("d/f"))
            for name in ("d", "."):
                info = tarfile.TarInfo(name)
                info.type, info.mtime = tarfile.DIRTYPE, MTIME
                writer.addfile(info)
        sink = unpack(buffer.getvalue(), tmp_path / "out")
        assert sink.events[-2:] == [("directory", "d", MTIME), ("directory", "", MTIME)]
        assert (tmp_path / "out/d").stat().st_mtime == (tmp_path / "out").stat().st_mtime == MTIME

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        unpack(python_tar({os.fsdecode(b"caf\xe9"): b"x"}, tarfile.GNU_FORMAT), tmp_path / "out")
        assert os.listdir(os.fsencode(tmp_path / "out")) == [b"caf\xe9"]

    def test_large_files_go_to_storage_while_they_grow(self, tmp_path: Path) -> None:
        begun: list[tuple[str, int]] = []

        class Noting(Storage):
            def begin(self, descriptor: int) -> bool:
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                begun.append((path.name, path.stat().st_size))
                return super().begin(descriptor)

        sizes = {
            "large": 2 * STEP + 2 * REST,
            "with a small rest": STEP + REST // 2,
            "some": REST,
            "small": REST - 1,
        }
        archive = python_tar({name: bytes(size) for name, size in sizes.items()})
        (tmp_path / "out").mkdir()
        with no_descriptor_left(tmp_path), closing(Noting()) as storage:
            recorder = Recorder(tmp_path / "out")
            extract(pieces(archive, 1 << 16), tmp_path / "out", recorder, storage, LIMITS, name=HANDLE)
        growing = [(name, size // STEP) for name, size in begun if size < sizes[name]]
        assert growing == [("large", 1), ("large", 2), ("with a small rest", 1)]
        assert [name for name, size in begun if size == sizes[name]] == ["large", "some"]


@contextmanager
def no_descriptor_left(directory: Path) -> Iterator[None]:
    yield
    assert open_files(directory) == []


class Stop(Exception):
    pass


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "kind", "said"),
        [
            (lambda: python_tar({"../x": b""}), HostileError, r"'\.\.'"),
            (lambda: python_tar({"f": b"x"})[:600], DamagedError, "truncated"),
            (lambda: gzip.compress(python_tar({"f": b"x"}))[:-1], DamagedError, "truncated"),
            (lambda: gzip.compress(bytes(10240)), DamagedError, "holds no files"),
            (lambda: b"<!doctype html>", DamagedError, "web page"),
        ],
    )
    def test_messages_begin_with_the_handle(
        self, tmp_path: Path, make: Callable[[], bytes], kind: type[HubfsError], said: str
    ) -> None:
        with no_descriptor_left(tmp_path), pytest.raises(kind, match=said) as caught:
            unpack(make(), tmp_path / "out")
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"{HANDLE}: ")

    def test_limits(self, tmp_path: Path) -> None:
        with pytest.raises(TooLargeError, match=HANDLE):
            unpack(python_tar({"f": b"xx"}), tmp_path / "a", limits=Limits(max_files=9, max_bytes=1))
        with pytest.raises(TooLargeError, match=HANDLE):
            unpack(python_tar({"d/f": b"xx"}), tmp_path / "b", limits=Limits(max_files=1, max_bytes=9))

    def test_nothing_is_written_outside(self, tmp_path: Path) -> None:
        for number, name in enumerate(("../x", "/tmp/x", "a/../../x")):
            with pytest.raises(HostileError):
                unpack(python_tar({"good": b"", name: b"evil"}), tmp_path / str(number))
            assert tree(tmp_path / str(number)) == {"good": b""}

    @pytest.mark.parametrize("error", [DamagedError(f"{HANDLE}: md5 mismatch"), ConnectionError("broke")])
    def test_errors_of_the_download_go_up_unchanged(self, tmp_path: Path, error: Exception) -> None:
        def chunks() -> Iterator[bytes]:
            yield python_tar({"f": b"x" * 5000})[:2000]
            raise error

        (tmp_path / "out").mkdir()
        with no_descriptor_left(tmp_path), pytest.raises(type(error)) as caught:
            unpack_from(chunks(), tmp_path / "out")
        assert caught.value is error

    @pytest.mark.parametrize("method", ["directory", "file_started", "file_grew", "file_done"])
    def test_errors_of_the_sink_end_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        def stop(*_: object) -> None:
            raise Stop

        monkeypatch.setattr(Recorder, method, stop)
        with no_descriptor_left(tmp_path), pytest.raises(Stop):
            unpack(python_tar(MODEL), tmp_path / "out")

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(archive_module.os, "write", full)
        with no_descriptor_left(tmp_path), pytest.raises(OSError, match="No space") as caught:
            unpack(python_tar(MODEL), tmp_path / "out")
        assert caught.value.errno == errno.ENOSPC

    def test_it_does_not_overwrite(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/f").symlink_to(tmp_path / "victim")
        with no_descriptor_left(tmp_path), pytest.raises(FileExistsError):
            unpack_from([python_tar({"f": b"x"})], tmp_path / "out")
        assert not (tmp_path / "victim").exists()


SMALL = {"saved_model.pb": b"graph" * 30, "variables/variables.index": b"index", "empty": b""}


def outcome(data: bytes, into: Path, step: int) -> dict[str, bytes | None] | None:
    """What `data` extracts to; None if it is refused."""
    into.mkdir()
    try:
        unpack_from(pieces(data, step), into)
        return tree(into)
    except (DamagedError, TooLargeError):
        return None
    finally:
        shutil.rmtree(into)


@pytest.mark.parametrize("step", [1 << 20, 61])
def test_every_cut_of_a_gzip_archive_is_noticed(tmp_path: Path, step: int) -> None:
    whole = gzip.compress(python_tar(SMALL), mtime=0)
    assert outcome(whole, tmp_path / "out", step) == with_parents(SMALL)
    for size in range(len(whole)):
        assert outcome(whole[:size], tmp_path / "out", step) is None


def test_every_cut_of_a_plain_archive_is_noticed(tmp_path: Path) -> None:
    whole = python_tar(SMALL)
    # The last member is an empty file: its header, padded to a block, and one zero block must be there.
    needed = len(whole.rstrip(b"\0"))
    needed += -needed % 512 + 512
    for size in range(0, needed, 7):
        assert outcome(whole[:size], tmp_path / "out", 1 << 20) is None
    for size in (needed, needed + 1, needed + 512, len(whole)):
        assert outcome(whole[:size], tmp_path / "out", 1 << 20) == with_parents(SMALL)


@pytest.mark.parametrize("level", [0, 1, 9])
def test_no_flipped_bit_makes_another_tree(tmp_path: Path, level: int) -> None:
    whole = gzip.compress(python_tar(SMALL), level, mtime=0)
    expected = with_parents(SMALL)
    bits = range(len(whole) * 8)
    for bit in bits if len(bits) < 3000 else random.Random(level).sample(bits, 3000):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert outcome(bytes(damaged), tmp_path / "out", 997) in (None, expected)


_NAME = st.text(st.sampled_from("abcü語 -._"), min_size=1, max_size=150).filter(lambda name: name.strip("."))


@settings(deadline=None, max_examples=100)
@given(
    model=st.dictionaries(
        st.lists(_NAME.filter(lambda name: len(name.encode()) < 256), min_size=1, max_size=3).map("/".join),
        st.binary(max_size=3000),
        min_size=1,
        max_size=5,
    ),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    compressed=st.booleans(),
    step=st.integers(1, 4000),
)
def test_any_tree(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, bytes], form: int, compressed: bool, step: int
) -> None:
    files = {
        name: data for name, data in model.items() if name not in with_parents(model) or data is not None
    }
    parents = {str(parent) for name in files for parent in Path(name).parents}
    files = {name: data for name, data in files.items() if name not in parents}
    archive = python_tar(files, form)
    into = tmp_path_factory.mktemp("any") / "out"
    unpack(gzip.compress(archive) if compressed else archive, into, step)
    assert tree(into) == with_parents(files)
