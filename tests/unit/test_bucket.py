"""Directories and archives in buckets: what is listed, what is read, and what every failure means.

Google's protocol is answered by `hubfs serve`, Amazon's by moto, and both are asked by the real client.
Faults come from a server that answers what it is told to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import trustme
from moto.server import ThreadedMotoServer

import hubfs
from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    AccessError,
    ChangedOriginError,
    HostileError,
    HubfsError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    RefusedError,
    StoppedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.hubs.base import Archive, Listing, Origin, RemoteFile
from hubfs.hubs.bucket import Buckets
from hubfs.hubs.object_store import BucketPath
from hubfs.hubs.tfhub import TfHub
from hubfs.net import Net
from hubfs.serve import LocalHub, RequestRecord
from tests import remote
from tests.bucket_hub import BUCKET, BucketHub
from tests.hub import Fault
from tests.models import make_tree, write_tree

TREE = make_tree(size=200_000)
GONE = RemoteFile("dir/file", 8, 0, '"etag"')
HANDLE = "gs://hubfs-serve/google/bert/9"
NEVER = threading.Event()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Buckets]]:
    """Makes `Buckets` with these settings."""
    with contextlib.ExitStack() as stack:

        def build(**settings: Any) -> Buckets:
            net = Net(Settings(cache_dir=str(tmp_path / "cache"), **settings))
            stack.callback(net.close)
            buckets = Buckets(net, net._settings)
            stack.callback(buckets.close)
            return buckets

        yield build


def listing(origin: Origin) -> Listing:
    assert isinstance(origin, Listing)
    return origin


def read(origin: Listing, name: str, start: int = 0, stop: int | None = None) -> bytes:
    file = origin.files[name]
    return remote.read(origin.source, origin.handle, file, start, stop)


class TestGoogle:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return write_tree(TREE, tmp_path / "models/google/bert/9").parents[2]

    @pytest.fixture
    def records(self) -> list[RequestRecord]:
        return []

    @pytest.fixture
    def hub(
        self, root: Path, tmp_path: Path, records: list[RequestRecord], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[LocalHub]:
        with LocalHub(root, archive_dir=tmp_path / "archives", on_request=records.append) as hub:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
            yield hub

    @pytest.mark.parametrize("handle", [HANDLE, HANDLE + "/"])
    def test_directory_is_a_listing(
        self, hub: LocalHub, root: Path, make: Callable[..., Buckets], handle: str
    ) -> None:
        origin = listing(make().locate(handle))
        assert (origin.handle, origin.where) == (handle, HANDLE)
        assert origin.files.keys() == TREE.keys()
        for name, content in TREE.items():
            file = origin.files[name]
            digest = hashlib.md5(content)
            assert (file.size, file.md5, file.etag) == (
                len(content),
                digest.digest(),
                f'"{digest.hexdigest()}"',
            )
            assert file.mtime == int((root / "google/bert/9" / name).stat().st_mtime)
            assert read(origin, name) == content
        data = "variables/variables.data-00000-of-00001"
        assert read(origin, data, 1000, 1010) == TREE[data][1000:1010]

    def test_nothing_of_a_file_needs_no_request(
        self, hub: LocalHub, make: Callable[..., Buckets], records: list[RequestRecord]
    ) -> None:
        origin = listing(make().locate(HANDLE))
        assert read(origin, "saved_model.pb", 7, 7) == b""
        hub.stop()
        assert ["list-type=2" in record.path for record in records] == [True]

    def test_many_read_at_once(self, hub: LocalHub, make: Callable[..., Buckets]) -> None:
        origin = listing(make().locate(HANDLE))
        found: dict[int, bytes] = {}
        name = "variables/variables.data-00000-of-00001"

        def part(i: int) -> None:
            found[i] = read(origin, name, i * 25_000, (i + 1) * 25_000)

        threads = [threading.Thread(target=part, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert b"".join(found[i] for i in range(8)) == TREE[name]

    def test_pieces(self, hub: LocalHub, root: Path, make: Callable[..., Buckets]) -> None:
        content = os.urandom((3 << 20) + 12345)
        write_tree({"data": content}, root / "large/model/1")
        origin = listing(make().locate("gs://hubfs-serve/large/model/1"))
        file, step = origin.files["data"], 256 << 10
        for start, stop in [(0, file.size), (step, 3 << 20), (5, 1000), (9, 9)]:
            pieces = [bytes(p) for p in origin.source.pieces("h", file, start, stop, NEVER)]
            assert b"".join(pieces) == content[start:stop]
            assert len(pieces) > 2 or stop - start < 2 << 20
        assert dataclasses.replace(origin.source.declared(file), crc32c=None) == file
        left_early = origin.source.pieces("h", file, 0, file.size, NEVER)
        assert content.startswith(next(left_early))
        left_early.close()
        cancel = threading.Event()
        stopped = origin.source.pieces("h", file, 0, file.size, cancel)
        next(stopped)
        cancel.set()
        with pytest.raises(StoppedError):
            list(stopped)

    def test_names_that_a_url_cannot_have(
        self, hub: LocalHub, root: Path, make: Callable[..., Buckets]
    ) -> None:
        odd = {name: name.encode() for name in ("a b", "100%", "x%20y", "#?&+", "ü", "a*b~", "<&>\"'")}
        write_tree(odd, root / "odd/model/1")
        origin = listing(make().locate("gs://hubfs-serve/odd/model/1"))
        assert {name: read(origin, name) for name in origin.files} == odd

    def test_thousands_of_files_come_in_pages(
        self, hub: LocalHub, root: Path, make: Callable[..., Buckets], records: list[RequestRecord]
    ) -> None:
        many = {f"assets/{i}": b"" for i in range(3000)}
        write_tree(many, root / "big/model/1")
        origin = listing(make().locate("gs://hubfs-serve/big/model/1"))
        assert origin.files.keys() == many.keys()
        hub.stop()
        assert len(records) == 3

    def test_limits(self, hub: LocalHub, make: Callable[..., Buckets]) -> None:
        names = {*TREE, "assets", "variables"}
        assert make(max_model_files=len(names)).locate(HANDLE)
        with pytest.raises(TooLargeError, match=r"files and directories.*--max-model-files"):
            make(max_model_files=len(names) - 1).locate(HANDLE)
        size = sum(map(len, TREE.values()))
        assert make(max_model_size=size).locate(HANDLE)
        with pytest.raises(TooLargeError, match=r"bytes.*--max-model-size"):
            make(max_model_size=size - 1).locate(HANDLE)

    @pytest.mark.parametrize("change", [b"x", TREE["fingerprint.pb"][::-1]])
    def test_changed_file_is_never_mixed(
        self, hub: LocalHub, root: Path, make: Callable[..., Buckets], change: bytes
    ) -> None:
        buckets = make()
        origin = listing(buckets.locate(HANDLE))
        path = root / "google/bert/9/fingerprint.pb"
        path.write_bytes(change)
        with pytest.raises(ChangedOriginError, match=r"gs://hubfs-serve/.*fingerprint\.pb"):
            read(origin, "fingerprint.pb", 0, 1)
        again = listing(buckets.locate(HANDLE))
        assert read(again, "fingerprint.pb") == change
        path.unlink()
        with pytest.raises(ChangedOriginError, match="gone"):
            read(again, "fingerprint.pb")

    @pytest.mark.parametrize(
        ("handle", "error"),
        [
            ("gs://hubfs-serve/google/bert/8", NotFoundError),
            ("gs://hubfs-serve/google/ber", NotFoundError),
            ("gs://hubfs-serve/google/bert/9/saved_model.pb", NotFoundError),
            ("gs://hubfs-serve/google/bert/8.tar.gz", NotFoundError),
            ("gs://another/google/bert/9", NotFoundError),
            ("gs://hubfs-serve", RefusedError),
            ("gs://hubfs-serve/", RefusedError),
            ("gs://hubfs-serve/google/../google/bert/9", RefusedError),
            ("gs://hubfs-serve//google/bert/9", RefusedError),
            ("gs:///google/bert/9", RefusedError),
            ("gs://user@host/google/bert/9", RefusedError),
        ],
    )
    def test_what_is_not_there(
        self, hub: LocalHub, make: Callable[..., Buckets], handle: str, error: type[HubfsError]
    ) -> None:
        with pytest.raises(error):
            make().locate(handle)

    def test_archive_is_an_archive(self, hub: LocalHub, make: Callable[..., Buckets]) -> None:
        origin = make().locate(HANDLE + ".tar.gz")
        assert isinstance(origin, Archive)
        answer = requests.get(origin.url, timeout=20)
        assert (len(answer.content), answer.headers["ETag"]) == (origin.size, origin.etag)
        with pytest.raises(ProtocolError, match="one by one"):
            make().locate(HANDLE + ".tar.gz", LoadFormat.UNCOMPRESSED)

    def test_endpoint_without_a_scheme(
        self, hub: LocalHub, make: Callable[..., Buckets], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url.removeprefix("http://") + "/")
        origin = listing(make().locate(HANDLE))
        assert read(origin, "saved_model.pb") == TREE["saved_model.pb"]

    def test_offline(self, hub: LocalHub, make: Callable[..., Buckets], records: list[RequestRecord]) -> None:
        with pytest.raises(OfflineError):
            make(offline=True).locate(HANDLE)
        hub.stop()
        assert records == []

    def test_hub_names_its_bucket(self, hub: LocalHub, make: Callable[..., Buckets]) -> None:
        buckets = make()
        tfhub = TfHub(buckets._net, buckets._settings, buckets)
        handle = f"{hub.url}/google/bert"
        for load_format in (LoadFormat.AUTO, LoadFormat.UNCOMPRESSED):
            origin = listing(tfhub.locate(handle, load_format))
            assert (origin.handle, origin.where) == (handle, HANDLE)
            assert read(origin, "saved_model.pb") == TREE["saved_model.pb"]
        assert isinstance(tfhub.locate(handle, LoadFormat.COMPRESSED), Archive)
        for load_format in LoadFormat:
            with pytest.raises(HubfsError) as caught:
                tfhub.locate(f"{hub.url}/google/bert/77", load_format)
            assert isinstance(caught.value, NotFoundError)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class TestPublicObjects:
    """Read at their URLs, without obstore."""

    MODEL = "google/demo/1"
    PB = "saved_model.pb"

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
        with BucketHub() as hub:
            hub.publish(self.MODEL, TREE)
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
            yield hub

    @pytest.fixture
    def origin(self, store: BucketHub, make: Callable[..., Buckets]) -> Listing:
        return listing(make().locate(f"gs://{BUCKET}/{self.MODEL}"))

    def test_hubfs_itself_asks_for_them_without_credentials(self, store: BucketHub, origin: Listing) -> None:
        for name, content in TREE.items():
            for start in range(0, len(content), 70_000):
                stop = min(len(content), start + 70_000)
                assert read(origin, name, start, stop) == content[start:stop]
        agents = {request.headers["user-agent"] for request in store.reads()}
        assert agents == {f"hubfs/{hubfs.__version__}"}
        assert not [request for request in store.reads() if "authorization" in request.headers]

    def test_refusal_says_what_to_do(self, store: BucketHub, origin: Listing) -> None:
        store.fault_file(self.MODEL, self.PB, Fault.status(403))
        with pytest.raises(AccessError) as caught:
            read(origin, self.PB)
        assert caught.value.message.startswith(f"{origin.handle}: ")
        assert caught.value.hint == "it was asked with no credentials; set GOOGLE_APPLICATION_CREDENTIALS"

    def test_file_that_is_gone_is_a_changed_one(self, store: BucketHub, origin: Listing) -> None:
        store.delete(f"{self.MODEL}/{self.PB}")
        with pytest.raises(ChangedOriginError, match="is not the file that was listed: it is gone"):
            read(origin, self.PB)

    def test_another_file_of_the_same_size_is_a_changed_one(self, store: BucketHub, origin: Listing) -> None:
        store.put(f"{self.MODEL}/{self.PB}", bytes(len(TREE[self.PB])))
        with pytest.raises(ChangedOriginError):
            read(origin, self.PB, 5, 10)

    def test_weak_etag_is_compared_as_well(self, store: BucketHub, make: Callable[..., Buckets]) -> None:
        store.publish("google/weak/1", {"f": b"12345678"}, etag='W/"one"')
        origin = listing(make().locate(f"gs://{BUCKET}/google/weak/1"))
        assert read(origin, "f") == b"12345678"
        store.put("google/weak/1/f", b"87654321", etag='W/"two"')
        with pytest.raises(ChangedOriginError):
            read(origin, "f", 0, 4)


class TestAmazon:
    @pytest.fixture
    def put(self, moto: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, bytes], str], None]:
        """Puts objects into the bucket `models`, which is empty before."""
        requests.post(f"{moto}/moto-api/reset", timeout=20).raise_for_status()
        requests.put(f"{moto}/models", timeout=20).raise_for_status()
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")

        def put(tree: Mapping[str, bytes], acl: str = "private") -> None:
            for key, content in tree.items():
                url = requests.Request("PUT", moto).prepare()
                url.url = f"{moto}/models/{quote(key)}"  # as it is: requests would take `..` away
                url.prepare_body(content, None)
                url.headers["x-amz-acl"] = acl
                # moto wants to know who it is, and does not look at the signature.
                url.headers["Authorization"] = (
                    "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, "
                    "SignedHeaders=host, Signature=x"
                )
                with requests.Session() as session:
                    session.send(url, timeout=20).raise_for_status()

        return put

    def test_directory_is_a_listing(self, put: Callable[..., None], make: Callable[..., Buckets]) -> None:
        put({f"a dir/{name}": content for name, content in TREE.items()})
        origin = listing(make().locate("s3://models/a dir"))
        assert {name: file.size for name, file in origin.files.items()} == {
            name: len(content) for name, content in TREE.items()
        }
        assert {name: read(origin, name) for name in origin.files} == TREE
        assert all(file.md5 is None for file in origin.files.values()), "an ETag of S3 may be no MD5"
        put({"a dir/saved_model.pb": b"another"})
        with pytest.raises(ChangedOriginError):
            read(origin, "saved_model.pb", 0, 5)

    def test_pieces(self, put: Callable[..., None], make: Callable[..., Buckets]) -> None:
        content = os.urandom((3 << 20) + 12345)
        put({"dir/data": content})
        buckets = make()
        origin = listing(buckets.locate("s3://models/dir"))
        file, step = origin.files["data"], 256 << 10
        for start, stop in [(0, file.size), (step, 3 << 20), (5, 1000), (9, 9)]:
            pieces = [bytes(p) for p in origin.source.pieces("h", file, start, stop, NEVER)]
            assert b"".join(pieces) == content[start:stop]
        assert origin.source.declared(file) == file
        left_early = origin.source.pieces("h", file, 0, file.size, NEVER)
        assert content.startswith(next(left_early))
        left_early.close()
        stopped = origin.source.pieces("h", file, 0, file.size, threading.Event())
        next(stopped)
        buckets.shut_down()
        with pytest.raises(StoppedError):
            list(stopped)

    def test_public_objects_need_no_credentials(
        self, put: Callable[..., None], make: Callable[..., Buckets], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put({"open/file": b"public"}, "public-read")
        put({"shut/file": b"private"})
        put({"open/file.tar.gz": b"archive"}, "public-read")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        buckets = make()
        assert read(listing(buckets.locate("s3://models/open")), "file") == b"public"
        with pytest.raises(AccessError, match="no credentials; set AWS_ACCESS_KEY_ID"):
            read(listing(buckets.locate("s3://models/shut")), "file")
        origin = buckets.locate("s3://models/open/file.tar.gz")
        assert isinstance(origin, Archive)
        assert (origin.size, "Signature" in origin.url) == (7, False)

    def test_archive_comes_by_a_signed_url(
        self, put: Callable[..., None], make: Callable[..., Buckets]
    ) -> None:
        put({"some/x y.tar.gz": b"archive"})
        origin = make().locate("s3://models/some/x y.tar.gz")
        assert isinstance(origin, Archive)
        assert requests.get(origin.url, timeout=20).content == b"archive"
        assert "X-Amz-Signature" in origin.url
        assert "X-Amz-Signature" not in repr(origin)
        with pytest.raises(NotFoundError) as caught:
            make().locate("s3://models/none.tar.gz")
        assert "Signature" not in str(caught.value)

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (["m/../x"], "lead elsewhere"),
            (["m/a/../../x"], "lead elsewhere"),
            (["m/./x"], "lead elsewhere"),
            (["m/a//b"], "lead elsewhere"),
            (["m/a", "m/a/b"], "both a file and a directory"),
            (["m/A", "m/a"], "take for one"),
            (["m/d/x", "m/D/y"], "take for one"),
            ([f"m/{'x' * 256}"], "no file can have"),
        ],
    )
    def test_names_that_clash_or_climb_out(
        self, put: Callable[..., None], make: Callable[..., Buckets], keys: list[str], words: str
    ) -> None:
        put({"m/saved_model.pb": b"x", **dict.fromkeys(keys, b"x")})
        with pytest.raises(HostileError, match=words):
            make().locate("s3://models/m")

    def test_empty_objects_that_stand_for_directories(
        self, put: Callable[..., None], make: Callable[..., Buckets]
    ) -> None:
        put({"m/": b"", "m/variables/": b"", "m/variables/x": b"x", "m/empty": b"", "mm/y": b""})
        assert listing(make().locate("s3://models/m")).files.keys() == {"variables/x", "empty"}

    def test_no_such_bucket(self, put: Callable[..., None], make: Callable[..., Buckets]) -> None:
        with pytest.raises(NotFoundError, match="s3://none/m"):
            make().locate("s3://none/m")


@dataclass
class Reply:
    """What the faulty store answers. The body stops for `until`, if that is given, at its end."""

    status: int = 206
    body: bytes = b"12345678"
    headers: Mapping[str, str] = field(default_factory=dict)
    until: threading.Event | None = None
    silent: bool = False  # `until` comes before the head
    drip: bool = False  # after the body a byte now and then, until `until`


class FaultyStore:
    """A server that gives one answer, whatever is asked for."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.reply = Reply()
        self.asked = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.set()
                with contextlib.suppress(OSError):
                    outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://localhost:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        reply = self.reply
        if reply.until and reply.silent:
            reply.until.wait(60)
        to.send_response(reply.status)
        own = {
            "Content-Length": "8",
            "Content-Range": "bytes 0-7/8",
            "ETag": '"etag"',
            "Last-Modified": "Fri, 14 Jul 2017 02:40:01 GMT",
        }
        for name, value in {**own, **reply.headers}.items():
            to.send_header(name, value)
        to.end_headers()
        to.wfile.write(reply.body)
        while reply.until and not reply.until.wait(0.02 if reply.drip else 60):
            to.wfile.write(b"x")

    def close(self) -> None:
        if self.reply.until:
            self.reply.until.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class TestFaults:
    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
        store = FaultyStore()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
        yield store
        store.close()

    def read(
        self, buckets: Buckets, size: int = 8, cancel: threading.Event = NEVER, etag: str | None = '"etag"'
    ) -> bytes:
        source = buckets_source(buckets)
        return remote.read(source, "gs://bkt/dir", RemoteFile("dir/file", size, 0, etag), 0, 8, cancel)

    def test_as_it_should_be(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        for etag in ('"etag"', None):
            assert self.read(make(), etag=etag) == b"12345678"

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (400, ProtocolError),
            (401, AccessError),
            (403, AccessError),
            (404, ChangedOriginError),
            (408, UnavailableError),
            (412, ChangedOriginError),
            (416, ProtocolError),
            (429, UnavailableError),
            (500, UnavailableError),
            (503, UnavailableError),
        ],
    )
    def test_status(
        self, store: FaultyStore, make: Callable[..., Buckets], status: int, error: type[HubfsError]
    ) -> None:
        body = b"<Error><Code>C</Code><Message>own words</Message></Error>"
        store.reply = Reply(status, body, {"Content-Length": str(len(body))})
        with pytest.raises(error) as caught:
            self.read(make())
        assert caught.value.message.startswith("gs://bkt/dir: ")
        if error in (AccessError, UnavailableError):
            assert "own words" in caught.value.message
        if status in (401, 403, 500):
            with pytest.raises(error, match="own words"):
                make().locate("gs://bkt/dir")

    @pytest.mark.parametrize(
        ("reply", "error"),
        [
            (Reply(headers={"ETag": '"other"'}), ChangedOriginError),
            (Reply(headers={"Content-Range": "bytes 0-7/9"}), ChangedOriginError),
            (Reply(headers={"Content-Range": "bytes 1-8/9"}), ProtocolError),
            (Reply(200), ProtocolError),
            (Reply(body=b"1234"), UnavailableError),
            (Reply(body=b"123", headers={"Content-Range": "bytes 0-2/8", "Content-Length": "3"}), HubfsError),
            (Reply(301), ProtocolError),
        ],
        ids=["etag", "size", "range", "no range", "cut", "short", "redirect"],
    )
    def test_answer_that_is_not_the_files(
        self, store: FaultyStore, make: Callable[..., Buckets], reply: Reply, error: type[HubfsError]
    ) -> None:
        store.reply = reply
        with pytest.raises(error):
            self.read(make())

    @pytest.mark.parametrize(
        ("there", "headers", "words"),
        [
            (2 << 20, {}, None),
            (2 << 20, {"ETag": '"other"'}, "not what was listed"),
            ((2 << 20) - 1, {"Content-Length": str((2 << 20) - 1)}, "2097151 of 2097152 bytes came"),
            ((2 << 20) + 1, {"Content-Length": str((2 << 20) + 1)}, "2097153 of 2097152 bytes came"),
            ((3 << 20) + 1, {"Content-Length": str((3 << 20) + 1)}, "of 2097152 bytes came"),
            ((2 << 20) - 1, {}, "cannot be read"),
        ],
        ids=["right", "etag", "short", "long", "longer", "cut"],
    )
    def test_pieces_of_another_answer(
        self,
        store: FaultyStore,
        make: Callable[..., Buckets],
        there: int,
        headers: Mapping[str, str],
        words: str | None,
    ) -> None:
        size = 2 << 20
        own = {"Content-Length": str(size), "Content-Range": f"bytes 0-{size - 1}/{size}"}
        store.reply = Reply(body=bytes(there), headers={**own, **headers})
        source = buckets_source(make())
        pieces = source.pieces("h", RemoteFile("dir/f", size, 0, '"etag"'), 0, size, NEVER)
        came = 0
        try:
            for piece in pieces:
                came += len(piece)
        except HubfsError as error:
            assert words is not None
            assert words in str(error)
            assert isinstance(error, ChangedOriginError if "ETag" in headers else UnavailableError)
            assert came < size, "the last piece is given after all checks"
        else:
            assert (words, came) == (None, size)

    def test_listing_that_is_none(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        for body in (b"", b"<html>sign in</html>", b"<ListBucketResult><Contents/></ListBucketResult>"):
            store.reply = Reply(200, body, {"Content-Length": str(len(body))})
            with pytest.raises((ProtocolError, NotFoundError)):
                make().locate("gs://bkt/dir")

    @pytest.mark.parametrize("silent", [True, False])
    def test_store_that_stands_still(
        self, store: FaultyStore, make: Callable[..., Buckets], silent: bool
    ) -> None:
        store.reply = Reply(body=b"1234", until=threading.Event(), silent=silent)
        with pytest.raises(UnavailableError, match=r"dir/file.*stands still"):
            self.read(make(stall_timeout=0.2))

    def test_store_that_drips(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        headers = {"Content-Length": "9999", "Content-Range": "bytes 0-9998/9999"}
        store.reply = Reply(body=b"", headers=headers, until=threading.Event(), drip=True)
        source, file = buckets_source(make(stall_timeout=0.3)), RemoteFile("dir/file", 9999, 0, '"etag"')
        with pytest.raises(UnavailableError, match="less than 1024 bytes a second"):
            remote.read(source, "gs://bkt/dir", file)

    def test_drip_ends_when_nobody_wants_it(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        headers = {"Content-Length": "9999", "Content-Range": "bytes 0-9998/9999"}
        store.reply = Reply(body=b"x", headers=headers, until=threading.Event(), drip=True)
        source, file = buckets_source(make()), RemoteFile("dir/file", 9999, 0, '"etag"')
        cancel = threading.Event()
        pieces = source.pieces("gs://bkt/dir", file, 0, 9999, cancel)
        assert set(next(pieces)) == {ord("x")}
        cancel.set()
        with pytest.raises(StoppedError):
            list(pieces)

    def test_cancelled_read_ends_at_once(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        store.reply = Reply(until=threading.Event(), silent=True)
        cancel, buckets = threading.Event(), make()

        def end() -> None:
            assert store.asked.wait(20)
            cancel.set()

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(StoppedError):
            self.read(buckets, cancel=cancel)
        thread.join()

    def test_shutting_down_ends_everything(self, store: FaultyStore, make: Callable[..., Buckets]) -> None:
        store.reply = Reply(until=threading.Event(), silent=True)
        buckets = make()

        def end() -> None:
            assert store.asked.wait(20)
            buckets.shut_down()

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(StoppedError):
            buckets.locate("gs://bkt/dir")
        thread.join()
        buckets.close()
        with pytest.raises(StoppedError):
            self.read(buckets)

    def test_nobody_listens(self, make: Callable[..., Buckets], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
        with pytest.raises(UnavailableError, match="gs://bkt/dir cannot be read: Connection refused"):
            make().locate("gs://bkt/dir")

    def test_own_authority(
        self, tmp_path: Path, make: Callable[..., Buckets], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        store = FaultyStore(context)
        try:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
            with pytest.raises(ProtocolError, match="no secure connection"):
                self.read(make())
            assert self.read(make(verify_certificates=False)) == b"12345678"
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
            assert self.read(make()) == b"12345678"
        finally:
            store.close()

    @pytest.mark.parametrize("content", [None, "{}"])
    def test_credentials_that_are_none(
        self,
        tmp_path: Path,
        make: Callable[..., Buckets],
        monkeypatch: pytest.MonkeyPatch,
        content: str | None,
    ) -> None:
        if content is not None:
            (tmp_path / "key.json").write_text(content)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        with pytest.raises(AccessError, match="gs://bkt/dir: the credentials for gs://"):
            make().locate("gs://bkt/dir")


def buckets_source(buckets: Buckets) -> Any:
    from hubfs.hubs.bucket import BucketFiles

    return BucketFiles(buckets._stores, BucketPath("gs", "bkt", "dir"), buckets._settings)


def test_paths() -> None:
    for text, expected in [
        ("gs://bkt/a/b", BucketPath("gs", "bkt", "a/b")),
        ("s3://my.bucket-1/a/b/", BucketPath("s3", "my.bucket-1", "a/b")),
        ("gs://bkt", BucketPath("gs", "bkt", "")),
        ("gs://bkt/ü x#?%", BucketPath("gs", "bkt", "ü x#?%")),
    ]:
        assert BucketPath.parse(text) == expected
        assert BucketPath.parse(str(expected)) == expected


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, hubfs.hubs.bucket; print([n for n in ('obstore', 'asyncio') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
