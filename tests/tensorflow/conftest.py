"""Real TensorFlow and tensorflow_hub in processes of their own, and models made with them.

The tests' own process never imports TensorFlow: that takes seconds, and its threads would stay.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.hub import FaultHub
from tests.models import Tree, make_archive

#: Seconds for the slowest order. None of them takes a tenth of it unless something hangs.
LONGEST = 90.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("tensorflow_hub") is None:
        skip = pytest.mark.skip(reason="needs TensorFlow: run scripts/test.sh")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


class OrderError(Exception):
    """What an order raised in the other process; `kind` is the name of the exception there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class TensorFlow:
    """A process that runs `tests/tensorflow/worker.py`, whose functions are called by name.

    tensorflow.embed(path=…) calls one and waits for its result; tensorflow.begin("embed", path=…) does not
    wait, and tensorflow.end() does.
    """

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TFHUB_")}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                cwd="/",
                env={**environ, **quiet, **(environment or {})},
            )
        self.pid = self._process.pid

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            self.begin(function, **arguments)
            return self.end()

        return call

    def begin(self, function: str, **arguments: Any) -> None:
        """Give an order without waiting for its end."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        self._pipe(self._process.stdin).write(json.dumps({"do": function, "with": plain}).encode() + b"\n")

    def end(self, timeout: float = LONGEST) -> Any:
        """The result of the order that was begun.

        Raises:
            OrderError: it raised an exception.
        """
        pipe = self._pipe(self._process.stdout)
        assert select.select([pipe], [], [], timeout)[0], f"no answer within {timeout} s; it said {self.said}"
        line = pipe.readline()
        assert line, f"the process ended; it said {self.said}"
        answer = json.loads(line)
        if "error" in answer:
            raise OrderError(answer["error"], answer["message"])
        return answer["result"]

    def has_ended(self, within: float) -> bool:
        """Whether the order that was begun has a result after so many seconds, or earlier."""
        return bool(select.select([self._process.stdout], [], [], within)[0])

    @property
    def said(self) -> str:
        """What it and its libraries logged."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """End it as `kill -9` does. Returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


@pytest.fixture(scope="session")
def tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorFlow]:
    """The process that most tests share."""
    process = TensorFlow(tmp_path_factory.mktemp("tensorflow") / "stderr.txt")
    yield process
    process.close()


@pytest.fixture
def other_tensorflow(tmp_path: Path) -> Iterator[Callable[..., TensorFlow]]:
    """Makes processes for one test: to be killed, to have an environment, to be looked at while waiting."""
    made: list[TensorFlow] = []

    def start(**environment: str) -> TensorFlow:
        made.append(TensorFlow(tmp_path / f"tensorflow{len(made)}.txt", environment))
        return made[-1]

    yield start
    for process in made:
        process.close()


@pytest.fixture(scope="session")
def saved(tensorflow: TensorFlow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the models that `worker.save_models` makes."""
    directory = tmp_path_factory.mktemp("saved")
    tensorflow.save_models(directory=directory)
    return directory


@pytest.fixture(scope="session")
def archives(saved: Path) -> dict[str, bytes]:
    """The archive of each of them. The data of the variables comes first, as published ones often have it."""
    found = {}
    for model in saved.iterdir():
        if model.is_dir():
            tree = tree_of(model)
            found[model.name] = make_archive(tree, order=sorted(tree, key=lambda name: ".data-" not in name))
    return found


@pytest.fixture
def tf_hub(hub: FaultHub, archives: dict[str, bytes]) -> FaultHub:
    """The hub, with all models as google/<name>/1 and, for the latest version, as google/<name>."""
    for name, archive in archives.items():
        hub.add(f"google/{name}/1", archive)
        hub.add(f"google/{name}", archive)
    return hub


def tree_of(directory: Path) -> Tree:
    """The files below a directory."""
    tree = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file():
            tree[name] = path.read_bytes()
        elif not any(path.iterdir()):
            tree[name + "/"] = b""
    return tree


def body_has_begun(hub: FaultHub, name: str, size: int) -> None:
    """Wait until the hub has sent so much of a body."""
    hub.wait_for(
        lambda _: any(request.bytes_sent >= size for request in hub.body_requests(name)),
        what=f"{size} bytes of {name} to be sent",
    )


def until(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
