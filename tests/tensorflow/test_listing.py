"""TensorFlow and tensorflow_hub on models whose files a hub gives one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubfs.handles import cache_key
from hubfs.serve import LocalHub, RequestRecord
from tests.tensorflow.conftest import TensorFlow, tree_of, until


class Listed:
    """A hub over the models that TensorFlow saved; its answers can be held back."""

    def __init__(self, saved: Path, directory: Path) -> None:
        self.log: list[RequestRecord] = []
        self.go_on = threading.Event()
        self.go_on.set()
        for model in saved.iterdir():
            if model.is_dir():
                place = directory / "root/google" / model.name / "1"
                place.parent.mkdir(parents=True)
                # Not a link: those that lead out of the version are refused.
                place.mkdir()
                for name, content in tree_of(model).items():
                    path = place / name
                    if name.endswith("/"):
                        path.mkdir(parents=True, exist_ok=True)
                        continue
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
        self.hub = LocalHub(directory / "root", archive_dir=directory / "archives", on_request=self._note)

    def _note(self, record: RequestRecord) -> None:
        self.log.append(record)
        if record.range is not None:
            # Its connection brings nothing more meanwhile.
            self.go_on.wait(60)

    def archives(self) -> list[RequestRecord]:
        return [record for record in self.log if "compressed" in record.path and "uncom" not in record.path]


@pytest.fixture
def listed(saved: Path, tmp_path: Path) -> Iterator[Listed]:
    made = Listed(saved, tmp_path / "listed")
    with made.hub:
        yield made
        made.go_on.set()


@pytest.mark.parametrize("load_format", ["auto", "uncompressed"])
@pytest.mark.parametrize("name", ["embed", "big", "module", "keras"])
def test_models_are_what_they_are_on_disk(
    listed: Listed, mount, tensorflow: TensorFlow, saved: Path, name: str, load_format: str
) -> None:
    mounted = mount(listed.hub.url, load_format=load_format)
    load = getattr(tensorflow, name)
    assert load(path=mounted.path / f"google/{name}/1") == load(path=saved / name)
    assert listed.archives() == []
    if load_format == "uncompressed":
        assert not mounted.cache.exists()


def test_hub_load_finds_what_was_read_by_range(
    listed: Listed, mount, tensorflow: TensorFlow, saved: Path
) -> None:
    mounted = mount(listed.hub.url)
    expected = tensorflow.embed(path=saved / "embed")
    assert tensorflow.embed(path=mounted.path / "google/embed/1") == expected
    handle = f"{listed.hub.url}/google/embed/1"
    until(lambda: (mounted.cache / cache_key(handle)).exists(), "the model in the cache")
    until(lambda: not list(mounted.cache.glob("*.lock")), "the end of the transfer")
    asked = len(listed.log)
    assert tensorflow.embed(path=handle, how="hub.load", cache=mounted.cache) == expected
    assert len(listed.log) == asked


def test_hub_load_waits_for_what_is_being_read_ahead(
    listed: Listed, mount, other_tensorflow: Callable[..., TensorFlow], saved: Path
) -> None:
    other = other_tensorflow()
    mounted = mount(listed.hub.url)
    handle = f"{listed.hub.url}/google/big/1"
    listed.go_on.clear()
    with (mounted.path / "google/big/1/variables/variables.data-00000-of-00001").open("rb") as file:
        file.read(1000)
        until(lambda: (mounted.cache / f"{cache_key(handle)}.lock").exists(), "the lock")
        other.begin("resolve", handle=handle, cache=mounted.cache)
        until(lambda: "already being downloaded" in other.said, "tensorflow_hub to wait")
        listed.go_on.set()
        # A bucket knows no empty directories.
        files = {name: data for name, data in tree_of(saved / "big").items() if not name.endswith("/")}
        assert tree_of(Path(other.end())) == files
    assert listed.archives() == []
