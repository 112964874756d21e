"""report.json and report.html: what an artifact is and how good, for people. No clock times: equal runs,
equal bytes.

Knows the manifest's words, nothing of how the numbers arose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from weft.artifact.manifest import LinearError

_VARIANTS = {"source": "source", "rounding": "4-bit rounding", "chosen": "4-bit, as chosen"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;"
    "background:#fff}"
    ".wide{overflow-x:auto}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    "th.n,td.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".bar{display:inline-block;width:8em;height:.7em;background:#ddd}"
    ".bar i{display:block;height:100%;background:#4a7}"
)


def build_report(
    model: str,
    recipe: dict[str, Any],
    quality: dict[str, Any] | None,
    errors: dict[str, LinearError],
    choices: dict[str, str],
    full_precision: list[str],
) -> dict[str, Any]:
    """The report as a document; `choices` maps scale groups to the candidate taken, `full_precision` names
    the linears that were left as they are.
    """
    return {
        "model": model,
        "recipe": recipe,
        "quality": quality,
        "linears": {name: {"rounding": e.rounding, "chosen": e.chosen} for name, e in errors.items()},
        "scales": choices,
        "full_precision": full_precision,
    }


def report_json(report: dict[str, Any]) -> bytes:
    """Indented, in key order."""
    return json.dumps(report, indent=1, sort_keys=True).encode("ascii") + b"\n"


def report_html(report: dict[str, Any]) -> bytes:
    """One self-contained page."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{escape(report['model'])}: quantization report</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report['model'])}: quantization report</h1>",
        _quality_table(report["quality"]),
        (
            "<h2>Error of each linear</h2><p>||X(W - W')||&sup2; / ||XW||&sup2; over the calibration set; "
            "the bar is the part of plain rounding's error that is left.</p>"
        ),
        _error_table(report["linears"]),
        *_full_precision(report["full_precision"]),
        "<h2>Scales taken</h2>",
        _pairs_table(report["scales"], "linears", "scales"),
        "<h2>Recipe</h2>",
        _pairs_table(report["recipe"], "setting", "value"),
        "</body></html>\n",
    ]
    return "\n".join(parts).encode("utf-8")


def _quality_table(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "<p>Not evaluated.</p>"
    rows = []
    for variant in _VARIANTS:
        entry = quality[variant]
        kl, agreement = entry.get("mean_kl"), entry.get("greedy_agreement")
        rows.append(
            f"<tr><td>{_VARIANTS[variant]}<td class=n>{entry['perplexity']:.3f}"
            f"<td class=n>{'' if kl is None else f'{kl:.5f}'}"
            f"<td class=n>{'' if agreement is None else f'{100 * agreement:.2f}%'}</tr>"
        )
    head = (("weights", ""), ("perplexity", "n"), ("mean KL (nats)", "n"), ("greedy agreement", "n"))
    return f"<p>{quality['predicted_tokens']:,} predicted tokens of held-out text.</p>\n" + _table(head, rows)


def _error_table(linears: dict[str, dict[str, float]]) -> str:
    rows = []
    for name, error in linears.items():
        left = error["chosen"] / error["rounding"] if error["rounding"] > 0 else 1.0
        percent = f"{100 * min(max(left, 0.0), 1.0):.0f}%"
        rows.append(
            f"<tr><td>{escape(name)}<td class=n>{error['rounding']:.6f}<td class=n>{error['chosen']:.6f}"
            f"<td><span class=bar><i style='width:{percent}'></i></span><td class=n>{percent}</tr>"
        )
    head = (("linear", ""), ("rounding", "n"), ("chosen", "n"), ("left", ""), ("", "n"))
    return _table(head, rows)


def _full_precision(names: list[str]) -> list[str]:
    if not names:
        return []
    items = "".join(f"<li>{escape(name)}" for name in names)
    return ["<h2>Left in full precision</h2>", f"<p>They do not divide into groups.</p><ul>{items}</ul>"]


def _pairs_table(pairs: dict[str, Any], *titles: str) -> str:
    rows = [f"<tr><td>{escape(str(key))}<td>{escape(str(value))}</tr>" for key, value in pairs.items()]
    return _table(tuple((title, "") for title in titles), rows)


def _table(head: Sequence[tuple[str, str]], rows: list[str]) -> str:
    """`head` holds titles and classes; it scrolls by itself where it is wider than the page."""
    titles = "".join(f"<th class='{kind}'>{title}" if kind else f"<th>{title}" for title, kind in head)
    return "\n".join([f"<div class=wide><table><tr>{titles}</tr>", *rows, "</table></div>"])
