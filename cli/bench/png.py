"""Charts as a PNG, through matplotlib: an extra that only this file needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cli.bench.charts import Chart

_COLOURS = (
    ("#86b6ef", "#2a78d6", "#12427e"),
    ("#f0a58f", "#d6532a", "#7e2c12"),
    ("#8fd3b6", "#1d8a5f", "#0d4d35"),
    ("#c5a9e6", "#7d4bc0", "#46237a"),
)


def write_png(path: Path, charts: Sequence[Chart], title: str) -> None:
    """All charts on one sheet. Raises OSError."""
    from matplotlib.figure import Figure

    rows = -(-len(charts) // 2)
    figure = Figure(figsize=(12, 3.6 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(rows, 2, index + 1)
        for series in chart.series:
            xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
            colour = _COLOURS[series.run][1 if len(chart.series) == 1 else series.rank]
            if series.is_scatter:
                axes.plot(xs, ys, ".", color=colour, alpha=0.5, markersize=4)
            else:
                marker = "o" if len(xs) <= 40 else ""
                axes.plot(xs, ys, marker=marker, color=colour, label=series.name, markersize=4)
        axes.set_title(f"{chart.title}, {chart.unit}", loc="left", fontsize=11)
        axes.set_xlabel(chart.x_title)
        axes.set_ylim(bottom=0)
        if chart.is_load_x:
            loads = sorted({x for series in chart.series for x, _ in series.points})
            if min(loads) > 0 and max(loads) / min(loads) >= 8:
                axes.set_xscale("log", base=2)
            axes.set_xticks(loads, [f"{x:g}" for x in loads])
            axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(chart.series) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
