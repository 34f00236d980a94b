"""Why a target is missed, by part and the beginning of a row's name. The page shows it while it is missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from scripts.bench.results import Result

_REASONS: Final[Mapping[tuple[str, str], str]] = {}


def reason(result: Result) -> str:
    """The reason for a row, empty where none is known."""
    found = (
        why for (part, name), why in _REASONS.items() if part == result.part and result.name.startswith(name)
    )
    return next(found, "")
