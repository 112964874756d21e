"""How a benchmark of the device lane measures and reports: device time by events, cold caches, rows as JSON.

A phase gets a `Bench`; every row is on disk as soon as it is known. Dry, the same code runs tiny sizes on the
CPU through Triton's interpreter; what it then prints are no measurements. Knows torch and clocks, no kernel.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

REPEAT_SECONDS = 0.12
MIN_REPEATS, MAX_REPEATS = 7, 200
SLEEP_CYCLES = 1_000_000
"""About half a millisecond."""
_SPEEDS = ("us", "ms", "GB/s", "TFLOP/s", "tokens/s")


class Missing(Exception):
    """What was to be measured is not there; the text says what."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float

    def __truediv__(self, other: float) -> Timing:
        return Timing(self.median / other, self.p20 / other, self.p80 / other)

    def rate(self, amount: float) -> Timing:
        """`amount` per second; the 20th percentile of a rate is the 80th of its time."""
        return Timing(amount / self.median, amount / self.p80, amount / self.p20)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. `ratio` compares with the baseline: above 1 is better than it, whatever the
    unit. `status`: "ok", "missing", "failed" or "skipped", with `note` saying why. `target`: what `ratio` or,
    where there is no baseline, `median` is to reach (or, `is_low_good`, stay under).
    """

    benchmark: str
    case: str
    unit: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    baseline: str = ""
    baseline_median: float | None = None
    ratio: float | None = None
    target: float | None = None
    is_low_good: bool = False
    status: str = "ok"
    note: str = ""


class Bench:
    """One phase's measurements: the device, the clock, and where rows go."""

    def __init__(self, name: str, is_dry: bool, seconds: float, out: Path | None) -> None:
        if not is_dry and not torch.cuda.is_available():
            sys.exit("no CUDA device: give --dry to walk through on the CPU")
        self.name, self.is_dry = name, is_dry
        self.device = torch.device("cpu" if is_dry else "cuda")
        # The interpreter multiplies bfloat16 wrongly.
        self.dtype = torch.float32 if is_dry else torch.bfloat16
        self._give_up_at = time.monotonic() + seconds
        self._out = out
        self.num_failed = 0
        torch.manual_seed(0)
        if is_dry:
            torch.set_num_threads(1)

    @property
    def remaining(self) -> float:
        """Seconds left."""
        return self._give_up_at - time.monotonic()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers on the device, of the benchmark's dtype unless another is given."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [0, high) on the device."""
        return torch.randint(high, shape, device=self.device, dtype=dtype)

    def num_copies(self, num_bytes: int) -> int:
        """How many sets of this size together are three times the L2 cache: each is cold when its turn
        comes.
        """
        if self.is_dry:
            return 2
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        return max(2, min(64, -(-3 * cache // max(1, num_bytes))))

    def time(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Device time of one call. The calls do the same work on different memory, in turn, as one CUDA
        graph: the host's launches and warm caches are not in it.
        """
        for call in calls:
            call()
        if self.is_dry:
            began = time.perf_counter()
            calls[0]()
            seconds = time.perf_counter() - began
            return Timing(seconds, seconds, seconds)
        return self.time_replays(_captured(calls)) / len(calls)

    def time_replays(self, replay: Callable[[], object]) -> Timing:
        """Device time of one replay of anything that only enqueues work. Half a millisecond of the host's
        time is hidden; a replay that takes the host longer than that shows it.
        """
        replay()
        torch.cuda.synchronize()
        seconds: list[float] = []
        while len(seconds) < MAX_REPEATS and (len(seconds) < MIN_REPEATS or sum(seconds) < REPEAT_SECONDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device is kept busy until the host has queued what is timed.
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        return quantiles(seconds)

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second of a large device-to-device copy, read and written bytes counted."""
        num_bytes = (1 << 16) if self.is_dry else (2 << 30)
        source = torch.randint(256, (num_bytes,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.time([lambda: target.copy_(source)]).median

    def emit(self, row: Row) -> None:
        """Report one row. Speeds of the interpreter are not written down."""
        if self.is_dry and row.unit in _SPEEDS:
            nothing = dict.fromkeys(("median", "p20", "p80", "baseline_median", "ratio", "target"))
            row = replace(row, **nothing, note="ran")
        self.num_failed += row.status == "failed"
        print(json.dumps(asdict(row)), flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def compare(
        self,
        case: str,
        timing: Timing,
        baseline: str,
        base: Timing,
        *,
        target: float | None = None,
        note: str = "",
    ) -> None:
        """A row in microseconds against a baseline in the same."""
        us = [1e6 * value for value in (timing.median, timing.p20, timing.p80)]
        ratio = base.median / timing.median
        self.emit(Row(self.name, case, "us", *us, baseline, 1e6 * base.median, ratio, target, note=note))

    def share(self, case: str, timing: Timing, num_bytes: float, target: float | None = None) -> None:
        """A row in GB/s against the measured copy bandwidth."""
        rate = timing.rate(num_bytes)
        gb = [value / 1e9 for value in (rate.median, rate.p20, rate.p80)]
        ratio = rate.median / self.copy_bandwidth
        self.emit(Row(self.name, case, "GB/s", *gb, "device copy", self.copy_bandwidth / 1e9, ratio, target))

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A failure inside becomes a row, and the next case runs; no case starts once time is up."""
        if self.remaining <= 0:
            self.emit(Row(self.name, name, status="skipped", note="out of time"))
            raise OutOfTime
        try:
            yield
        except OutOfTime:
            raise
        except (Missing, ImportError) as error:
            is_ours = (getattr(error, "name", None) or "").startswith("services")
            self.emit(Row(self.name, name, status="failed" if is_ours else "missing", note=str(error)))
        except Exception as error:
            traceback.print_exc()
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.emit(Row(self.name, name, status="failed", note=note))
        finally:
            if not self.is_dry:
                torch.cuda.empty_cache()

    def close_to(self, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Raise ValueError unless ||found - expected|| <= tolerance ||expected||: no time is reported of a
        wrong result.
        """
        error = relative_error(found, expected)
        if not error <= tolerance:
            raise ValueError(f"{name}: relative error {error:.2e}, at most {tolerance:g} is accepted")


class OutOfTime(Exception):
    """The phase's time is up."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN when either holds one."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp_min(1e-300))


def quantiles(values: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    p20, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return Timing(statistics.median(ordered), p20, p80)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of the calls in turn. They have run before, so nothing is compiled inside."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
