"""A chart as SVG. Colours are names of the page's style sheet, so light and dark are its matter."""

from __future__ import annotations

import math
from html import escape

from cli.bench.charts import Chart, Series
from cli.bench.table import number

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 96, 40, 48
_LABEL_GAP = 14
MAX_LABEL_CHARS = 12


def ticks(high: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to just above `high`."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    return [step * index for index in range(math.ceil(high / step * 0.999) + 1)]


class _Scale:
    """From the chart's numbers to the picture's."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for series in chart.series for x, _ in series.points]
        ys = [y for series in chart.series for _, y in series.points]
        self.is_log = chart.is_load_x and min(xs) > 0 and max(xs) / min(xs) >= 8
        self.y_ticks = ticks(max(ys))
        self.x_ticks = sorted(set(xs)) if chart.is_load_x else ticks(max(xs))
        low = min(xs) if chart.is_load_x else 0.0
        high = max(max(xs), self.x_ticks[-1])
        self._low, self._high = (math.log2(low), math.log2(high)) if self.is_log else (low, high)

    def x(self, value: float) -> float:
        at = math.log2(value) if self.is_log else value
        share = (at - self._low) / (self._high - self._low) if self._high > self._low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_ticks[-1] * (HEIGHT - TOP - BOTTOM)


def draw(chart: Chart) -> str:
    """An <svg> element, with a tooltip on each point."""
    scale = _Scale(chart)
    lone = ' class="lone"' if len(chart.series) == 1 else ""
    parts = [
        f'<svg{lone} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        f'<text class="title" x="{LEFT}" y="20">{escape(chart.title)}',
        f'<tspan class="unit" dx="8">{escape(chart.unit)}</tspan></text>',
        *_axes(chart, scale),
    ]
    # A scatter is thinned with opacity, a curve keeps its markers on top.
    for series in chart.series:
        parts += _series(series, scale, chart)
    parts += _labels(chart, scale)
    return "\n".join([*parts, "</svg>"])


def _axes(chart: Chart, scale: _Scale) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = []
    for value in scale.y_ticks:
        y = scale.y(value)
        kind = "axis" if value == 0 else "grid"
        found.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
        )
    last = -math.inf
    for value in scale.x_ticks:
        x = scale.x(value)
        if x - last < 30:
            continue
        last = x
        found.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_tick(value)}</text>'
        )
    middle = (LEFT + right) / 2
    place = f'x="{middle}" y="{HEIGHT - 8}" text-anchor="middle"'
    found.append(f'<text class="unit" {place}>{escape(chart.x_title)}</text>')
    return found


def _series(series: Series, scale: _Scale, chart: Chart) -> list[str]:
    kind = f"r{series.run} p{series.rank}"
    places = [(scale.x(x), scale.y(y), x, y) for x, y in series.points]
    found = []
    if not series.is_scatter:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        found.append(f'<polyline class="curve {kind}" points="{path}"/>')
    if series.is_scatter or len(places) <= 40:
        radius = 2.2 if series.is_scatter else 3.5
        shape = "dot" if series.is_scatter else "mark"
        for x, y, at, value in places:
            told = f"{series.name}: {number(value)} {chart.unit} at {number(at)}"
            found.append(
                f'<circle class="{shape} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(told)}</title></circle>"
            )
    return found


def _labels(chart: Chart, scale: _Scale) -> list[str]:
    """Each curve's name at its end, moved apart where they would touch; a lone curve needs none."""
    if len(chart.series) == 1:
        return []
    ends = sorted(
        ((scale.y(s.points[-1][1]), scale.x(s.points[-1][0]), s) for s in chart.series), key=lambda e: e[0]
    )
    ys = [y for y, _, _ in ends]
    for index in range(1, len(ys)):
        ys[index] = max(ys[index], ys[index - 1] + _LABEL_GAP)
    ys[-1] = min(ys[-1], HEIGHT - BOTTOM)
    for index in range(len(ys) - 2, -1, -1):
        ys[index] = min(ys[index], ys[index + 1] - _LABEL_GAP)
    return [
        f'<text class="label r{series.run} p{series.rank}" x="{x + 9:.1f}" y="{y + 4:.1f}">'
        f"{escape(_short(series.name))}</text>"
        for y, (_, x, series) in zip(ys, ends, strict=True)
    ]


def _short(name: str) -> str:
    """What tells the curves of a run apart stands at the end."""
    run, _, which = name.rpartition(" ")
    room = MAX_LABEL_CHARS - len(which) - 1
    return name if len(run) <= room else f"{run[: max(1, room - 1)]}\u2026 {which}"


def _tick(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}" if value == int(value) or value >= 0.01 else f"{value:.1e}"
