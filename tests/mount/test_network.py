"""Lines that break, hubs that fail or dawdle, redirects: what a reader of the mount sees."""

from __future__ import annotations

import email.utils
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import Tree, make_archive, make_tree

MODEL = "google/demo/1"
TREE = make_tree(size=1 << 20)
GOOD = make_archive(TREE)
OTHER_TREE = make_tree(99, size=1 << 20)
OTHER = make_archive(OTHER_TREE)
#: Large enough for several connections.
LARGE_TREE = make_tree(7, size=24 << 20)
#: Until a failure that is remembered briefly may be tried anew, generously.
FORGOTTEN = 30.0


def error_or_none(read: Callable[[], object]) -> int | None:
    """The errno with which `read` fails, if it does."""
    try:
        read()
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return None


def error_of(read: Callable[[], object]) -> int:
    number = error_or_none(read)
    assert number is not None, "it did not fail"
    return number


def assert_reads_as(mounted: Mounted, tree: Tree, model: str = MODEL) -> None:
    for name, content in tree.items():
        assert (mounted.path / model / name).read_bytes() == content, name


def read_model(mounted: Mounted, model: str = MODEL) -> bytes:
    return (mounted.path / model / "saved_model.pb").read_bytes()


def why(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.error").decode()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The archive of LARGE_TREE."""
    path = tmp_path / "large.tar.gz"
    path.write_bytes(make_archive(LARGE_TREE))
    return path


class TestBrokenConnections:
    @pytest.mark.parametrize("kind", [Fault.cut, Fault.reset])
    @pytest.mark.parametrize("after", [1, 20_000, len(GOOD) // 2, len(GOOD) - 1])
    def test_is_resumed_where_it_broke(
        self, hub: FaultHub, mount, kind: Callable[[int], Fault], after: int
    ) -> None:
        hub.add(MODEL, GOOD, etag='"one"')
        hub.fault(MODEL, kind(after))
        assert_reads_as(mount(hub), TREE)
        first, second = hub.body_requests()
        assert (first.range, second.range) == (None, f"bytes={after}-")
        assert second.headers["if-range"] == '"one"'
        assert (second.status, first.bytes_sent + second.bytes_sent) == (206, len(GOOD))

    def test_is_resumed_again_and_again_and_every_byte_is_sent_once(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        step = 150_000
        hub.fault(MODEL, *[Fault.cut(step)] * 5)
        assert_reads_as(mount(hub, retries=2), TREE)
        requests = hub.body_requests()
        assert [r.range for r in requests] == [None, *(f"bytes={step * n}-" for n in range(1, 6))]
        assert sum(r.bytes_sent for r in requests) == len(GOOD)

    def test_without_an_answer_is_tried_again(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.hang_up(on="probe"), Fault.hang_up())
        assert_reads_as(mount(hub), TREE)
        assert len(hub.body_requests()) == 2

    @pytest.mark.parametrize("after", [20_000, len(GOOD) // 2])
    def test_changed_archive_starts_anew_and_is_never_mixed(self, hub: FaultHub, mount, after: int) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.cut(after), Fault.change(OTHER))
        mounted = mount(hub)
        assert_reads_as(mounted, OTHER_TREE)
        assert "changed" in mounted.log_text()
        assert hub.body_requests()[-1].range is None or hub.body_requests()[-1].status == 200

    @pytest.mark.parametrize("size", [100, 30_000])
    def test_archive_that_changes_after_a_part_was_read_is_never_mixed(
        self, hub: FaultHub, mount, release: threading.Event, size: int
    ) -> None:
        """A file's size and bytes that were shown of the first archive are not used for the second."""
        first = {**TREE, "saved_model.pb": b"1" * 5000}
        second = {**OTHER_TREE, "saved_model.pb": b"2" * size}
        order = ["saved_model.pb", *sorted(TREE.keys() - {"saved_model.pb"})]
        hub.add(MODEL, make_archive(first, order=order))
        hub.fault(MODEL, Fault.stall(500_000, release), Fault.change(make_archive(second, order=order)))
        mounted = mount(hub, stall_timeout=1.5)
        assert read_model(mounted) == b"1" * 5000
        assert (mounted.path / MODEL / "saved_model.pb").stat().st_size == 5000
        hub.wait_for(lambda hub: len(hub.body_requests()) >= 2, what="the second archive")
        deadline = time.monotonic() + 20
        while mounted.status()["transfers"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (mounted.path / MODEL / "variables/variables.index").read_bytes() == second[
            "variables/variables.index"
        ]
        assert read_model(mounted) == b"2" * size
        assert_reads_as(mounted, second)

    def test_without_an_etag_starts_anew(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD, etag=None)
        hub.fault(MODEL, Fault.cut(300_000))
        assert_reads_as(mount(hub), TREE)
        assert [r.range for r in hub.body_requests()] == [None, None]

    def test_weak_etag_starts_anew(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD, etag='W/"one"')
        hub.fault(MODEL, Fault.cut(300_000))
        assert_reads_as(mount(hub), TREE)
        assert [r.range for r in hub.body_requests()] == [None, None]

    def test_hub_that_ignores_ranges_gives_right_bytes(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD, accept_ranges=False)
        hub.fault(MODEL, Fault.cut(300_000))
        assert_reads_as(mount(hub), TREE)
        assert [r.status for r in hub.body_requests()] == [200, 200]

    def test_answer_with_another_range_is_not_taken(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.cut(300_000), Fault.wrong_range())
        assert_reads_as(mount(hub), TREE)
        assert hub.body_requests()[-1].range == "bytes=300000-"

    @pytest.mark.logs(MODEL)
    def test_connection_that_breaks_for_ever_without_progress_is_given_up(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.cut(100_000), Fault.cut(0, times=None))
        mounted = mount(hub, retries=3)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert len(hub.body_requests()) <= 6
        assert MODEL in why(mounted.path / MODEL)
        assert not [name for name in os.listdir(mounted.cache) if "hubfs" not in name]


class TestSeveralConnections:
    """Reading waits for the bytes, so more connections than one are tried."""

    @pytest.mark.parametrize(
        "refusal",
        [Fault.status(429, headers={"Retry-After": "600"}), Fault.status(503), Fault.hang_up()],
        ids=lambda fault: fault.kind,
    )
    def test_that_the_hub_does_not_grant_are_done_without(
        self, hub: FaultHub, mount, large: Path, release: threading.Event, refusal: Fault
    ) -> None:
        hub.add(MODEL, large)
        alone = Fault.when(lambda hub, request: len(hub.answering()) > 1 and not request.is_probe, refusal)
        hub.fault(MODEL, Fault.stall(1000, release), alone)
        mounted = mount(hub)
        reader = threading.Thread(target=error_or_none, args=(lambda: read_model(mounted),))
        reader.start()
        hub.wait_for(lambda hub: any(request.fault == alone.kind for request in hub.log), what="another one")
        release.set()
        assert_reads_as(mounted, LARGE_TREE)
        reader.join()

    def test_bring_hardly_a_byte_twice_over_lines_that_break(self, hub: FaultHub, mount, large: Path) -> None:
        hub.add(MODEL, large)
        hub.rate = 10e6
        hub.fault(MODEL, *[Fault.cut(200_000), Fault.reset(300_000)] * 3)
        assert_reads_as(mount(hub, connections=4), LARGE_TREE)
        assert hub.busiest > 1
        # Each part went on from where it was; only what was under way is lost with a line.
        assert sum(request.fault is not None for request in hub.log) == 6
        size = large.stat().st_size
        assert size <= sum(request.bytes_sent for request in hub.body_requests()) < 1.1 * size

    @pytest.mark.parametrize("when", ["at once", "on the way"])
    def test_changed_archive_starts_anew_and_is_never_mixed(
        self, hub: FaultHub, mount, large: Path, release: threading.Event, when: str
    ) -> None:
        hub.add(MODEL, large)
        if when == "on the way":
            hub.fault(MODEL, Fault.cut(500_000))
        hub.fault(MODEL, Fault.change(OTHER))
        mounted = mount(hub)
        assert_reads_as(mounted, OTHER_TREE)
        assert "changed" in mounted.log_text()


class TestStatus:
    @pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
    @pytest.mark.parametrize("on", ["probe", "body"])
    def test_passing_failure_is_tried_again(self, hub: FaultHub, mount, code: int, on: str) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.status(code, on=on), Fault.status(code, on=on))
        assert_reads_as(mount(hub), TREE)
        assert [r.status for r in hub.requests(MODEL) if r.kind == on][:3] in (
            [code, code, 200],
            [code, code, 206],
        )

    @pytest.mark.parametrize("on", ["probe", "body"])
    @pytest.mark.parametrize("form", ["seconds", "date"])
    def test_retry_after_is_obeyed(self, hub: FaultHub, mount, on: str, form: str) -> None:
        hub.add(MODEL, GOOD)
        # A date has no fractions: two seconds from now are more than one.
        value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2.5, usegmt=True)
        hub.fault(MODEL, Fault.status(503, headers={"Retry-After": value}, on=on))
        mounted = mount(hub)
        began = time.monotonic()
        assert_reads_as(mounted, TREE)
        # No sooner than it was told; a lower bound holds on any machine.
        assert time.monotonic() - began >= 1.0
        assert 503 in [r.status for r in hub.requests(MODEL)]

    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("on", ["probe", "body"])
    def test_lasting_failure_is_eio_after_the_retries_and_remembered(
        self, hub: FaultHub, mount, on: str
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.status(500, b"<h1>Out of  cheese</h1>", on=on, times=None))
        mounted = mount(hub, retries=3)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert [r.status for r in hub.log if r.kind == on] == [500] * 4
        asked = len(hub.log)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert len(hub.log) == asked
        assert re.search(r"google/demo/1.*HTTP 500.*Out of cheese", why(mounted.path / "google/demo"))

    @pytest.mark.logs(MODEL)
    def test_failure_is_forgotten_after_a_while(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.status(500, on="any", times=2))
        mounted = mount(hub, retries=1)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        deadline = time.monotonic() + FORGOTTEN
        while error_or_none(lambda: read_model(mounted)) is not None:
            assert time.monotonic() < deadline, "the hub is well again, and the mount does not notice"
            time.sleep(0.1)
        assert_reads_as(mounted, TREE)

    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("code", [401, 403])
    @pytest.mark.parametrize("on", ["probe", "body"])
    def test_refused_access_is_eacces_with_the_hubs_own_words(
        self, hub: FaultHub, mount, code: int, on: str
    ) -> None:
        hub.add(MODEL, GOOD)
        words = b"<html><body><p>Please accept the <b>licence</b></p></body></html>"
        hub.fault(MODEL, Fault.status(code, words, on=on, times=None))
        mounted = mount(hub)
        assert error_of(lambda: read_model(mounted)) == errno.EACCES
        assert len([r for r in hub.log if r.status == code]) == 1, "no retry"
        for place in ("google/demo", "google"):
            assert re.search(
                rf"google/demo/1.*HTTP {code}.*Please accept the licence", why(mounted.path / place)
            )
        assert "Please accept the licence" in mounted.log_text()

    @pytest.mark.parametrize("code", [404, 410])
    @pytest.mark.parametrize("on", ["probe", "body"])
    def test_missing_model_is_enoent_and_asked_for_once(
        self, hub: FaultHub, mount, code: int, on: str
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.status(code, on=on, times=None))
        mounted = mount(hub)
        for _ in range(3):
            assert error_of(lambda: read_model(mounted)) == errno.ENOENT
        assert [r.kind for r in hub.log] == ["listing", "probe", "body"][: 2 if on == "probe" else 3]
        assert len([r for r in hub.archive_requests() if r.status == code]) == 1
        assert f"HTTP {code}" in why(mounted.path / "google/demo")

    @pytest.mark.logs(MODEL)
    def test_answer_that_makes_no_sense_is_eio(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.status(418, b"teapot", on="any", times=None))
        mounted = mount(hub)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert len(hub.archive_requests()) == 1
        assert "HTTP 418): teapot" in why(mounted.path / "google/demo")


class TestDeadlines:
    """Each test would hang for ever if a wait had no bound."""

    @pytest.mark.logs(MODEL)
    def test_hub_that_stalls_is_given_up_by_the_connection(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.stall(100_000, release), Fault.stall(0, release, times=None))
        mounted = mount(hub, stall_timeout=0.3, retries=2)
        assert error_of((mounted.path / MODEL / "variables/variables.index").read_bytes) == errno.EIO
        assert not release.is_set()
        assert [r.range for r in hub.body_requests()] == [None, *["bytes=100000-"] * 2]

    def test_stalled_connection_is_replaced_and_the_model_arrives(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.stall(100_000, release))
        assert_reads_as(mount(hub, stall_timeout=0.3), TREE)
        assert [r.range for r in hub.body_requests()] == [None, "bytes=100000-"]
        assert not release.is_set()

    def test_reader_is_freed_by_the_read_timeout_and_the_transfer_goes_on(
        self, hub: FaultHub, mount, release: threading.Event
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.stall(0, release))
        mounted = mount(hub, read_timeout=0.5, stall_timeout=30)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        release.set()
        hub.wait_for(lambda hub: hub.body_requests()[0].done.is_set(), what="the end of the download")
        assert_reads_as(mounted, TREE)
        assert len(hub.body_requests()) == 1

    @pytest.mark.logs(MODEL)
    def test_slow_drip_is_given_up(self, hub: FaultHub, mount) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.drip(10, 0.1, times=None))
        mounted = mount(hub, stall_timeout=0.5, retries=2)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert "bytes a second" in why(mounted.path / MODEL)

    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("on", ["listing", "probe", "body"])
    def test_hub_that_never_answers_is_given_up(
        self, hub: FaultHub, mount, release: threading.Event, on: str
    ) -> None:
        hub.add(MODEL, GOOD)
        hub.fault(MODEL, Fault.hang(release, on=on, times=None))
        mounted = mount(hub, stall_timeout=0.3, retries=2)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert not release.is_set()
        assert MODEL in why(mounted.path / "google/demo")

    @pytest.mark.logs(MODEL)
    def test_refused_connection_is_eio_and_says_so(self, mount) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # not listening
            mounted = mount(f"http://127.0.0.1:{taken.getsockname()[1]}", retries=2)
            assert error_of(lambda: read_model(mounted)) == errno.EIO
            assert re.search("refused", why(mounted.path / "google/demo"), re.IGNORECASE)

    @pytest.mark.logs(MODEL)
    def test_connection_that_nobody_accepts_is_given_up(self, mount) -> None:
        with socket.socket() as full, socket.socket() as filler:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            filler.connect(full.getsockname())  # the queue has room for one
            mounted = mount(
                f"http://127.0.0.1:{full.getsockname()[1]}", retries=1, connect_timeout=0.3, stall_timeout=0.3
            )
            assert error_of(lambda: read_model(mounted)) == errno.EIO


class TestRedirects:
    def test_are_followed_afresh_after_a_failure(self, hub: FaultHub, mount) -> None:
        hub.add("signed/a.tar.gz", GOOD)
        hub.add_redirect(MODEL, "/step", 302)
        hub.add_redirect("step", "/signed/a.tar.gz?signature=1", 307)
        hub.fault("signed/a.tar.gz", Fault.cut(300_000))
        assert_reads_as(mount(hub, load_format="compressed"), TREE)
        # One probe, the body, and what was left of it.
        assert [r.path for r in hub.log] == [MODEL, "step", "signed/a.tar.gz"] * 3
        assert [r.range for r in hub.body_requests("signed/a.tar.gz")] == [None, "bytes=300000-"]
        assert all(r.query.get("tf-hub-format") == "compressed" for r in hub.requests(MODEL))

    def test_are_followed_once_for_all_parts(self, hub: FaultHub, mount, large: Path) -> None:
        hub.add("signed/a.tar.gz", large)
        hub.add_redirect(MODEL, "/signed/a.tar.gz?signature=1", 302)
        assert_reads_as(mount(hub), LARGE_TREE)
        assert [r.kind for r in hub.requests(MODEL)] == ["listing", "probe", "body"]
        assert len(hub.body_requests("signed/a.tar.gz")) > 1

    def test_to_another_host_are_followed(self, hub: FaultHub, mount) -> None:
        with FaultHub() as storage:
            storage.add("bucket/a.tar.gz", GOOD)
            hub.add_redirect(MODEL, f"{storage.url}/bucket/a.tar.gz", 303)
            assert_reads_as(mount(hub, load_format="compressed"), TREE)
            assert len(storage.body_requests()) == 1

    def test_of_every_format_to_the_archive_bring_that(self, hub: FaultHub, mount) -> None:
        """The hub does not look at the format, so the listing's answer is an archive."""
        hub.add("signed/a.tar.gz", GOOD)
        hub.add_redirect(MODEL, "/signed/a.tar.gz?signature=1", 302)
        mounted = mount(hub)
        assert_reads_as(mounted, TREE)
        assert [r.kind for r in hub.requests(MODEL)] == ["listing", "probe", "body"]
        assert os.getxattr(mounted.path / MODEL, "user.hubfs.origin") == b"archive"

    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize(("load_format", "most"), [("compressed", 11), ("auto", 22)])
    def test_in_a_circle_end(self, hub: FaultHub, mount, load_format: str, most: int) -> None:
        hub.add_redirect(MODEL, f"/{MODEL}?tf-hub-format=compressed", 302)
        mounted = mount(hub, load_format=load_format)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert len(hub.log) <= most
        assert "redirects" in why(mounted.path / "google/demo")
