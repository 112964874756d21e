"""report.json and report.html: what an artifact is and how good, for people. No clock times: equal runs,
equal bytes.

Knows the manifest's words, nothing of how the numbers arose.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from weft.artifact.manifest import LinearError

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}"
    "th,td{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".bar{display:inline-block;height:.7em;background:#4a7;vertical-align:middle}"
    ".rest{display:inline-block;height:.7em;background:#ddd;vertical-align:middle}"
)


def build_report(
    model: str,
    recipe: dict[str, Any],
    quality: dict[str, Any] | None,
    errors: dict[str, LinearError],
    choices: dict[str, str],
) -> dict[str, Any]:
    """The report as a document; `choices` maps scale groups to the candidate taken."""
    return {
        "model": model,
        "recipe": recipe,
        "quality": quality,
        "linears": {name: {"rounding": e.rounding, "awq": e.awq} for name, e in errors.items()},
        "scales": choices,
    }


def report_json(report: dict[str, Any]) -> bytes:
    """Indented, in key order."""
    return json.dumps(report, indent=1, sort_keys=True).encode("ascii") + b"\n"


def report_html(report: dict[str, Any]) -> bytes:
    """One self-contained page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(report['model'])}: quantization report</title><style>{_STYLE}</style>",
        f"<h1>{escape(report['model'])}</h1>",
        _quality_table(report["quality"]),
        (
            "<h2>Error of each linear</h2><p>||X(W - W')||&sup2; / ||XW||&sup2; over the calibration set; "
            "the bar is the part of plain rounding's error that is left.</p>"
        ),
        _error_table(report["linears"]),
        "<h2>Scales taken</h2>",
        _pairs_table(report["scales"]),
        "<h2>Recipe</h2>",
        _pairs_table(report["recipe"]),
        "</html>\n",
    ]
    return "\n".join(parts).encode("utf-8")


def _quality_table(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "<p>Not evaluated.</p>"
    rows = [f"<p>{quality['predicted_tokens']} predicted tokens of held-out text.</p><table>"]
    rows.append("<tr><th>weights<th>perplexity<th>mean KL (nats)<th>greedy agreement</tr>")
    for variant in ("source", "rounding", "awq"):
        entry = quality[variant]
        kl, agreement = entry.get("mean_kl"), entry.get("greedy_agreement")
        rows.append(
            f"<tr><td>{variant}<td class=n>{entry['perplexity']:.3f}"
            f"<td class=n>{'' if kl is None else f'{kl:.5f}'}"
            f"<td class=n>{'' if agreement is None else f'{100 * agreement:.2f}%'}</tr>"
        )
    return "\n".join([*rows, "</table>"])


def _error_table(linears: dict[str, dict[str, float]]) -> str:
    rows = ["<table><tr><th>linear<th>rounding<th>awq<th></tr>"]
    for name, error in linears.items():
        left = error["awq"] / error["rounding"] if error["rounding"] > 0 else 1.0
        width = 8.0 * min(max(left, 0.0), 1.0)
        rows.append(
            f"<tr><td>{escape(name)}<td class=n>{error['rounding']:.6f}<td class=n>{error['awq']:.6f}"
            f"<td><span class=bar style='width:{width:.2f}em'></span>"
            f"<span class=rest style='width:{8.0 - width:.2f}em'></span> {100 * left:.0f}%</tr>"
        )
    return "\n".join([*rows, "</table>"])


def _pairs_table(pairs: dict[str, Any]) -> str:
    rows = [f"<tr><td>{escape(str(key))}<td>{escape(str(value))}</tr>" for key, value in pairs.items()]
    return "\n".join(["<table>", *rows, "</table>"])
