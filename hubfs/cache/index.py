"""Which models the cache directory holds, for listings: names only, read once and kept up to date."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from hubfs.cache.layout import Layout, is_present, read_descriptor
from hubfs.handles import HandleMap

log = logging.getLogger(__name__)

#: A scan is followed by a pause of so many times its length: at most a twentieth of the time is spent on it.
SCAN_PAUSE: Final = 20
#: Seconds of such a pause at most: so long may a model be listed that is gone, on a machine that is busy.
LONGEST_PAUSE: Final = 5.0
#: Seconds that a status waits for the models to be counted.
PATIENCE: Final = 0.5


@dataclass(slots=True)
class _Names:
    """The names below one namespace directory, and what of them is a model."""

    children: dict[str, _Names] = field(default_factory=dict)
    models: int = 0


class Index:
    """Mount path <-> keys of the models on disk.

    A model is listed when its directory is there and not empty; whether it is whole is found out when it
    is opened. Scanning costs some 30 µs a model and is done again only when the directory changed.
    """

    def __init__(self, layout: Layout, handles: HandleMap) -> None:
        self._layout = layout
        self._handles = handles
        # Held during a scan: whoever lists meanwhile waits for its end, which is disk work only.
        self._scan_lock = threading.Lock()
        self._lock = threading.Lock()  # protects what follows
        self._scanned: int | None = None
        self._next_scan = 0.0
        self._totals = (0, 0)
        self._counter: threading.Thread | None = None
        self._paths: dict[str, str | None] = {}
        self._sizes: dict[str, tuple[int, int]] = {}  # by key: time of the manifest in ns, bytes
        self._root = _Names()
        self._keys: dict[str, list[str]] = {}

    def refresh(self) -> None:
        """Take notice of what other processes cached or removed."""
        with self._scan_lock:
            try:
                stamp = self._layout.root.stat().st_mtime_ns
            except (FileNotFoundError, NotADirectoryError):
                stamp = 0
            begin = time.monotonic()
            if stamp == self._scanned or begin < self._next_scan:
                return
            self._scan(set(self._layout.keys()) if stamp else set(), stamp)
            # Each manifest that hubfs writes changes the directory too: a walk over a large cache must not
            # scan it anew for each model.
            end = time.monotonic()
            self._next_scan = end + min(SCAN_PAUSE * (end - begin), LONGEST_PAUSE)

    def _scan(self, present: set[str], stamp: int) -> None:
        for key in self._paths.keys() - present:
            self._remove(key)
        empty = False
        for key in present:
            # A descriptor may have been written after its directory was seen.
            if self._paths.get(key) is None:
                if is_present(self._layout.model(key)):
                    self.add(key, read_descriptor(self._layout.descriptor(key)))
                else:
                    empty = True
        # When an empty directory is filled, the cache directory's own time does not change.
        self._scanned = None if empty else stamp

    def add(self, key: str, handle: str | None) -> None:
        """A model is there now."""
        path = self._handles.mount_path(handle) if handle else None
        with self._lock:
            # A key without a path was found without its descriptor; its handle is told now.
            if self._paths.get(key) is not None:
                return
            self._paths[key] = path
            if path is None or handle is None:
                return
            names = self._root
            names.models += 1
            for part in path.split("/"):
                names = names.children.setdefault(part, _Names())
                names.models += 1
            self._keys.setdefault(self._handles.handle_at(path), []).append(key)

    def has(self, handle: str) -> bool:
        """Whether a model was in the cache when it was last scanned."""
        with self._lock:
            return handle in self._keys

    def other_keys(self, handle: str, key: str) -> list[str]:
        """Keys of the same model under other spellings of its handle."""
        self.refresh()
        with self._lock:
            return [other for other in self._keys.get(handle, ()) if other != key]

    def below(self, parts: tuple[str, ...]) -> list[str]:
        """Names in a namespace directory that lead to cached models, sorted."""
        self.refresh()
        with self._lock:
            names = self._root
            for part in parts:
                if part not in names.children:
                    return []
                names = names.children[part]
            return sorted(names.children)

    def totals(self) -> tuple[int, int]:
        """`count` and `size`, or what they were when last counted if that takes longer than a moment."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                counter = self._counter
                earlier = counter is not None and counter.is_alive()
                if not earlier:
                    counter = threading.Thread(target=self._count_all, name="hubfs-count", daemon=True)
                    self._counter = counter
                    counter.start()
            assert counter is not None
            counter.join(max(0.0, deadline - time.monotonic()))
            # One that ran already may have looked before the latest change.
            if not earlier or counter.is_alive():
                return self._totals

    def _count_all(self) -> None:
        try:
            self._totals = self.count(), self.size()
        except OSError as error:
            log.warning("the models in the cache cannot be counted: %s", error)

    def count(self) -> int:
        """Models in the cache, also those that this mount does not show."""
        self.refresh()
        with self._lock:
            return len(self._paths)

    def size(self) -> int:
        """Bytes of the models' files, as far as there are manifests of them."""
        with self._lock:
            known = {key: self._sizes.get(key, (0, 0)) for key in self._paths}
        sizes = {key: _manifest_size(self._layout, key, *stamped) for key, stamped in known.items()}
        with self._lock:
            self._sizes = sizes
        return sum(size for _, size in sizes.values())

    def _remove(self, key: str) -> None:
        with self._lock:
            path = self._paths.pop(key)
            if path is None:
                return
            trail = [self._root]
            for part in path.split("/"):
                trail.append(trail[-1].children[part])
            for names in trail:
                names.models -= 1
            for parent, part in zip(trail, path.split("/"), strict=False):
                if not parent.children[part].models:
                    del parent.children[part]
                    break
            handle = self._handles.handle_at(path)
            self._keys[handle].remove(key)
            if not self._keys[handle]:
                del self._keys[handle]


def _manifest_size(layout: Layout, key: str, stamp: int, size: int) -> tuple[int, int]:
    """The manifest's time and the bytes it tells, which were `size` when its time was `stamp`."""
    path = layout.manifest(key)
    try:
        now = path.stat().st_mtime_ns
        if now == stamp:
            return stamp, size
        files: Mapping[str, list[int]] = json.loads(path.read_bytes())["files"]
        return now, sum(values[0] for values in files.values())
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return 0, 0
