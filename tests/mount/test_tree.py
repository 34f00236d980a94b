"""Which paths there are, what they are called and numbered, and which of them are ever asked for."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import FaultHub
from tests.models import make_archive, make_tree
from tests.mount.conftest import put_into_cache, read_tree, until_cached

TREE = make_tree()
LITTER = (
    ".git", ".git/config", ".hg", ".svn", ".Trash", ".Trash-1000", ".DS_Store", "._x", ".hidden",
    ".directory", ".x.swp", "notes.swp", "notes~", "#notes#", "package.json", "pyproject.toml", "setup.py",
    "__init__.py", "Makefile", "node_modules", "__pycache__", "libm.so", "Thumbs.db", "desktop.ini", "CVS",
)  # fmt: skip


def exists(path: Path | str) -> bool:
    """Unlike os.path.exists, only "no such file" means no."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


# ---- spellings of one handle


class TestSpellings:
    @pytest.mark.parametrize("scheme", ["http:/", "https:/", "http://", "https://"])
    def test_a_whole_handle_of_the_default_hub_is_the_same_file_and_cached_once(
        self, hub: FaultHub, mount, scheme: str
    ) -> None:
        hub.add("google/demo/1", make_archive(TREE))
        mounted = mount(hub)
        spelled = f"{mounted.path}/{scheme}{hub.host}"
        assert read_tree(Path(f"{spelled}/google/demo/1")) == TREE
        assert os.path.islink(spelled)
        assert os.path.realpath(f"{spelled}/google/demo/1") == str(mounted.path / "google/demo/1")
        assert os.path.samefile(f"{spelled}/google/demo/1", mounted.path / "google/demo/1")
        assert read_tree(mounted.path / "google/demo/1") == TREE
        assert len(hub.body_requests()) == 1
        until_cached(mounted.cache)

    def test_upper_case_host_is_the_same_hub(self, hub: FaultHub, mount) -> None:
        hub.add("google/demo/1", make_archive(TREE))
        port = hub.host.partition(":")[2]
        mounted = mount(f"http://LocalHost:{port}")
        for host in ("localhost", "LOCALHOST", "LocalHost"):
            path = mounted.path / f"http:/{host}:{port}/google/demo/1"
            assert read_tree(path) == TREE
            assert path.samefile(mounted.path / "google/demo/1")
        assert len(hub.body_requests()) == 1
        until_cached(mounted.cache)

    def test_schemes_and_default_ports_of_the_public_hub_are_the_same_without_a_request(
        self, mount, tmp_path: Path
    ) -> None:
        put_into_cache(tmp_path / "cache", "https://tfhub.dev/google/demo/1", TREE)
        mounted = mount("https://tfhub.dev", offline=True)
        whole = (
            "https://tfhub.dev",
            "http://tfhub.dev",
            "https://tfhub.dev:443",
            "http://tfhub.dev:80",
            "https://TFHub.DEV",
        )
        for spelling in whole:
            path = f"{mounted.path}/{spelling}/google/demo/1"
            assert os.path.samefile(path, mounted.path / "google/demo/1"), spelling
            assert read_tree(Path(path)) == TREE
        assert not exists(f"{mounted.path}/https://tfhub.dev:8080/google/demo/1"), (
            "another port is another host"
        )

    def test_hub_below_a_path_shows_its_models_at_the_top(self, hub: FaultHub, mount) -> None:
        hub.add("mirror/hub/google/demo/1", make_archive(TREE))
        hub.add("elsewhere/demo/1", make_archive({**TREE, "other": b"x"}))
        mounted = mount(f"{hub.url}/mirror/hub")
        assert read_tree(mounted.path / "google/demo/1") == TREE
        assert (mounted.path / f"http:/{hub.host}/mirror/hub/google/demo/1").samefile(
            mounted.path / "google/demo/1"
        )
        assert read_tree(mounted.path / f"http:/{hub.host}/elsewhere/demo/1") == {**TREE, "other": b"x"}
        assert len(hub.body_requests("mirror/hub/google/demo/1")) == 1

    def test_versions_with_leading_zeros_or_without_a_publisher_are_not_mixed_up(
        self, hub: FaultHub, mount
    ) -> None:
        hub.add("google/demo/1", make_archive(TREE))
        hub.add("google/demo/01", make_archive({**TREE, "zero": b""}))
        mounted = mount(hub)
        assert "zero" in read_tree(mounted.path / "google/demo/01")
        assert "zero" not in read_tree(mounted.path / "google/demo/1")
        hub.clear_log()
        assert (mounted.path / "1").is_dir(), "a number at the top is a publisher"
        assert hub.requests() == []


