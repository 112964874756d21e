"""The operations between the products: norms, silu-mul, rotary with the KV write, and sampling.

Each moves a few bytes per value and computes little: what counts is the share of the copy bandwidth at many
rows, and the microseconds at few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_measure import Bench, Row
from services.engine.kernels.kv_format import FORMATS, LayerCache

HIDDEN, WIDTH = 4096, 14336
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 128
ROWS = (1, 64, 4096)
EPS, TOLERANCE = 1e-5, 1e-2
VOCABULARY, SAMPLED_ROWS, SAMPLING_TARGET_US = 131072, 64, 25.0


def run(bench: Bench) -> None:
    """All of them; sampling first, which has a target."""
    run_sampling(bench)
    for rows in (3,) if bench.is_dry else ROWS:
        with bench.case(f"add_rms_norm rows={rows}"):
            _norm(bench, f"add_rms_norm rows={rows}", rows)
        with bench.case(f"silu_mul rows={rows}"):
            _silu_mul(bench, f"silu_mul rows={rows}", rows)
        for name in (str(bench.dtype).removeprefix("torch."), "int8"):
            with bench.case(f"rotary_write_kv {name} rows={rows}"):
                _rotary_write(bench, f"rotary_write_kv {name} rows={rows}", name, rows)


def run_sampling(bench: Bench) -> None:
    """Rows of logits to tokens: keyed noise over all ids, then with filters."""
    settings = {"temperature 0.8": (0, 1.0, 0.0), "top_k 50": (50, 1.0, 0.0), "top_p 0.9": (0, 0.9, 0.0)}
    settings |= {"top_k 50, top_p 0.9, min_p 0.05": (50, 0.9, 0.05)}
    for name, (top_k, top_p, min_p) in settings.items():
        case = f"sampling {3 if bench.is_dry else SAMPLED_ROWS} rows, {name}"
        with bench.case(case):
            _sample(bench, case, top_k, top_p, min_p)


def _sample(bench: Bench, case: str, top_k: int, top_p: float, min_p: float) -> None:
    from services.engine.kernels.gpu.sampling import PARAM_WORDS, draw

    rows, vocabulary = (3, 1500) if bench.is_dry else (SAMPLED_ROWS, VOCABULARY)
    floats = torch.tensor([0.8, top_p, min_p]).view(torch.int32).tolist()
    words = [[floats[0], top_k, floats[1], floats[2], 7, 0, row, 5] for row in range(rows)]
    params = torch.tensor(words, dtype=torch.int32, device=bench.device)
    if params.shape[1] != PARAM_WORDS:
        raise ValueError(f"the sampler takes {PARAM_WORDS} words a row, this fills {params.shape[1]}")
    copies = bench.num_copies(4 * rows * vocabulary)
    logits = [4 * bench.randn(rows, vocabulary, dtype=torch.float32) for _ in range(copies)]
    tokens = torch.full((rows,), -1, device=bench.device)
    status = torch.full((rows,), -1, dtype=torch.int32, device=bench.device)
    has_filters = top_k > 0 or top_p < 1 or min_p > 0

    def ours(logits: Tensor) -> None:
        draw(logits, params, has_filters=has_filters, token_ids=tokens, status=status)

    def plain(logits: Tensor) -> Tensor:
        return _sample_plain(logits / 0.8, top_k, top_p, min_p)

    ours(logits[0])
    if int(status.abs().sum()) or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(f"tokens {tokens.tolist()}, status {status.tolist()}")
    timing = bench.time([lambda x=x: ours(x) for x in logits])
    base = bench.time([lambda x=x: plain(x) for x in logits])
    bench.compare(case, timing, "torch softmax, sort and noise" if has_filters else "torch, noise", base)
    us = 1e6 * timing.median
    row = Row(
        bench.name, f"{case}, against the target", "us", us, target=SAMPLING_TARGET_US, is_low_good=True
    )
    bench.emit(row)


def _sample_plain(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The usual way: filter by a sort, then divide by exponential noise."""
    probs = logits.softmax(-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    if top_k > 0 or top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        if top_k > 0:
            ordered[:, top_k:] = 0.0
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(-1)


def _report(
    bench: Bench, case: str, calls: list[Callable[[], object]], plain: list[Callable[[], object]], moved: int
) -> None:
    """Time against torch's; with many rows also bytes per second against a copy."""
    timing = bench.time(calls)
    bench.compare(case, timing, "torch, op by op", bench.time(plain))
    if moved > 1 << 26 or bench.is_dry:
        bench.share(f"{case}, bandwidth", timing, moved)


def _norm(bench: Bench, case: str, rows: int) -> None:
    from services.engine.kernels.gpu.norm import add_rms_norm

    hidden = 100 if bench.is_dry else HIDDEN
    copies = bench.num_copies(4 * rows * hidden * bench.dtype.itemsize)
    xs = [bench.randn(rows, hidden) for _ in range(copies)]
    residual, weight = bench.randn(rows, hidden), bench.randn(hidden)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (hidden,), weight, EPS), total

    bench.close_to(case, add_rms_norm(xs[0], residual, weight, EPS)[0], plain(xs[0])[0], TOLERANCE)
    _report(
        bench,
        case,
        [lambda x=x: add_rms_norm(x, residual, weight, EPS) for x in xs],
        [lambda x=x: plain(x) for x in xs],
        4 * rows * hidden * bench.dtype.itemsize,
    )


