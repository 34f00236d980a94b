"""A store over a bucket that misbehaves on demand, for tests of versions that are read by range."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from hubfs.cache.entry import Entry
from hubfs.cache.readable import Wait
from hubfs.cache.store import Store
from hubfs.config import Settings
from hubfs.errors import HubfsError
from tests.bucket_hub import BucketHub

MODEL = "google/demo/1"


class Listed:
    """A hub and stores that ask it, each as a process of its own would have it.

    Args:
        cache: the directory that the stores share.
    """

    def __init__(self, hub: BucketHub, cache: Path) -> None:
        self.hub = hub
        self.cache = cache
        self._stores: list[Store] = []

    def store(self, *, keep: bool = False, **settings: Any) -> Store:
        flags = {
            "hub": self.hub.url, "cache_dir": str(self.cache), "retry_delay": 0.01, "retries": 2,
            "stall_timeout": 20.0, **settings,
        }  # fmt: skip
        self._stores.append(Store(Settings.load(flags, {}, Path("/dev/null")), keep=keep))
        return self._stores[-1]

    def entry(self, model: str = MODEL, *, keep: bool = False, **settings: Any) -> Entry:
        """An entry in a store of its own."""
        return self.store(keep=keep, **settings).entry(f"{self.hub.url}/{model}")

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def __enter__(self) -> Listed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def soon(interrupted: Callable[[], bool] = lambda: False) -> Wait:
    """A wait that no working test comes to the end of."""
    return Wait(30.0, interrupted)


def read(entry: Entry, path: str, start: int = 0, size: int | None = None) -> bytes:
    """Open a file, read some of it as the kernel would, and close it."""
    file = entry.open(path, soon())
    try:
        stop = 1 << 62 if size is None else start + size
        found = bytearray()
        while start < stop and (part := file.read(min(128 << 10, stop - start), start, soon())):
            found += part
            start += len(part)
        return bytes(found)
    finally:
        file.close()


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def error_of(attempt: Callable[[], object]) -> HubfsError | None:
    try:
        attempt()
    except HubfsError as error:
        return error
    return None
