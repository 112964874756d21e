"""`python -m services.quantizer run ...`: flags in, one artifact out, or one line that says why not. Wiring
only.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError

_EXIT_FAILED = 1
_EXIT_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m services.quantizer", description="Quantize to 4 bits.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="quantize one checkpoint and publish it")
    defaults = QuantizerConfig(Path(), Path(), "x")
    add = run.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint (safetensors)")
    add("--artifacts", type=Path, required=True, metavar="DIR", help="root of the artifact volume")
    add("--name", required=True, help="model name to publish under")
    add("--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text (bundled)")
    add("--samples", type=int, default=defaults.samples, help="calibration windows (%(default)s)")
    length = defaults.sequence_length
    add("--sequence-length", type=int, default=length, help="tokens of a calibration window (%(default)s)")
    add("--evaluation", type=Path, nargs="+", default=[], metavar="FILE", help="held-out text (bundled)")
    tokens = defaults.evaluation_tokens
    add("--evaluation-tokens", type=int, default=tokens, metavar="N", help="0 skips it (%(default)s)")
    add("--group-size", type=int, default=defaults.group_size, help="32, 64 or 128 (%(default)s)")
    add("--skip-indivisible", action="store_true", help="leave what does not divide in full precision")
    add(
        "--propagate-error",
        action=argparse.BooleanOptionalAction,
        default=defaults.propagate_error,
        help="calibrate each block on the quantized ones before it (default)",
    )
    add("--device", default=defaults.device, help="cpu or cuda (%(default)s)")
    add("--threads", type=int, default=None, metavar="N", help="CPU threads")
    add("--seed", type=int, default=defaults.seed, help="chooses the calibration windows (%(default)s)")
    add("--force", action="store_true", help="quantize even when CURRENT already holds this")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 published or up to date, 1 failed, 2 wrong usage."""
    values = vars(build_parser().parse_args(arguments))
    values.pop("command")
    values["calibration"], values["evaluation"] = tuple(values["calibration"]), tuple(values["evaluation"])
    try:
        config = QuantizerConfig(**values)
    except QuantizerError as error:
        return _complain(error, _EXIT_USAGE)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    return _run(config)


def _run(config: QuantizerConfig) -> int:
    # torch and transformers take seconds to import: not before the flags are known to be right.
    from services.quantizer.job import run
    from weft.artifact.checkpoint import CheckpointError
    from weft.artifact.manifest import ArtifactError

    try:
        artifact = run(config)
    except (QuantizerError, CheckpointError, ArtifactError, OSError, MemoryError) as error:
        return _complain(error, _EXIT_FAILED)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(artifact.path)
    for line in _quality_lines(artifact.manifest.quality):
        print(line)
    return 0


def _quality_lines(quality: dict[str, dict[str, float]] | None) -> list[str]:
    if quality is None:
        return []
    return [
        f"{variant:8} " + "  ".join(f"{key} {value:.6g}" for key, value in quality[variant].items())
        for variant in ("source", "rounding", "awq")
    ]


def _complain(error: BaseException, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {text[:500]}", file=sys.stderr)
    return status


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds through the staging area, which leaves nothing behind


if __name__ == "__main__":
    sys.exit(main())
