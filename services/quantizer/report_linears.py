"""What the report shows of the linears: heat maps of their errors, methods, figures, histograms. Knows their
entries of the report's document, and copes with what is missing in them.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from services.quantizer.report_figures import by_block, heat_map, histogram, legend, short_names
from services.quantizer.report_markup import cell, details, is_number, number, percent, table, text

_MAX_HISTOGRAMS = 640
_MAX_ROWS = 1400

Linears = dict[str, dict[str, Any]]
"""Name -> what the report tells of a linear: at least its errors, where they are known."""


def _left(linear: dict[str, Any]) -> float | None:
    """The part of rounding's error that is left."""
    rounding, chosen = linear.get("rounding"), linear.get("chosen")
    if not is_number(rounding) or not is_number(chosen):
        return None
    return chosen / rounding if rounding > 0 else 1.0


def error_maps(linears: Linears) -> str:
    stored = [e["chosen"] for e in linears.values() if is_number(e.get("chosen")) and e["chosen"] > 0]
    if not stored:
        return ""

    def tooltip(name: str) -> str:
        linear = linears[name]
        errors = [f"{key} {number(linear.get(key), '.4g')}" for key in ("rounding", "chosen")]
        extra = [str(linear[key]) for key in ("method", "scales") if key in linear]
        return f"{name}: " + ", ".join([*errors, f"{percent(_left(linear))} left", *extra])

    def left(name: str) -> tuple[float, str] | None:
        value = _left(linears[name])
        return None if value is None else (value, f"{100 * value:.0f}")

    low, high = math.log10(min(stored)), math.log10(max(stored))
    unit = 3 * math.floor(math.log10(median(stored)) / 3)

    def absolute(name: str) -> tuple[float, str] | None:
        value = linears[name].get("chosen")
        if not is_number(value):
            return None
        place = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
        return place, number(value / 10.0**unit, ".1f" if value < 100 * 10.0**unit else ".0f")

    names = list(linears)
    second = (
        f"<p>‖X(W − W′)‖² / ‖XW‖² of what is stored, in units of 10<sup>{unit}</sup>; the colours are "
        f"logarithmic.</p>{legend(f'{10**low:.2g}', f'{10**high:.2g}')}"
        f"{heat_map(names, absolute, tooltip)}"
    )
    return (
        "<h2>Error of each linear</h2>\n<p>How many percent of plain rounding's error are left, by block "
        "(down) and linear (across), over the calibration text. Pointing at a cell tells both errors; the "
        "table below has them all.</p>\n"
        f"{legend('0%: none left', '100%: no better than rounding')}\n{heat_map(names, left, tooltip)}\n"
        + details("The error itself, of what is stored", second)
    )


def methods(linears: Linears) -> str:
    found: dict[str, list[float]] = {}
    for linear in linears.values():
        if "method" in linear:
            found.setdefault(str(linear["method"]), []).append(_left(linear) or 0.0)
    if not found:
        return ""
    rows = [
        [cell(text(method)), cell(f"{len(left):,}", "n"), cell(percent(median(left)), "n")]
        for method, left in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    head = (("method", ""), ("linears", "n"), ("error left, median", "n"))
    return (
        "<h2>Methods taken</h2>\n<p>Chosen for each linear on calibration text that the methods had not "
        "seen.</p>\n" + table(head, rows)
    )


def linear_table(linears: Linears) -> str:
    tried: dict[str, None] = {}
    for linear in linears.values():
        tried.update(dict.fromkeys(_mapping(linear.get("held_out"))))
    has_shrink = any(_mapping(linear.get("shrink")) for linear in linears.values())
    shown, note = _spread(linears, _MAX_ROWS)
    rows = []
    for name in shown:
        linear = linears[name]
        held_out, shrink = _mapping(linear.get("held_out")), _mapping(linear.get("shrink"))
        rows.append(
            [
                cell(text(name)),
                cell(number(linear.get("rounding"), ".3e"), "n"),
                cell(number(linear.get("chosen"), ".3e"), "n"),
                cell(percent(_left(linear)), "n"),
                cell(text(linear.get("method", "–"))),
                cell(text(linear.get("scales", "–"))),
                *(
                    cell(
                        number(held_out.get(method), ".3e"),
                        "n best" if method == linear.get("method") else "n",
                    )
                    for method in tried
                ),
                *(cell(number(shrink.get(side), ".3f"), "n") for side in ("low", "high") if has_shrink),
            ]
        )
    head = [("linear", ""), ("rounding", "n"), ("stored", "n"), ("left", "n"), ("method", ""), ("scales", "")]
    head += [(f"held out: {text(method)}", "n") for method in tried]
    head += [("low kept", "n"), ("high kept", "n")] if has_shrink else []
    told = "<p>Errors are ‖X(W − W′)‖² / ‖XW‖²."
    if tried:
        told += (
            " Held out: the error of each method on calibration text it had not seen; the taken one is bold."
        )
    if has_shrink:
        told += " Kept: the mean part of a group's lowest and highest value that its 16 levels span."
    return details(f"All linears in figures{note}", f"{told}</p>{table(head, rows)}")


def histograms(linears: Linears) -> str:
    having = {name: e for name, e in linears.items() if _mapping(e.get("histogram"))}
    shown, note = _spread(having, _MAX_HISTOGRAMS)
    blocks, columns, others = by_block(shown)
    short = dict(zip(columns, short_names(columns), strict=True))
    groups = [
        (f"block {block}", [(short[column], name) for column, name in found.items()])
        for block, found in blocks.items()
    ]
    if others:
        groups.append(("others", [(name, name) for name in others]))
    folded = []
    for title, found in groups:
        plots = [histogram(label, having[name]["histogram"]) for label, name in found]
        drawn = "\n".join(plot for plot in plots if plot is not None)
        if drawn:
            folded.append(details(title, f'<div class="plots">{drawn}</div>'))
    if not folded:
        return ""
    return (
        "<h2>Weights before and after</h2>\n<p>Histograms over one range:"
        '<span class="key" style="background:var(--before)"></span>source'
        '<span class="key" style="background:var(--after)"></span>'
        f"stored, with its scales undone{note}.</p>\n" + "\n".join(folded)
    )


def _spread(linears: Linears, most: int) -> tuple[list[str], str]:
    """The names of at most about `most` linears, whole blocks evenly spaced, and a note if some are left
    out.
    """
    names = list(linears)
    if len(names) <= most:
        return names, ""
    blocks, _, _ = by_block(names)
    step = math.ceil(len(names) / most)
    kept = [name for block in list(blocks)[::step] for name in blocks[block].values()]
    return kept, f" (one block of {step}; report.json has all)"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
