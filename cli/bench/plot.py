"""Results as a page that needs nothing else, or as a PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cli.bench.charts import charts_of
from cli.bench.svg import draw
from cli.bench.table import load_words, number

MAX_RUNS = 4

_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1c1c1a; --soft: #6b6a66; --grid: #e4e3df;
  --r0p0: #86b6ef; --r0p1: #2a78d6; --r0p2: #12427e; --r1p0: #f0a58f; --r1p1: #d6532a; --r1p2: #7e2c12;
  --r2p0: #8fd3b6; --r2p1: #1d8a5f; --r2p2: #0d4d35; --r3p0: #c5a9e6; --r3p1: #7d4bc0; --r3p2: #46237a; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1a19; --ink: #f2f1ee; --soft: #a3a29d;
  --grid: #33322f; --r0p0: #2f5f9e; --r0p1: #4e95e8; --r0p2: #b7d6fa; --r1p0: #9c4a31; --r1p1: #ee7d57;
  --r1p2: #fbd2c5; --r2p0: #2a7355; --r2p1: #3fbf8b; --r2p2: #bdf0da; --r3p0: #6a4a97; --r3p1: #a982e0;
  --r3p2: #e2d3f7; } }
body { margin: 0 auto; padding: 24px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } p { margin: 2px 0; color: var(--soft); overflow-wrap: anywhere; }
p.warning { color: var(--ink); border-left: 3px solid var(--r1p1); padding-left: 8px; margin: 6px 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px;
  margin: 20px 0; }
svg { width: 100%; max-width: 640px; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .unit { fill: var(--soft); font-size: 12px; font-weight: 400; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.mark { stroke: var(--page); stroke-width: 1.5; }
.dot { fill-opacity: 0.55; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: 3px 12px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""
_COLUMNS = (
    ("sent", ("requests", "sent")),
    ("ok", ("requests", "ok")),
    ("failed", ("requests", "failed")),
    ("requests/s", ("throughput", "requests_per_s")),
    ("goodput/s", ("throughput", "goodput_requests_per_s")),
    ("output tokens/s", ("throughput", "output_tokens_per_s")),
    ("TTFT p50", ("latency_ms", "ttft", "p50")),
    ("p90", ("latency_ms", "ttft", "p90")),
    ("p99", ("latency_ms", "ttft", "p99")),
    ("ITL p50", ("latency_ms", "itl", "p50")),
    ("p90", ("latency_ms", "itl", "p90")),
    ("p99", ("latency_ms", "itl", "p99")),
    ("end to end p50", ("latency_ms", "e2e", "p50")),
    ("p99", ("latency_ms", "e2e", "p99")),
)


class PlotError(ValueError):
    """A picture that cannot be made. The message is one line."""


def check_plot(path: Path) -> None:
    """Refuse a file of another kind before anything is measured. Raises PlotError."""
    if path.suffix not in (".html", ".png"):
        raise PlotError(f"{path}: a plot is a .html or a .png file")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise PlotError("a .png needs matplotlib (pip install 'weft[bench]'); a .html needs nothing")


def write_plot(path: Path, documents: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> None:
    """Draw. Raises PlotError and OSError."""
    if len(documents) > MAX_RUNS:
        raise PlotError(f"at most {MAX_RUNS} results fit into one picture")
    named = list(names) or [document["server"]["model"] for document in documents]
    check_plot(path)
    if path.suffix == ".png":
        from cli.bench.png import write_png

        write_png(path, charts_of(documents, named), _title(documents))
    else:
        path.write_text(page(documents, named), encoding="utf-8")


def _title(documents: Sequence[dict[str, Any]]) -> str:
    server = documents[0]["server"]
    version = f"@{server['version']}" if server["version"] else ""
    return f"weft bench: {server['model']}{version}"


def page(documents: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The whole page, style and pictures inside."""
    title = escape(_title(documents))
    colours = "\n".join(
        f".curve.r{run}.p{rank} {{ stroke: var(--r{run}p{rank}); }} "
        f"circle.r{run}.p{rank}, svg text.label.r{run}.p{rank} {{ fill: var(--r{run}p{rank}); }}"
        for run in range(MAX_RUNS)
        for rank in range(3)
    )
    # A lone curve is of the middle shade, which is easiest to see.
    colours += (
        "\n.dot.r0.p0, .lone circle.r0.p0 { fill: var(--r0p1); } .lone .curve.r0.p0 { stroke: var(--r0p1); }"
    )
    charts = charts_of(documents, names)
    is_named = len(documents) > 1
    pairs = list(zip(documents, names, strict=True))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}{colours}</style></head><body>",
            f"<h1>{title}</h1>",
            *(
                _about(document, name, len(documents) > 1)
                for document, name in zip(documents, names, strict=True)
            ),
            *_warnings(documents, names),
            "<main>",
            *(f"<section>{draw(chart)}</section>" for chart in charts),
            "</main>",
            *(_table(document, name, is_named) for document, name in pairs),
            "</body></html>\n",
        ]
    )


def _about(document: dict[str, Any], name: str, is_named: bool) -> str:
    settings, server, machine = document["settings"], document["server"], document["machine"]
    workload = settings["workload"]
    words = [
        *([name] if is_named else []),
        f"{server['address']} over {server['transport']}",
        workload["kind"],
        *load_words(settings),
        f"seed {settings['seed']}",
        document["started_at"],
        f"client on {machine['cores']} x {machine['cpu']}",
        f"weft {document['versions']['weft']}",
    ]
    return f"<p>{escape(' · '.join(words))}</p>"


def _warnings(documents: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    found = []
    for document, name in zip(documents, names, strict=True):
        run = f"{name} " if len(documents) > 1 else ""
        for point in document["points"]:
            lines = [f"{run}{point['load']['label']}: {warning}" for warning in point["warnings"]]
            found += [f'<p class="warning">{escape(line)}</p>' for line in lines]
    return found


def _table(document: dict[str, Any], name: str, is_named: bool) -> str:
    heads = "".join(f"<th>{escape(title)}</th>" for title, _ in _COLUMNS)
    rows = []
    for point in document["points"]:
        cells = []
        for _, path in _COLUMNS:
            value: Any = point
            for key in path:
                value = value[key]
            cells.append(f"<td>{number(value)}</td>")
        rows.append(f"<tr><td>{escape(point['load']['label'])}</td>{''.join(cells)}</tr>")
    head = f"<p>{escape(name)}</p>" if is_named else ""
    return (
        f'{head}<div class="scroll"><table><thead><tr><th>load</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p>Latencies in milliseconds.</p>"
    )
