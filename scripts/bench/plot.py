"""Plots as SVG text: bars, and dots on a logarithmic scale.

Their background is transparent, and each colour can be read on white as well as on the dark of code hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from scripts.bench.results import number

_TEXT: Final = "#6e7781"
_LINE: Final = "#9198a1"
_COLOURS: Final = ("#2f81f7", "#d4761f", "#2da44e", "#a371f7")
_OTHERS: Final = "#8b949e"
_WIDTH: Final = 960
_LABELS: Final = 460  # pixels left of the plot
_ROW: Final = 20
_HEAD: Final = 52


@dataclass(frozen=True)
class Point:
    """A median with the least and greatest value it comes from."""

    median: float
    low: float
    high: float


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, Point]], ours: str) -> str:
    """Horizontal bars from 0, in groups that have a heading each.

    Args:
        ours: bars whose names begin so have a colour; the others are grey.
    """
    most = max(point.high for group in groups.values() for point in group.values())
    scale = (_WIDTH - _LABELS - 90) / most
    body: list[str] = []
    y = _HEAD - 14
    for heading, group in groups.items():
        if heading:
            body.append(_text(14, y + 15, heading, weight="600"))
            y += _ROW
        for name, point in group.items():
            colour = _COLOURS[0] if name.startswith(ours) else _OTHERS
            end = _LABELS + point.median * scale
            body.append(_text(_LABELS - 8, y + 14, name, anchor="end"))
            body.append(
                f'<rect x="{_LABELS}" y="{y + 3}" width="{end - _LABELS:.1f}" height="14" fill="{colour}"/>'
            )
            body.append(_whisker(_LABELS + point.low * scale, _LABELS + point.high * scale, y + 10, _TEXT))
            beyond = _LABELS + point.high * scale
            body.append(_text(max(beyond, end) + 6, y + 14, f"{number(point.median)} {unit}"))
            y += _ROW
        y += 8
    return _svg(title, y + 4, body)


def dots(title: str, below: str, rows: Mapping[str, Sequence[Point | None]], series: Sequence[str]) -> str:
    """A dot and its range for each row and series, on a logarithmic scale with a line at 1.

    Args:
        below: what the scale says.
        rows: by their labels, a point for each of `series`.
    """
    points = [point for row in rows.values() for point in row if point]
    low = min(0.5, *(point.low for point in points)) * 0.9
    high = max(2.0, *(point.high for point in points)) * 1.1

    def x(value: float) -> float:
        return _LABELS + (_WIDTH - _LABELS - 16) * math.log(value / low) / math.log(high / low)

    bottom = _HEAD + _ROW * len(rows)
    body = [
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_HEAD - 4}" y2="{bottom}" stroke="{_LINE}" '
        f'stroke-width="{1.5 if tick == 1 else 0.5}" stroke-dasharray="{"none" if tick == 1 else "2 3"}"/>'
        + _text(x(tick), bottom + 16, f"{tick:g}", anchor="middle")
        for tick in _ticks(low, high)
    ]
    body.append(_text(x(1), bottom + 34, below, anchor="middle"))
    for index, name in enumerate(series):
        at = 14 + 130 * index
        body.append(f'<circle cx="{at + 5}" cy="36" r="5" fill="{_COLOURS[index % len(_COLOURS)]}"/>')
        body.append(_text(at + 16, 40, name))
    for line, (label, row) in enumerate(rows.items()):
        middle = _HEAD + _ROW * line + _ROW / 2
        body.append(_text(_LABELS - 8, middle + 4, label, anchor="end"))
        for index, point in enumerate(row):
            if point:
                colour = _COLOURS[index % len(_COLOURS)]
                y = middle + 4 * (index - (len(row) - 1) / 2)
                body.append(_whisker(x(point.low), x(point.high), y, colour))
                body.append(f'<circle cx="{x(point.median):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    return _svg(title, bottom + 44, body)


def _ticks(low: float, high: float) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (tick for digit in (1, 2, 5) if low <= (tick := digit * 10.0**power) <= high)


def _whisker(start: float, end: float, y: float, colour: str) -> str:
    place = f'x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{escape(text)}</text>"


def _svg(title: str, height: float, body: Sequence[str]) -> str:
    font = f'font-family="system-ui, sans-serif" font-size="12" fill="{_TEXT}"'
    size = f'width="{_WIDTH}" height="{height:.0f}" viewBox="0 0 {_WIDTH} {height:.0f}"'
    head = f'<text x="14" y="18" font-size="14" font-weight="600">{escape(title)}</text>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">'
    return "\n".join([opening, f"<title>{escape(title)}</title>", head, *body, "</svg>\n"])