class TestOtherHosts:
    @pytest.fixture
    def other(self) -> Iterator[FaultHub]:
        with FaultHub() as server:
            yield server

    def test_allowed_host_with_port_is_served_beside_the_default_hub(
        self, hub: FaultHub, other: FaultHub, mount
    ) -> None:
        theirs = make_tree(seed=7)
        hub.add("google/demo/1", make_archive(TREE))
        other.add("google/demo/1", make_archive(theirs))
        mounted = mount(hub, allow_hosts=[other.host])
        assert read_tree(Path(f"{mounted.path}/http://{other.host}/google/demo/1")) == theirs
        assert hub.requests() == []
        assert read_tree(mounted.path / "google/demo/1") == TREE
        assert len(other.body_requests()) == len(hub.body_requests()) == 1
        assert os.listdir(mounted.path) == ["google", "http:"]
        assert os.listdir(mounted.path / "http:") == [other.host]
        assert os.listdir(mounted.path / "http:" / other.host) == ["google"]

    def test_upper_case_spelling_of_an_allowed_host_is_a_link_to_the_lower_case_one(
        self, hub: FaultHub, other: FaultHub, mount
    ) -> None:
        other.add("google/demo/1", make_archive(TREE))
        port = other.host.partition(":")[2]
        mounted = mount(hub, allow_hosts=[f"localhost:{port}"])
        lower, upper = (mounted.path / "http:" / f"{name}:{port}" for name in ("localhost", "LocalHost"))
        assert read_tree(upper / "google/demo/1") == TREE
        assert (upper / "google/demo/1").samefile(lower / "google/demo/1")
        assert len(other.body_requests()) == 1

    @pytest.mark.parametrize(
        "name", ["model.tar.gz", "files/model.tar.gz", "a/b/c.d/model.tgz", "files/model.tar"]
    )
    @pytest.mark.parametrize("where", ["default", "other"])
    def test_handle_that_is_an_archive_is_a_directory(
        self, hub: FaultHub, other: FaultHub, mount, name: str, where: str
    ) -> None:
        server = hub if where == "default" else other
        server.add(name, make_archive(TREE, gzip=not name.endswith(".tar"), prefix=""))
        mounted = mount(hub, allow_hosts=[other.host])
        assert read_tree(Path(f"{mounted.path}/http://{server.host}/{name}")) == TREE
        if where == "default":
            assert read_tree(mounted.path / name) == TREE
        assert len(server.body_requests(name)) == 1
        until_cached(mounted.cache)

    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize(
        "tail", ["", "/google/demo", "/google/demo/1", "/google/demo/1/saved_model.pb", "/m.tar.gz"]
    )
    def test_host_that_is_not_allowed_is_not_there_and_gets_no_packet(
        self, hub: FaultHub, mount, scheme: str, tail: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            host = f"127.0.0.1:{listener.getsockname()[1]}"
            mounted = mount(hub, allow_hosts=["127.0.0.1", "127.0.0.1:1"])
            for spelling in (
                host,
                host.replace("127.0.0.1", "localhost"),
                f"user@{hub.host}",
                f"{hub.host}0",
            ):
                with pytest.raises(FileNotFoundError):
                    os.stat(f"{mounted.path}/{scheme}://{spelling}{tail}")
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert hub.requests() == []

    def test_what_is_no_handle_is_not_there(self, hub: FaultHub, mount) -> None:
        mounted = mount(hub)
        for name in (
            "ftp:/host/x/1",
            "file:/etc/passwd",
            "s3:/bucket/x",
            "http:/%00/x",
            "a/b?x/1",
            "a/b#c/1",
            "a/b%2f/1",
        ):
            assert not exists(f"{mounted.path}/{name}"), name
        assert hub.requests() == []


# ---- what is asked for, and what is not


class TestAsksOnlyForModels:
    @pytest.fixture
    def used(self, hub: FaultHub, mount):
        """A mount with one cached version of a model that has more at the hub; the log is empty."""
        hub.add("google/demo/1", make_archive(TREE))
        hub.add("google/demo/2", make_archive(TREE))
        hub.add("google/demo", make_archive(TREE))
        mounted = mount(hub)
        assert read_tree(mounted.path / "google/demo/1") == TREE
        hub.clear_log()
        return mounted

    def test_listings_show_what_is_cached(self, hub: FaultHub, used) -> None:
        assert os.listdir(used.path) == ["google"]
        assert os.listdir(used.path / "google") == ["demo"]
        assert os.listdir(used.path / "google/demo") == ["1"]
        assert os.listdir(used.path / "google/nothing-yet") == []
        assert hub.requests() == []

    @pytest.mark.parametrize(
        "command",
        [
            "find .", "find . -name '*.pb' -size +1k", "ls -laR .", "du -s .", "tar cf - . | wc -c",
            "grep -r word .", "for f in * */* */*/*; do test -e $f; done; true",
            "bash -c 'compgen -f go; compgen -d google/; compgen -f google/demo/; compgen -f nothing; true'",
            "git status; git -C google/demo/1 log; true",
        ],
    )  # fmt: skip
    def test_tools_that_look_around_send_nothing(self, hub: FaultHub, used, command: str) -> None:
        done = subprocess.run(command, shell=True, cwd=used.path, capture_output=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert hub.requests() == []

    def test_find_shows_exactly_what_is_cached(self, hub: FaultHub, used) -> None:
        found = subprocess.check_output(["find", ".", "-type", "f"], cwd=used.path, text=True).split()
        assert sorted(found) == sorted(f"./google/demo/1/{name}" for name in TREE)
        assert hub.requests() == []

    @pytest.mark.parametrize(
        "level",
        ["", "google", "google/demo", "google/new/x", "google/demo/1", "google/demo/1/assets", "http:"],
    )
    def test_litter_is_never_asked_for(self, hub: FaultHub, used, level: str) -> None:
        for name in LITTER:
            assert not exists(used.path / level / name), name
        assert hub.requests() == []

    def test_litter_at_another_host_is_never_asked_for(self, hub: FaultHub, mount) -> None:
        with FaultHub() as other:
            mounted = mount(hub, allow_hosts=[other.host])
            for level in ("", "google", "google/demo"):
                for name in LITTER:
                    assert not exists(mounted.path / "http:" / other.host / level / name), name
            assert other.requests() == hub.requests() == []

    def test_directories_above_versions_are_there_without_a_request(self, hub: FaultHub, mount) -> None:
        mounted = mount(hub)
        for path in (
            "google",
            "google/any",
            "google/any/deeper/model",
            f"http:/{hub.host}/google/any",
            "http:",
            "https:",
        ):
            assert (mounted.path / path).is_dir(), path
        assert hub.requests() == []

    def test_missing_names_in_a_cached_model_send_nothing(self, hub: FaultHub, used) -> None:
        for name in (
            "debug/saved_model_debug_info.pb",
            "nothing",
            "2",
            "assets/2",
            "assets/x.tar.gz",
            "variables/3/4",
        ):
            assert not exists(used.path / "google/demo/1" / name), name
        with pytest.raises(NotADirectoryError):
            os.stat(used.path / "google/demo/1/saved_model.pb/x")
        assert hub.requests() == []

    def test_looking_at_a_version_asks_once_and_downloads_nothing(self, hub: FaultHub, used) -> None:
        for _ in range(3):
            assert (used.path / "google/demo/2").is_dir()
        assert [request.kind for request in hub.requests()] == ["listing", "probe"]

    def test_missing_version_is_asked_for_once_in_a_while(self, hub: FaultHub, mount) -> None:
        mounted = mount(hub)
        # Longer than the kernel itself remembers that there is no such name.
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not exists(mounted.path / "google/none/1")
            assert not exists(mounted.path / "google/none/1/saved_model.pb")
        assert [request.kind for request in hub.requests()] == ["listing", "probe"]
        assert not exists(mounted.path / "google/none/2"), "another version is another question"
        assert [request.kind for request in hub.requests("google/none/2")] == ["listing", "probe"]
        assert len(hub.requests()) == 4


class TestUnversioned:
    def test_model_file_resolves_the_unversioned_handle(self, hub: FaultHub, mount) -> None:
        hub.add("google/demo", make_archive(TREE))
        mounted = mount(hub)
        path = mounted.path / "google/demo"
        assert os.listdir(path) == []
        assert hub.requests() == []
        assert (path / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert read_tree(path) == TREE
        assert len(hub.body_requests("google/demo")) == len(hub.body_requests()) == 1

    def test_versions_beside_an_unversioned_model_are_their_own(self, hub: FaultHub, mount) -> None:
        hub.add("google/demo", make_archive(TREE))
        hub.add("google/demo/1", make_archive(make_tree(seed=1)))
        mounted = mount(hub)
        path = mounted.path / "google/demo"
        assert (path / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        assert read_tree(path / "1") == make_tree(seed=1)
        assert sorted(os.listdir(path)) == sorted({"1", *(name.split("/")[0] for name in TREE)})

    def test_unversioned_model_is_served_after_a_remount_without_a_request(
        self, hub: FaultHub, mount
    ) -> None:
        hub.add("google/demo", make_archive(TREE))
        first = mount(hub)
        assert (first.path / "google/demo/saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        until_cached(first.cache)
        first.unmount()
        hub.clear_log()
        assert read_tree(mount(hub).path / "google/demo") == TREE
        assert hub.requests() == []

    def test_files_looked_for_before_the_model_was_are_there_afterwards(self, hub: FaultHub, mount) -> None:
        hub.add("google/demo", make_archive(TREE))
        path = mount(hub).path / "google/demo"
        for name in TREE:
            exists(path / name)
        assert (path / "saved_model.pb").read_bytes() == TREE["saved_model.pb"]
        for name, content in TREE.items():
            assert (path / name).read_bytes() == content, name

    def test_missing_unversioned_model_is_not_there(self, hub: FaultHub, mount) -> None:
        mounted = mount(hub)
        with pytest.raises(FileNotFoundError):
            (mounted.path / "google/none/saved_model.pb").read_bytes()
        assert (mounted.path / "google/none").is_dir()
        assert [request.kind for request in hub.requests()] == ["listing", "probe"]
