"""report.html: one page that needs nothing but itself, no script, no network. Knows the report's document
(report.py) and copes with what is missing in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from services.quantizer.report_figures import colour_style
from services.quantizer.report_linears import Linears, error_maps, histograms, linear_table, methods
from services.quantizer.report_markup import (
    STYLE,
    cell,
    details,
    is_number,
    number,
    percent,
    size,
    table,
    text,
)

_VARIANTS = {"source": "source", "rounding": "4-bit, plain rounding", "chosen": "4-bit, as stored"}
# Forbids what is not there anyway: whoever injects markup gets no script and no request out of it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_MAX_ROWS = 1400


def report_html(report: dict[str, Any]) -> bytes:
    """The page, UTF-8."""
    model = text(report["model"])
    linears: Linears = report["linears"]
    group_size = text(report["recipe"].get("group_size", "–"))
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<link rel="icon" href="data:,">',
        f"<title>{model}: quantization report</title><style>{STYLE}{colour_style()}</style></head><body>",
        f"<h1>{model}</h1>",
        f'<p class="dim">Quantization report: {len(linears):,} linears, 4 bits, groups of {group_size}.</p>',
        *(f'<p class="missed">Not published: {text(line)}.</p>' for line in report.get("missed", [])),
        _tiles(report),
        _quality(report["quality"]),
        error_maps(linears),
        methods(linears),
        linear_table(linears),
        histograms(linears),
        _scales(report["scales"]),
        _full_precision(report["full_precision"]),
        _texts(report.get("texts", {}), report["quality"]),
        _sizes(report.get("sizes", {})),
        _recipe(report["recipe"]),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part).encode("utf-8")


def _tiles(report: dict[str, Any]) -> str:
    quality, sizes = report["quality"] or {}, report.get("sizes", {})
    chosen = quality.get("chosen", {})
    source, stored = quality.get("source", {}).get("perplexity"), chosen.get("perplexity")
    tiles = []
    if quality:
        tiles += [
            (f"perplexity; the source's is {number(source, '.3f')}", number(stored, ".3f")),
            ("more perplexity than the source", percent(_increase(source, stored), 2)),
            ("mean KL from the source, nats", number(chosen.get("mean_kl"), ".5f")),
            ("same next token as the source", percent(chosen.get("greedy_agreement"), 2)),
        ]
    if sizes:
        tiles += [
            (f"weights; {size(sizes.get('source_bytes'))} before", size(sizes.get("artifact_bytes"))),
            ("bits a parameter, in all", number(sizes.get("bits_per_parameter"), ".2f")),
        ]
    content = "".join(f'<div class="tile"><b>{value}</b>{name}</div>' for name, value in tiles)
    return f'<div class="tiles">{content}</div>' if tiles else ""


def _increase(source: Any, stored: Any) -> float | None:
    return stored / source - 1 if is_number(source) and is_number(stored) and source > 0 else None


def _quality(quality: dict[str, Any] | None) -> str:
    title = "<h2>Quality on held-out text</h2>"
    if quality is None:
        return f"{title}<p>Not evaluated.</p>"
    intervals = quality.get("intervals") or {}
    source = quality.get("source", {}).get("perplexity")
    rows = []
    for variant, label in _VARIANTS.items():
        entry, bounds = quality.get(variant, {}), intervals.get(variant, {})
        increase = None if variant == "source" else _increase(source, entry.get("perplexity"))
        rows.append(
            [
                cell(label),
                _figure(entry.get("perplexity"), bounds.get("perplexity"), lambda v: number(v, ".3f")),
                _figure(increase, bounds.get("perplexity_increase"), lambda v: percent(v, 2)),
                _figure(entry.get("mean_kl"), bounds.get("mean_kl"), lambda v: number(v, ".5f")),
                _figure(
                    entry.get("greedy_agreement"), bounds.get("greedy_agreement"), lambda v: percent(v, 2)
                ),
            ]
        )
    head = (
        ("weights", ""), ("perplexity", "n"), ("increase", "n"), ("mean KL, nats", "n"),
        ("same next token", "n"),
    )  # fmt: skip
    told = f"{number(quality.get('predicted_tokens'), ',')} predicted tokens. "
    if intervals:
        told += (
            f"Below each figure its {percent(intervals.get('level'))} bootstrap interval over "
            f"{number(quality.get('windows'), ',')} windows."
        )
    else:
        told += "Too few windows for intervals."
    told += " KL is of the quantized model's predictions from the source's."
    return f"{title}<p>{told}</p>\n{table(head, rows)}"


def _figure(value: Any, bounds: Any, show: Callable[[Any], str]) -> str:
    content = "" if value is None else show(value)
    if value is not None and isinstance(bounds, list) and len(bounds) == 2:
        content += f"<small>{show(bounds[0])} to {show(bounds[1])}</small>"
    return cell(content, "n")


def _scales(scales: dict[str, str]) -> str:
    if not scales:
        return ""
    counts: dict[str, int] = {}
    for label in scales.values():
        family = str(label).split(" ")[0]
        counts[family] = counts.get(family, 0) + 1
    told = ", ".join(f"{text(family)} {count:,}" for family, count in sorted(counts.items()))
    shown = list(scales.items())[:_MAX_ROWS]
    rows = [[cell(text(group), "free"), cell(text(label))] for group, label in shown]
    left_out = f" The first {_MAX_ROWS:,}; report.json has all." if len(shown) < len(scales) else ""
    return (
        f"<h2>Scales taken</h2>\n<p>Of groups of linears that read one input: {told}. x-only: powers of the "
        f"inputs' mean size; duo: divided by the weights'; identity: none.{left_out}</p>\n"
        + details("Every group", table((("linears", ""), ("scales", "")), rows))
    )


def _full_precision(names: list[str]) -> str:
    if not names:
        return ""
    rows = [[cell(text(name), "free")] for name in names[:_MAX_ROWS]]
    return (
        f"<h2>Left in full precision</h2>\n<p>{len(names):,} linears that do not divide into groups, or that "
        "share an input with one.</p>\n" + details("Their names", table((("linear", ""),), rows))
    )


def _texts(texts: dict[str, Any], quality: dict[str, Any] | None) -> str:
    columns = {
        "file": "file", "kind": "kind", "weight": "weight", "documents": "documents",
        "duplicate_paragraphs": "paragraphs dropped", "duplicate_documents": "documents dropped",
        "duplicate_windows": "windows dropped", "windows": "windows", "chosen": "taken", "tokens": "tokens",
    }  # fmt: skip
    parts = []
    for use in ("calibration", "evaluation"):
        files = [entry for entry in texts.get(use) or [] if isinstance(entry, dict)]
        if not files:
            continue
        present = [key for key in columns if any(entry.get(key) is not None for entry in files)]
        rows = [
            [
                cell(text(entry.get(key, "–")), "free" if key == "file" else "")
                if isinstance(entry.get(key, "–"), str)
                else cell(number(entry.get(key), ","), "n")
                for key in present
            ]
            for entry in files
        ]
        head = [(columns[key], "" if key in ("file", "kind") else "n") for key in present]
        parts.append(f"<h3>{use.capitalize()}</h3>\n{table(head, rows)}")
    if quality is not None and parts:
        parts.append(
            f"<p>Evaluated on {number(quality.get('tokens'), ',')} tokens. Runs of words were compared: the "
            "calibration text does not hold the evaluation text.</p>"
        )
    return "<h2>Text</h2>\n" + "\n".join(parts) if parts else ""


def _sizes(sizes: dict[str, Any]) -> str:
    if not sizes:
        return ""
    rows = [
        ("parameters", number(sizes.get("parameters"), ",")),
        ("weights of the source", size(sizes.get("source_bytes"))),
        ("weights of the artifact", size(sizes.get("artifact_bytes"))),
        ("bits a parameter, in all", number(sizes.get("bits_per_parameter"), ".3f")),
        (
            "bits a quantized weight, with scale and zero point",
            number(sizes.get("bits_per_quantized_weight"), ".3f"),
        ),
    ]
    return "<h2>Size</h2>\n" + table((("", ""), ("", "n")), [[cell(a), cell(b, "n")] for a, b in rows])


def _recipe(recipe: dict[str, Any]) -> str:
    rows = []
    for key in sorted(recipe):
        value = recipe[key]
        shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        rows.append([cell(text(key)), cell(text(shown), "free")])
    return "<h2>Recipe</h2>\n" + table((("setting", ""), ("value", "")), rows)
