"""Why a target is missed, by part and the beginning of a row's name. The page shows it while it is missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from scripts.bench.results import Result

_LISTINGS = (
    "up to four requests a directory, each answered in Python; libfuse 3.14 drops the flag by which the "
    "kernel keeps listings, 3.17 does not"
)
_CORES = "two cores for the bench's server, the daemon and two readers"

_REASONS: Final[Mapping[tuple[str, str], str]] = {
    ("read", "root: sequential, first"): (
        "two copies more than natively, into pages that the kernel must find first; not so with passthrough"
    ),
    ("read", "unprivileged: sequential, first"): "requests of 128 KiB; only root may raise the readahead",
    ("open", "open + read + close"): (
        "not fully understood: other runs on this machine took 33 µs; it seems to depend on which CPU answers"
    ),
    ("metadata", "find"): _LISTINGS,
    ("load-cold", "embed"): "inflating takes 0.5 s and TensorFlow another 0.5 s, and it needs the end first",
    ("load-cold", "large"): "inflating takes 2.7 s of one core and TensorFlow another second",
    ("stream", "cold load of large, 1007 MB, loopback, AUTO, beside rclone"): (
        "both CPUs are busy: TensorFlow takes 0.6 to 0.9 s from a local disk, the server has 0.2 s of work, "
        "the daemon 1.0 s (what comes, the disk's cache, the kernel's questions); rclone keeps nothing here "
        "and checks nothing"
    ),
    ("stream", "daemon killed"): (
        "what the server had sent into the connections' buffers when the daemon was killed, while the CPUs "
        "were busy; nothing that had been written"
    ),
    ("transfer", "the daemon's CPU"): "download, inflating and writing overlap: more than one core is busy",
    ("transfer", "a pass over"): _CORES,
}


def reason(result: Result) -> str:
    """The reason for a row, empty where none is known."""
    found = (
        why for (part, name), why in _REASONS.items() if part == result.part and result.name.startswith(name)
    )
    return next(found, "")
