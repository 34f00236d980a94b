"""The command line: help, exit codes, error lines and output. api and daemon are stood in for."""

import dataclasses
import errno
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path

import pytest
import typer

import hubfs
from hubfs import mounts
from hubfs.cli import app as cli
from hubfs.cli import doctor, options, output
from hubfs.cli import mount as mount_commands
from hubfs.config import LoadFormat, Settings, env_name
from hubfs.errors import ConfigError, HubfsError, MountError, NotFoundError, StoppedError

COMMANDS = ["mount", "unmount", "status", "ls", "pull", "resolve", "serve", "doctor"]
HANDLE = "https://tfhub.dev/google/demo/1"


@dataclasses.dataclass(frozen=True)
class Model:
    handle: str | None
    key: str
    path: str
    state: str
    version: str | None
    size: int
    files: int
    last_used: float | None


@dataclasses.dataclass(frozen=True)
class Pulled:
    handle: str
    path: str | None
    size: int
    cached: bool
    error: HubfsError | None


@dataclasses.dataclass(frozen=True)
class TransferStatus:
    handle: str
    state: str
    received: int
    total: int | None
    written: int
    rate: float


@pytest.fixture(autouse=True)
def clean_home(tmp_path, monkeypatch):
    """No setting of this machine's user reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TFHUB_", "HUBFS_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module of functions where `hubfs.<name>` is imported from."""

    def put(name, **functions):
        module = types.SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"hubfs.{name}", module)
        monkeypatch.setattr(hubfs, name, module, raising=False)

    return put


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives its exit code, stdout and stderr."""

    def command(*arguments):
        code = cli.main(list(arguments))
        return (code, *capsys.readouterr())

    return command


class Terminal:
    """A stream that says that it is a terminal and keeps what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


