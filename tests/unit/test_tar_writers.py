"""Archives of real writers: GNU tar, bsdtar and Python make the same tree of them, or an error."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from hubfs.errors import DamagedError, HostileError
from hubfs.transfer.tar import Member, members

MTIME = 1_500_000_000
GNU_FORMATS = ["gnu", "oldgnu", "pax", "ustar", "v7"]
BSD_FORMATS = ["pax", "gnutar", "ustar", "v7"]
PYTHON_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

#: A small SavedModel with what makes names hard.
MODEL = {
    "saved_model.pb": b"pb" * 700,
    "variables/variables.data-00000-of-00001": random.Random(0).randbytes(5000),
    "variables/variables.index": b"",
    "assets/ü 語.txt": b"vocabulary",
    "assets/new\nline=": b"odd",
    "assets/" + "n" * 120: b"longer than ustar's name field",
    "deep/" + "d" * 90 + "/" + "e" * 90 + "/" + "f" * 120: b"longer than 256",
    "/".join(["x" * 250] * 13): b"nearly as long as Linux allows",
}

Tree = dict[str, bytes | None]
needs_bsdtar = pytest.mark.skipif(not shutil.which("bsdtar"), reason="libarchive-tools is not installed")


def read(archive: bytes, step: int = 0) -> dict[Member, bytes]:
    chunks = [
        archive[at : at + (step or len(archive))] for at in range(0, len(archive), step or len(archive))
    ]
    found = members(chunks, max_files=1000, max_bytes=1 << 40)
    return {member: b"".join(data) for member, data in found}


def check(archive: bytes, files: dict[str, bytes], *, root: bool = True) -> None:
    """The archive has these files, the directories above them, and MTIME everywhere."""
    expected: Tree = {**dict.fromkeys(above(files)), **files}
    if not root:
        del expected[""]
    for step in (0, 100):
        found = read(archive, step)
        assert {member.name: None if member.is_dir else data for member, data in found.items()} == expected
        assert {member.mtime for member in found} == {MTIME}


def above(files: Iterable[str]) -> set[str]:
    return {"" if parent == Path() else str(parent) for name in files for parent in Path(name).parents}


def fitting(form: str) -> dict[str, bytes]:
    """The part of MODEL whose names the format can hold."""
    longest = {"v7": 99, "ustar": 100}.get(form, 5000)
    # bsdtar's v7 and ustar refuse names that are not ASCII in some locales; the others cover them.
    return {
        name: data
        for name, data in MODEL.items()
        if len(name) < longest and (longest > 100 or name.isascii())
    }


def write(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir()
    # One component at a time: the whole would be longer than a path may be.
    for name, content in files.items():
        *parents, last = name.split("/")
        at = os.open(root, os.O_RDONLY)
        for parent in parents:
            if not os.access(parent, os.F_OK, dir_fd=at):
                os.mkdir(parent, dir_fd=at)
            below = os.open(parent, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        file = os.open(last, os.O_WRONLY | os.O_CREAT, dir_fd=at)
        os.write(file, content)
        os.close(file)
        os.close(at)
    for _, directories, names, at in os.fwalk(root, topdown=False):
        for name in (*directories, *names):
            os.utime(name, (MTIME, MTIME), dir_fd=at, follow_symlinks=False)
    os.utime(root, (MTIME, MTIME))
    return root


def run(*command: str | Path, cwd: Path | None = None) -> bytes:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, check=True, capture_output=True, env=environment, cwd=cwd).stdout


def gnu_tar(source: Path, form: str, *arguments: str) -> bytes:
    return run("tar", "-C", source, f"--format={form}", "-cf", "-", *(arguments or (".",)))


def bsd_tar(source: Path, form: str, *arguments: str) -> bytes:
    return run("bsdtar", "-C", source, "--format", form, "-cf", "-", *(arguments or (".",)))


class TestTaken:
    @pytest.mark.parametrize("form", GNU_FORMATS)
    def test_gnu_tar(self, tmp_path: Path, form: str) -> None:
        files = fitting(form)
        source = write(tmp_path / "in", files)
        check(gnu_tar(source, form), files)
        check(gnu_tar(source, form, "--", *os.listdir(source)), files, root=False)

    @needs_bsdtar
    @pytest.mark.parametrize("form", BSD_FORMATS)
    def test_bsdtar(self, tmp_path: Path, form: str) -> None:
        files = fitting(form)
        check(bsd_tar(write(tmp_path / "in", files), form), files)

    @pytest.mark.parametrize("form", PYTHON_FORMATS)
    def test_python(self, tmp_path: Path, form: str) -> None:
        files = {name: data for name, data in fitting(form).items() if len(name) < 1000}
        source, buffer = write(tmp_path / "in", files), io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=PYTHON_FORMATS[form]) as writer:
            writer.add(source, arcname=".")
        check(buffer.getvalue(), files)

    @pytest.mark.parametrize("form", GNU_FORMATS)
    def test_names_that_are_not_utf8(self, tmp_path: Path, form: str) -> None:
        names = {os.fsdecode(b"caf\xe9"): b"1", os.fsdecode(b"\xff/" + b"\xfe" * 60): b"2"}
        source = write(tmp_path / "in", names)
        check(gnu_tar(source, form), names)

    @needs_bsdtar
    @pytest.mark.parametrize("form", BSD_FORMATS)
    def test_names_that_are_not_utf8_from_bsdtar(self, tmp_path: Path, form: str) -> None:
        names = {os.fsdecode(b"caf\xe9"): b"1"}
        source = write(tmp_path / "in", names)
        # In the C locale it takes bytes for what they are.
        command = ["bsdtar", "-C", str(source), "--format", form, "-cf", "-", "."]
        environment = {**os.environ, "LC_ALL": "C"}
        made = subprocess.run(command, capture_output=True, check=False, env=environment)
        if made.returncode:
            pytest.skip(f"bsdtar: {made.stderr.decode()}")
        check(made.stdout, names)

    @pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax"])
    def test_sizes_that_octal_digits_cannot_hold(self, tmp_path: Path, form: str) -> None:
        size = 9 << 30
        with (tmp_path / "big").open("wb") as file:
            file.truncate(size)
        command = ["tar", "-C", str(tmp_path), f"--format={form}", "-cf", "-", "big"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            member, _ = next(members([tar.stdout.read(10240)], max_files=1, max_bytes=1 << 40))
            tar.kill()
        assert (member.name, member.size) == ("big", size)

    @pytest.mark.parametrize("form", ["gnu", "pax"])
    def test_sizes_that_octal_digits_cannot_hold_from_python(self, form: str) -> None:
        info = tarfile.TarInfo("big")
        info.size = 9 << 30
        header = info.tobuf(PYTHON_FORMATS[form])
        member, _ = next(members([header], max_files=1, max_bytes=1 << 40))
        assert (member.name, member.size) == ("big", 9 << 30)

    @pytest.mark.parametrize("form", ["gnu", "pax"])
    @pytest.mark.parametrize("mtime", [-1.5, 0.25, 2**33 + 0.5, MTIME + 0.999])
    def test_odd_times(self, tmp_path: Path, form: str, mtime: float) -> None:
        source = write(tmp_path / "in", {"f": b"x"})
        os.utime(source / "f", (mtime, mtime))
        (member,) = read(gnu_tar(source, form, "f"))
        # GNU tar rounds down, and pax cuts off what it wrote in decimal.
        assert member.mtime in (int(mtime), int(mtime // 1))

    def test_directories_repeated_by_appending(self, tmp_path: Path) -> None:
        source, archive = write(tmp_path / "in", {"d/one": b"1", "d/two": b"2"}), tmp_path / "a.tar"
        for what in ("d/one", "d/two"):
            run("tar", "-C", source, "--no-recursion", "-rf", archive, ".", "d", what)
        check(archive.read_bytes(), {"d/one": b"1", "d/two": b"2"})

    @pytest.mark.parametrize("forms", [("gnu", "pax"), ("ustar", "gnu"), ("v7", "ustar")])
    def test_archives_joined_by_gnu_tar(self, tmp_path: Path, forms: tuple[str, str]) -> None:
        """The second one's headers may be of another format."""
        parts = []
        for number, form in enumerate(forms):
            source = write(tmp_path / form, {f"d{number}/f": form.encode()})
            parts.append(tmp_path / f"{form}.tar")
            parts[-1].write_bytes(gnu_tar(source, form))
        run("tar", "-Af", *parts)
        check(parts[0].read_bytes(), {f"d{number}/f": form.encode() for number, form in enumerate(forms)})

    @pytest.mark.parametrize("form", ["gnu", "pax"])
    @pytest.mark.parametrize("blocking", ["1", "3", "20", "2048"])
    def test_any_record_size(self, tmp_path: Path, form: str, blocking: str) -> None:
        source = write(tmp_path / "in", {"f": b"x" * 700})
        check(gnu_tar(source, form, "-b", blocking, "."), {"f": b"x" * 700})

    def test_pax_records_that_mean_nothing_here(self, tmp_path: Path) -> None:
        source = write(tmp_path / "in", {"f": b"x"})
        try:
            os.setxattr(source / "f", "user.note", b"binary\0=\n\xff")
        except OSError:
            pytest.skip("no extended attributes here")
        options = "--pax-option=globexthdr.name=/tmp/g,comment=made today,comment:=for this one"
        check(gnu_tar(source, "pax", "--xattrs", options, "."), {"f": b"x"})


