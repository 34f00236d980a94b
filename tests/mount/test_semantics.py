"""The examples of docs/SEMANTICS.md do what they say."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hubfs.serve import LocalHub
from tests.models import make_tree, write_tree

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "SEMANTICS.md"


def examples() -> list[tuple[str, list[str]]]:
    """Each command of the document with the lines it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def matches(expected: str, line: str) -> bool:
    pattern = expected.replace("[", "[[]").replace("?", "[?]").replace("…", "*")
    return fnmatch.fnmatchcase(line, pattern)


def test_examples_do_what_they_say(tmp_path: Path, mount) -> None:
    for version in (1, 2):
        tree = {**make_tree(seed=version), "assets/vocab.txt": b"hello\nworld\n"}
        write_tree(tree, tmp_path / "models" / "google" / "demo" / str(version))
    commands = examples()
    assert len(commands) > 12
    with LocalHub(tmp_path / "models", archive_dir=tmp_path / "archives") as hub:
        mounted = mount(hub.url)
        environment = {
            **os.environ,
            "MNT": str(mounted.path),
            "HUB": hub.url,
            "TFHUB_CACHE_DIR": str(mounted.cache),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LC_ALL": "C",
        }
        for command, expected in commands:
            done = subprocess.run(
                ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
            )
            printed = (done.stdout + done.stderr).splitlines()
            if len(printed) != len(expected) or not all(map(matches, expected, printed)):
                pytest.fail(f"$ {command}\nexpected: {expected}\nprinted: {printed}")
