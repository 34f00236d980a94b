"""`hubfs pull` of a model, beside another way, and beside what no way can be faster than.

Whole commands, each into an empty directory. `pull` checks what arrives and brings it to stable storage;
`curl | tar xz` does neither. The slowest resource is one of: the line (`curl -o` to the same disk), the disk
(`dd conv=fsync` of the unpacked bytes) and one core (inflating the archive with isal, in steps of 256 KiB).
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator
from typing import Final

from scripts.bench.bench import Bench, seconds, warm
from scripts.bench.models import DATA, Model, transfer_model
from scripts.bench.processes import Unavailable, hubfs_command, run_quietly
from scripts.bench.results import Result, compared, compared_with_one_of
from scripts.bench.server import GIGABIT, LOOPBACK, Link, serving

_TAR: Final = "curl | tar xz"
#: Issue 3, beside the slowest resource.
_SLOWEST: Final = 1.3
_INFLATE: Final = """
import sys
from isal import isal_zlib
inflate = isal_zlib.decompressobj(31)
with open(sys.argv[1], "rb", buffering=0) as file:
    while block := file.read(256 << 10):
        inflate.decompress(block)
"""


def pull(bench: Bench) -> Iterator[Result]:
    if shutil.which("curl") is None:
        raise Unavailable("curl is not installed")
    for kind, size in (("large", bench.sizes.large), ("embed", bench.sizes.embed)):
        model = transfer_model(bench.work, kind, size)
        for link in (LOOPBACK, GIGABIT):
            yield from _pull(bench, kind, model, link)


def _pull(bench: Bench, kind: str, model: Model, link: Link) -> Iterator[Result]:
    times: dict[str, list[float]] = {}
    with serving({model.handle: model.archive}, link, digests=bench.digests) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"pull of {model.handle}, {link.name}, {run + 1}")
            warm(model.archive.path)
            ways = _ways(model, f"{url}/{model.handle}") if link is LOOPBACK else _two_ways(url, model)
            for way, command in ways.items():
                with bench.fresh_cache() as directory:
                    words = [word.replace("{directory}", str(directory)) for word in command]
                    times.setdefault(way, []).append(seconds(lambda: run_quietly(*words)))  # noqa: B023
    name = f"{kind}, {model.size / 1e6:.0f} MB, {link.name}"
    ours, tar = times.pop("hubfs"), times.pop(_TAR)
    speed = f"{model.size / statistics.median(ours) / 1e6:.0f} MB/s of files"
    yield compared(f"{name}, beside {_TAR}", "s", ours, tar, _TAR, note=speed)
    if times:
        limit = _SLOWEST if kind == "large" else None
        yield compared_with_one_of(max, f"{name}, beside the slowest resource", "s", ours, times, limit)


def _two_ways(url: str, model: Model) -> dict[str, list[str]]:
    handle = f"{url}/{model.handle}"
    archive = f"{handle}?tf-hub-format=compressed"
    return {
        "hubfs": [*hubfs_command(), "pull", "--cache-dir", "{directory}", handle],
        _TAR: ["bash", "-o", "pipefail", "-c", f"curl -sSfL '{archive}' | tar xz -C '{{directory}}'"],
    }


def _ways(model: Model, handle: str) -> dict[str, list[str]]:
    url = handle.removesuffix(f"/{model.handle}")
    data = model.tree / DATA
    return {
        **_two_ways(url, model),
        "curl -o": ["curl", "-sSf", "-o", "{directory}/archive", f"{handle}?tf-hub-format=compressed"],
        "inflating": [sys.executable, "-c", _INFLATE, str(model.archive.path)],
        "dd": ["dd", f"if={data}", "of={directory}/data", "bs=1M", "conv=fsync", "status=none"],
    }
