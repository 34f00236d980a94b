"""Running programs that are measured, so that nothing of the machine's settings reaches them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[2]


#: Beginnings of the variables that programs which are measured take settings from.
_SETTINGS: Final = (
    "HUBFS_", "TFHUB_", "RCLONE_", "GCS_", "GOOGLE_", "AWS_", "STORAGE_EMULATOR_",
)  # fmt: skip


class Unavailable(Exception):
    """What cannot be measured on this machine; the message says why."""


def environment(**more: str) -> dict[str, str]:
    """For processes that are measured: no setting or proxy of the machine reaches them."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_SETTINGS) and not name.lower().endswith("_proxy")
    }
    return {**kept, **more}


def hubfs_command() -> list[str]:
    """What runs `hubfs` as a user does."""
    script = Path(sys.executable).with_name("hubfs")
    return [str(script)] if script.exists() else [sys.executable, "-m", "hubfs"]


def run_quietly(*command: str, **more: str) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def find_program(name: str) -> str:
    """A program of the machine, or of those that run.sh has installed for the benchmark.

    Raises:
        Unavailable: it is not there.
    """
    found = shutil.which(name) or shutil.which(name, path=os.environ.get("HUBFS_BENCH_PROGRAMS", ""))
    if found is None:
        raise Unavailable(f"{name} is not installed")
    return found
