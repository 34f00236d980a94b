"""The hosting protocol as a client: what a hub offers, in which order it is asked, and whom it may name."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    HostileError,
    HubfsError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    StoppedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.hubs import tfhub as tfhub_module
from hubfs.hubs.archive_url import ArchiveUrl
from hubfs.hubs.base import Archive, Listing, Origin
from hubfs.hubs.bucket import Buckets
from hubfs.hubs.tfhub import TfHub
from hubfs.net import Net
from hubfs.serve import LocalHub, RequestRecord
from tests import remote
from tests.answers import Answer, AnswerServer, own_authority
from tests.models import make_tree, write_tree

TREE = make_tree(size=200_000)
AUTO, COMPRESSED, UNCOMPRESSED = LoadFormat.AUTO, LoadFormat.COMPRESSED, LoadFormat.UNCOMPRESSED
MODEL = "/google/m/1"
ASKED = f"{MODEL}?tf-hub-format=uncompressed"
ARCHIVE = f"{MODEL}?tf-hub-format=compressed"
LITE, TFJS = "?lite-format=tflite", "?tfjs-format=compressed"
NEVER = threading.Event()


@pytest.fixture
def make() -> Iterator[Callable[..., TfHub]]:
    """Makes a client with these settings."""
    with contextlib.ExitStack() as stack:

        def build(**given: Any) -> TfHub:
            settings = Settings(**given)
            net = Net(settings)
            stack.callback(net.close)
            buckets = Buckets(net, settings)
            stack.callback(buckets.close)
            return TfHub(net, settings, buckets)

        yield build


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(TREE, tmp_path / "models/google/m/1").parents[2]


@pytest.fixture
def hub(root: Path, tmp_path: Path, records: list[RequestRecord]) -> Iterator[LocalHub]:
    with LocalHub(root, archive_dir=tmp_path / "archives", on_request=records.append) as hub:
        yield hub


@pytest.fixture
def odd() -> Iterator[AnswerServer]:
    """A hub that has an archive of the model, and of which each test says what else it answers."""
    with AnswerServer() as server:
        server.answers[ARCHIVE] = Answer(200, b"archive", {"ETag": '"a"'})
        yield server


def listing(origin: Origin) -> Listing:
    assert isinstance(origin, Listing)
    return origin


def contents(origin: Listing) -> dict[str, bytes]:
    return {name: remote.read(origin.source, origin.handle, file) for name, file in origin.files.items()}


class TestOwnBucket:
    """A hub that serves the bucket which it names."""

    @pytest.mark.parametrize("load_format", [AUTO, UNCOMPRESSED])
    @pytest.mark.parametrize("path", [MODEL, "/google/m", "/google/m/1/"])
    def test_needs_no_environment(
        self, hub: LocalHub, make: Callable[..., TfHub], load_format: LoadFormat, path: str
    ) -> None:
        origin = listing(make().locate(f"{hub.url}{path}", load_format))
        assert (origin.handle, origin.where) == (f"{hub.url}{path}", "gs://hubfs-serve/google/m/1")
        assert contents(origin) == TREE

    def test_the_environment_goes_first(
        self,
        hub: LocalHub,
        make: Callable[..., TfHub],
        tmp_path: Path,
        records: list[RequestRecord],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tree = make_tree(seed=2, size=1000)
        other = write_tree(tree, tmp_path / "other/google/m/1").parents[2]
        with LocalHub(other, archive_dir=tmp_path / "a2") as emulator:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
            assert contents(listing(make().locate(f"{hub.url}{MODEL}"))) == tree
        hub.stop()
        assert [record.path for record in records] == [ASKED]

    def test_two_hubs_with_a_bucket_of_one_name(
        self, hub: LocalHub, make: Callable[..., TfHub], tmp_path: Path
    ) -> None:
        tree = make_tree(seed=2, size=1000)
        other = write_tree(tree, tmp_path / "other/google/m/1").parents[2]
        client = make()
        with LocalHub(other, archive_dir=tmp_path / "a2") as second:
            assert contents(listing(client.locate(f"{hub.url}{MODEL}"))) == TREE
            assert contents(listing(client.locate(f"{second.url}{MODEL}"))) == tree

    def test_of_the_hub_that_was_redirected_to(
        self, hub: LocalHub, odd: AnswerServer, make: Callable[..., TfHub]
    ) -> None:
        odd.answers[ASKED] = Answer(302, headers={"Location": f"{hub.url}{ASKED}"})
        assert contents(listing(make().locate(f"{odd.url}{MODEL}"))) == TREE
        assert [seen.target for seen in odd.seen] == [ASKED]

    def test_with_an_authority_of_its_own(
        self, hub: LocalHub, make: Callable[..., TfHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tls, certificate = own_authority(tmp_path, "localhost")
        with AnswerServer(tls) as front:
            front.upstream = hub.url
            with pytest.raises(ProtocolError, match="SSL_CERT_FILE or REQUESTS_CA_BUNDLE"):
                make().locate(f"{front.url}{MODEL}", UNCOMPRESSED)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert contents(listing(make().locate(f"{front.url}{MODEL}"))) == TREE

    def test_below_a_prefix(self, hub: LocalHub, odd: AnswerServer, make: Callable[..., TfHub]) -> None:
        # What a proxy in front of a hub makes of its answers.
        odd.answers[f"/pre{ASKED}"] = Answer(
            303, b"gs://hubfs-serve/google/m/1", {"X-Hubfs-Storage": "../../"}
        )
        odd.answers[f"/pre{ARCHIVE}"] = Answer(200, b"archive")
        make().locate(f"{odd.url}/pre{MODEL}")
        assert odd.seen[1].target.startswith("/pre/hubfs%2Dserve?")

    @pytest.mark.parametrize(
        "storage",
        [
            "http://127.0.0.1:{port}/", "https://localhost:{port}/", "//localhost:1/", "http://localhost/",
            "http://user@localhost:{port}/", "/?x", "/#x", "http://[", "http://localhost:x/", "gs://bucket",
        ],
    )  # fmt: skip
    def test_is_nobody_elses(
        self, hub: LocalHub, odd: AnswerServer, make: Callable[..., TfHub], storage: str
    ) -> None:
        header = {"X-Hubfs-Storage": storage.format(port=odd.url.rpartition(":")[2])}
        odd.answers[ASKED] = Answer(303, b"gs://hubfs-serve/google/m/1", header)
        assert isinstance(make().locate(f"{odd.url}{MODEL}"), Archive)
        with pytest.raises(ProtocolError, match=r"another server as its own.*--load-format auto"):
            make().locate(f"{odd.url}{MODEL}", UNCOMPRESSED)
        assert [seen.target for seen in odd.seen] == [ASKED, ARCHIVE, ASKED]


class TestNoListing:
    """What is not to be listed comes as an archive, or not at all."""

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (Answer(200, b"gs://bucket/m"), ProtocolError),
            (Answer(404), ProtocolError),
            (Answer(410), ProtocolError),
            (Answer(400), ProtocolError),
            (Answer(403), AccessError),
            (Answer(500), UnavailableError),
            (Answer(501), UnavailableError),
            (Answer(302, headers={"Location": "gs://bucket/m"}), ProtocolError),
            (Answer(303, b"gs://bucket/m", {"Location": "gs://bucket/m"}), ProtocolError),
            (Answer(303, b"<html>sign in</html>"), ProtocolError),
            (Answer(303, b""), ProtocolError),
            (Answer(303, b"s3://bucket/m"), ProtocolError),
            (Answer(303, b"gs://BUCKET/m"), ProtocolError),
            (Answer(303, b"gs://bucket/../m"), ProtocolError),
            (Answer(303, b"gs://bucket/a gs://bucket/b"), ProtocolError),
            (Answer(303, b"gs://bucket/" + b"x" * 5000 + b" "), HubfsError),
            (Answer(303, b"\xff\xfe"), ProtocolError),
            (Answer(303, b"gs://bucket"), HubfsError),
        ],
        ids=lambda value: f"{value.status}-{value.body[:20]!r}" if isinstance(value, Answer) else "",
    )
    def test_answer_of_the_hub(
        self,
        odd: AnswerServer,
        make: Callable[..., TfHub],
        caplog: pytest.LogCaptureFixture,
        answer: Answer,
        error: type[HubfsError],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", odd.url)
        odd.answers[ASKED] = answer
        caplog.set_level(logging.INFO, "hubfs.hubs")
        origin = make().locate(f"{odd.url}{MODEL}")
        assert isinstance(origin, Archive)
        assert origin.size == 7
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "its archive is asked for" in caplog.text
        with pytest.raises(error) as caught:
            make().locate(f"{odd.url}{MODEL}", UNCOMPRESSED)
        assert caught.value.hint
        assert caught.value.message.startswith(f"{odd.url}{MODEL}: ")

    @pytest.mark.parametrize("status", [400, 403, 404, 500, 200])
    def test_answer_of_the_bucket(
        self,
        odd: AnswerServer,
        make: Callable[..., TfHub],
        caplog: pytest.LogCaptureFixture,
        status: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        odd.answers[ASKED] = Answer(303, b"gs://bucket/m")
        caplog.set_level(logging.INFO, "hubfs.hubs")
        with AnswerServer() as store:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
            store.answers["/bucket?list-type=2&prefix=m%2F"] = Answer(status, b"own words")
            assert isinstance(make().locate(f"{odd.url}{MODEL}"), Archive)
            assert {record.levelname for record in caplog.records} == {"INFO"}
            assert len(caplog.records) == (2 if status == 500 else 1)
            with pytest.raises(HubfsError) as caught:
                make().locate(f"{odd.url}{MODEL}", UNCOMPRESSED)
            assert caught.value.hint
            assert {seen.target for seen in store.seen} == set(store.answers)

    def test_bucket_that_nobody_reaches(
        self, odd: AnswerServer, make: Callable[..., TfHub], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        odd.answers[ASKED] = Answer(303, b"gs://bucket/m")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
        assert isinstance(make().locate(f"{odd.url}{MODEL}"), Archive)
        with pytest.raises(UnavailableError):
            make().locate(f"{odd.url}{MODEL}", UNCOMPRESSED)

    def test_bucket_that_was_not_reached_is_passed_over_for_a_while(
        self,
        odd: AnswerServer,
        make: Callable[..., TfHub],
        hub: LocalHub,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        odd.answers[ASKED] = Answer(303, b"gs://bucket/m")
        client, sooner = make(), tfhub_module.time.monotonic()
        with AnswerServer() as store:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
            store.answers["/bucket?list-type=2&prefix=m%2F"] = Answer(503)
            for _ in range(3):
                assert isinstance(client.locate(f"{odd.url}{MODEL}"), Archive)
            assert len(store.seen) == 2
            # Who takes nothing else asks again, and so does everybody later.
            with pytest.raises(UnavailableError, match="HTTP 503"):
                client.locate(f"{odd.url}{MODEL}", UNCOMPRESSED)
            assert len(store.seen) == 3
            monkeypatch.setattr(tfhub_module.time, "monotonic", lambda: sooner + 120)
            assert isinstance(client.locate(f"{odd.url}{MODEL}"), Archive)
            assert len(store.seen) == 5
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        assert isinstance(client.locate(f"{hub.url}{MODEL}"), Listing), "another bucket"

    def test_files_that_cannot_be_listed_now_are_not_missing(
        self, odd: AnswerServer, make: Callable[..., TfHub], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is no archive, what is to be had later is not said to be nowhere."""
        odd.answers[ASKED] = Answer(303, b"gs://bucket/m")
        odd.answers[ARCHIVE] = Answer(404)
        with AnswerServer() as store:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
            store.answers["/bucket?list-type=2&prefix=m%2F"] = Answer(503)
            with pytest.raises(UnavailableError, match="HTTP 503"):
                make().locate(f"{odd.url}{MODEL}")

    def test_hostile_or_too_large_listings_are_not_passed_over(
        self, hub: LocalHub, make: Callable[..., TfHub], root: Path
    ) -> None:
        with pytest.raises(TooLargeError):
            make(max_model_size=1000).locate(f"{hub.url}{MODEL}")
        write_tree({"a": b"1", "A": b"2"}, root / "google/twice/1")
        with pytest.raises(HostileError):
            make().locate(f"{hub.url}/google/twice/1")

    def test_hub_that_nobody_reaches(self, make: Callable[..., TfHub]) -> None:
        for load_format in LoadFormat:
            with pytest.raises(UnavailableError, match="no connection"):
                make().locate(f"http://127.0.0.1:1{MODEL}", load_format)

    def test_hub_that_hangs_up(self, odd: AnswerServer, make: Callable[..., TfHub]) -> None:
        odd.answers[ASKED] = Answer(303, b"gs://", {"Content-Length": "100"})
        with pytest.raises(UnavailableError):
            make().locate(f"{odd.url}{MODEL}")
        assert [seen.target for seen in odd.seen] == [ASKED]

    def test_offline_and_stopped(self, hub: LocalHub, make: Callable[..., TfHub]) -> None:
        with pytest.raises(OfflineError):
            make(offline=True).locate(f"{hub.url}{MODEL}")
        client = make()
        client._buckets.shut_down()
        with pytest.raises(StoppedError):
            client.locate(f"{hub.url}{MODEL}")

    def test_no_such_version(self, hub: LocalHub, make: Callable[..., TfHub]) -> None:
        for load_format in LoadFormat:
            with pytest.raises(NotFoundError, match="no such model"):
                make().locate(f"{hub.url}/google/m/2", load_format)

    def test_archive_by_its_url(self, hub: LocalHub, make: Callable[..., TfHub]) -> None:
        client = ArchiveUrl(make()._net)
        for load_format in (AUTO, COMPRESSED):
            assert isinstance(client.locate(f"{hub.url}{MODEL}.tar.gz", load_format), Archive)
        with pytest.raises(ProtocolError, match=r"one by one; --load-format auto or compressed"):
            client.locate(f"{hub.url}{MODEL}.tar.gz", UNCOMPRESSED)