class TestRefused:
    @pytest.mark.parametrize("form", GNU_FORMATS)
    @pytest.mark.parametrize("kind", ["hard link", "symbolic link", "fifo"])
    def test_what_is_no_file(self, tmp_path: Path, form: str, kind: str) -> None:
        if (kind, form) == ("fifo", "v7"):
            pytest.skip("v7 has no fifos")
        source = write(tmp_path / "in", {"f": b"x"})
        make_other(source / "other", kind)
        with pytest.raises(HostileError, match=f"has a {kind}"):
            read(gnu_tar(source, form, "f", "other"))

    @needs_bsdtar
    @pytest.mark.parametrize("form", BSD_FORMATS)
    @pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
    def test_what_is_no_file_from_bsdtar(self, tmp_path: Path, form: str, kind: str) -> None:
        source = write(tmp_path / "in", {"f": b"x"})
        make_other(source / "other", kind)
        with pytest.raises(HostileError, match=f"has a {kind}"):
            read(bsd_tar(source, form, "f", "other"))

    @pytest.mark.parametrize("options", [
        ["--format=gnu"], ["--format=oldgnu"],
        *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")),
    ])  # fmt: skip
    def test_sparse_files(self, tmp_path: Path, options: list[str]) -> None:
        with (tmp_path / "holes").open("wb") as file:
            for offset in range(0, 50 << 20, 10 << 20):
                file.seek(offset)
                file.write(b"data")
        archive = run("tar", "-C", tmp_path, "--sparse", *options, "-cf", "-", "holes")
        assert len(archive) < 1 << 20, "tar found no holes"
        with pytest.raises(HostileError, match="sparse"):
            read(archive)

    @needs_bsdtar
    def test_sparse_files_from_bsdtar(self, tmp_path: Path) -> None:
        with (tmp_path / "holes").open("wb") as file:
            file.write(b"data")
            file.truncate(50 << 20)
        archive = bsd_tar(tmp_path, "pax", "holes")
        if len(archive) > 1 << 20:
            pytest.skip("bsdtar found no holes")
        with pytest.raises(HostileError, match="sparse"):
            read(archive)

    def test_volume_labels(self, tmp_path: Path) -> None:
        source = write(tmp_path / "in", {"f": b"x"})
        with pytest.raises(HostileError, match="unknown type b'V'"):
            read(gnu_tar(source, "gnu", "-V", "label", "."))

    def test_incremental_archives(self, tmp_path: Path) -> None:
        source = write(tmp_path / "in", {"d/f": b"x"})
        with pytest.raises(HostileError, match="unknown type b'D'"):
            read(gnu_tar(source, "gnu", "-g", str(tmp_path / "snapshot"), "."))

    def test_continued_volumes(self, tmp_path: Path) -> None:
        source = write(tmp_path / "in", {"f": random.Random(3).randbytes(15_000)})
        volumes = [tmp_path / name for name in ("one", "two")]
        run("tar", "-C", source, "--format=gnu", "-cM", "-L", "10",
            *(f"-f{volume}" for volume in volumes), "f")  # fmt: skip
        with pytest.raises(DamagedError, match="truncated in the data of 'f'"):
            read(volumes[0].read_bytes())
        with pytest.raises(HostileError, match="unknown type b'M'"):
            read(volumes[1].read_bytes())

    def test_archives_one_behind_the_other(self, tmp_path: Path) -> None:
        """`cat` does not join archives: readers end at the first end marker."""
        parts = [gnu_tar(write(tmp_path / name, {name: b"x"}), "gnu") for name in ("a", "b")]
        with pytest.raises(DamagedError, match="after its end marker"):
            read(b"".join(parts))

    @needs_bsdtar
    @pytest.mark.parametrize("form", ["cpio", "newc", "shar", "ar", "zip", "mtree", "xar", "warc", "iso9660"])
    def test_other_formats(self, tmp_path: Path, form: str) -> None:
        source = write(tmp_path / "in", {"f": b"x" * 2000})
        with pytest.raises(DamagedError):
            read(bsd_tar(source, form, "f"))


