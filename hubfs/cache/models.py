"""The versions in a cache directory, for `hubfs ls`. No request is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hubfs.cache.layout import Layout, is_present, locked_keys, read_descriptor
from hubfs.cache.manifest import read_or_adopt
from hubfs.cache.partial import summary
from hubfs.cache.state import State
from hubfs.errors import CacheError
from hubfs.handles import version_of


@dataclass(frozen=True)
class Model:
    """A version in the cache.

    Attributes:
        handle: `None` if the cache does not say (its descriptor is missing).
        state: `complete`, `partial`, `damaged`, `empty`, `transferring`.
        size: bytes; of what is there.
        last_used: epoch seconds.
    """

    handle: str | None
    key: str
    path: str
    state: str
    version: str | None
    size: int
    files: int
    last_used: float | None


def models(layout: Layout) -> Iterator[Model]:
    """Every version in the cache directory, also those that are not whole."""
    locked = locked_keys(layout)
    present, partial = set(layout.keys()), set(layout.partial_keys())
    for key in sorted({*present, *locked, *partial}):
        handle = read_descriptor(layout.descriptor(key))
        if key in present:
            yield _model(layout, key, handle)
        elif key in partial:
            yield _partial_model(layout, key)
        else:
            path = str(layout.model(key))
            yield Model(handle, key, path, State.TRANSFERRING.value, version_of(handle or ""), 0, 0, None)


def prefixed(models: Iterable[Model], prefix: str, hub: str) -> Sequence[Model]:
    """Those whose handle, or whose path at the default hub, begins with `prefix`."""
    wanted = prefix.strip("/")
    return [
        model
        for model in models
        if not wanted
        or (model.handle or "").startswith(prefix)
        or (model.handle or "").startswith(f"{hub}/{wanted}")
    ]


def _model(layout: Layout, key: str, handle: str | None) -> Model:
    directory = layout.model(key)
    version, used = version_of(handle or ""), _last_use(layout, key)
    if not is_present(directory):
        return Model(handle, key, str(directory), "empty", version, 0, 0, used)
    try:
        manifest, _ = read_or_adopt(directory, layout.manifest(key), handle or key)
    except (CacheError, FileNotFoundError):
        return Model(handle, key, str(directory), "damaged", version, 0, 0, used)
    size, files = manifest.size, len(manifest.files)
    return Model(handle, key, str(directory), State.COMPLETE.value, version, size, files, used)


def _partial_model(layout: Layout, key: str) -> Model:
    path = layout.partial(key)
    handle, there, files = summary(path) or (None, 0, 0)
    version, used = version_of(handle or ""), _last_use(layout, key)
    return Model(handle, key, str(path), State.PARTIAL.value, version, there, files, used)


def _last_use(layout: Layout, key: str) -> float | None:
    with contextlib.suppress(OSError):
        return layout.last_use(key).stat().st_mtime
    return None
