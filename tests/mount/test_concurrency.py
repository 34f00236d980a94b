"""Many readers at once: one transfer for all, nobody waits for another's model, and a signal frees a reader.

What is cold is held back at the hub by an event, so that nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubfs import api
from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree

DATA = "variables/variables.data-00000-of-00001"
#: For an answer that needs no network. Generous, as the stalls last until a test ends them.
SOON = 20.0
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


@pytest.fixture
def big() -> dict[str, bytes]:
    """A model whose data is large and cannot be compressed: an offset of the archive is one of the data."""
    return make_tree(size=12 << 20)


def add_stalled(
    hub: FaultHub, name: str, archive: bytes, release: threading.Event, after: int = 4 << 20
) -> None:
    hub.add(name, archive)
    hub.fault(name, Fault.stall(after, release))


def data_first(tree: dict[str, bytes]) -> bytes:
    return make_archive(tree, order=[DATA, *sorted(tree.keys() - {DATA})])


def eventually(condition: Callable[[], object], what: str, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def waiting(mounted: Mounted) -> int:
    return sum(transfer["waiting"] for transfer in mounted.status()["transfers"])


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True
    )


def cat(path: Path) -> subprocess.Popen[bytes]:
    # A shell that starts the tests in the background has them, and what they start, ignore SIGINT.
    command = ["env", "--default-signal=INT", "cat", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class TestOneTransferForAll:
    def test_32_threads_and_16_processes_share_one_download(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        tree = make_tree(size=1 << 20)
        hub.add("google/demo/1", make_archive(tree))
        hub.fault("google/demo/1", Fault.hang(release, on="any"))
        mounted = mount(hub)
        names = sorted(tree)
        paths = [mounted.path / "google/demo/1" / name for name in names]
        expected = [hashlib.sha256(tree[name]).hexdigest() for name in names]
        together = threading.Barrier(33)

        def read(number: int) -> list[str]:
            together.wait(SOON)
            order = paths[number % len(paths) :] + paths[: number % len(paths)]
            found = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in order}
            return [found[path] for path in paths]

        with ThreadPoolExecutor(32) as pool:
            threads = [pool.submit(read, number) for number in range(32)]
            processes = [
                subprocess.Popen(["sha256sum", *map(str, paths)], stdout=subprocess.PIPE, text=True)
                for _ in range(16)
            ]
            together.wait(SOON)
            hub.wait_for(lambda hub: hub.log, what="the first request")
            release.set()
            assert [thread.result() for thread in threads] == [expected] * 32
        for process in processes:
            output, _ = process.communicate(timeout=60)
            assert [line.split()[0] for line in output.splitlines()] == expected
        assert len(hub.body_requests("google/demo/1")) == 1

    def test_two_mounts_and_a_pull_share_one_download(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        first, second = mount(hub, "first"), mount(hub, "second")
        assert first.cache == second.cache
        with ThreadPoolExecutor(2) as pool:
            reads = [
                pool.submit((mounted.path / "google/demo/1" / DATA).read_bytes) for mounted in (first, second)
            ]
            for mounted in (first, second):
                eventually(lambda m=mounted: m.status()["transfers"], "both mounts to want it")
            pull = subprocess.Popen(
                [sys.executable, "-m", "hubfs", "pull", "google/demo/1", "--hub", hub.url,
                 "--cache-dir", str(first.cache)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert pull.stderr is not None
            assert "google/demo/1" in pull.stderr.readline()
            release.set()
            assert [read.result(60) == big[DATA] for read in reads] == [True, True]
        output, errors = pull.communicate(timeout=60)
        assert pull.returncode == 0, errors
        assert "google/demo/1" in output
        assert len(hub.body_requests()) == 1
        for mounted in (first, second):
            for name, content in big.items():
                assert (mounted.path / "google/demo/1" / name).read_bytes() == content
        assert len(hub.body_requests()) == 1


class TestCachedModelsAnswerWhileOthersWait:
    @pytest.fixture
    def warm(self, hub: FaultHub, mount, tmp_path: Path) -> tuple[Mounted, dict[str, bytes]]:
        """A mount with a cached model that its kernel has not been told anything of."""
        tree = make_tree(7)
        hub.add("google/warm/1", make_archive(tree))
        [pulled] = api.pull(["google/warm/1"], hub=hub.url, cache_dir=str(tmp_path / "cache"))
        assert pulled.error is None
        return mount(hub), tree

    @staticmethod
    def use_all(model: Path, tree: dict[str, bytes]) -> None:
        """Look up, list, open and read everything, in another process, with a deadline."""
        code = (
            "import hashlib, os, sys\n"
            "root = sys.argv[1]\n"
            "for folder, _, names in os.walk(root):\n"
            "    for name in names:\n"
            "        path = os.path.join(folder, name)\n"
            "        with open(path, 'rb') as file:\n"
            "            digest = hashlib.sha256(file.read()).hexdigest()\n"
            "        print(os.path.relpath(path, root), os.stat(path).st_size, digest)\n"
            "print('missing', os.path.exists(os.path.join(root, 'missing')))\n"
        )
        output = subprocess.run(
            [sys.executable, "-S", "-c", code, str(model)],
            timeout=SOON, check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        assert output.pop() == "missing False"
        assert sorted(output) == sorted(
            f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}" for name, content in tree.items()
        )

    def test_while_100_readers_wait_for_names_and_bytes_of_one_model(
        self, hub: FaultHub, warm, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        mounted, tree = warm
        add_stalled(hub, "google/cold/1", data_first(big), release)
        model = mounted.path / "google/cold/1"
        with ThreadPoolExecutor(110) as pool:
            # Distinct names: the kernel lets only one look-up of one name through at a time.
            lookups = [pool.submit((model / f"assets/{number}").exists) for number in range(50)]
            same_name = [pool.submit((model / "saved_model.pb").read_bytes) for _ in range(10)]
            reads = [
                pool.submit(_read_at, model / DATA, (6 << 20) + number * 100_000, 4096)
                for number in range(50)
            ]
            eventually(lambda: waiting(mounted) >= 51, "the readers to wait")
            self.use_all(mounted.path / "google/warm/1", tree)
            assert not release.is_set()
            assert not any(future.done() for future in (*lookups, *same_name, *reads))
            release.set()
            assert [future.result(60) for future in lookups] == [False] * 50
            assert {future.result(60) for future in same_name} == {big["saved_model.pb"]}
            for number, future in enumerate(reads):
                start = (6 << 20) + number * 100_000
                assert future.result(60) == big[DATA][start : start + 4096]
        assert len(hub.body_requests("google/cold/1")) == 1

    def test_while_readers_wait_for_more_models_than_can_be_brought_in_at_once(
        self, hub: FaultHub, warm, release: threading.Event
    ) -> None:
        mounted, tree = warm
        cold = make_tree(3)
        archive = make_archive(cold)
        for number in range(30):
            add_stalled(hub, f"google/cold{number}/1", archive, release, after=1000)
        hub.fault("google/held/1", Fault.hang(release, on="any"))
        models = [mounted.path / f"google/cold{number}/1" for number in range(30)]
        with ThreadPoolExecutor(100) as pool:
            reads = [pool.submit((model / name).read_bytes) for model in models for name in sorted(cold)[:3]]
            held = pool.submit((mounted.path / "google/held/1").exists)
            eventually(lambda: waiting(mounted) >= 30, "the readers to wait")
            self.use_all(mounted.path / "google/warm/1", tree)
            assert not release.is_set()
            assert not any(future.done() for future in (*reads, held))
            release.set()
            expected = [cold[name] for name in sorted(cold)[:3]] * 30
            assert [future.result(60) for future in reads] == expected
            assert held.result(60) is False
        assert len(hub.body_requests()) == 31

    def test_in_the_same_directory_while_the_hub_is_slow_to_say_what_there_is(
        self, hub: FaultHub, warm, release: threading.Event
    ) -> None:
        """The kernel has a lock for each directory, and must be told not to hold it while hubfs waits."""
        mounted, tree = warm
        hub.fault("google/warm/2", Fault.hang(release, on="any"))
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit((mounted.path / "google/warm/2").exists)
            hub.wait_for(lambda hub: hub.requests("google/warm/2"), what="the look-up")
            self.use_all(mounted.path / "google/warm/1", tree)
            listing = subprocess.run(["ls", mounted.path / "google/warm"], timeout=SOON, capture_output=True)
            assert listing.stdout.split() == [b"1"]
            assert not other.done()
            release.set()
            assert other.result(60) is False


class TestServedWhileArriving:
    def test_first_member_is_readable_though_the_rest_stalls(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        archive = make_archive(big, order=["saved_model.pb", DATA, "assets/vocab.txt"])
        add_stalled(hub, "google/demo/1", archive, release)
        model = mount(hub).path / "google/demo/1"
        with ThreadPoolExecutor(2) as pool:
            assert pool.submit((model / "saved_model.pb").read_bytes).result(SOON) == big["saved_model.pb"]
            last = pool.submit((model / "assets/vocab.txt").read_bytes)
            assert not hub.body_requests()[0].done.is_set()
            assert not last.done()
            release.set()
            assert last.result(60) == big["assets/vocab.txt"]
        assert (model / DATA).read_bytes() == big[DATA]
        assert len(hub.body_requests()) == 1

    def test_large_file_is_readable_as_far_as_it_has_arrived(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        arrived = 8 << 20
        add_stalled(hub, "google/demo/1", data_first(big), release, after=arrived)
        mounted = mount(hub)
        path = mounted.path / "google/demo/1" / DATA
        chunk = 64 << 10

        def read_on(descriptor: int, start: int, stop: int) -> bytes:
            return b"".join(os.pread(descriptor, chunk, offset) for offset in range(start, stop, chunk))

        # The kernel asks for up to 1 MiB at once and waits for all of it, and hubfs inflates in blocks.
        sure = arrived - (2 << 20)
        with ThreadPoolExecutor(1) as pool:
            descriptor = pool.submit(os.open, path, os.O_RDONLY).result(SOON)
            assert os.fstat(descriptor).st_size == len(big[DATA])
            assert pool.submit(read_on, descriptor, 0, sure).result(SOON) == big[DATA][:sure]
            rest = pool.submit(read_on, descriptor, sure, len(big[DATA]))
            eventually(lambda: waiting(mounted) > 0, "the reader to wait")
            assert not rest.done()
            release.set()
            assert rest.result(60) == big[DATA][sure:]
            os.close(descriptor)


class TestSignals:
    @pytest.mark.parametrize("number", SIGNALS)
    def test_frees_a_reader_that_waits_in_a_lookup(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes], number: signal.Signals
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        reader = cat(mounted.path / "google/demo/1/saved_model.pb")
        hub.wait_for(lambda hub: hub.body_requests(), what="the download")
        eventually(lambda: waiting(mounted) == 1, "the reader to wait")
        reader.send_signal(number)
        assert reader.wait(SOON) == -number
        assert not release.is_set()
        release.set()
        assert (mounted.path / "google/demo/1/saved_model.pb").read_bytes() == big["saved_model.pb"]
        assert len(hub.body_requests()) == 1

    @pytest.mark.parametrize("number", SIGNALS)
    def test_frees_a_reader_that_waits_in_a_read(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes], number: signal.Signals
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        path = mounted.path / "google/demo/1" / DATA
        assert _read_at(path, 0, 4096) == big[DATA][:4096]
        reader = cat(path)
        eventually(lambda: waiting(mounted) >= 1, "the reader to wait")
        reader.send_signal(number)
        assert reader.wait(SOON) == -number
        release.set()
        assert path.read_bytes() == big[DATA]
        assert len(hub.body_requests()) == 1

    @pytest.mark.parametrize("where", ["lookup", "read"])
    def test_ctrl_c_reaches_a_python_program_that_waits(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes], where: str
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        model = mounted.path / "google/demo/1"
        assert _read_at(model / DATA, 0, 10) == big[DATA][:10]
        code = (
            "import os, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "print('ready', flush=True)\n"
            "try:\n"
            "    os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, int(sys.argv[2]))\n"
            "except KeyboardInterrupt:\n"
            "    print('interrupted', flush=True)\n"
        )
        reader = run_python(code, *((model / DATA, 8 << 20) if where == "read" else (model / "new", 0)))
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        eventually(lambda: waiting(mounted) >= 1, "the reader to wait")
        reader.send_signal(signal.SIGINT)
        assert reader.communicate(timeout=SOON)[0] == "interrupted\n"
        assert not release.is_set()

    def test_kill_frees_all_of_many_that_look_up_one_name(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        """The kernel holds all but the first back, deaf to signals; when the first goes, the others do."""
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        readers = [cat(mounted.path / "google/demo/1/saved_model.pb") for _ in range(8)]
        hub.wait_for(lambda hub: hub.body_requests(), what="the download")
        eventually(lambda: waiting(mounted) >= 1, "a reader to wait")
        for reader in readers:
            reader.kill()
        assert [reader.wait(SOON) for reader in readers] == [-signal.SIGKILL] * 8
        assert not release.is_set()

    def test_kill_frees_all_of_many_that_open_and_read_one_file(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        readers = [cat(mounted.path / "google/demo/1" / DATA) for _ in range(8)]
        hub.wait_for(lambda hub: hub.body_requests(), what="the download")
        eventually(lambda: waiting(mounted) >= 1, "a reader to wait")
        readers[-1].kill()
        assert readers.pop().wait(SOON) == -signal.SIGKILL
        for reader in readers:
            reader.kill()
        assert [reader.wait(SOON) for reader in readers] == [-signal.SIGKILL] * 7
        assert not release.is_set()

    def test_transfer_goes_on_for_others_when_the_reader_that_began_it_is_killed(
        self, hub: FaultHub, mount, release: threading.Event, big: dict[str, bytes]
    ) -> None:
        add_stalled(hub, "google/demo/1", data_first(big), release)
        mounted = mount(hub)
        model = mounted.path / "google/demo/1"
        first = cat(model / "saved_model.pb")
        hub.wait_for(lambda hub: hub.body_requests(), what="the download")
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit((model / "fingerprint.pb").read_bytes)
            eventually(lambda: waiting(mounted) >= 2, "both readers to wait")
            first.kill()
            assert first.wait(SOON) == -signal.SIGKILL
            assert not other.done()
            release.set()
            assert other.result(60) == big["fingerprint.pb"]
        assert len(hub.body_requests()) == 1


def _read_at(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
