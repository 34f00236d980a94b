"""Fixtures of all tiers: a world of its own for each test, hubs, caches and mounts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hubfs import daemon, mounts
from hubfs.config import Settings
from hubfs.errors import HubfsError
from tests.hub import FaultHub

pytest_plugins = ["tests.leaks"]


#: Settings of hubfs, and of what it speaks to.
OURS = ("HUBFS_", "TFHUB_", "AWS_", "GOOGLE_", "STORAGE_EMULATOR_", "KAGGLE_")
#: Variables by which the machine could lead requests elsewhere, or trust others.
OUTSIDE = {
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "ssl_cert_file", "ssl_cert_dir", "requests_ca_bundle", "curl_ca_bundle",
    "gce_metadata_host", "gce_metadata_root", "gce_metadata_ip", "no_gce_check",
}  # fmt: skip
#: A port of the machine's own where nobody listens, for those who would ask a cloud's metadata service.
NOWHERE = "127.0.0.1:9"
NO_METADATA = {
    "GCE_METADATA_HOST": NOWHERE,
    "GCE_METADATA_ROOT": NOWHERE,
    "GCE_METADATA_IP": NOWHERE,
    "NO_GCE_CHECK": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_METADATA_ENDPOINT": f"http://{NOWHERE}",
}


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and nothing of a test reaches the machine."""
    for name in list(os.environ):
        if name.startswith(OURS) or name.lower() in OUTSIDE:
            monkeypatch.delenv(name)
    for name, value in NO_METADATA.items():
        monkeypatch.setenv(name, value)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        directory = tmp_path / "home" / name.lower()
        directory.mkdir(parents=True)
        monkeypatch.setenv(name, str(directory))


@pytest.fixture
def hub() -> Iterator[FaultHub]:
    """A hub on loopback that misbehaves on demand."""
    with FaultHub() as server:
        yield server


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets stalled answers go on; at the latest at the end of the test, so that no reader hangs."""
    event = threading.Event()
    yield event
    event.set()


@dataclass(frozen=True)
class Mounted:
    """A running mount."""

    path: Path
    cache: Path
    log: Path
    pid: int

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / ".hubfs/status.json").read_text())
        return found

    def log_text(self) -> str:
        return self.log.read_text()

    def unmount(self, **how: Any) -> None:
        mounts.unmount(self.path, **how)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Mounts as `hubfs mount` does; what is still mounted at the end is unmounted."""
    made: list[Mounted] = []

    def start(hub: FaultHub | str, name: str = "mnt", **settings: Any) -> Mounted:
        url = hub if isinstance(hub, str) else hub.url
        cache = Path(settings.pop("cache_dir", tmp_path / "cache"))
        log = tmp_path / f"{name}.log"
        flags = {
            "hub": url, "cache_dir": str(cache), "log_file": str(log), "log_level": "debug",
            "retry_delay": 0.02, **settings,
        }  # fmt: skip
        path = tmp_path / name
        pid = daemon.start(Settings.load(flags), path)
        made.append(Mounted(path, cache, log, pid))
        return made[-1]

    yield start
    for mounted in reversed(made):
        if mounted.path in mounts.find():
            try:
                mounts.unmount(mounted.path)
            except HubfsError:
                mounts.unmount(mounted.path, lazy=True)
                raise
