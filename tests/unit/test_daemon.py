"""Parts of the daemon that need no mount."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hubfs.daemon import _notify_systemd, default_log_file


def test_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        _notify_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_service_manager_that_is_gone_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    _notify_systemd("READY=1")


def test_each_mount_point_has_a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_log_file(Path("/mnt/tfhub")) == Path("/state/hubfs/mnt-tfhub.log")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_log_file(Path("/a/b")) == Path("/home/me/.local/state/hubfs/a-b.log")
