"""One phase of the device lane as a process: `python -m benchmarks.gpu_phase NAME [--dry] ...`.

Runs `run(bench)` of benchmarks/gpu_NAME.py. Exit code 1 when a row failed. A phase has its own process so
that a device fault in one of them does not take the others along.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_phase", description=__doc__)
    parser.add_argument("phase")
    parser.add_argument("--out", type=Path, help="append rows to this file, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, through the interpreter")
    arguments = parser.parse_args()
    # transformers looks for kernels to download unless told that there is no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.dry:
        # Before Triton is imported: it decides when a kernel is decorated.
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: nothing would be measured. Unset it, or give --dry.")

    import torch

    from benchmarks.gpu_measure import Bench, OutOfTime

    bench = Bench(arguments.phase, arguments.dry, arguments.seconds, arguments.out)
    phase = importlib.import_module(f"benchmarks.gpu_{arguments.phase}")
    with torch.inference_mode(), contextlib.suppress(OutOfTime):
        phase.run(bench)
    return 1 if bench.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
