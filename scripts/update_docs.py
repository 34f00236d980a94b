"""Write the parts of README.md that follow from the code: `python scripts/update_docs.py [--check]`."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

from hubfs.cli.options import option_name
from hubfs.config import LoadFormat, Settings, env_name

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- settings: written by scripts/update_docs.py -->", "<!-- end of settings -->"


def settings_table() -> str:
    """All settings as a Markdown table."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    kinds = get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        cells = [
            f"`{option_name(field)}`",
            f"`{env_name(field)}`",
            _default(field, kinds[field.name]),
            field.metadata["help"] + (f" ({field.metadata['unit']})" if field.metadata["unit"] else ""),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """The README with the present settings in it."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{settings_table()}\n{END}", text, flags=re.S)


def _default(field: dataclasses.Field[Any], kind: Any) -> str:
    if kind is bool:
        return "yes" if field.default else "no"
    if field.default in ("", ()):
        return ""
    if isinstance(field.default, LoadFormat):
        return f"`{field.default.value}`"
    if field.metadata["unit"] == "bytes":
        unit, name = (10**9, "GB") if field.default >= 10**9 else (10**6, "MB")
        return f"{field.default // unit} {name}"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def main() -> int:
    before = README.read_text(encoding="utf8")
    after = updated(before)
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
