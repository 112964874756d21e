"""Does dequantising cost time? One linear on the CPU: 4-bit weights against 16- and 32-bit ones, by rows.

    python -m benchmarks.linear [--threads N] [--append]

Prints rows per second; --append adds the rows to benchmarks/results.csv. The weights of several layers
are used in turn, so that they come from memory and not from the processor's cache.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time

import torch

from benchmarks import results
from services.engine.kernels import native, ops
from services.engine.kernels.int4pack import Int4PackLinear
from services.engine.kernels.linear import Linear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

IN_FEATURES, OUT_FEATURES, GROUP, LAYERS = 2048, 5632, 128, 6
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MIN_SECONDS = 0.6


def variants(dtype: torch.dtype) -> dict[str, list[Linear]]:
    """LAYERS linears of each kind: full precision, torch's packed 4-bit product, unpack and then multiply,
    and, where they can be had, the engine's kernels in C.
    """
    numerics, scratch = Numerics(dtype, is_deterministic=False), Scratch()
    found: dict[str, list[Linear]] = {"dense": [], "packed": [], "unpacked": []}
    for _ in range(LAYERS):
        values = torch.randint(0, 16, (IN_FEATURES, OUT_FEATURES), dtype=torch.uint8)
        zeros = torch.randint(0, 16, (IN_FEATURES // GROUP, OUT_FEATURES), dtype=torch.uint8)
        scales = torch.rand(IN_FEATURES // GROUP, OUT_FEATURES).half() * 0.01
        found["dense"].append(ops.make_dense_linear(torch.randn(OUT_FEATURES, IN_FEATURES), None, numerics))
        for name, crossover_rows in (("packed", None), ("unpacked", 1)):
            linear = ops.make_int4_linear(values, zeros, scales, None, numerics, scratch)
            if isinstance(linear, Int4PackLinear):
                linear.crossover_rows = crossover_rows
                found[name].append(linear)
            elif name == "unpacked":
                found[name].append(linear)
        if dtype == torch.bfloat16 and (library := native.library(None)) is not None:
            native.use(library)
            linear = ops.make_int4_linear(values, zeros, scales, None, numerics, scratch)
            native.use(None)
            found.setdefault(linear.path, []).append(linear)
    return {name: linears for name, linears in found.items() if linears}


def measure(linears: list[Linear], x: torch.Tensor) -> list[float]:
    """Rows per second of each pass over the layers."""
    rates: list[float] = []
    for linear in linears:
        linear(x)
    give_up_at = time.perf_counter() + MIN_SECONDS
    while time.perf_counter() < give_up_at or len(rates) < 5:
        began = time.perf_counter()
        for linear in linears:
            linear(x)
        rates.append(x.shape[0] * len(linears) / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--append", action="store_true", help="add to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()} {capability} {arguments.threads} threads torch {torch.__version__}"
    rows: list[tuple[object, ...]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, linears in variants(dtype).items():
            for count in ROWS:
                rates = sorted(measure(linears, torch.randn(count, IN_FEATURES).to(dtype)))
                p20, p80 = (rates[round(q * (len(rates) - 1))] for q in (0.2, 0.8))
                case = f"{name} {str(dtype).removeprefix('torch.')} {IN_FEATURES}x{OUT_FEATURES} rows={count}"
                median = statistics.median(rates)
                print(f"{case:48} {median:10.0f} rows/s   p20 {p20:.0f}  p80 {p80:.0f}", flush=True)
                figures = (f"{median:.0f}", f"{p20:.0f}", f"{p80:.0f}")
                rows.append(("linear", case, "rows/s", *figures, "", "", "", machine, sha))
    if arguments.append:
        results.append(rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
