"""What does a quantised KV cache cost, and what does it hold? The engine on held-out text, by kv dtype.

    python -m benchmarks.kv_quality [--source DIR] [--dtype float32] [--windows N] [--threads N] [--append]

For each format: perplexity and mean KL divergence from the same engine with K and V in full precision, how
often the likeliest token is the same, tokens that 1 GiB holds, and the time of a step of decodes. Prints
rows; --append adds them to benchmarks/results.csv.

Every row of a forward reads the cache, its own chunk's K and V included, so one pass over a window sees what
decoding token by token would.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import results
from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.kv_format import FORMATS
from services.engine.runner.config import RunnerConfig
from services.engine.runner.inputs import make_inputs
from services.engine.runner.kv_cache import KVCache, kv_bytes_per_token, resolve_num_blocks
from services.engine.runner.model_runner import ModelRunner, load_runner

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("evaluation_alice.txt", "evaluation_dubliners.txt")
WINDOW, BLOCK_SIZE = 512, 128
NUM_BLOCKS = WINDOW // BLOCK_SIZE
COMPARED = ("bfloat16", "int8", "fp8", "int4")
GIB = 1 << 30
DECODES, STEPS = 32, 15


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one format over all windows, against full precision. `divergence` in nats per token."""

    perplexity: float
    divergence: float
    agreement: float


def held_out_windows(tokenizer_file: Path, count: int) -> Tensor:
    """int64 [count, WINDOW]: windows of the evaluation texts in equal shares, each begun with token 0."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found: list[list[int]] = []
    for index, name in enumerate(TEXTS):
        text = (ROOT / "services/quantizer/data" / name).read_text(encoding="utf-8")
        joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        ids = tokenizer.encode(joined, add_special_tokens=False).ids
        share = (count + index) // len(TEXTS)
        if share * (WINDOW - 1) > len(ids):
            raise SystemExit(f"{name} has {len(ids)} tokens, too few for {share} windows")
        found += [[0, *ids[i * (WINDOW - 1) : (i + 1) * (WINDOW - 1)]] for i in range(share)]
    return torch.tensor(found)


def in_format(runner: ModelRunner, name: str) -> ModelRunner:
    """The same model over a cache of its own."""
    cache = KVCache(runner.model.config, NUM_BLOCKS, BLOCK_SIZE, FORMATS[name])
    return ModelRunner(runner.model, cache, runner.numerics, runner.info)


def window_logits(runner: ModelRunner, ids: list[int]) -> Tensor:
    """fp32 [WINDOW, vocab] of one window, computed in one chunk in the cache's first blocks."""
    sequence = Sequence("window", ids, SamplingParams(max_tokens=1))
    sequence.block_table = list(range(NUM_BLOCKS))
    inputs = make_inputs([Chunk(sequence, 0, WINDOW, False)], BLOCK_SIZE, runner.cache.scratch_block, 16)
    rows = torch.arange(WINDOW)
    return runner.model.forward(inputs.token_ids, inputs.metadata, runner.cache.layers, rows)


