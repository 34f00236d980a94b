"""The caches of thousands of models that start-up, `stat` and `find` are measured on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hubfs.cache.layout import Layout
from hubfs.handles import cache_key
from scripts.bench.bench import NOWHERE, Bench
from scripts.bench.models import drop_manifests, fake_cache, write_manifests


@dataclass(frozen=True)
class Cache:
    """A cache directory.

    Attributes:
        paths: mount paths of the models in it.
        adopted: whether hubfs is to know them already, by manifests of its own.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    adopted: bool = True

    def reset(self) -> None:
        """Undo what a mount has noted in it."""
        if not self.adopted:
            drop_manifests(self.root)

    @property
    def handles(self) -> list[str]:
        return [f"{NOWHERE}/{path}" for path in self.paths]


def caches(bench: Bench) -> list[Cache]:
    """The same models as tensorflow_hub leaves them, and as hubfs does."""
    count = bench.sizes.models
    found = []
    for kind, adopted in (("tensorflow_hub's", False), ("hubfs's", True)):
        root = bench.work / "caches" / f"{'hubfs' if adopted else 'tfhub'}-{count}"
        cache = Cache(
            f"{count:,} models of {kind}", root, tuple(fake_cache(root, NOWHERE, count)), adopted=adopted
        )
        if adopted:
            write_manifests(root, cache.handles)
        found.append(cache)
    return found


def plain_tree(cache: Cache) -> Path:
    """The files of a cache in a tree of the same directories as a mount shows; made once, of hard links."""
    root = cache.root.with_name(f"tree-{len(cache.paths)}")
    if not root.exists():
        place, unfinished = Layout(cache.root), root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for path, handle in zip(cache.paths, cache.handles, strict=True):
            shutil.copytree(place.model(cache_key(handle)), unfinished / path, copy_function=os.link)
        unfinished.rename(root)
    return root