class TestHelp:
    def test_lists_every_command_with_a_whole_line_and_an_example_session(self, run):
        code, out, err = run("--help")
        assert (code, err) == (0, "")
        for name in COMMANDS:
            line = next(line for line in out.splitlines() if line.split()[:1] == [name])
            assert line.endswith("."), "cut off"
            assert not line.endswith("...")
        assert "$ hubfs mount /mnt/tfhub\n" in out
        assert all(len(line) <= 80 for line in out.splitlines())

    def test_without_a_command_is_help_and_wrong_use(self, run):
        code, out, _ = run()
        assert code == 2
        assert "An example session" in out

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_each_command(self, run, name):
        code, out, err = run(name, "-h")
        assert (code, err) == (0, "")
        assert f"Usage: hubfs {name}" in out

    def test_version(self, run):
        from hubfs.version import __version__

        assert run("--version") == (0, f"hubfs {__version__}\n", "")
        assert run("--debug", "--version") == (0, f"hubfs {__version__}\n", "")

    def test_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "hubfs", "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "Usage: hubfs" in done.stdout

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["mount", "/x", "--offline", "--retries", "none"]])
    def test_what_is_slow_is_not_imported(self, arguments):
        code = (
            "import sys; from hubfs.cli.app import main; sys.stdout = sys.stderr = None\n"
            f"try: main({arguments})\n"
            "finally: sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__\n"
            "slow = {'requests', 'rich.progress', 'mfusepy', 'hubfs.serve', 'pydantic', 'tensorflow'}\n"
            "sys.exit(' '.join(slow & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message", "hint"),
        [
            (["mont"], "no such command 'mont'", "hubfs --help"),
            (["mount"], "missing argument 'MOUNTPOINT'", "hubfs mount --help"),
            (["mount", "a", "b"], "got unexpected extra argument", "hubfs mount --help"),
            (["unmount", "--nope", "a"], "no such option: --nope", "hubfs unmount --help"),
            (["pull"], "missing argument 'HANDLE'", "hubfs pull --help"),
            (["ls", "--hub", "tfhub"], "hub: 'tfhub' is not a URL", ""),
            (
                ["mount", "a", "--read-timeout", "soon"],
                "read_timeout: 'soon' (command line) cannot be used",
                "",
            ),
            (["serve", "/nonexistent"], "/nonexistent is not a directory", "give a directory"),
            (["serve", "/", "--port", "99999"], "--port: '99999' is not a port", "give a number"),
        ],
    )
    def test_wrong_use_is_exit_code_2_and_plain_lines(self, run, arguments, message, hint):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        lines = err.splitlines()
        assert lines[0].startswith(f"hubfs: {message}")
        assert len(lines) == (2 if hint else 1)
        assert not hint or lines[1].startswith(f"  next: {hint}")

    def test_uncompressed_is_not_for_those_who_want_all_verified(self, run, stand_in):
        stand_in("daemon", start=lambda settings, path: pytest.fail("it was mounted"))
        code, _, err = run("mount", "/x", "--verified-only", "--load-format", "UNCOMPRESSED")
        assert (code, err.splitlines()[1]) == (2, "  next: use --load-format auto or compressed with it")
        assert "hubfs: verified_only: " in err

    @pytest.mark.parametrize("command", ["pull", "resolve"])
    def test_uncompressed_is_taken_by_those_who_bring_in(self, run, monkeypatch, stand_in, command):
        given = []

        def pull(handles, settings, **how):
            given.append(settings.load_format)
            return [Pulled(handles[0], "/c/k", 1, True, None)]

        stand_in("api", pull=pull, resolve=lambda handle, settings: pull([handle], settings)[0].path)
        monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "UNCOMPRESSED")
        assert run(command, "a/b/1")[0] == 0
        assert given == [LoadFormat.UNCOMPRESSED]

    def test_uncompressed_does_not_matter_to_ls(self, run, monkeypatch, stand_in):
        stand_in("api", models=lambda settings, prefix: [])
        monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "UNCOMPRESSED")
        assert run("ls")[0] == 0

    def _fail_with(self, stand_in, error):
        def resolve(handle, settings):
            raise error

        stand_in("api", resolve=resolve)

    def test_a_failure_is_one_line_and_the_next_step(self, run, stand_in):
        self._fail_with(
            stand_in, NotFoundError("a/b/1: the hub has no such model", hint="check the spelling")
        )
        assert run("resolve", "a/b/1") == (
            1,
            "",
            "hubfs: a/b/1: the hub has no such model\n  next: check the spelling\n",
        )

    def test_a_setting_found_to_be_wrong_later_is_wrong_use(self, run, stand_in):
        self._fail_with(stand_in, ConfigError("cache_dir: belongs to\nanother user"))
        assert run("resolve", "a") == (2, "", "hubfs: cache_dir: belongs to another user\n")

    @pytest.mark.parametrize("arguments", [("--debug", "resolve", "a"), ("resolve", "a", "--debug")])
    def test_a_bug_is_one_line_and_a_traceback_only_with_debug(self, run, stand_in, arguments):
        self._fail_with(stand_in, ZeroDivisionError("oops"))
        line = "hubfs: internal error: ZeroDivisionError: oops (run with --debug for the traceback)\n"
        assert run("resolve", "a") == (1, "", line)
        code, _, err = run(*arguments)
        assert code == 1
        assert err.startswith("Traceback")
        assert err.endswith(line)

    def test_debug_behind_two_dashes_is_an_argument(self, run, stand_in):
        stand_in("api", resolve=lambda handle, settings: handle)
        assert run("resolve", "--", "--debug") == (0, "--debug\n", "")

    def test_what_is_logged_is_not_told_twice(self, tmp_path):
        code = (
            "import logging, sys, types, hubfs; from hubfs.cli.app import main\n"
            "log = lambda *_: logging.getLogger('hubfs.x').error('logged') or '/path'\n"
            "hubfs.api = sys.modules['hubfs.api'] = types.SimpleNamespace(resolve=log)\n"
            "main(sys.argv[1:])"
        )
        for flags, expected in (([], False), (["--debug"], True)):
            done = subprocess.run(
                [sys.executable, "-c", code, "resolve", "a", *flags], capture_output=True, text=True
            )
            assert done.stdout == "/path\n"
            assert ("logged" in done.stderr) is expected

    def test_ctrl_c_is_130(self, run, stand_in):
        self._fail_with(stand_in, KeyboardInterrupt())
        code, _, err = run("resolve", "a")
        # Older versions of typer end the line of the terminal's ^C first.
        assert (code, err.lstrip("\n")) == (130, "hubfs: stopped\n")

    def test_a_reader_that_goes_away_is_no_traceback(self, tmp_path):
        command = f"{sys.executable} -m hubfs --help | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
        assert done.stderr == ""

    @pytest.mark.parametrize("unbuffered", ["", "1"])
    @pytest.mark.parametrize("flag", ["--help", "--version"])
    def test_output_that_cannot_be_written_fails(self, flag, unbuffered):
        # Python's default is to write at the end; many containers set the variable.
        environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "hubfs", flag], stdout=full, stderr=subprocess.PIPE, env=environ
            )
        assert (done.returncode, done.stderr) == (1, b"hubfs: No space left on device\n")


