"""The pictures of the report: heat maps of blocks by linears, and histograms, as plain HTML and SVG. Knows
how values become colours, not what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.quantizer.report_markup import is_number, number, text

# Colours that grow lighter evenly and that colour-blind eyes tell apart (viridis, of matplotlib).
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_NUM_STEPS = 21
_PLACE = re.compile(r"(.*?)(?:^|\.)(\d{1,6})\.(.+)")
_HEIGHT = 44

Maps = dict[int, dict[str, str]]
"""Block -> what is behind the block's number -> the full name."""


def by_block(names: Sequence[str]) -> tuple[Maps, list[str], list[str]]:
    """Names as blocks by linears; the columns in order of appearance; and the names that are in no block."""
    blocks: Maps = {}
    columns: dict[str, None] = {}
    others = []
    for name in names:
        match = _PLACE.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        blocks.setdefault(int(match[2]), {})[match[3]] = name
        columns[match[3]] = None
    return dict(sorted(blocks.items())), list(columns), others


def short_names(columns: Sequence[str]) -> list[str]:
    """The last part of each, or all of it where that would be said of two."""
    last = [column.rsplit(".", 1)[-1] for column in columns]
    return [short if last.count(short) == 1 else column for short, column in zip(last, columns, strict=True)]


def heat_map(
    names: Sequence[str], shown: Callable[[str], tuple[float, str] | None], tooltip: Callable[[str], str]
) -> str:
    """A row per block, a column per linear. `shown` gives a value in [0, 1] for the colour and the text of
    the cell, or None where there is nothing to show.
    """
    blocks, columns, _ = by_block(names)
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in short_names(columns))
    rows = []
    for block, linears in blocks.items():
        cells = []
        for column in columns:
            name = linears.get(column)
            value = None if name is None else shown(name)
            if name is None or value is None:
                cells.append('<td class="none">–</td>')
                continue
            step = round(min(max(value[0], 0.0), 1.0) * (_NUM_STEPS - 1))
            cells.append(f'<td class="c{step}" title="{text(tooltip(name))}">{text(value[1])}</td>')
        rows.append(f'<tr><th scope="row">{block}</th>{"".join(cells)}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table class="map"><thead><tr><th></th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def legend(low: str, high: str) -> str:
    """The colours from the value 0 to the value 1, with words at both ends."""
    gradient = f"linear-gradient(90deg,{','.join(_colour(i / 8) for i in range(9))})"
    bar = f'<i style="background:{gradient}"></i>'
    return f'<div class="scale"><span>{text(low)}</span>{bar}<span>{text(high)}</span></div>'


def colour_style() -> str:
    """The classes c0 to c20 of the cells, each with ink that can be read on it."""
    lines = []
    for step in range(_NUM_STEPS):
        value = step / (_NUM_STEPS - 1)
        lines.append(f".c{step}{{background:{_colour(value)};color:{'#fff' if value < 0.5 else '#10141a'}}}")
    return "".join(lines)


def histogram(label: str, data: Mapping[str, Any]) -> str | None:
    """Weights before (filled) and after (line) over one range; None when the record holds no such thing."""
    source, chosen = data.get("source"), data.get("chosen")
    if not (_is_counts(source) and _is_counts(chosen) and len(source) == len(chosen)):
        return None
    top = max([*source, *chosen, 1])
    ranges = f"{number(data.get('low'))} to {number(data.get('high'))}"
    width = 2 * len(source)
    return (
        f'<figure><svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{text(label)}">'
        f'<path class="before" d="{_steps(source, top)}z"/>'
        f'<path class="after" d="{_steps(chosen, top)}"/></svg>'
        f"<figcaption>{text(label)}<br>{ranges}</figcaption></figure>"
    )


def _is_counts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= 256
        and all(is_number(count) and count >= 0 for count in value)
    )


def _steps(counts: Sequence[float], top: float) -> str:
    """A path along the tops of the bars, from the ground to the ground; moves are relative, being shorter."""
    path, before = [f"M0 {_HEIGHT}"], _HEIGHT
    for count in counts:
        height = _HEIGHT - round((_HEIGHT - 4) * count / top)
        path.append(f"v{height - before}h2" if height != before else "h2")
        before = height
    return "".join([*path, f"V{_HEIGHT}"])


def _colour(value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(place), len(_STOPS) - 2)
    part = place - index
    mixed = (round(a + (b - a) * part) for a, b in zip(_STOPS[index], _STOPS[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
