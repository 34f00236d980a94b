"""What a mount tells about itself: `/.hubfs/status.json` and the `user.hubfs.*` extended attributes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hubfs.cache.readable import Readable, Wait
from hubfs.cache.state import EntryState
from hubfs.cache.store import Store
from hubfs.errors import NotFoundError
from hubfs.fs.passthrough import ReadModes

_STATUS = "status.json"


class Control:
    """Control files and attributes of one mount."""

    def __init__(self, store: Store, read_modes: ReadModes, about: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            about: the parts of status.json that are about the mount and its process.
        """
        self._store = store
        self._read_modes = read_modes
        self._about = about

    def names(self) -> list[str]:
        return [_STATUS]

    def open(self, name: str) -> ControlFile:
        """
        Raises:
            NotFoundError: there is no such control file.
        """
        if name != _STATUS:
            raise NotFoundError(f".hubfs/{name}: there is no such control file")
        mode, reason = self._read_modes.mode()
        reading = {"read_mode": mode.value, "read_mode_reason": reason}
        text = json.dumps({**self._about(), **reading, **self._store.status()}, indent=1) + "\n"
        return ControlFile(text.encode())

    def attributes_of(self, entry: EntryState, path: str) -> dict[str, bytes]:
        """Of a version's directory and all that is in it."""
        snapshot = entry.snapshot()
        found = {"handle": snapshot.handle, "key": entry.key, "state": snapshot.state}
        if snapshot.origin is not None:
            found["origin"] = snapshot.origin
        if snapshot.error is not None:
            found["error"] = str(snapshot.error)
        if snapshot.state in ("transferring", "partial"):
            found["received"] = str(snapshot.received)
            if snapshot.total is not None:
                found["total"] = str(snapshot.total)
        mode, reason = self._read_modes.mode_of(path)
        found["read_mode"] = mode.value
        if reason:
            found["read_mode_reason"] = reason
        return _encoded(found)

    def attributes_below(self, parts: tuple[str, ...]) -> dict[str, bytes]:
        """Of a directory above versions: the latest failure below it.

        A version that does not exist or must not be read cannot be asked itself.
        """
        prefix = "/".join(parts)
        for failure in reversed(self._store.failures()):
            path = self._store.handles.mount_path(failure.handle) or ""
            if not prefix or path == prefix or path.startswith(prefix + "/"):
                return _encoded({"error": str(failure.error)})
        return {}


class ControlFile(Readable):
    """A control file's content as it was when the file was opened."""

    direct = True

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read_into(self, buffer: memoryview, offset: int, wait: Wait) -> int:
        part = self._content[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """There is nothing to close."""


def _encoded(found: dict[str, str]) -> dict[str, bytes]:
    return {f"user.hubfs.{name}": text.encode("utf8", "surrogateescape") for name, text in found.items()}