class TestOptions:
    def _parameters(self, name):
        command = typer.main.get_command(cli.app).commands[name]
        return {parameter.name: parameter for parameter in command.params}

    def test_mount_has_every_setting_with_its_help_and_variable(self):
        parameters = self._parameters("mount")
        for field in dataclasses.fields(Settings):
            parameter = parameters[field.name]
            assert parameter.opts == [options.option_name(field)]
            assert parameter.help.startswith(field.metadata["help"])
            assert f"env: {env_name(field)}]" in parameter.help
        assert parameters["allow_hosts"].opts == ["--allow-host"]
        assert parameters["allow_hosts"].multiple

    def test_transfers_take_what_matters_to_them(self):
        for name in ("pull", "resolve"):
            parameters = set(self._parameters(name))
            assert {"hub", "cache_dir", "load_format", "offline", "max_model_size", "retries"} <= parameters
            assert not {"allow_other", "log_file"} & parameters

    def test_flag_beats_environment_beats_file_beats_default(self, run, stand_in, monkeypatch, tmp_path):
        seen = []
        stand_in("api", models=lambda settings, prefix: seen.append(settings) or [])
        config = tmp_path / "home/.config/hubfs/config.toml"
        config.parent.mkdir(parents=True)
        config.write_text(
            'hub = "https://file.example"\ntrust_cache_dir = true\nallow_hosts = ["one.example"]\n'
        )
        run("ls")
        monkeypatch.setenv("HUBFS_HUB", "https://environment.example")
        run("ls")
        run(
            "ls",
            "--hub",
            "https://flag.example",
            "--no-trust-cache-dir",
            "--allow-host",
            "a:1",
            "--allow-host",
            "b",
        )
        assert [settings.hub for settings in seen] == [
            "https://file.example",
            "https://environment.example",
            "https://flag.example",
        ]
        assert [settings.trust_cache_dir for settings in seen] == [True, True, False]
        assert [settings.allow_hosts for settings in seen] == [("one.example",)] * 2 + [("a:1", "b")]


