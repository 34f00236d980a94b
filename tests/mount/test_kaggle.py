"""Kaggle Models through a mount: every spelling, listings and archives, licences and logins."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from tests.conftest import Mounted
from tests.kaggle import KaggleServer
from tests.models import make_tree
from tests.mount.conftest import Hubfs, cached_keys, read_tree, until
from tests.mount.test_listing import DATA, MiB, Mount, read_at, until_cached

VARIATION = "google/demo/tensorFlow2/small"
HANDLE = f"https://www.kaggle.com/models/{VARIATION}"
BELOW = f"https:/www.kaggle.com/models/{VARIATION}"
TREE = make_tree(4, size=3 * MiB + 99)
OLD = make_tree(5, size=1000)
TOKEN = "KGAT_0123456789abcdef0123456789abcdef"


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    with KaggleServer() as server:
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", server.url)
        server.publish(f"{VARIATION}/1", OLD)
        server.publish(f"{VARIATION}/2", TREE)
        yield server


@pytest.fixture
def mounted(kaggle: KaggleServer, mount: Mount) -> Mounted:
    return mount("https://tfhub.dev")


@pytest.fixture
def offer(kaggle: KaggleServer, mount: Mount) -> Callable[..., Mounted]:
    return lambda **settings: mount("https://tfhub.dev", **settings)


def why(path: Path) -> str:
    return os.getxattr(path, "user.hubfs.error").decode()


def downloads(kaggle: KaggleServer) -> list[str]:
    return [seen.what for seen in kaggle.seen("storage")]


class TestSpellings:
    @pytest.mark.parametrize(
        "path",
        [
            f"https:/www.kaggle.com/models/{VARIATION}/2",
            f"https:/kaggle.com/models/{VARIATION}/2",
            "https:/www.kaggle.com/models/google/demo/TensorFlow2/small/2",
            "https:/www.kaggle.com/models/google/demo/tensorflow2/small/2",
            "https:/www.kaggle.com/models/google/demo/frameworks/TensorFlow2/variations/small/versions/2",
            "https:/www.kaggle.com/api/v1/models/google/demo/tensorFlow2/small/2",
            f"kaggle:/{VARIATION}/2",
            f"https://www.kaggle.com/models/{VARIATION}/2",
            f"http:/www.kaggle.com/models/{VARIATION}/2",
        ],
    )
    def test_of_one_version_all_lead_to_it(self, mounted: Mounted, path: str) -> None:
        place = f"{mounted.path}/{path}"
        assert Path(f"{place}/saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert os.path.realpath(place) == f"{mounted.path}/{BELOW}/2"
        assert sorted(os.listdir(place)) == ["assets", "fingerprint.pb", "saved_model.pb", "variables"]

    def test_of_one_version_are_one_in_the_cache(self, mounted: Mounted, kaggle: KaggleServer) -> None:
        for path in (f"kaggle:/{VARIATION}/2", f"https:/kaggle.com/models/{VARIATION}/2", f"{BELOW}/2"):
            assert (mounted.path / path / DATA).read_bytes() == TREE[DATA]
        until_cached(mounted.cache)
        assert cached_keys(mounted.cache) == [cache_key(f"{HANDLE}/2")]

    def test_of_no_model_are_enoent_without_a_request(self, mounted: Mounted, kaggle: KaggleServer) -> None:
        for path in (
            "https:/www.kaggle.com/datasets/google/demo/1", "https:/www.kaggle.com/login",
            f"https:/www.kaggle.com/models/{VARIATION}/.git", "https:/api.kaggle.com/models/a/b/c/d/1",
        ):  # fmt: skip
            with pytest.raises(FileNotFoundError):
                os.listdir(mounted.path / path)
        assert kaggle.seen() == []


class TestVersions:
    def test_listing_names_files_and_fetches_none(self, mounted: Mounted, kaggle: KaggleServer) -> None:
        done = subprocess.run(
            ["ls", "-lR", mounted.path / BELOW / "2"], capture_output=True, text=True, check=True, timeout=60
        )
        assert str(len(TREE[DATA])) in done.stdout
        assert kaggle.seen("storage") == [] and kaggle.seen("api", "download") == []

    def test_old_one_is_another_one(self, mounted: Mounted) -> None:
        assert read_tree(mounted.path / BELOW / "1") == OLD
        assert read_tree(mounted.path / BELOW / "2") == TREE

    def test_latest_is_what_no_number_means(self, mounted: Mounted) -> None:
        model = mounted.path / BELOW
        assert (model / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert (model / DATA).read_bytes() == TREE[DATA]

    def test_that_is_not_there_is_enoent(self, mounted: Mounted) -> None:
        for path in (f"{BELOW}/3", "https:/www.kaggle.com/models/google/nothing/tensorFlow2/small/1"):
            with pytest.raises(FileNotFoundError):
                os.listdir(mounted.path / path)

    def test_listing_of_many_pages_is_whole(self, mounted: Mounted, kaggle: KaggleServer) -> None:
        many = {f"files/{n:03}.bin": bytes([n % 256]) * n for n in range(450)}
        kaggle.publish("google/many/pyTorch/all/1", many)
        path = mounted.path / "https:/www.kaggle.com/models/google/many/pyTorch/all/1"
        assert len(os.listdir(path / "files")) == 450
        assert read_tree(path) == many


class TestFrameworks:
    @pytest.mark.parametrize(
        ("framework", "names"),
        [
            ("pyTorch", ("config.json", "model.safetensors", "tokenizer/vocab.txt")),
            ("keras", ("model.keras", "metadata.json")),
            ("tfLite", ("1.tflite",)),
            ("gguf", ("model-Q4_K_M.gguf",)),
            ("other", ("a b.txt", "ü.bin", "100%.txt", "sub dir/x#y")),
        ],
    )
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_files_of_any_are_shown(
        self,
        offer: Callable[..., Mounted],
        kaggle: KaggleServer,
        framework: str,
        names: tuple[str, ...],
        load_format: str,
    ) -> None:
        files = {name: os.urandom(50_000 + len(name)) for name in names}
        kaggle.publish(f"owner/model/{framework}/base/1", files)
        mounted = offer(load_format=load_format)
        path = mounted.path / f"https:/www.kaggle.com/models/owner/model/{framework}/base/1"
        assert read_tree(path) == files
        if load_format == "auto":
            until_cached(mounted.cache)
            assert read_tree(path) == files

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "saved_model.pb"])
    def test_latest_of_any_is_found_by_its_files(
        self, mounted: Mounted, kaggle: KaggleServer, name: str
    ) -> None:
        kaggle.publish("owner/model/pyTorch/base/1", {name: b"x" * 100})
        path = mounted.path / "https:/www.kaggle.com/models/owner/model/pyTorch/base"
        assert (path / name).read_bytes() == b"x" * 100


class TestReading:
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed", "compressed"])
    def test_gives_the_files(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer, load_format: str
    ) -> None:
        assert read_tree(offer(load_format=load_format).path / BELOW / "2") == TREE
        assert ("archive.tar.gz" in downloads(kaggle)) is (load_format == "compressed")

    def test_range_fetches_a_range(self, offer: Callable[..., Mounted], kaggle: KaggleServer) -> None:
        mounted = offer(read_ahead=False)
        assert read_at(mounted.path / BELOW / "2" / DATA, 2 * MiB + 5, 10) == TREE[DATA][2 * MiB + 5 :][:10]
        assert set(downloads(kaggle)) == {DATA}
        assert {seen.range for seen in kaggle.seen("storage")} <= {
            f"bytes={2 * MiB}-{3 * MiB - 1}", f"bytes={2 * MiB}-{len(TREE[DATA]) - 1}", "bytes=0-0",
        }  # fmt: skip

    def test_expired_address_is_asked_for_anew(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer
    ) -> None:
        path = offer(read_ahead=False).path / BELOW / "2" / DATA
        assert read_at(path, 0, 10) == TREE[DATA][:10]
        kaggle.expire()
        assert read_at(path, 3 * MiB, 10) == TREE[DATA][3 * MiB : 3 * MiB + 10]

    @pytest.mark.parametrize("fault", ["chunked", "short", "no-hash", "less", "no-ranges", "gzip"])
    @pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
    def test_storage_that_misbehaves_gives_right_bytes(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer, fault: str, load_format: str
    ) -> None:
        """Or an error, where the fault never ends."""
        kaggle.object(f"{VARIATION}/2", DATA).faults = {fault}
        path = offer(load_format=load_format, retries=1).path / BELOW / "2"
        try:
            assert (path / DATA).read_bytes() == TREE[DATA]
        except OSError as error:
            assert error.errno == errno.EIO and fault in ("short", "less", "no-ranges", "gzip")
        assert (path / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]

    @pytest.mark.logs("kaggle")
    def test_md5_is_compared(self, offer: Callable[..., Mounted], kaggle: KaggleServer) -> None:
        stored = kaggle.object(f"{VARIATION}/2", "saved_model.pb")
        stored.faults = {"flip"}
        mounted = offer(read_ahead=False)
        path = mounted.path / BELOW / "2"
        with pytest.raises(OSError) as caught:
            (path / "saved_model.pb").read_bytes()
        assert caught.value.errno == errno.EIO
        stored.faults = set()
        until(lambda: _or_none(path / "saved_model.pb") == TREE["saved_model.pb"], "right bytes", 30)
        assert _or_none(path / "saved_model.pb") == TREE["saved_model.pb"]

    def test_change_is_an_error_and_then_right_bytes(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer
    ) -> None:
        path = offer(read_ahead=False).path / BELOW / "2" / DATA
        assert read_at(path, 0, 10) == TREE[DATA][:10]
        kaggle.publish(f"{VARIATION}/2", {**TREE, DATA: TREE[DATA][::-1]})
        with pytest.raises(OSError):
            read_at(path, 3 * MiB, 10)
        assert path.read_bytes() == TREE[DATA][::-1]

    def test_becomes_complete(self, mounted: Mounted, kaggle: KaggleServer) -> None:
        read_at(mounted.path / BELOW / "2" / DATA, 0, 1)
        until_cached(mounted.cache)
        assert read_tree(mounted.cache / cache_key(f"{HANDLE}/2")) == TREE
        kaggle.forget()
        assert read_tree(mounted.path / BELOW / "2") == TREE
        assert kaggle.seen() == []


def _or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


class TestArchives:
    @pytest.mark.parametrize("status", [400, 404])
    def test_are_taken_where_there_is_no_listing(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer, status: int
    ) -> None:
        kaggle.unlist(f"{VARIATION}/2", status)
        assert read_tree(offer(retries=1).path / BELOW / "2") == TREE
        assert downloads(kaggle)[-1] == "archive.tar.gz"

    @pytest.mark.logs("kaggle")
    @pytest.mark.parametrize(("status", "number"), [(403, errno.EACCES), (500, errno.EIO)])
    def test_are_not_taken_where_the_listing_is_refused_or_late(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer, status: int, number: int
    ) -> None:
        """Kaggle may give it later, or to somebody else."""
        kaggle.unlist(f"{VARIATION}/2", status)
        path = offer(retries=1).path / BELOW / "2"
        with pytest.raises(OSError) as caught:
            os.listdir(path)
        assert caught.value.errno == number
        assert downloads(kaggle) == []

    def test_that_are_zip_files_are_taken_too(
        self, offer: Callable[..., Mounted], kaggle: KaggleServer
    ) -> None:
        import io
        import zipfile

        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in TREE.items():
                archive.writestr(name, content)
        kaggle.publish(f"{VARIATION}/3", TREE, ("archive.zip", packed.getvalue()))
        assert read_tree(offer(load_format="compressed").path / BELOW / "3") == TREE


class TestLicences:
    @pytest.fixture
    def gated(self, kaggle: KaggleServer) -> KaggleServer:
        kaggle.gated.add("google/demo")
        return kaggle

    @pytest.mark.logs("kaggle")
    def test_that_are_not_accepted_are_eacces_and_say_what_to_do(
        self, gated: KaggleServer, mounted: Mounted
    ) -> None:
        with pytest.raises(PermissionError):
            os.listdir(mounted.path / BELOW / "2")
        told = why(mounted.path / "https:/www.kaggle.com/models/google/demo")
        assert "consent" in told
        assert "https://www.kaggle.com/models/google/demo" in told
        assert "log" in told.lower() or "KAGGLE" in told
        assert len(gated.seen()) <= 3

    def test_that_were_accepted_are_no_obstacle(
        self, gated: KaggleServer, mount: Mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        login = f"Bearer {TOKEN}"
        gated.accounts.add(login)
        gated.consents.add((login, "google/demo"))
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        mounted = mount("https://tfhub.dev")
        assert read_tree(mounted.path / BELOW / "2") == TREE
        assert {seen.authorization for seen in gated.seen("storage")} == {None}
        assert TOKEN not in mounted.log_text()

    @pytest.mark.logs("kaggle")
    def test_wrong_login_is_eacces(
        self, kaggle: KaggleServer, mount: Mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        mounted = mount("https://tfhub.dev")
        with pytest.raises(PermissionError):
            os.listdir(mounted.path / BELOW / "2")
        assert "Unauthenticated" in why(mounted.path / "https:/www.kaggle.com/models/google")
        assert TOKEN not in mounted.log_text()


class TestCommands:
    def test_pull_takes_every_spelling(self, kaggle: KaggleServer, hubfs: Hubfs, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        hubfs("pull", f"kaggle:/{VARIATION}/2", "--cache-dir", cache)
        assert cached_keys(cache) == [cache_key(f"{HANDLE}/2")]
        assert read_tree(cache / cached_keys(cache)[0]) == TREE
        assert HANDLE in hubfs("ls", "--cache-dir", cache).stdout
        kaggle.forget()
        hubfs("pull", f"https://kaggle.com/models/{VARIATION}/2/", "--cache-dir", cache)
        assert kaggle.seen() == []


class TestAsTheDefaultHub:
    def test_models_are_at_the_top(self, kaggle: KaggleServer, mount: Mount) -> None:
        mounted = mount("https://www.kaggle.com/models")
        assert read_tree(mounted.path / VARIATION / "2") == TREE
        assert read_tree(mounted.path / f"kaggle:/{VARIATION}/2") == TREE