class TestOtherKinds:
    PATH = "/tensorflow/lite-model/m/1/default/1"
    FILE = b"\x1c\0\0\0TFL3" + bytes(range(256)) * 100

    @pytest.fixture
    def lite(self, root: Path) -> Path:
        return write_tree({"some name.tflite": self.FILE, "labels.txt": b"x"}, root / self.PATH[1:])

    @pytest.mark.parametrize("load_format", list(LoadFormat))
    def test_tf_lite_is_one_file(
        self, hub: LocalHub, lite: Path, make: Callable[..., TfHub], load_format: LoadFormat
    ) -> None:
        for path in (self.PATH, self.PATH.rpartition("/")[0]):
            origin = listing(make().locate(f"{hub.url}{path}{LITE}", load_format))
            assert contents(origin) == {"some name.tflite": self.FILE}
            (file,) = origin.files.values()
            assert (file.size, file.md5) == (len(self.FILE), hashlib.md5(self.FILE).digest())
            assert file.crc32c is not None
            assert file.mtime == int((lite / "some name.tflite").stat().st_mtime)
            part = remote.read(origin.source, "h", file, 1000, 1010)
            assert part == self.FILE[1000:1010]
        assert origin.source.declared(file) == file

    def test_tf_lite_file_that_changed(self, hub: LocalHub, lite: Path, make: Callable[..., TfHub]) -> None:
        origin = listing(make().locate(f"{hub.url}{self.PATH}{LITE}"))
        (lite / "some name.tflite").write_bytes(self.FILE[::-1])
        with pytest.raises(ChangedOriginError):
            contents(origin)
        assert contents(listing(make().locate(origin.handle))) == {"some name.tflite": self.FILE[::-1]}

    def test_tf_lite_without_a_redirect(self, odd: AnswerServer, make: Callable[..., TfHub]) -> None:
        head = {"Last-Modified": "Fri, 14 Jul 2017 02:40:00 GMT"}
        for path, answer, expected in [
            (f"/a/lite-model/m/7{LITE}", Answer(200, self.FILE, head), ("7.tflite", 1500000000)),
            (f"/a/lite-model/m{LITE}", Answer(200, self.FILE), ("model.tflite", 0)),
            (f"/a/lite-model/x.tflite{LITE}", Answer(200, self.FILE), ("x.tflite", 0)),
        ]:
            odd.answers[path] = answer
            origin = listing(make().locate(f"{odd.url}{path}"))
            ((name, file),) = origin.files.items()
            assert (name, file.mtime, file.etag, file.md5) == (*expected, None, None)
            assert contents(origin) == {name: self.FILE}

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (Answer(200, b"<html>", {"Content-Type": "text/html; charset=utf-8"}), ProtocolError),
            (Answer(200, b"file", {"Content-Length": ""}), ProtocolError),
            (Answer(206, b"f", {"Content-Range": "bytes 0-0/*"}), ProtocolError),
            (Answer(206, b"f", {"Content-Range": "bytes 0-0/99999999999999"}), TooLargeError),
            (Answer(403), AccessError),
            (Answer(404), NotFoundError),
            (Answer(500), UnavailableError),
        ],
    )
    def test_tf_lite_that_is_not_there(
        self, odd: AnswerServer, make: Callable[..., TfHub], answer: Answer, error: type[HubfsError]
    ) -> None:
        path = f"/a/lite-model/m/7{LITE}"
        odd.answers[path] = answer
        with pytest.raises(error):
            make().locate(f"{odd.url}{path}")
        assert [(seen.target, seen.range) for seen in odd.seen] == [(path, "bytes=0-0")]

    def test_tf_lite_name_that_no_file_can_have(self, odd: AnswerServer, make: Callable[..., TfHub]) -> None:
        path = f"/a/lite-model/m/7{LITE}"
        odd.answers[path] = Answer(302, headers={"Location": "/x%00.tflite"})
        odd.answers["/x%00.tflite"] = Answer(200, b"file")
        with pytest.raises(HostileError):
            make().locate(f"{odd.url}{path}")

    def test_tf_lite_with_several_files(
        self, hub: LocalHub, lite: Path, make: Callable[..., TfHub], root: Path
    ) -> None:
        write_tree({"a.tflite": b"a", "b.tflite": b"b"}, root / "x/lite-model/two/1")
        for path in ("/x/lite-model/two/1", MODEL):
            with pytest.raises(NotFoundError):
                make().locate(f"{hub.url}{path}{LITE}")

    def test_tf_js_is_an_archive(
        self, hub: LocalHub, make: Callable[..., TfHub], root: Path, records: list[RequestRecord]
    ) -> None:
        write_tree({"model.json": b"{}"}, root / "google/tfjs-model/m/1/default/3")
        handle = f"{hub.url}/google/tfjs-model/m/1/default/3{TFJS}"
        for load_format in (AUTO, COMPRESSED):
            origin = make().locate(handle, load_format)
            assert isinstance(origin, Archive)
            assert origin.url == handle
        with pytest.raises(ProtocolError, match="one by one"):
            make().locate(handle, UNCOMPRESSED)
        hub.stop()
        assert [record.status for record in records] == [206, 206]
