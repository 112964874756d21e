"""The smallest words of the report's HTML: text that cannot be markup, numbers, tables, style. Knows no
report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

# What has no place in a page, or could make it read otherwise than it is: controls, marks of direction,
# halves of surrogate pairs (a file's name may hold them), noncharacters.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_MAX_TEXT = 400

STYLE = (Path(__file__).parent / "data" / "report.css").read_text(encoding="ascii")


def text(value: Any) -> str:
    """A value as text in HTML, in an element or in quotes."""
    shown = _UNSHOWN.sub("\ufffd", str(value))
    if len(shown) > _MAX_TEXT:
        shown = shown[: _MAX_TEXT - 1] + "…"
    return escape(shown, quote=True)


def is_number(value: Any) -> bool:
    """Whether `value` can be shown as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, form: str = ".3g") -> str:
    """A number in a form of its own, or a dash."""
    return format(value, form) if is_number(value) else "–"


def percent(value: Any, digits: int = 0) -> str:
    """A fraction as percent, or a dash."""
    return f"{100 * value:.{digits}f}%" if is_number(value) else "–"


def size(value: Any) -> str:
    """Bytes, for people."""
    if not is_number(value):
        return "–"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return "–"


def cell(content: str, kind: str = "", title: str = "") -> str:
    """A td of HTML `content`."""
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' title="{title}"' if title else ""
    return f"<td{attributes}>{content}</td>"


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """`head` holds titles and classes, `rows` cells. It scrolls by itself where it is wider than the page."""
    titles = "".join(
        f'<th scope="col" class="{kind}">{title}</th>' if kind else f'<th scope="col">{title}</th>'
        for title, kind in head
    )
    lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def details(summary: str, content: str) -> str:
    """Folded away until asked for."""
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"
