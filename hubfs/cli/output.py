"""How the commands print: for a person at a terminal, for `awk` in a pipe, or as JSON for a program.

At a terminal a size is `1.2 GiB` and a time `3 hours ago`. Elsewhere a cell never contains a blank,
so that columns stay columns: `1.2GiB`, `2026-03-04T15:16:17`; and one without a value is `-`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hubfs.errors import HubfsError

_PERIODS = (("year", 365 * 86400), ("month", 30 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60))


def size(count: float, blank: str = " ") -> str:
    """Bytes in binary units: `0 B`, `1.0 KiB`, `1.2 GiB`."""
    if count < 1024:
        return f"{int(count)}{blank}B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        # 1023.95 and more would be rounded to 1024.0 of this unit.
        if count < 1023.95:
            return f"{count:.1f}{blank}{unit}"
    return f"{count / 1024:.1f}{blank}PiB"


def ago(when: float, now: float | None = None) -> str:
    """How long a time (epoch seconds) is past: `just now`, `3 hours ago`."""
    return (
        f"{passed} ago" if (passed := _period((time.time() if now is None else now) - when)) else "just now"
    )


def duration(seconds: float) -> str:
    """Seconds as the largest unit that fits: `40 seconds`, `3 hours`."""
    return _period(seconds) or f"{max(0, int(seconds))} seconds"


def _period(seconds: float) -> str:
    for unit, length in _PERIODS:
        number = int(seconds // length)
        if number >= 1:
            return f"{number} {unit}{'s' if number > 1 else ''}"
    return ""


def size_cell(count: int) -> str:
    """A size for a column of `print_table`."""
    return size(count, " " if sys.stdout.isatty() else "")


def time_cell(when: float | None) -> str:
    """A time (epoch seconds) for a column of `print_table`."""
    if when is None:
        return "-"
    if sys.stdout.isatty():
        return ago(when)
    return datetime.fromtimestamp(when).isoformat(timespec="seconds")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows below a heading; the columns named in `right` are aligned there."""
    if sys.stdout.isatty():
        _print_rich(columns, rows, right)
        return
    lines = [[name.upper().replace(" ", "-") for name in columns], *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        # Text, not str: a handle may hold brackets, which rich would take for markup.
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(message: str, hint: str = "") -> None:
    """Print an error on stderr, with what to do next if that is known."""
    print(f"hubfs: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"  next: {' '.join(hint.split())}", file=sys.stderr)


def error_as_json(error: HubfsError | None) -> dict[str, Any] | None:
    """An error as `--json` shows it: its name without `Error`, message, hint and errno."""
    if error is None:
        return None
    kind = type(error).__name__.removesuffix("Error")
    return {"kind": kind, "message": error.message, "hint": error.hint, "errno": error.errno}
