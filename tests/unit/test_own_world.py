"""What a test finds around it: nothing of the machine, and nobody outside to ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import GCSStore, S3Store

from tests.conftest import NO_METADATA, NOWHERE

ROOT = Path(__file__).resolve().parents[2]
#: One of each family, as a user may have it.
USERS = {
    "HUBFS_HUB": "https://example.org",
    "TFHUB_CACHE_DIR": "gs://bucket/theirs",
    "AWS_ACCESS_KEY_ID": "theirs",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/user/key.json",
    "STORAGE_EMULATOR_HOST": "http://example.org",
    "KAGGLE_USERNAME": "theirs",
    "https_proxy": "http://example.org",
    "GCE_METADATA_HOST": "example.org",
}
#: What is left of them.
INNER = [("GCE_METADATA_HOST", NOWHERE)]


def test_variables_of_the_machine_do_not_reach_a_test(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "def test_inner():\n"
        f"    assert [(n, os.environ[n]) for n in {sorted(USERS)} if n in os.environ] == {INNER}\n"
    )
    (tmp_path / "test_inner.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "inner"), str(tmp_path / "test_inner.py")],
        cwd=ROOT, env={**os.environ, **USERS}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda **how: GCSStore("bucket", **how),
        lambda **how: S3Store("bucket", region="us-east-1", **how),
    ],
    ids=["Google", "Amazon"],
)
def test_metadata_service_is_looked_for_where_nobody_is(make: Callable[..., Any]) -> None:
    # Without these the next lines would ask the machine's own, if it is a cloud's.
    assert {name: os.environ[name] for name in NO_METADATA} == NO_METADATA
    with pytest.raises(Exception, match=NOWHERE):
        obstore.get(make(retry_config={"max_retries": 0}), "key")