class TestMount:
    def test_starts_the_daemon_and_says_how_to_end_it(self, run, stand_in, monkeypatch, tmp_path):
        calls = []
        stand_in("daemon", start=lambda settings, path: calls.append((settings, path)) or 123)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Settings, "cache_is_temporary", False)
        code, out, err = run(
            "mount",
            "mnt",
            "--hub",
            "http://localhost:1/",
            "--load-format",
            "Compressed",
            "--max-model-size",
            "2GiB",
            "--offline",
            "--read-timeout",
            "3",
            "--allow-other",
        )
        assert (code, err) == (0, "")
        where = tmp_path / "mnt"
        assert out == f"http://localhost:1 is mounted on {where} (to end it: hubfs unmount {where})\n"
        expected = Settings(
            hub="http://localhost:1",
            load_format=LoadFormat.COMPRESSED,
            max_model_size=2 * 2**30,
            offline=True,
            read_timeout=3.0,
            allow_other=True,
        )
        assert calls == [(expected, where)]

    def test_in_the_foreground(self, run, stand_in, tmp_path):
        calls = []
        stand_in("daemon", run=lambda settings, path: calls.append(path))
        assert run("mount", "--foreground", str(tmp_path), "--cache-dir", "/var/lib/x") == (0, "", "")
        assert calls == [tmp_path]

    def test_tells_once_how_to_keep_a_temporary_cache(self, run, stand_in, monkeypatch, tmp_path):
        stand_in("daemon", start=lambda settings, path: 1)
        monkeypatch.setattr(Settings, "cache_is_temporary", True)
        outputs = [run("mount", str(tmp_path))[1] for _ in range(2)]
        assert len(outputs[0].splitlines()) == 3
        assert "export TFHUB_CACHE_DIR=" in outputs[0]
        assert 'cache_dir = "' in outputs[0]
        assert len(outputs[1].splitlines()) == 1
        assert (tmp_path / "home/.local/state/hubfs").is_dir()
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/nothing")
        assert [len(run("mount", str(tmp_path))[1].splitlines()) for _ in range(2)] == [3, 3]

    def test_the_daemons_reason_is_told(self, run, stand_in, tmp_path):
        def start(settings, path):
            raise MountError("fuse: device not found", hint="modprobe fuse")

        stand_in("daemon", start=start)
        assert run("mount", str(tmp_path)) == (
            1,
            "",
            "hubfs: fuse: device not found\n  next: modprobe fuse\n",
        )

    def test_unmount_what_is_not_mounted(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # and back: the command leaves the directory
        code, out, err = run("unmount", str(tmp_path))
        assert (code, out) == (1, "")
        assert err.startswith(f"hubfs: {tmp_path}: not a mount of hubfs")

    def test_unmount_from_inside(self, run, monkeypatch, tmp_path):
        calls = []
        monkeypatch.setattr(mounts, "unmount", lambda path, lazy: calls.append((path, lazy, Path.cwd())))
        monkeypatch.chdir(tmp_path)
        assert run("unmount", ".", "--lazy")[0] == 0
        assert calls == [(tmp_path, True, Path("/"))]


STATUS = {
    "version": "0.1.0", "pid": 77, "mountpoint": "/mnt/a", "hub": "https://tfhub.dev", "load_format": "auto",
    "offline": False, "started": 1000.0,
    "cache": {"dir": "/var/cache/x", "size": 3 * 2**30, "models": 2, "free": 2**40},
    "shared_cache": {"url": "gs://bucket/prefix", "uploads": 1},
    "transfers": [{"handle": HANDLE, "state": "transferring", "received": 2**29, "total": 2**30, "written": 0,
                   "rate": 2.0**26, "waiting": 2},
                  {"handle": "x", "state": "locating", "received": 0, "total": None, "written": 0,
                   "rate": 0.0, "waiting": 1}],
    "failures": [{"handle": "bad/model/1", "error": "bad/model/1: no such model", "until": 0.0},
                 {"handle": "bad/model/2", "error": "no room", "until": 0.0}],
    "open_files": 4, "log_file": "/var/log/x",
    "read_mode": "cached", "read_mode_reason": "libfuse 3.14.0 is older than 3.17.2",
}  # fmt: skip


class TestStatus:
    @pytest.fixture
    def two_mounts(self, monkeypatch):
        def status(path):
            if path == Path("/mnt/a"):
                return STATUS
            raise MountError(f"{path}: the mount is dead", hint="mount it again")

        monkeypatch.setattr(mounts, "find", lambda: [Path("/mnt/a"), Path("/mnt/dead")])
        monkeypatch.setattr(mounts, "status", status)

    def test_no_mounts(self, run, monkeypatch):
        monkeypatch.setattr(mounts, "find", list)
        code, out, err = run("status")
        assert (code, err) == (0, "")
        assert "no mounts" in out
        assert run("status", "--json") == (0, "[]\n", "")

    def test_not_a_mount(self, run, tmp_path):
        code, out, err = run("status", str(tmp_path))
        assert (code, out) == (1, "")
        assert "hubfs is not mounted there" in err

    def test_describes_each(self, run, two_mounts):
        code, out, err = run("status")
        assert (code, err) == (0, "")
        alive, dead = out.split("\n\n")
        for part in (
            "/mnt/a\n",
            "https://tfhub.dev, auto",
            "/var/cache/x: 2 models, 3.0 GiB, 1.0 TiB free",
            "shared      gs://bucket/prefix, 1 model on the way there\n",
            "pid 77, hubfs 0.1.0, started",
            "cached; no passthrough: libfuse 3.14.0 is older than 3.17.2\n",
            f"{HANDLE}: transferring, 512.0 MiB of 1.0 GiB (50 %), 64.0 MiB/s, 8 seconds left, 2 readers",
            "x: locating, 0 B, 1 reader waits\n",
            "failed      bad/model/1: no such model\n",
            "failed      bad/model/2: no room\n",
            "/var/log/x",
        ):
            assert part in alive
        assert dead == "/mnt/dead\n  problem     /mnt/dead: the mount is dead\n  next        mount it again\n"

    @pytest.mark.parametrize(
        ("shared", "line"),
        [
            (None, ""),
            ({"url": "s3://b/p", "uploads": 0}, "  shared      s3://b/p\n"),
            ({"url": "s3://b/p", "uploads": 2}, "  shared      s3://b/p, 2 models on the way there\n"),
        ],
    )
    def test_tells_of_the_shared_cache(self, run, monkeypatch, shared, line):
        monkeypatch.setattr(mounts, "find", lambda: [Path("/mnt/a")])
        monkeypatch.setattr(mounts, "status", lambda path: {**STATUS, "shared_cache": shared})
        _, out, _ = run("status")
        assert line in out
        assert ("shared" in out) == bool(line)

    def test_json(self, run, two_mounts):
        found = json.loads(run("status", "--json")[1])
        assert found[0] == STATUS
        assert found[1]["mountpoint"] == "/mnt/dead"
        assert found[1]["error"]["hint"] == "mount it again"
        assert json.loads(run("status", "/mnt/a", "--json")[1]) == [STATUS]
        assert run("status", "/mnt/dead", "--json")[0] == 1


class TestLs:
    @pytest.fixture
    def two_models(self, stand_in):
        calls = []
        found = [
            Model(HANDLE, "k1", "/c/k1", "complete", "1", 1288490189, 4, time.time() - 3 * 3600),
            Model(None, "k2", "/c/k2", "damaged", None, 10, 1, None),
        ]
        stand_in("api", models=lambda settings, prefix: calls.append(prefix) or found)
        return calls

    def test_columns_that_awk_can_read(self, run, two_models):
        code, out, err = run("ls")
        assert (code, err) == (0, "")
        heading, first, second = (line.split() for line in out.splitlines())
        assert heading == ["HANDLE", "VERSION", "SIZE", "STATE", "LAST-USE"]
        assert first[:4] == [HANDLE, "1", "1.2GiB", "complete"]
        assert len(first) == 5
        assert second == ["(k2)", "-", "10B", "damaged", "-"]

    def test_at_a_terminal(self, run, two_models, monkeypatch):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", "140")
        assert cli.main(["ls"]) == 0
        assert "1.2 GiB" in terminal.text
        assert "3 hours ago" in terminal.text

    def test_prefix_and_json(self, run, two_models):
        code, out, _ = run("ls", "google/", "--json")
        assert (code, two_models) == (0, ["google/"])
        assert [model["key"] for model in json.loads(out)] == ["k1", "k2"]

    def test_nothing(self, run, stand_in):
        stand_in("api", models=lambda settings, prefix: [])
        code, out, err = run("ls", "x/")
        assert (code, out) == (0, "")
        assert err.startswith("hubfs: no models that begin with x/ in /")


class TestPull:
    GOOD = Pulled("a/b/1", "/c/k", 2048, False, None)
    CACHED = Pulled("a/b/2", "/c/k2", 10, True, None)
    BAD = Pulled("a/b/3", None, 0, False, NotFoundError("a/b/3: no such model", hint="look again"))

    def _pull(self, *results):
        def pull(handles, settings, *, on_progress, cancel):
            for state in ("locating", "transferring", "transferring", "complete"):
                on_progress(TransferStatus("a/b/1", state, 1024, 2048, 1024, 10.0))
            return list(results)

        return pull

    def test_lines_without_a_terminal(self, run, stand_in):
        stand_in("api", pull=self._pull(self.GOOD, self.CACHED))
        code, out, err = run("pull", "a/b/1", "a/b/2")
        assert code == 0
        assert out == "a/b/1 is cached: /c/k (2.0 KiB)\na/b/2 was cached already: /c/k2 (10 B)\n"
        assert err == "a/b/1: locating (2.0 KiB)\na/b/1: transferring (2.0 KiB)\na/b/1: complete\n"

    def test_one_failure_fails(self, run, stand_in):
        stand_in("api", pull=self._pull(self.GOOD, self.BAD))
        code, out, err = run("pull", "a/b/1", "a/b/3")
        assert (code, out) == (1, "a/b/1 is cached: /c/k (2.0 KiB)\n")
        assert err.endswith("hubfs: a/b/3: no such model\n  next: look again\n")

    def test_json(self, run, stand_in):
        stand_in("api", pull=self._pull(self.GOOD, self.BAD))
        code, out, _ = run("pull", "a/b/1", "a/b/3", "--json")
        good, bad = json.loads(out)
        assert code == 1
        assert good == {"handle": "a/b/1", "path": "/c/k", "size": 2048, "cached": False, "error": None}
        assert bad["error"] == {
            "kind": "NotFound", "message": "a/b/3: no such model", "hint": "look again",
            "errno": errno.ENOENT,
        }  # fmt: skip

    def test_what_is_no_url_is_told_like_any_other_failure(self, run, tmp_path):
        code, out, err = run("pull", "https://[x", "--cache-dir", str(tmp_path / "cache"))
        assert (code, out) == (1, "")
        assert err == "https://[x: failed\nhubfs: 'https://[x' is not a URL: Invalid IPv6 URL\n"

    def test_bars_at_a_terminal(self, stand_in, monkeypatch, capsys):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "140")
        stand_in("api", pull=self._pull(self.GOOD))
        assert cli.main(["pull", "a/b/1"]) == 0
        assert "a/b/1" in terminal.text
        assert "complete" in terminal.text
        assert "1.0/2.0 KiB" in terminal.text

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_stops_all_and_waits(self, run, stand_in, number, code):
        def pull(handles, settings, *, on_progress, cancel):
            os.kill(os.getpid(), number)
            assert cancel.wait(5)
            return [Pulled(handle, None, 0, False, StoppedError("stopped")) for handle in handles]

        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        stand_in("api", pull=pull)
        assert run("pull", "a", "b") == (code, "", "hubfs: stopped\n")
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers

    def test_resolve(self, run, stand_in):
        stand_in("api", resolve=lambda handle, settings: f"/c/{handle}")
        assert run("resolve", "k") == (0, "/c/k\n", "")
        assert json.loads(run("resolve", "k", "--json")[1]) == {"handle": "k", "path": "/c/k"}


