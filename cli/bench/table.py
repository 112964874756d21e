"""Results on a terminal, within 80 columns. Reads the document alone."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 80
PLAIN: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
}
_LATENCIES = (
    ("ttft", "TTFT"),
    ("itl", "ITL"),
    ("message_gap", "message gap"),
    ("tpot", "TPOT"),
    ("e2e", "end to end"),
)


def number(value: float | int | None, digits: int = 3) -> str:
    """So many significant digits, one less below 1; no exponent; whole numbers whole; a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1
    while size >= 10:
        size, decimals = size / 10, decimals - 1
    while size < 0.1 and decimals < digits + 6:
        size, decimals = size * 10, decimals + 1
    return f"{value:.{max(0, decimals)}f}"


def show_header(console: Console, document: dict[str, Any]) -> None:
    """What was asked, of whom, and how."""
    server, settings = document["server"], document["settings"]
    workload = settings["workload"]
    version = f"@{server['version']}" if server["version"] else ""
    way = {"grpc": "gRPC", "multiplex": "one gRPC stream", "http": f"HTTP {server['endpoint']}"}
    how = ", ".join(load_words(settings))
    lengths = ""
    if workload["kind"] not in ("trace", "text"):
        lengths = f" {_range(workload['input_tokens'])}/{_range(workload['output_tokens'])}"
    console.print(
        escape(f"{server['model']}{version} at {server['address']} over {way[server['transport']]}"),
        highlight=False,
    )
    console.print(escape(f"{workload['kind']}{lengths}, {how}, seed {settings['seed']}"), highlight=False)


def load_words(settings: dict[str, Any]) -> list[str]:
    """The load in words."""
    kind = settings["loads"][0]["kind"]
    if kind == "closed":
        words = ["closed loop"]
    elif kind == "open":
        burst = f" of shape {settings['burstiness']:g}" if settings["arrivals"] == "gamma" else ""
        words = [f"open loop, {settings['arrivals']} arrivals{burst}"]
    else:
        words = [f"open loop at the trace's times x {settings['workload']['time_scale']:g}"]
    if settings["max_concurrency"]:
        words.append(f"at most {settings['max_concurrency']} at once")
    if settings["duration_s"]:
        words.append(f"{settings['duration_s']:g} s")
    if settings["num_warmup"]:
        words.append(f"{settings['num_warmup']} warm-up requests not counted")
    return words


def show(console: Console, document: dict[str, Any]) -> None:
    """Everything."""
    show_header(console, document)
    points = document["points"]
    has_targets = bool(document["settings"]["targets"])
    console.print(throughput_table(points, has_targets))
    console.print(latency_table(points))
    if has_targets:
        targets = ", ".join(document["settings"]["targets"])
        console.print(f"good: whole answers within {targets} ms", highlight=False)
    for point in points:
        _show_others(console, point)
        for error in point["errors"][:5]:
            line = f"{point['load']['label']}: {error['count']} x {error['status']}: {error['reason']}"
            console.print(escape(line), style="red", highlight=False)
        for warning in point["warnings"]:
            console.print(escape(f"{point['load']['label']}: {warning}"), style="yellow", highlight=False)
    mine = max((point["client"]["cpu_share"] for point in points), default=0.0)
    lags = [point["client"]["loop_lag_ms"]["p99"] for point in points if point["client"]["loop_lag_ms"]]
    lag = f", its event loop late by {number(max(lags))} ms at p99" if lags else ""
    late = [p["client"]["schedule_lateness_ms"] for p in points if p["client"]["schedule_lateness_ms"]]
    lateness = f", requests by {number(max(found['p99'] or 0 for found in late))} ms" if late else ""
    load = document["machine"]["load_average"]
    busy = f"; load of this machine {load[0]:g}" if load else ""
    console.print(f"client: {mine:.0%} of a core{lag}{lateness}{busy}", style="dim", highlight=False)


def throughput_table(points: list[dict[str, Any]], has_targets: bool) -> Table:
    """One row a load: where its requests went, and the rates."""
    has_others = any(_others(point) for point in points)
    table = Table(title="requests and rates", **PLAIN)
    headings = ["load", "sent", "ok", "fail", *(["other"] if has_others else [])]
    headings += ["req/s", "in tok/s", "out tok/s", "peak", *(["good/s", "good"] if has_targets else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "load" else "right", no_wrap=True)
    for point in points:
        requests, rates = point["requests"], point["throughput"]
        row = [point["load"]["label"], *(number(requests[name]) for name in ("sent", "ok", "failed"))]
        row += [number(_others(point))] if has_others else []
        row += [number(rates[f"{name}_per_s"]) for name in ("requests", "input_tokens", "output_tokens")]
        row.append(number(point["concurrency"]["peak"]))
        if has_targets:
            share = rates["good_share"]
            row += [number(rates["goodput_requests_per_s"]), "-" if share is None else f"{share:.0%}"]
        table.add_row(*row)
    return table


def _others(point: dict[str, Any]) -> int:
    requests = point["requests"]
    return int(requests["cancelled"] + requests["interrupted"])


def latency_table(points: list[dict[str, Any]]) -> Table:
    """One row a load and metric, in milliseconds."""
    table = Table(title="latency, ms", **PLAIN)
    for heading in ("load", "", "values", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="left" if heading in ("load", "") else "right", no_wrap=True)
    for point in points:
        label = point["load"]["label"]
        for name, title in _LATENCIES:
            values = point["latency_ms"][name]
            if not values["count"] or (name == "message_gap" and not _has_large_messages(point)):
                continue
            cells = (number(values[key]) for key in ("mean", "p50", "p90", "p99", "max"))
            table.add_row(label, title, number(values["count"]), *cells)
            label = ""
        table.add_section()
    return table


def _has_large_messages(point: dict[str, Any]) -> bool:
    return (point["tokens"]["per_message"] or 1.0) > 1.01 and point["tokens"]["itl_counts_tokens"]


def _show_others(console: Console, point: dict[str, Any]) -> None:
    for group, found in point["others"].items():
        counts = point["requests"]["groups"][group]
        ended = ", ".join(f"{counts[name]} {name}" for name in ("ok", "failed", "cancelled") if counts[name])
        ttft = found["latency_ms"]["ttft"]
        words = {"cancelled": "to cancel", "slow": "slow readers"}[group]
        more = f"; TTFT p50 {number(ttft['p50'])} ms, p99 {number(ttft['p99'])} ms" if ttft["count"] else ""
        console.print(
            f"{point['load']['label']}: {counts['sent']} {words}, apart from the above: {ended}{more}",
            highlight=False,
        )


def _range(pair: list[int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"