def qualities(runners: dict[str, ModelRunner], windows: Tensor) -> dict[str, Quality]:
    """Every format against the first."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in runners}
    for ids in windows.tolist():
        expected: Tensor | None = None
        for name, runner in runners.items():
            found = window_logits(runner, ids)[:-1].double().log_softmax(-1)
            expected = found if expected is None else expected
            nll = -found.gather(1, torch.tensor(ids[1:])[:, None]).mean()
            divergence = (expected.exp() * (expected - found)).sum(-1).mean()
            agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean()
            sums[name] += torch.stack([nll, divergence, agreement])
    means = {name: (total / len(windows)).tolist() for name, total in sums.items()}
    return {name: Quality(math.exp(mean[0]), mean[1], mean[2]) for name, mean in means.items()}


def step_times(runners: dict[str, ModelRunner]) -> dict[str, tuple[float, float, float]]:
    """(median, p20, p80) in ms of a step of DECODES sequences of WINDOW tokens, which share their blocks. The
    formats take turns, so that what else the machine does meets all of them.
    """
    chunks = []
    for key in range(DECODES):
        sequence = Sequence(key, [0] * WINDOW, SamplingParams(max_tokens=1))
        sequence.block_table = list(range(NUM_BLOCKS))
        chunks.append(Chunk(sequence, WINDOW - 1, 1, True))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(STEPS + 2):
        for name, runner in runners.items():
            began = time.perf_counter()
            runner.forward(chunks)
            times[name].append(1e3 * (time.perf_counter() - began))
    kept = {name: sorted(found[2:]) for name, found in times.items()}
    return {
        name: (statistics.median(found), found[STEPS // 5], found[-1 - STEPS // 5])
        for name, found in kept.items()
    }


def tokens_in_a_gib(bytes_per_token: int) -> int:
    """Tokens of the whole blocks that sequences can own in 1 GiB."""
    config = RunnerConfig(source=Path("."), kv_memory_bytes=GIB, block_size=BLOCK_SIZE)
    return resolve_num_blocks(config, bytes_per_token, WINDOW) * BLOCK_SIZE


def figures(runners: dict[str, ModelRunner], windows: Tensor) -> list[tuple[str, ...]]:
    """The columns of results.csv from the case to the ratio; the first format is the baseline."""
    found, steps = qualities(runners, windows), step_times(runners)
    base = next(iter(runners))
    rows: list[tuple[str, ...]] = []
    for name, runner in runners.items():
        one, tokens = found[name], _tokens(runner)
        step, base_step = steps[name], steps[base][0]
        ratio = one.perplexity / found[base].perplexity
        baseline = (base, f"{found[base].perplexity:.4f}", f"{ratio:.5f}")
        rows.append((name, "perplexity", f"{one.perplexity:.4f}", "", "", *baseline))
        rows.append((name, "mean KL, nats", f"{one.divergence:.3g}", "", "", "", "", ""))
        rows.append((name, "share of equal likeliest tokens", f"{one.agreement:.4f}", "", "", "", "", ""))
        baseline = (base, str(_tokens(runners[base])), f"{tokens / _tokens(runners[base]):.3f}")
        rows.append((name, "tokens in 1 GiB", str(tokens), "", "", *baseline))
        baseline = (base, f"{base_step:.2f}", f"{step[0] / base_step:.3f}")
        case = f"{name}, {DECODES} decodes at {WINDOW}"
        rows.append((case, "ms", *(f"{value:.2f}" for value in step), *baseline))
    return rows


def _tokens(runner: ModelRunner) -> int:
    return tokens_in_a_gib(kv_bytes_per_token(runner.model.config, runner.cache.kv_format))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, default=ROOT / "models" / "demo", help="a checkpoint directory"
    )
    parser.add_argument("--dtype", default="float32", help="of the activations")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW} tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--append", action="store_true", help="add to results.csv")
    arguments = parser.parse_args()
    windows = held_out_windows(arguments.source / "tokenizer.json", arguments.windows)

    def load(kv_dtype: str) -> ModelRunner:
        return load_runner(
            RunnerConfig(
                source=arguments.source,
                dtype=arguments.dtype,
                kv_dtype=kv_dtype,
                block_size=BLOCK_SIZE,
                num_blocks=NUM_BLOCKS,
                max_model_len=WINDOW,
                num_threads=arguments.threads,
            )
        )

    # For integer codes a load evens out the keys' channels.
    base, balanced = load("auto"), load("int8")
    names = dict.fromkeys([base.info.kv_dtype, *COMPARED])
    runners = {name: in_format(base if FORMATS[name].max_code is None else balanced, name) for name in names}
    rows = figures(runners, windows)
    for case, unit, median, p20, p80, _, _, ratio in rows:
        print(f"{case:32} {unit:32} {median:>10} {p20:>8} {p80:>8} {ratio:>9}")
    if arguments.append:
        head = ["git", "rev-parse", "--short", "HEAD"]
        sha = subprocess.run(head, capture_output=True, text=True).stdout.strip()
        capability = torch.backends.cpu.get_cpu_capability()
        machine = f"{platform.machine()} {capability} {arguments.threads} threads torch {torch.__version__}"
        results.append(("kv_quality", *row, machine, sha) for row in rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