def _silu_mul(bench: Bench, case: str, rows: int) -> None:
    from services.engine.kernels.gpu.silu_mul import silu_mul

    width = 100 if bench.is_dry else WIDTH
    moved = 3 * rows * width * bench.dtype.itemsize
    xs = [bench.randn(rows, 2 * width) for _ in range(bench.num_copies(moved))]

    def plain(x: Tensor) -> Tensor:
        return F.silu(x[:, :width]) * x[:, width:]

    bench.close_to(case, silu_mul(xs[0]), plain(xs[0]), TOLERANCE)
    _report(bench, case, [lambda x=x: silu_mul(x) for x in xs], [lambda x=x: plain(x) for x in xs], moved)


def _rotary_write(bench: Bench, case: str, name: str, rows: int) -> None:
    """q and k rotated, k and v stored; torch's side rotates and stores in full precision."""
    from services.engine.kernels.gpu.rotary_write import rotary_write_kv

    heads, kv_heads, head_dim = (4, 2, 64) if bench.is_dry else (HEADS, KV_HEADS, HEAD_DIM)
    kv_format = FORMATS[name]
    cache = _empty_cache(bench, name, -(-rows // BLOCK_SIZE) + 1, kv_heads, head_dim)
    slots = torch.randperm(rows, device=bench.device)
    angles = torch.rand(rows, head_dim // 2, device=bench.device)
    cos, sin = angles.cos(), angles.sin()
    moved = rows * (2 * heads + 2 * kv_heads) * head_dim * bench.dtype.itemsize
    moved += 2 * rows * kv_heads * kv_format.bytes_per_vector(head_dim)
    xs = [bench.randn(rows, heads + 2 * kv_heads, head_dim) for _ in range(bench.num_copies(moved))]
    stored = torch.empty(2, rows, kv_heads, head_dim, device=bench.device, dtype=bench.dtype)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None].to(bench.dtype) for t in (cos, sin))

    def plain(x: Tensor) -> Tensor:
        rotated = x[:, : heads + kv_heads]
        first, second = rotated.chunk(2, -1)
        rotated = rotated * wide_cos + torch.cat([-second, first], -1) * wide_sin
        stored[0, slots], stored[1, slots] = rotated[:, heads:], x[:, heads + kv_heads :]
        return rotated[:, :heads]

    def write(x: Tensor) -> Tensor:
        return rotary_write_kv(x, cos, sin, heads, cache, slots)

    bench.close_to(case, write(xs[0]), plain(xs[0]), 2 * TOLERANCE)
    _report(bench, case, [lambda x=x: write(x) for x in xs], [lambda x=x: plain(x) for x in xs], moved)


def _empty_cache(bench: Bench, name: str, num_blocks: int, kv_heads: int, head_dim: int) -> LayerCache:
    kv_format = FORMATS[name]
    shape = (num_blocks, kv_heads, BLOCK_SIZE, kv_format.row_size(head_dim))
    k, v = (torch.zeros(shape, dtype=kv_format.storage, device=bench.device) for _ in range(2))
    if not kv_format.is_quantized:
        return LayerCache(kv_format, k, v)
    params = [torch.zeros(shape[:3], dtype=torch.int32, device=bench.device) for _ in range(2)]
    return LayerCache(kv_format, k, v, *params)