def archives(tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    files = {"d/f": b"x" * 700, "long" * 30: b"y", "z": b"z" * 512}
    source = write(tmp_path / "in", files)
    short = ["d", "z"]
    for form in GNU_FORMATS:
        yield f"GNU tar {form}", gnu_tar(source, form, *(short if form in ("v7", "ustar") else ["."]))
    if shutil.which("bsdtar"):
        for form in BSD_FORMATS:
            yield f"bsdtar {form}", bsd_tar(source, form, *(short if form == "v7" else ["."]))
    for name, form in PYTHON_FORMATS.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as writer:
            writer.add(source / "d" if name == "ustar" else source, arcname="model")
        yield f"Python {name}", buffer.getvalue()


def test_every_cut_of_every_writer_is_noticed(tmp_path: Path) -> None:
    for writer, whole in archives(tmp_path):
        expected = read(whole)
        end = end_of_last_member(whole)
        for size in range(1, end + 512):
            with pytest.raises(DamagedError):
                read(whole[:size])
                pytest.fail(f"{writer}: cut to {size} bytes")
        for size in (end + 512, end + 513, end + 1024, len(whole)):
            assert read(whole[:size]) == expected, writer


def end_of_last_member(archive: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(archive)) as reader:
        last = reader.getmembers()[-1]
        return last.offset_data + -(-last.size // 512) * 512


def make_other(path: Path, kind: str) -> None:
    if kind == "hard link":
        path.hardlink_to(path.with_name("f"))
    elif kind == "symbolic link":
        path.symlink_to("f")
    else:
        os.mkfifo(path)
