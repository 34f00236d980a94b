"""What the kernel is answered, where a mount cannot show it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hubfs.cache.readable import Wait
from hubfs.cache.store import Store
from hubfs.config import Settings
from hubfs.fs.control import Control
from hubfs.fs.operations import Operations
from hubfs.fs.passthrough import ReadModes
from hubfs.fs.tree import Tree
from tests.models import make_tree
from tests.mount.conftest import put_into_cache

HUB = "https://tfhub.dev"


def test_a_listing_that_fails_when_it_is_read_has_its_own_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its version was known to be cached when the directory was opened, and vanished since."""
    cache = tmp_path / "cache"
    model = put_into_cache(cache, f"{HUB}/google/demo/1", make_tree())
    cache.chmod(0o700)
    store = Store(
        Settings.load({"hub": HUB, "cache_dir": str(cache), "offline": True}, {}, Path("/dev/null"))
    )
    modes = ReadModes(False)
    operations = Operations(Tree(store, Control(store, modes, dict)), modes, cache, 1.0, lambda session: None)
    # There is no request of a kernel, so nobody who could be interrupted.
    monkeypatch.setattr(operations, "_wait", lambda: Wait(1.0))
    try:
        store.index.refresh()
        opened = SimpleNamespace()
        operations.opendir("/google/demo/1", opened)
        shutil.rmtree(model)
        with pytest.raises(OSError) as caught:
            operations.readdir(opened)
        assert caught.value.errno == errno.ENONET
    finally:
        store.close()
