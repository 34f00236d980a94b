"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from scripts.bench.processes import Unavailable, find_program


def describe(directory: Path) -> dict[str, str]:
    """Machine and versions, by name.

    Args:
        directory: where the caches are; its file system counts.
    """
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "system": system(),
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {_memory()}",
        "file system": _file_system(directory),
        "kernel": platform.release(),
        "load before": f"{load} (1, 5, 15 minutes)",
        "user": "root" if os.geteuid() == 0 else "not root (no cold page cache, smaller readahead)",
        "Python": platform.python_version(),
        "libfuse": _said_by("fusermount3", "-V"),
        **{name: _version(name) for name in ("hubfs", "mfusepy", "isal", "requests", "urllib3")},
        "TensorFlow": _version("tensorflow_cpu", "tensorflow"),
        "tensorflow_hub": _version("tensorflow_hub"),
        **{program: _said_by(program, "--version") for program in ("rclone", "ratarmount")},
    }


def system() -> str:
    """The distribution, in short: `Debian 12`."""
    found = platform.freedesktop_os_release()
    name = found["NAME"].split()[0]
    return " ".join(filter(None, (name, found.get("VERSION_ID"))))


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of memory"


def _file_system(directory: Path) -> str:
    """Type and source of the mount that a directory is on."""
    best, said = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, target, kind = line.split(" ")[:3]
        if (f"{directory}/".startswith(target.rstrip("/") + "/")) and len(target) >= len(best):
            best, said = target, f"{kind} on {source}"
    return said


def _said_by(program: str, question: str) -> str:
    """The version in what a program answers."""
    try:
        command = [find_program(program), question]
    except Unavailable:
        return "not installed"
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said.strip()


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"
