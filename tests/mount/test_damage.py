"""Damaged and hostile archives: readers get an errno and never a byte, the cache nothing, the log the why."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from isal import igzip

from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import Tree, make_archive, make_tree

MODEL = "google/demo/1"
SOON = 20.0
TREE = make_tree()
GOOD = make_archive(TREE)


def error_of(read: Callable[[], object]) -> int:
    """The errno with which `read` fails."""
    try:
        found = read()
    except OSError as error:
        assert error.errno is not None
        return error.errno
    raise AssertionError(f"it did not fail, but gave {str(found)[:100]}")


def try_everything(mounted: Mounted, name: str = "saved_model.pb") -> list[int]:
    """What the calls that a reader makes fail with."""
    model = mounted.path / MODEL
    return [
        error_of(lambda: (model / name).read_bytes()),
        error_of(lambda: os.stat(model / name)),
        error_of(lambda: os.listdir(model)),
    ]


def cached_names(mounted: Mounted) -> list[str]:
    """What is in the cache directory, which need not exist."""
    return sorted(os.listdir(mounted.cache)) if mounted.cache.exists() else []


def assert_says_why(mounted: Mounted, pattern: str) -> None:
    """Log and extended attribute of the version's directory tell the reason, and of which handle."""
    value = os.getxattr(mounted.path / MODEL, "user.hubfs.error").decode()
    assert re.search(pattern, value), value
    assert MODEL in value
    lines = [line for line in mounted.log_text().splitlines() if " ERROR " in line]
    assert any(re.search(pattern, line) and MODEL in line for line in lines), lines


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def archive_with(*extra: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    return make_archive(TREE, extra_members=extra)


def at_member_boundary(tree: Tree, members: int = 3) -> bytes:
    """A whole gzip stream of a tar that ends right before a member's header."""
    plain = make_archive(tree, gzip=False)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        offset = tar.getmembers()[members].offset
    return igzip.compress(plain[:offset], 1, mtime=0)


def without_files() -> bytes:
    return make_archive({}, dirs=True)


@dataclass(frozen=True)
class Damage:
    """An archive that is not what was published.

    Attributes:
        why: what the error says.
        body: what the hub serves, `None` for the good archive.
        fault: what the hub does with it at every request.
        digests: whether the hub declares checksums, so that not only the content tells.
    """

    why: str
    body: bytes | None = None
    fault: Fault | None = None
    digests: bool = False


DAMAGES = {
    "truncated, and the length says so": Damage("truncated", GOOD[: len(GOOD) // 2]),
    "truncated, with the checksums of the whole": Damage(
        "truncated|md5|crc32c", fault=Fault.truncate(len(GOOD) // 2, times=None), digests=True
    ),
    "truncated, without a length": Damage("truncated", GOOD[:-2000], Fault.no_length(times=None)),
    "truncated at a member boundary": Damage("no end marker", at_member_boundary(TREE)),
    "without the gzip trailer": Damage("truncated|trailer", GOOD[:-8]),
    "without a half of the gzip trailer": Damage("truncated|trailer", GOOD[:-4]),
    "wrong gzip trailer": Damage("gzip|check", GOOD[:-8] + bytes(4) + GOOD[-4:]),
    "wrong md5": Damage("md5", fault=Fault.wrong_md5(times=None), digests=True),
    "wrong crc32c": Damage("crc32c", fault=Fault.wrong_crc32c(times=None), digests=True),
    "length too small": Damage(
        "truncated|crc32c|bytes", fault=Fault.short_length(500, times=None), digests=True
    ),
    "not a tar": Damage("tar", igzip.compress(random.Random(1).randbytes(50_000))),
    "neither gzip nor tar": Damage("tar|gzip", random.Random(1).randbytes(50_000)),
    "a web page": Damage("web page|HTML|html|tar", fault=Fault.html(times=None)),
    "no members": Damage("no files", make_archive({}, prefix="")),
    "no files": Damage("no files", without_files()),
    "no bytes": Damage("empty|truncated", b""),
    "bytes after its end": Damage("gzip|end", GOOD + b"something else" * 100),
}

HOSTILE = {
    "a name that leads out": (archive_with((member("../evil"), b"x")), r"'\.\.' in its name"),
    "a name that leads out at the end": (archive_with((member("assets/../../evil"), b"x")), r"'\.\.'"),
    "an absolute name": (archive_with((member("/tmp/hubfs-evil"), b"x")), "absolute name"),
    "a symbolic link": (archive_with(member("link", tarfile.SYMTYPE, "/etc/passwd")), "symbolic link"),
    "a symbolic link to write through": (
        archive_with(member("out", tarfile.SYMTYPE, "/tmp"), (member("out/hubfs-evil"), b"x")),
        "symbolic link",
    ),
    "a hard link": (archive_with(member("hard", tarfile.LNKTYPE, "saved_model.pb")), "hard link"),
    "a character device": (archive_with(member("null", tarfile.CHRTYPE)), "character device"),
    "a block device": (archive_with(member("disk", tarfile.BLKTYPE)), "block device"),
    "a fifo": (archive_with(member("fifo", tarfile.FIFOTYPE)), "fifo"),
    "a name twice": (archive_with((member("./saved_model.pb"), b"other")), "twice"),
    "a name twice, spelt differently": (archive_with((member("assets//./vocab.txt"), b"x")), "twice"),
    "a file where a directory was": (archive_with((member("assets"), b"x")), "both a file and a directory"),
    "a directory where a file was": (archive_with(member("saved_model.pb", tarfile.DIRTYPE)), "both a file"),
    "something below a file": (archive_with((member("saved_model.pb/x"), b"x")), "both a file"),
}


@pytest.mark.logs("google/demo/1")
class TestDamaged:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_fails_with_eio_after_one_clean_retry_and_leaves_nothing(
        self, hub: FaultHub, mount, name: str
    ) -> None:
        damage = DAMAGES[name]
        hub.add(MODEL, GOOD if damage.body is None else damage.body, digests=damage.digests)
        if damage.fault is not None:
            hub.fault(MODEL, damage.fault)
        mounted = mount(hub)
        assert try_everything(mounted) == [errno.EIO] * 3
        assert len(hub.body_requests()) == 2
        assert all(request.range is None for request in hub.body_requests()), "the retry is from zero"
        assert cached_names(mounted) == []
        assert_says_why(mounted, damage.why)

    @pytest.mark.parametrize("name", DAMAGES)
    def test_is_right_when_only_the_first_answer_was_damaged(self, hub: FaultHub, mount, name: str) -> None:
        damage = DAMAGES[name]
        if damage.fault is not None:
            hub.fault(MODEL, _once(damage.fault))
            hub.add(MODEL, GOOD if damage.body is None else damage.body, digests=damage.digests)
        else:
            assert damage.body is not None
            hub.add(MODEL, damage.body, digests=False)
        if damage.body is not None:
            # The first request for the body gets the damaged one; before the second, the hub is repaired.
            hub.fault(MODEL, Fault.change(GOOD) if damage.fault else _pass(), Fault.change(GOOD))
        mounted = mount(hub)
        for file, content in TREE.items():
            assert (mounted.path / MODEL / file).read_bytes() == content
        assert len(hub.body_requests()) == 2
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(mounted.path / MODEL, "user.hubfs.error")

    @pytest.mark.logs(r"google/demo/\d+")
    @pytest.mark.parametrize("digests", [True, False])
    def test_flipped_bit_anywhere_is_noticed(self, hub: FaultHub, mount, digests: bool) -> None:
        # Bytes 3 to 9 of a gzip header may be anything; there only the hub's checksums tell.
        header = {0, 1, 2, *(range(3, 10) if digests else ())}
        trailer = {len(GOOD) - 1, len(GOOD) - 5, len(GOOD) - 9}
        sampled = sorted({*header, *trailer, *random.Random(5).sample(range(10, len(GOOD)), 12)})
        for number, offset in enumerate(sampled, 1):
            hub.add(f"google/demo/{number}", GOOD, digests=digests)
            hub.fault(f"google/demo/{number}", Fault.flip(offset, times=None))
        mounted = mount(hub)
        for number, offset in enumerate(sampled, 1):
            path = mounted.path / f"google/demo/{number}"
            assert error_of((path / "saved_model.pb").read_bytes) == errno.EIO, f"bit at {offset}"
            assert os.getxattr(path, "user.hubfs.error")
        assert cached_names(mounted) == []

    def test_flipped_bit_of_one_answer_is_repaired(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.flip(len(GOOD) // 2))
        mounted = mount(hub)
        for name, content in TREE.items():
            assert (mounted.path / MODEL / name).read_bytes() == content
        assert [request.range for request in hub.body_requests()] == [None, None]

    def test_length_that_promises_too_much_is_a_broken_connection_and_bounded(
        self, hub: FaultHub, mount
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.long_length(500, times=None))
        mounted = mount(hub, retries=2)
        assert try_everything(mounted) == [errno.EIO] * 3
        assert 1 < len(hub.body_requests()) <= 8
        assert cached_names(mounted) == []

    def test_reader_that_was_given_bytes_of_a_damaged_archive_gets_eio_for_the_rest(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        """What was handed out while it arrived cannot be taken back, but it is never completed."""
        tree = make_tree(size=8 << 20)
        data = "variables/variables.data-00000-of-00001"
        archive = make_archive(tree, order=[data, *sorted(tree.keys() - {data})])
        hub.add(MODEL, archive[: 5 << 20] + bytes(64) + archive[(5 << 20) + 64 :], digests=False)
        hub.fault(MODEL, Fault.stall(3 << 20, release))
        mounted = mount(hub)
        descriptor = os.open(mounted.path / MODEL / data, os.O_RDONLY)
        try:
            assert os.pread(descriptor, 4096, 0) == tree[data][:4096]
            release.set()
            steps = range(0, 8 << 20, 1 << 16)
            assert error_of(lambda: [os.pread(descriptor, 1 << 16, at) for at in steps]) == errno.EIO
        finally:
            os.close(descriptor)
        assert try_everything(mounted) == [errno.EIO] * 3
        assert cached_names(mounted) == []

    def test_failure_is_remembered_and_then_tried_anew(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD[:-8], digests=False)
        mounted = mount(hub)
        assert try_everything(mounted) == [errno.EIO] * 3
        before = len(hub.log)
        assert try_everything(mounted, "assets/vocab.txt") == [errno.EIO] * 3
        assert len(hub.log) == before


@pytest.mark.logs("google/demo/1")
class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_fails_with_eio_without_a_retry_and_leaves_nothing(
        self, hub: FaultHub, mount, tmp_path: Path, name: str
    ) -> None:
        archive, why = HOSTILE[name]
        hub.add(MODEL, archive)
        mounted = mount(hub)
        before = sorted(tmp_path.iterdir())
        assert try_everything(mounted) == [errno.EIO] * 3
        assert len(hub.body_requests()) == 1
        assert cached_names(mounted) == []
        assert sorted(tmp_path.iterdir()) == before
        assert not Path("/tmp/hubfs-evil").exists()
        assert_says_why(mounted, why)

    def test_model_beyond_the_limit_of_size_is_efbig(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, make_archive(make_tree(files={"assets/zeros": bytes(3 << 20)})))
        mounted = mount(hub, max_model_size=2 << 20)
        assert try_everything(mounted) == [errno.EFBIG] * 3
        assert len(hub.body_requests()) == 1
        assert cached_names(mounted) == []
        assert_says_why(mounted, "more than 2097152 bytes")

    def test_model_beyond_the_limit_of_files_is_efbig(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, make_archive(make_tree(files={f"assets/{n}": b"x" for n in range(50)})))
        mounted = mount(hub, max_model_files=40)
        assert try_everything(mounted) == [errno.EFBIG] * 3
        assert cached_names(mounted) == []
        assert_says_why(mounted, "more than 40 files")


class TestVerifiedOnly:
    def test_gives_no_byte_before_the_whole_is_checked(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        tree = make_tree(size=4 << 20)
        body = make_archive(tree, order=["saved_model.pb", *sorted(tree.keys() - {"saved_model.pb"})])
        for name in (MODEL, "google/demo/2"):
            hub.add(name, body)
            hub.fault(name, Fault.stall(3 << 20, release))
        careful = mount(hub, "careful", verified_only=True)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((careful.path / MODEL / "saved_model.pb").read_bytes)
            hub.wait_for(lambda hub: any(r.bytes_sent >= 3 << 20 for r in hub.body_requests()))
            # The same in a mount that hands out what arrives shows that it would have been there.
            ordinary = mount(hub, "ordinary")
            shown = (ordinary.path / "google/demo/2/saved_model.pb").read_bytes()
            assert shown == tree["saved_model.pb"]
            assert not read.done()
            release.set()
            assert read.result(SOON) == tree["saved_model.pb"]

    @pytest.mark.logs("google/demo/1")
    def test_damage_at_the_very_end_shows_nothing(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        tree = make_tree(size=4 << 20)
        body = make_archive(tree, order=["saved_model.pb", *sorted(tree.keys() - {"saved_model.pb"})])
        hub.add(MODEL, body[:-8] + bytes(8), digests=False)
        hub.fault(MODEL, Fault.stall(3 << 20, release))
        mounted = mount(hub, verified_only=True)
        with ThreadPoolExecutor(1) as pool:
            failed = pool.submit(try_everything, mounted)
            hub.wait_for(lambda hub: any(r.bytes_sent >= 3 << 20 for r in hub.body_requests()))
            release.set()
            assert failed.result(SOON) == [errno.EIO] * 3
        assert cached_names(mounted) == []


def _once(fault: Fault) -> Fault:
    return Fault(fault.kind, fault.act, fault.on, 1)


def _pass() -> Fault:
    """Answer as usual; it takes a request's place in the script."""
    return Fault("pass", lambda answer: None)