class TestServe:
    # The archive directory keeps the files that its flocks are on.
    @pytest.mark.leaves("*.lock")
    def test_serves_until_told_to_stop(self, tmp_path):
        for number in range(1, 24):
            version = tmp_path / "models/google/demo" / str(number)
            version.mkdir(parents=True)
            (version / "saved_model.pb").write_bytes(b"model")
        server = subprocess.Popen(
            [sys.executable, "-m", "hubfs", "serve", str(tmp_path / "models"), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        try:
            lines = [server.stdout.readline() for _ in range(23)]
            url = lines[0].split(" at ")[1].split(": ")[0]
            assert lines[1] == f"  {url}/google/demo/1\n"
            assert lines[21] == "  … and 3 more\n"
            assert lines[22] == f"To mount it: hubfs mount --hub {url} /mnt/tfhub\n"
            with urllib.request.urlopen(
                f"{url}/google/demo/1?tf-hub-format=compressed", timeout=10
            ) as answer:
                sent = len(answer.read())
        finally:
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=20)
        assert server.returncode == 0
        assert err == f"GET /google/demo/1?tf-hub-format=compressed -> 200, {sent} bytes\n"


class TestDoctor:
    def test_json_and_exit_code(self, run, tmp_path):
        code, out, err = run("doctor", "--offline", "--json", "--cache-dir", str(tmp_path / "cache"))
        checks = json.loads(out)
        assert err == ""
        assert [set(check) for check in checks] == [{"name", "state", "found", "advice"}] * len(checks)
        assert len(checks) == 10
        states = {check["state"] for check in checks}
        assert states <= {"ok", "warning", "problem"}
        assert code == (1 if "problem" in states else 0)
        assert not (tmp_path / "cache").exists(), "it only looks"
        assert all(check["advice"] for check in checks if check["state"] != "ok")

    def test_text(self, run):
        _, out, _ = run("doctor", "--offline")
        assert "ok       Python: 3." in out
        assert "hub: https://tfhub.dev: not asked (offline)" in out

    def test_a_problem_is_exit_code_1(self, run, monkeypatch):
        monkeypatch.setattr(
            doctor, "check_device", lambda: doctor.Check("/dev/fuse", "problem", "gone", "fetch it")
        )
        code, out, _ = run("doctor", "--offline")
        assert code == 1
        assert "problem  /dev/fuse: gone\n         next: fetch it\n" in out

    def test_device(self, tmp_path):
        assert doctor.check_device(tmp_path / "nothing").state == "problem"
        (tmp_path / "there").touch()
        assert doctor.check_device(tmp_path / "there").state == "ok"

    def test_allow_other(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        config = tmp_path / "fuse.conf"
        config.write_text("#user_allow_other\n")
        assert doctor.check_allow_other(False, config).state == "ok"
        assert doctor.check_allow_other(True, config).state == "problem"
        config.write_text("mount_max = 10\nuser_allow_other\n")
        assert doctor.check_allow_other(True, config).advice == ""

    def test_cache(self, tmp_path):
        own = tmp_path / "own"
        own.mkdir(0o700)
        assert doctor.check_cache(own, False, False).state == "ok"
        assert doctor.check_cache(own / "new", False, False).state == "ok"
        assert doctor.check_cache(own, False, True).state == "warning"
        own.chmod(0o777)
        assert doctor.check_cache(own, False, False).state == "problem"
        assert doctor.check_cache(own, True, False).state == "ok"
        (own / "file").touch()
        assert doctor.check_cache(own / "file", False, False).state == "problem"

    def test_libfuse(self, monkeypatch):
        assert doctor.check_libfuse(None).state == "problem"
        library = doctor._load_libfuse()
        if library is None:
            pytest.skip("no libfuse here")
        monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
        monkeypatch.setenv("FUSE_LIBRARY_NAME", "fuse")
        assert "FUSE_LIBRARY_NAME is fuse" in doctor.check_libfuse(library).found
        monkeypatch.delenv("FUSE_LIBRARY_NAME")
        assert doctor.check_libfuse(library).found.startswith("3.")

    def test_hub(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(503)

            def log_message(self, *arguments):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            settings = Settings(hub=f"http://127.0.0.1:{server.server_port}")
            assert doctor.check_hub(settings).found.endswith("answers (HTTP 503)")
            thread.join()
        refused = doctor.check_hub(settings)
        assert refused.state == "problem"
        assert "Connection refused" in refused.found


class TestOutput:
    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1048575, "1.0 MiB"), (1288490189, "1.2 GiB"),
         (2**50, "1.0 PiB"), (5000 * 2**50, "5000.0 PiB")],
    )  # fmt: skip
    def test_size(self, count, text):
        assert output.size(count) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(-5, "just now"), (59, "just now"), (60, "1 minute ago"), (3 * 3600 + 5, "3 hours ago"),
         (86400, "1 day ago"), (400 * 86400, "1 year ago")],
    )  # fmt: skip
    def test_ago(self, seconds, text):
        assert output.ago(10_000.0 - seconds, now=10_000.0) == text

    def test_duration(self):
        assert [output.duration(seconds) for seconds in (-1, 8.9, 120)] == [
            "0 seconds",
            "8 seconds",
            "2 minutes",
        ]


def test_the_state_directory_is_the_one_of_the_user(monkeypatch, tmp_path):
    assert mount_commands._state_directory() == tmp_path / "home/.local/state/hubfs"
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert mount_commands._state_directory() == Path("/x/hubfs")
