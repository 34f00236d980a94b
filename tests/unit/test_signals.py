"""Whether a waiting process was signalled, asked of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs.fs.signals import pending_signal

Start = Callable[[str], int]
BLOCK = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python process that runs some code, says so, and waits; gives its id."""
    made: list[subprocess.Popen[str]] = []

    def run(code: str) -> int:
        whole = f"import os, signal, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", whole], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield run
    for process in made:
        process.kill()
        process.communicate()


def soon(look: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not look() and time.monotonic() < deadline:
        time.sleep(0.005)
    return look()


def stop(pid: int) -> None:
    """Keep a process from taking its signals, as one that waits in the kernel is kept."""
    os.kill(pid, signal.SIGSTOP)
    assert soon(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
    assert not pending_signal(pid)


def test_process_without_signals(start: Start) -> None:
    assert not pending_signal(start("pass"))


def test_this_very_thread_has_none() -> None:
    assert not pending_signal(threading.get_native_id())


def test_signal_that_waits_for_its_process(start: Start) -> None:
    pid = start("signal.signal(signal.SIGUSR1, lambda *_: None)")
    stop(pid)
    os.kill(pid, signal.SIGUSR1)
    assert soon(lambda: pending_signal(pid))
    os.kill(pid, signal.SIGCONT)
    assert soon(lambda: not pending_signal(pid))


def test_blocked_signal_does_not_count(start: Start) -> None:
    pid = start(BLOCK)
    os.kill(pid, signal.SIGTERM)
    assert not pending_signal(pid)


def test_ignored_signal_does_not_count(start: Start) -> None:
    pid = start("signal.signal(signal.SIGUSR1, signal.SIG_IGN)")
    stop(pid)
    os.kill(pid, signal.SIGUSR1)
    assert not pending_signal(pid)
    os.kill(pid, signal.SIGCONT)


def test_blocked_and_another_signal_together(start: Start) -> None:
    pid = start(BLOCK)
    os.kill(pid, signal.SIGTERM)
    stop(pid)
    os.kill(pid, signal.SIGUSR1)
    assert soon(lambda: pending_signal(pid))


def test_process_that_is_gone_waits_no_longer() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    # Ended, and not yet waited for: a zombie.
    assert soon(lambda: pending_signal(process.pid))
    process.wait()
    assert pending_signal(process.pid)


@pytest.mark.parametrize("task", [0, -1])
def test_process_that_cannot_be_known_is_not_asked(task: int) -> None:
    assert not pending_signal(task)
