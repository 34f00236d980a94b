"""The command line and the Python API as people use them: real processes, a real hub, a real mount."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import hubfs as api
from hubfs import mounts
from hubfs.errors import HubfsError, NotFoundError, OfflineError
from hubfs.handles import cache_key
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree, write_tree
from tests.mount.conftest import COMMAND, Hubfs, cached_keys, put_into_cache, read_tree, until, until_cached

TREE = make_tree(size=2_000_000)
DATA = "variables/variables.data-00000-of-00001"


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr, which are few and tell what went wrong."""
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2 and lines[0].startswith("hubfs: "), done.stderr
    assert not lines[1:] or lines[1].startswith("  next: "), done.stderr
    return lines


@contextmanager
def running(*arguments: object, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that is not waited for."""
    words = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def served(directory: Path, port: int = 0) -> Iterator[str]:
    """`hubfs serve`; gives its URL."""
    with running("serve", directory, "--port", port, "--quiet") as server:
        assert server.stdout is not None
        said = ""
        while "To mount it" not in said:
            line = server.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found
        yield found[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of all commands of a test, named as tensorflow_hub's users do."""
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def here(hub: FaultHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FaultHub:
    """The hub of all commands of a test, with one model."""
    monkeypatch.setenv("HUBFS_HUB", hub.url)
    monkeypatch.setenv("HUBFS_RETRY_DELAY", "0.02")
    hub.add("google/demo/1", make_archive(TREE))
    return hub


@pytest.mark.parametrize("load_format", ["auto", "compressed"])
def test_from_serve_to_unmount(hubfs: Hubfs, cache: Path, tmp_path: Path, load_format: str) -> None:
    write_tree(TREE, tmp_path / "models/google/demo/1")
    write_tree(make_tree(2), tmp_path / "models/google/demo/2")
    with served(tmp_path / "models") as url:
        said = hubfs("mount", "--hub", url, "--load-format", load_format, tmp_path / "mnt")
        assert str(tmp_path / "mnt") in said.stdout and "hubfs unmount" in said.stdout
        assert read_tree(tmp_path / "mnt/google/demo/1") == TREE
        assert (tmp_path / "mnt/google/demo/saved_model.pb").read_bytes() == make_tree(2)["saved_model.pb"]
        # Under `auto` it is a data file that brings the rest of a model.
        assert (tmp_path / "mnt/google/demo" / DATA).read_bytes() == make_tree(2)[DATA]
        told = hubfs("status", tmp_path / "mnt").stdout
        assert url in told and str(cache) in told
        until(lambda: len(cached_keys(cache)) == 2, "both to be published")
        listed = hubfs("ls", "--hub", url, "google/demo/1").stdout.splitlines()
        assert [line.split()[:2] for line in listed[1:]] == [[f"{url}/google/demo/1", "1"]]
        assert hubfs("resolve", "--hub", url, "google/demo/1").stdout.strip() == str(
            cache / cache_key(f"{url}/google/demo/1")
        )
        assert hubfs("unmount", tmp_path / "mnt").stderr == ""
    assert tmp_path / "mnt" not in mounts.find()


class TestMount:
    def test_status_as_json_tells_settings_cache_and_transfers(
        self, here: FaultHub, cache: Path, hubfs: Hubfs, tmp_path: Path
    ) -> None:
        gate = threading.Event()
        here.add("google/slow/1", make_archive(TREE))
        here.fault("google/slow/1", Fault.stall(1_000_000, gate))
        hubfs("mount", tmp_path / "mnt")
        read_tree(tmp_path / "mnt/google/demo/1")
        until_cached(cache)
        with subprocess.Popen(
            ["cat", tmp_path / "mnt/google/slow/1" / DATA], stdout=subprocess.DEVNULL
        ) as reader:

            def there() -> list[tuple[int, int]]:
                [status] = json.loads(hubfs("status", tmp_path / "mnt", "--json").stdout)
                found = [one for one in status["transfers"] if one["handle"] == f"{here.url}/google/slow/1"]
                return [(one["received"], one["total"]) for one in found if one["waiting"]]

            until(lambda: there() == [(1_000_000, len(make_archive(TREE)))], "its progress and its reader")
            assert "google/slow/1" in hubfs("status").stdout
            gate.set()
            assert reader.wait(20) == 0
        [status] = json.loads(hubfs("status", tmp_path / "mnt", "--json").stdout)
        assert status["hub"] == here.url and status["cache"]["dir"] == str(cache)
        assert status["mountpoint"] == str(tmp_path / "mnt") and status["offline"] is False

    @pytest.mark.logs("refuses access")
    def test_failure_is_told_by_status_attribute_and_log(
        self, here: FaultHub, hubfs: Hubfs, tmp_path: Path
    ) -> None:
        here.fault(
            "google/locked/1", Fault.status(403, b"<p>accept the licence first</p>", on="any", times=None)
        )
        hubfs("mount", tmp_path / "mnt", "--log-file", tmp_path / "mount.txt")
        with pytest.raises(PermissionError):
            (tmp_path / "mnt/google/locked/1/saved_model.pb").read_bytes()
        assert "accept the licence first" in hubfs("status").stdout
        assert b"accept the licence first" in os.getxattr(tmp_path / "mnt/google/locked", "user.hubfs.error")
        assert "accept the licence first" in (tmp_path / "mount.txt").read_text()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_foreground_serves_until_a_signal(
        self, here: FaultHub, tmp_path: Path, number: signal.Signals
    ) -> None:
        with running("mount", "--foreground", tmp_path / "mnt") as process:
            until(lambda: tmp_path / "mnt" in mounts.find(), "the mount")
            assert read_tree(tmp_path / "mnt/google/demo/1") == TREE
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Traceback" not in said and "unmounted" in said
        assert tmp_path / "mnt" not in mounts.find()

    @pytest.mark.logs("no connection to 127")
    def test_hub_that_is_down_can_be_mounted_and_is_used_when_it_is_up(
        self, hubfs: Hubfs, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_tree(TREE, tmp_path / "models/google/demo/1")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        monkeypatch.setenv("HUBFS_RETRIES", "1")
        monkeypatch.setenv("HUBFS_RETRY_DELAY", "0.02")
        hubfs("mount", "--hub", f"http://127.0.0.1:{port}", tmp_path / "mnt")
        file = tmp_path / "mnt/google/demo/1/saved_model.pb"
        with pytest.raises(OSError) as caught:
            file.read_bytes()
        assert caught.value.errno == errno.EIO
        with served(tmp_path / "models", port):
            # The failure is remembered for ten seconds.
            until(lambda: readable(file), "the hub to be asked again", 30)
            assert read_tree(file.parent) == TREE

    def test_offline_serves_what_is_cached_and_asks_for_nothing(
        self, here: FaultHub, hubfs: Hubfs, cache: Path, tmp_path: Path
    ) -> None:
        hubfs("pull", "google/demo/1")
        here.clear_log()
        hubfs("mount", "--offline", tmp_path / "mnt")
        assert read_tree(tmp_path / "mnt/google/demo/1") == TREE
        with pytest.raises(OSError) as caught:
            (tmp_path / "mnt/google/demo/2/saved_model.pb").read_bytes()
        assert caught.value.errno == errno.ENONET
        assert os.listdir(tmp_path / "mnt/google/demo") == ["1"]
        assert here.requests() == []

    def test_temporary_cache_is_explained_once(
        self, here: FaultHub, hubfs: Hubfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for expected in (True, False):
            said = hubfs("mount", tmp_path / "mnt").stdout
            assert ("TFHUB_CACHE_DIR" in said) == expected
            hubfs("unmount", tmp_path / "mnt")


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


class TestPullAndResolve:
    def test_resolve_fetches_once_and_prints_the_directory(
        self, here: FaultHub, hubfs: Hubfs, cache: Path
    ) -> None:
        for handle in (f"{here.url}/google/demo/1", "google/demo/1", f"https://{here.host}/google/demo/1/"):
            assert hubfs("resolve", handle).stdout == f"{cache / cache_key(f'{here.url}/google/demo/1')}\n"
        found = json.loads(hubfs("resolve", "google/demo/1", "--json").stdout)
        assert read_tree(Path(found["path"])) == TREE
        assert len(here.body_requests()) == 1

    def test_several_at_once_with_one_that_fails(self, here: FaultHub, hubfs: Hubfs, cache: Path) -> None:
        for number in (2, 3):
            here.add(f"google/demo/{number}", make_archive(make_tree(number)))
        names = [f"google/demo/{number}" for number in (1, 2, 9, 3)]
        done = hubfs("pull", *names, "--json", code=1)
        found = json.loads(done.stdout)
        assert [one["handle"] for one in found] == names
        assert [one["error"] and one["error"]["kind"] for one in found] == [None, None, "NotFound", None]
        assert read_tree(Path(found[3]["path"])) == make_tree(3)
        assert f"hubfs: {here.url}/google/demo/9: the hub has no such model" in done.stderr
        assert len(cached_keys(cache)) == 3
        again = hubfs("pull", *names[:2])
        assert again.stdout.count("was cached already") == 2

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_leaves_nothing_half_done(
        self, here: FaultHub, hubfs: Hubfs, cache: Path, number: signal.Signals
    ) -> None:
        gate = threading.Event()
        for name in ("google/slow/1", "google/slow/2"):
            here.add(name, make_archive(TREE))
            here.fault(name, Fault.stall(1_000_000, gate))
        with running("pull", "google/demo/1", "google/slow/1", "google/slow/2") as process:
            here.wait_for(lambda hub: sum(r.bytes_sent == 1_000_000 for r in hub.body_requests()) == 2)
            until(lambda: len(cached_keys(cache)) == 1, "the first to be done")
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert "Traceback" not in said and "hubfs: stopped" in said
        assert [name for name in os.listdir(cache) if ".tmp" in name or name.endswith(".lock")] == []
        listed = json.loads(hubfs("ls", "--json").stdout)
        assert [(one["handle"], one["state"]) for one in listed] == [
            (f"{here.url}/google/demo/1", "complete")
        ]

    def test_handle_of_another_host_needs_no_leave_when_it_is_typed(
        self, here: FaultHub, hubfs: Hubfs, cache: Path
    ) -> None:
        with FaultHub() as other:
            other.add("files/model.tar.gz", make_archive(TREE))
            path = hubfs("resolve", f"{other.url}/files/model.tar.gz").stdout.strip()
        assert path == str(cache / cache_key(f"{other.url}/files/model.tar.gz"))
        assert read_tree(Path(path)) == TREE

    def test_list_of_nothing(self, here: FaultHub, hubfs: Hubfs) -> None:
        assert hubfs("ls").stdout == ""
        assert json.loads(hubfs("ls", "--json").stdout) == []
        assert here.requests() == []

    def test_list_tells_versions_sizes_and_states(self, here: FaultHub, hubfs: Hubfs, cache: Path) -> None:
        hubfs("pull", "google/demo/1")
        put_into_cache(cache, f"{here.url}/other/model/7", make_tree(7))
        (cache / cache_key("lost")).mkdir()
        found = {one["handle"]: one for one in json.loads(hubfs("ls", "--json").stdout)}
        ours, theirs = found[f"{here.url}/google/demo/1"], found[f"{here.url}/other/model/7"]
        assert (ours["version"], ours["state"]) == ("1", "complete")
        assert (ours["size"], ours["files"]) == (sum(map(len, TREE.values())), len(TREE))
        assert (theirs["version"], theirs["state"]) == ("7", "complete")
        assert found[None]["state"] == "empty"
        assert len(hubfs("ls", "other/").stdout.splitlines()) == 2


class TestFailures:
    @pytest.mark.parametrize(
        "words",
        [
            [], ["mount"], ["nonsense"], ["mount", "--nonsense", "x"], ["pull"], ["mount", "a", "b"],
            ["mount", "--hub", "ftp://x", "mnt"], ["mount", "--read-timeout", "soon", "mnt"],
            ["mount", "--load-format", "zip", "mnt"], ["mount", "--log-level", "loud", "mnt"],
            ["mount", "--load-format", "uncompressed", "--verified-only", "mnt"],
            ["mount", "--memory-limit", "1MB", "mnt"], ["mount", "--shared-cache", "/srv", "mnt"],
            ["mount", "--allow-host", "http://x/", "mnt"], ["serve", "--port", "x", "."],
            ["serve", "nowhere"],
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_wrong_use_is_2(self, hubfs: Hubfs, cache: Path, tmp_path: Path, words: list[str]) -> None:
        done = hubfs(*words, code=2)
        if words:
            errors(done)
        assert not (tmp_path / "mnt").exists()

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["pull", "google/none/1"], "no such model"),
            (["resolve", "google/none/1"], "no such model"),
            (["resolve", "google"], "not a model's handle"),
            (["resolve", "--offline", "google/demo/1"], "offline"),
            (["unmount", "nowhere"], "not a mount of hubfs"),
            (["status", "nowhere"], "not mounted there"),
            (["resolve", "google/demo/1", "--cache-dir", "/dev/null"], "/dev/null"),
        ],
    )
    def test_failure_is_1_and_says_why_in_a_line_or_two(
        self, here: FaultHub, hubfs: Hubfs, words: list[str], told: str
    ) -> None:
        done = hubfs(*words, code=1)
        lines = [line for line in done.stderr.splitlines() if line.startswith(("hubfs: ", "  next: "))]
        assert told in lines[0]
        assert len(lines) <= 2 and done.stdout == ""

    def test_traceback_is_shown_with_debug_only(self, here: FaultHub) -> None:
        done = subprocess.run(
            [*COMMAND, "--debug", "resolve", "google/none/1"], capture_output=True, text=True
        )
        assert done.returncode == 1 and "Traceback" in done.stderr

    def test_help_and_version(self, hubfs: Hubfs) -> None:
        assert re.fullmatch(r"hubfs \d+\.\d+\S*\n", hubfs("--version").stdout)
        for name in ("mount", "unmount", "status", "ls", "pull", "resolve", "serve", "doctor"):
            assert name in hubfs("--help").stdout
            assert f"hubfs {name}" in hubfs(name, "--help").stdout


class TestSettings:
    def test_flag_beats_environment_beats_file_beats_default(
        self, hub: FaultHub, hubfs: Hubfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = Path(os.environ["XDG_CONFIG_HOME"]) / "hubfs/config.toml"
        config.parent.mkdir()
        cache = {name: str(tmp_path / name) for name in ("file", "env", "flag")}

        def mounted(*flags: str, **environ: str) -> dict[str, Any]:
            hubfs("mount", *flags, tmp_path / "mnt", **environ)
            [found] = json.loads(hubfs("status", "--json", tmp_path / "mnt").stdout)
            hubfs("unmount", tmp_path / "mnt")
            return {"hub": found["hub"], "cache": found["cache"]["dir"], "offline": found["offline"]}

        temporary = {"TMPDIR": str(tmp_path)}
        assert mounted(**temporary) == {
            "hub": "https://tfhub.dev", "cache": f"{tmp_path}/tfhub_modules", "offline": False,
        }  # fmt: skip
        config.write_text(f'hub = "{hub.url}"\ncache_dir = "{cache["file"]}"\noffline = true\n')
        assert mounted(**temporary) == {"hub": hub.url, "cache": cache["file"], "offline": True}
        environ = {"TFHUB_CACHE_DIR": cache["env"], "HUBFS_HUB": "http://127.0.0.1:1", "HUBFS_OFFLINE": ""}
        assert mounted(**environ) == {"hub": "http://127.0.0.1:1", "cache": cache["env"], "offline": True}
        flags = ["--cache-dir", cache["flag"], "--hub", "http://127.0.0.1:2", "--no-offline"]
        assert mounted(*flags, **environ) == {
            "hub": "http://127.0.0.1:2", "cache": cache["flag"], "offline": False,
        }  # fmt: skip
        assert hub.requests() == []

    @pytest.mark.parametrize("text", ["cache = 1", "hub = ", 'retries = "many"'])
    def test_config_file_that_cannot_be_used_is_named(self, hubfs: Hubfs, text: str) -> None:
        config = Path(os.environ["XDG_CONFIG_HOME"]) / "hubfs/config.toml"
        config.parent.mkdir()
        config.write_text(text)
        assert str(config) in errors(hubfs("ls", code=2))[0]

    def test_allowed_hosts_from_the_environment(self, here: FaultHub, hubfs: Hubfs, tmp_path: Path) -> None:
        with FaultHub() as other:
            other.add("google/demo/1", make_archive(TREE))
            hubfs("mount", tmp_path / "mnt", HUBFS_ALLOW_HOSTS=f"{other.host} example.org")
            assert read_tree(tmp_path / f"mnt/http:/{other.host}/google/demo/1") == TREE


class TestDoctor:
    def test_machine_that_can_mount_is_well(self, here: FaultHub, hubfs: Hubfs) -> None:
        found = json.loads(hubfs("doctor", "--json").stdout)
        states = {check["name"]: check["state"] for check in found}
        assert "problem" not in states.values()
        assert states["/dev/fuse"] == states["libfuse"] == states["hub"] == "ok"
        assert "/dev/fuse" in hubfs("doctor").stdout

    def test_hub_that_does_not_answer_and_cache_that_is_none_are_problems(self, hubfs: Hubfs) -> None:
        done = hubfs("doctor", "--hub", "http://127.0.0.1:1", "--cache-dir", "/dev/null", "--json", code=1)
        found = {check["name"]: check for check in json.loads(done.stdout)}
        for name in ("hub", "cache"):
            assert found[name]["state"] == "problem" and found[name]["advice"]


def test_serve_speaks_the_protocol_to_others(tmp_path: Path) -> None:
    write_tree(TREE, tmp_path / "google/demo/1")
    with served(tmp_path) as url:
        request = urllib.request.Request(
            f"{url}/google/demo/1?tf-hub-format=compressed", headers={"Range": "bytes=0-1"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 206 and answer.read() == b"\x1f\x8b"
            assert answer.headers["ETag"] and "md5=" in answer.headers["x-goog-hash"]


class TestPythonApi:
    def test_resolve_and_pull(self, here: FaultHub, cache: Path) -> None:
        path = api.resolve("google/demo/1")
        assert read_tree(Path(path)) == TREE
        with pytest.raises(NotFoundError):
            api.resolve("google/none/1")
        with pytest.raises(OfflineError):
            api.resolve("google/demo/2", offline=True)
        seen: list[Any] = []
        found = api.pull(["google/demo/1", "google/none/1"], on_progress=seen.append)
        assert [(one.path, one.cached) for one in found] == [(path, True), (None, False)]
        assert isinstance(found[1].error, HubfsError) and found[0].error is None
        assert {(one.handle, one.state) for one in seen} >= {
            ("google/demo/1", "cached"),
            ("google/none/1", "failed"),
        }
        assert len(here.body_requests()) == 1

    def test_pull_can_be_cancelled(self, here: FaultHub, cache: Path) -> None:
        cancel, gate = threading.Event(), threading.Event()
        here.fault("google/demo/1", Fault.stall(1_000_000, gate))

        def stop_at_half(status: Any) -> None:
            if status.received == 1_000_000:
                cancel.set()

        [found] = api.pull(["google/demo/1"], on_progress=stop_at_half, cancel=cancel)
        assert found.error is not None and "stopped" in str(found.error)
        assert cached_keys(cache) == []
