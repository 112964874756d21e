"""What the demo shows: a live view on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.demo.streams import Fault, Load, Stream, percentile

REFRESH_PER_S = 8
TITLE_WIDTH = 36
STYLES = {"waiting": "dim", "running": "cyan", "stop": "green", "length": "green", "failed": "red"}


def picture(streams: Sequence[Stream], load: Load, began: float, width: int) -> Group:
    """The live view: one line a stream with the newest of its text, and the engine's state below."""
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("request", no_wrap=True, width=TITLE_WIDTH)
    table.add_column("newest text", no_wrap=True, ratio=1)
    table.add_column("tokens", justify="right", width=6)
    table.add_column("state", width=8)
    room = max(10, width - TITLE_WIDTH - 22)
    for stream in streams:
        newest = stream.error or " ".join(stream.text.split())[-room:].lstrip()
        state = stream.state
        table.add_row(
            Text(stream.title), Text(newest), str(stream.num_tokens), Text(state, STYLES.get(state, ""))
        )
    now = load.now
    tokens = sum(stream.num_tokens for stream in streams)
    is_over = all(stream.finish or stream.error for stream in streams)
    until = max(stream.last_token_at for stream in streams) if is_over else time.monotonic()
    seconds = max(until - began, 1e-9)
    status = (
        f"{tokens / seconds:6.0f} tokens/s   batch {now.running:2d}, waiting {now.waiting:2d}   "
        f"blocks: {now.free_blocks} free, {now.active_blocks} active, {now.cached_blocks} cached"
    )
    return Group(table, Text(status, style="bold"))


@contextlib.asynccontextmanager
async def watching(console: Console, streams: Sequence[Stream], load: Load) -> AsyncIterator[None]:
    """Show the streams while the body runs."""
    began = time.monotonic()
    show = show_live if console.is_terminal else show_lines
    task = asyncio.create_task(show(console, streams, load, began))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def show_live(console: Console, streams: Sequence[Stream], load: Load, began: float) -> None:
    """Redraw until cancelled, and leave the last picture standing."""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(picture(streams, load, began, console.width), refresh=True)
                await asyncio.sleep(1 / REFRESH_PER_S)
        finally:
            live.update(picture(streams, load, began, console.width), refresh=True)


async def show_lines(console: Console, streams: Sequence[Stream], load: Load, began: float) -> None:
    """Print a line when a stream ends."""
    left = list(streams)
    try:
        while True:
            left = print_ended(console, left, began)
            await asyncio.sleep(1 / REFRESH_PER_S)
    finally:
        print_ended(console, left, began)


def print_ended(console: Console, streams: Sequence[Stream], began: float) -> list[Stream]:
    """Print those that have ended and return the others."""
    left = []
    for stream in streams:
        if not (stream.finish or stream.error):
            left.append(stream)
            continue
        text = stream.error or " ".join(stream.text.split())[:60]
        seconds = time.monotonic() - began
        line = f"{seconds:6.2f} s  {stream.state:8s} {stream.num_tokens:4d} tokens  {stream.title} | {text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return left


def summary(
    streams: Sequence[Stream],
    seconds: float,
    load: Load,
    quality: dict[str, float],
    fault: Fault | None = None,
    num_moved: int = 0,
) -> Table:
    """What the run measured. `quality` maps a row's name to a perplexity; `num_moved` of the streams went on
    elsewhere after the fault.
    """
    tokens = sum(stream.num_tokens for stream in streams)
    first = [(s.first_token_at - s.submitted_at) * 1e3 for s in streams if s.first_token_at is not None]
    gaps = [gap * 1e3 for stream in streams for gap in stream.gaps_s]
    now = load.now
    rows: list[tuple[str, Any]] = [
        ("completions", f"{sum(s.finish is not None for s in streams)} of {len(streams)}"),
        ("tokens", f"{tokens} in {seconds:.2f} s = {tokens / seconds:.0f} tokens/s"),
        ("TTFT", f"p50 {percentile(first, 50):.0f} ms, p99 {percentile(first, 99):.0f} ms"),
        ("ITL", f"p50 {percentile(gaps, 50):.1f} ms, p99 {percentile(gaps, 99):.1f} ms"),
        *fault_rows(streams, fault, num_moved),
        ("peak batch", f"{now.peak_batch_size} sequences"),
        ("prefix cache", f"{now.prefix_cache_hits} of {now.prefix_cache_queries} prompt tokens found"),
        ("preemptions", now.preemptions),
        ("blocks", f"{now.free_blocks} free, {now.active_blocks} active, {now.cached_blocks} cached"),
        *((f"perplexity, {name}", f"{value:.3f}") for name, value in quality.items()),
    ]
    table = Table(show_header=False, title="Summary", title_justify="left")
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def fault_rows(streams: Sequence[Stream], fault: Fault | None, num_moved: int) -> list[tuple[str, str]]:
    """What the fault was, and what became of the streams."""
    if fault is None or fault.at_s is None:
        return []
    worst_ms = 1e3 * max((stream.worst_gap_s for stream in streams), default=0.0)
    return [
        ("engine killed", f"kill -9 after {fault.at_s:.2f} s, {fault.num_tokens} tokens into the streams"),
        ("moved", f"{num_moved} streams went on at the other engine; worst gap {worst_ms:.0f} ms"),
    ]
