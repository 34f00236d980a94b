"""Bringing a model into the cache with `hubfs pull`, beside `curl | tar xz`, which checks nothing."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator

from scripts.bench.bench import Bench, Unavailable, hubfs_command, run_quietly, seconds, warm
from scripts.bench.models import Model, transfer_model
from scripts.bench.results import Result, compared
from scripts.bench.server import GIGABIT, LOOPBACK, Link, serving


def pull(bench: Bench) -> Iterator[Result]:
    """Whole commands, each into an empty directory. `pull` also brings the model to stable storage."""
    if shutil.which("curl") is None:
        raise Unavailable("curl is not installed")
    for kind, size in (("large", bench.sizes.large), ("embed", bench.sizes.embed)):
        model = transfer_model(bench.work, kind, size)
        for link in (LOOPBACK, GIGABIT):
            yield _pull(bench, kind, model, link)


def _pull(bench: Bench, kind: str, model: Model, link: Link) -> Result:
    ours, theirs = [], []
    with serving({model.handle: model.archive}, link, digests=bench.digests) as url:
        for run in range(bench.sizes.runs):
            bench.say(f"pull of {model.handle}, {link.name}, {run + 1}")
            warm(model.archive.path)
            with bench.fresh_cache() as cache:
                command = [*hubfs_command(), "pull", "--cache-dir", str(cache), f"{url}/{model.handle}"]
                ours.append(seconds(lambda: run_quietly(*command)))  # noqa: B023
            with bench.fresh_cache() as cache:
                script = f"curl -sSfL '{url}/{model.handle}?tf-hub-format=compressed' | tar xz -C '{cache}'"
                theirs.append(seconds(lambda: run_quietly("bash", "-o", "pipefail", "-c", script)))  # noqa: B023
    note = f"{model.size / statistics.median(ours) / 1e6:.0f} MB/s of files"
    name = f"{kind}, {model.size / 1e6:.0f} MB, {link.name}"
    return compared("pull", name, "s", ours, theirs, "curl | tar xz", note=note)
