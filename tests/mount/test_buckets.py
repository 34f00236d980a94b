"""Buckets as handles, through a mount: `gs://…` and `s3://…`, directories and archives in them."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from hubfs.serve import LocalHub
from tests.bucket_hub import BUCKET, BucketHub
from tests.conftest import Mounted
from tests.hub import Fault
from tests.models import make_archive, make_tree, write_tree
from tests.moto_s3 import MotoS3
from tests.mount.conftest import Hubfs, cached_keys, read_tree, until
from tests.mount.test_listing import DATA, MiB, Mount, read_at, until_cached

TREE = make_tree(3, size=3 * MiB + 77)
GS = f"gs://{BUCKET}"
#: So that a request that should not be sent fails its test soon.
BRIEF = {"connect_timeout": 1, "stall_timeout": 1, "retries": 1}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    with BucketHub() as hub:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
        yield hub


def fill(hub: BucketHub, directory: str = "some/model", tree: dict[str, bytes] = TREE) -> None:
    for name, content in tree.items():
        hub.put(f"{directory}/{name}", content)


class TestDirectories:
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed", "compressed"])
    @pytest.mark.parametrize("directory", ["model/1", "some/deep/model/12"])
    def test_are_models(self, hub: BucketHub, mount: Mount, load_format: str, directory: str) -> None:
        fill(hub, directory)
        mounted = mount(hub, load_format=load_format, allow_hosts=(GS,))
        assert read_tree(mounted.path / f"gs:/{BUCKET}" / directory) == TREE
        assert len(hub.listings()) == 1

    def test_whole_handle_behind_the_mount_point_works(self, hub: BucketHub, mount: Mount) -> None:
        fill(hub, "model/1")
        mounted = mount(hub, allow_hosts=(GS,))
        path = f"{mounted.path}/{GS}/model/1/saved_model.pb"
        done = subprocess.run(["cat", path], capture_output=True, check=True, timeout=30)
        assert done.stdout == TREE["saved_model.pb"]

    @pytest.mark.parametrize("directory", ["model", "some/deep/model"])
    def test_without_a_version_are_models_by_their_files(
        self, hub: BucketHub, mount: Mount, directory: str
    ) -> None:
        fill(hub, directory)
        model = mount(hub, allow_hosts=(GS,)).path / f"gs:/{BUCKET}" / directory
        assert (model / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert read_tree(model) == TREE

    def test_are_kept_under_their_handle(self, hub: BucketHub, mount: Mount) -> None:
        fill(hub, "model/1")
        mounted = mount(hub, allow_hosts=(GS,))
        read_at(mounted.path / f"gs:/{BUCKET}/model/1" / DATA, 0, 1)
        until_cached(mounted.cache)
        assert cached_keys(mounted.cache) == [cache_key(f"{GS}/model/1")]

    def test_that_are_not_there_are_enoent_and_looked_for_once(self, hub: BucketHub, mount: Mount) -> None:
        path = mount(hub, allow_hosts=(GS,)).path / f"gs:/{BUCKET}"
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                os.listdir(path / "model/1")
        assert len(hub.listings()) == 1

    def test_above_models_are_there_without_a_request(self, hub: BucketHub, mount: Mount) -> None:
        path = mount(hub, allow_hosts=(GS,)).path
        for name in ("gs:", f"gs:/{BUCKET}", f"gs:/{BUCKET}/some", f"gs:/{BUCKET}/some/where"):
            assert (path / name).is_dir()
            os.listdir(path / name)
        assert hub.requests() == []

    def test_find_over_all_that_is_known_asks_for_nothing_more(self, hub: BucketHub, mount: Mount) -> None:
        fill(hub, "model/1")
        mounted = mount(hub, allow_hosts=(GS,))
        (mounted.path / f"gs:/{BUCKET}/model/1/saved_model.pb").read_bytes()
        asked = len(hub.requests())
        found = subprocess.run(["find", mounted.path], capture_output=True, text=True, timeout=60, check=True)
        assert f"{mounted.path}/gs:/{BUCKET}/model/1/{DATA}" in found.stdout.splitlines()
        assert len(hub.requests()) == asked

    @pytest.mark.logs(BUCKET)
    def test_that_refuse_are_eacces(self, hub: BucketHub, mount: Mount) -> None:
        fill(hub, "model/1")
        words = b"<Error><Code>AccessDenied</Code><Message>Nobody may</Message></Error>"
        hub.fault_listing(Fault.status(403, words, times=None))
        path = mount(hub, allow_hosts=(GS,)).path / f"gs:/{BUCKET}"
        with pytest.raises(PermissionError):
            os.listdir(path / "model/1")
        told = os.getxattr(path, "user.hubfs.error").decode()
        assert "Nobody may" in told and "GOOGLE_APPLICATION_CREDENTIALS" in told

    def test_change_is_seen_by_new_readers(self, hub: BucketHub, mount: Mount) -> None:
        """A directory of a bucket has no versions."""
        fill(hub, "model")
        model = mount(hub, allow_hosts=(GS,), read_ahead=False).path / f"gs:/{BUCKET}/model"
        assert (model / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        other = make_tree(8, size=len(TREE[DATA]) + 5)
        fill(hub, "model", other)
        with pytest.raises(OSError) as caught:
            (model / DATA).read_bytes()
        assert caught.value.errno == errno.EIO
        until(lambda: (model / DATA).stat().st_size == len(other[DATA]), "the new size")
        assert read_tree(model) == other


class TestAllowed:
    @pytest.fixture
    def listener(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
        """Where every request for a bucket would arrive."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
            yield listener

    @pytest.mark.parametrize(
        "path",
        [
            "gs:/other-bucket/model/1/saved_model.pb", "gs:/other-bucket/model/saved_model.pb",
            "s3:/other-bucket/model/1/saved_model.pb", f"s3:/{BUCKET}/model/1/saved_model.pb",
            f"gs:/{BUCKET}x/model/1", f"gs:/x{BUCKET}/model/1/saved_model.pb", "gs:/other-bucket/x.tar.gz/a",
            "gs:/UPPER/model/1",
        ],
    )  # fmt: skip
    def test_others_are_enoent_without_a_packet(
        self, listener: socket.socket, mount: Mount, path: str
    ) -> None:
        mounted = mount("http://127.0.0.1:9", allow_hosts=(GS,), **BRIEF)
        with pytest.raises(FileNotFoundError):
            (mounted.path / path).read_bytes()
        with pytest.raises(BlockingIOError):
            listener.accept()

    def test_others_say_how_to_allow_them(self, mount: Mount) -> None:
        mounted = mount("http://127.0.0.1:9", allow_hosts=(GS,), **BRIEF)
        with pytest.raises(FileNotFoundError):
            os.listdir(mounted.path / "gs:/other-bucket")
        assert "--allow-host gs://other-bucket" in os.getxattr(mounted.path, "user.hubfs.error").decode()

    @pytest.mark.parametrize("name", [".git", "desktop.ini", ".DS_Store", "Thumbs.db", "saved_model.pb~"])
    def test_litter_is_never_looked_for(self, listener: socket.socket, mount: Mount, name: str) -> None:
        mounted = mount("http://127.0.0.1:9", allow_hosts=(GS,), **BRIEF)
        for above in (f"gs:/{BUCKET}", f"gs:/{BUCKET}/model"):
            assert not (mounted.path / above / name).exists()
        with pytest.raises(BlockingIOError):
            listener.accept()

    def test_bucket_that_the_hub_names_is_allowed_with_it_and_for_that_only(
        self, hub: BucketHub, mount: Mount
    ) -> None:
        hub.publish("google/demo/1", TREE)
        mounted = mount(hub)
        assert (mounted.path / "google/demo/1/saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        with pytest.raises(FileNotFoundError):
            (mounted.path / f"gs:/{BUCKET}/google/demo/1/saved_model.pb").read_bytes()


class TestArchives:
    @pytest.mark.parametrize("name", ["model.tar.gz", "deep/model.tgz", "model.tar"])
    def test_are_models(self, hub: BucketHub, mount: Mount, name: str) -> None:
        hub.put(name, make_archive(TREE, gzip=not name.endswith("tar")))
        mounted = mount(hub, allow_hosts=(GS,))
        assert read_tree(mounted.path / f"gs:/{BUCKET}" / name) == TREE
        assert hub.listings() == []

    @pytest.mark.logs(BUCKET)
    def test_are_refused_where_nothing_may_be_kept(self, hub: BucketHub, mount: Mount) -> None:
        hub.put("model.tar.gz", make_archive(TREE))
        path = mount(hub, allow_hosts=(GS,), load_format="uncompressed").path / f"gs:/{BUCKET}"
        with pytest.raises(OSError) as caught:
            os.listdir(path / "model.tar.gz")
        assert caught.value.errno == errno.EIO
        assert "compressed" in os.getxattr(path, "user.hubfs.error").decode()

    def test_that_are_not_there_are_enoent(self, hub: BucketHub, mount: Mount) -> None:
        path = mount(hub, allow_hosts=(GS,)).path / f"gs:/{BUCKET}"
        with pytest.raises(FileNotFoundError):
            os.listdir(path / "model.tar.gz")


class TestCommands:
    def test_pull_and_ls(self, hub: BucketHub, hubfs: Hubfs, tmp_path: Path) -> None:
        fill(hub, "model/1")
        cache = tmp_path / "cache"
        hubfs("pull", f"{GS}/model/1", "--cache-dir", cache, "--allow-host", GS)
        (key,) = cached_keys(cache)
        assert read_tree(cache / key) == TREE
        assert f"{GS}/model/1" in hubfs("ls", "--cache-dir", cache).stdout


class TestS3:
    @pytest.fixture(scope="class")
    def server(self) -> Iterator[MotoS3]:
        with MotoS3() as server:
            yield server

    @pytest.fixture
    def s3(self, server: MotoS3, monkeypatch: pytest.MonkeyPatch) -> MotoS3:
        server.reset()
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        return server

    @pytest.fixture
    def models(self, s3: MotoS3, mount: Mount) -> Callable[..., Mounted]:
        return lambda **settings: mount("http://127.0.0.1:9", allow_hosts=("s3://models",), **settings)

    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_directory_is_a_model(self, s3: MotoS3, models: Callable[..., Mounted], load_format: str) -> None:
        s3.put({f"demo/1/{name}": content for name, content in TREE.items()})
        mounted = models(load_format=load_format)
        assert sorted(os.listdir(mounted.path / "s3:/models/demo/1")) == [
            "assets", "fingerprint.pb", "saved_model.pb", "variables",
        ]  # fmt: skip
        assert [r for r in s3.requests if r.method == "GET" and "list-type=2" not in r.path] == []
        assert read_tree(mounted.path / "s3:/models/demo/1") == TREE

    def test_is_kept_and_served_without_the_bucket(self, s3: MotoS3, models: Callable[..., Mounted]) -> None:
        s3.put({f"demo/1/{name}": content for name, content in TREE.items()})
        mounted = models()
        assert read_tree(mounted.path / "s3:/models/demo/1") == TREE
        until_cached(mounted.cache)
        asked = len(s3.requests)
        mounted.unmount()
        assert read_tree(models(name="again").path / "s3:/models/demo/1") == TREE
        assert len(s3.requests) == asked

    def test_archive_is_a_model(self, s3: MotoS3, models: Callable[..., Mounted]) -> None:
        s3.put({"demo.tar.gz": make_archive(TREE)})
        assert read_tree(models().path / "s3:/models/demo.tar.gz") == TREE

    def test_change_is_an_error_and_then_right_bytes(
        self, s3: MotoS3, models: Callable[..., Mounted]
    ) -> None:
        s3.put({f"demo/1/{name}": content for name, content in TREE.items()})
        path = models(read_ahead=False).path / "s3:/models/demo/1"
        assert read_at(path / DATA, 0, 10) == TREE[DATA][:10]
        s3.put({f"demo/1/{DATA}": TREE[DATA][::-1]})
        with pytest.raises(OSError):
            read_at(path / DATA, 2 * MiB, 10)
        assert (path / DATA).read_bytes() == TREE[DATA][::-1]

    @pytest.mark.logs("s3://models")
    def test_refusal_is_eacces(self, s3: MotoS3, models: Callable[..., Mounted]) -> None:
        s3.fault = lambda request: 403
        with pytest.raises(PermissionError):
            os.listdir(models().path / "s3:/models/demo/1")


class TestLocalHub:
    """`hubfs serve`, whose bucket is read as Google's would be."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
        write_tree(TREE, tmp_path / "models/google/demo/1")
        with LocalHub(tmp_path / "models", archive_dir=tmp_path / "archives") as served:
            yield served

    @pytest.mark.parametrize("emulator", [False, True])
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed", "compressed"])
    def test_is_read_in_every_format(
        self,
        served: LocalHub,
        mount: Mount,
        monkeypatch: pytest.MonkeyPatch,
        emulator: bool,
        load_format: str,
    ) -> None:
        """Also where no variable leads to it: the hub says that it has the bucket itself."""
        if emulator:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.url)
        mounted = mount(served.url, load_format=load_format)
        assert read_tree(mounted.path / "google/demo/1") == TREE

    def test_its_bucket_is_one_to_be_typed(
        self, served: LocalHub, mount: Mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.url)
        mounted = mount(served.url, allow_hosts=(f"gs://{served.bucket}",))
        assert read_tree(mounted.path / f"gs:/{served.bucket}/google/demo/1") == TREE
