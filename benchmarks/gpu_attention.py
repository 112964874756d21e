"""Attention over the blocked cache: decoding as a share of the copy bandwidth, causal prefill in TFLOP/s,
each against torch's own attention on contiguous K and V.

Blocks are handed out in random order. Counted are the bytes of K and V with their scales, read once, and
the multiplications of the causal half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_measure import Bench, Missing, Row, Timing
from services.engine.kernels.kv_format import FORMATS, LayerCache, dequantize, quantize

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 128
DECODES = ((1, 32768), (8, 4096), (64, 1024), (64, 4096))
DECODE_TARGETS = {"bfloat16": 0.80, "fp8": 0.75, "int8": 0.70}
"""Share of the measured copy bandwidth, for 8 sequences or more and a cache far larger than the L2."""
PREFILL, PREFILL_TARGET = 8192, 420.0
QUANTIZED = ("fp8", "int8", "int4")
TOLERANCE = 2e-2


@dataclass(slots=True)
class Batch:
    """Sequences of one length over a cache: `keys` and `values` [seqs, kv_heads, context, head_dim] are what
    the cache holds, as torch's attention wants it (only the first set has them).
    """

    cache: LayerCache
    tables: Tensor
    contexts: Tensor
    keys: Tensor
    values: Tensor


def run(bench: Bench) -> None:
    """Decodes of all formats, then prefills."""
    full = str(bench.dtype).removeprefix("torch.")
    for seqs, context in ((2, 150),) if bench.is_dry else DECODES:
        base = None
        for name in (full, *QUANTIZED):
            case = f"decode {name} seqs={seqs} context={context}"
            with bench.case(case):
                base = _decode(bench, case, name, seqs, context, base)
    length = 48 if bench.is_dry else PREFILL
    for name in (full, *QUANTIZED):
        with bench.case(f"prefill {name} length={length}"):
            _prefill(bench, f"prefill {name} length={length}", name, length, is_first=name == full)


def _heads(bench: Bench) -> tuple[int, int, int, int]:
    return (4, 2, 64, 16) if bench.is_dry else (HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)


def _decode(
    bench: Bench, case: str, name: str, seqs: int, context: int, base: Timing | None
) -> Timing | None:
    """One row; returns the time of torch's attention, measured with the first format."""
    from services.engine.kernels.gpu.paged_decode import paged_decode

    heads, kv_heads, head_dim, _ = _heads(bench)
    num_bytes = 2 * seqs * context * kv_heads * FORMATS[name].bytes_per_vector(head_dim)
    batches = [_batch(bench, name, seqs, context) for _ in range(bench.num_copies(num_bytes))]
    query = bench.randn(seqs, heads, head_dim)
    scale = head_dim**-0.5

    def attend(batch: Batch) -> Tensor:
        return paged_decode(query, batch.cache, batch.tables, batch.contexts, scale, max_context=context)

    def plain(batch: Batch) -> Tensor:
        wide = query.unsqueeze(2)
        return F.scaled_dot_product_attention(wide, batch.keys, batch.values, enable_gqa=True).squeeze(2)

    bench.close_to(case, attend(batches[0]), plain(batches[0]), TOLERANCE)
    timing = bench.time([lambda batch=batch: attend(batch) for batch in batches])
    if base is None:
        base = bench.time([lambda batch=batch: plain(batch) for batch in batches])
    target = DECODE_TARGETS.get(name) if seqs * context >= 8 * 4096 and seqs >= 8 else None
    bench.share(case, timing, num_bytes, target)
    bench.compare(f"{case}, time", timing, "torch SDPA bf16, contiguous", base)
    return base


def _prefill(bench: Bench, case: str, name: str, length: int, *, is_first: bool) -> None:
    from services.engine.kernels.gpu.paged_prefill import paged_prefill

    heads, _, head_dim, _ = _heads(bench)
    batch = _batch(bench, name, 1, length)
    query = bench.randn(length, heads, head_dim)
    starts = torch.tensor([0, length], dtype=torch.int32, device=bench.device)

    def attend() -> Tensor:
        return paged_prefill(
            query, batch.cache, batch.tables, starts, batch.contexts, head_dim**-0.5, max_query_len=length
        )

    wide = query.transpose(0, 1).unsqueeze(0).contiguous()

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(wide, batch.keys, batch.values, is_causal=True, enable_gqa=True)

    bench.close_to(case, attend(), plain().squeeze(0).transpose(0, 1), TOLERANCE)
    operations = 4 * heads * head_dim * length * (length + 1) / 2
    rate = bench.time([attend]).rate(operations / 1e12)
    base_name, base = "", None
    if is_first:
        base_name, base = _best_plain(bench, case, plain, operations)
    bench.emit(
        Row(
            bench.name,
            case,
            "TFLOP/s",
            rate.median,
            rate.p20,
            rate.p80,
            baseline=base_name,
            baseline_median=base,
            ratio=rate.median / base if base else None,
            note="" if bench.is_dry else _target_note(name, rate.median),
        )
    )


def _target_note(name: str, rate: float) -> str:
    if name != "bfloat16":
        return ""
    return f"target {PREFILL_TARGET:.0f} TFLOP/s: {'met' if rate >= PREFILL_TARGET else 'missed'}"


def _best_plain(
    bench: Bench, case: str, plain: Callable[[], Tensor], operations: float
) -> tuple[str, float | None]:
    """Name and TFLOP/s of torch's fastest backend for this; a row for each that runs."""
    found: list[tuple[float, str]] = []
    backends = (
        (SDPBackend.MATH,) if bench.is_dry else (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    )
    for backend in backends:
        name = f"torch SDPA {backend.name.lower()}"
        with bench.case(f"{case} by {name}"), sdpa_kernel(backend):
            try:
                plain()
            except RuntimeError as error:
                raise Missing(f"torch: {error}".splitlines()[0]) from error
            rate = bench.time([plain]).rate(operations / 1e12)
            bench.emit(Row(bench.name, f"{case} by {name}", "TFLOP/s", rate.median, rate.p20, rate.p80))
            found.append((rate.median, name))
    best = max(found, default=(None, ""))
    return best[1], best[0]


def _batch(bench: Bench, name: str, seqs: int, context: int) -> Batch:
    """Random K and V written into blocks in random order, in the format and as the format holds them."""
    _, kv_heads, head_dim, block_size = _heads(bench)
    blocks = -(-context // block_size)
    order = torch.randperm(seqs * blocks, device=bench.device)
    parts = [_stored(bench, name, seqs * blocks) for _ in range(2)]
    (k, k_params, k_values), (v, v_params, v_values) = parts

    def contiguous(values: Tensor) -> Tensor:
        by_seq = values[order].view(seqs, blocks, kv_heads, block_size, head_dim).transpose(1, 2)
        return by_seq.reshape(seqs, kv_heads, blocks * block_size, head_dim)[:, :, :context].contiguous()

    return Batch(
        LayerCache(FORMATS[name], k, v, k_params, v_params),
        order.view(seqs, blocks).to(torch.int32),
        torch.full((seqs,), context, dtype=torch.int32, device=bench.device),
        contiguous(k_values),
        contiguous(v_values),
    )


def _stored(bench: Bench, name: str, num_blocks: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(what the cache stores, its scales and minima, the values they stand for) of random vectors, one more
    block than asked for.
    """
    _, kv_heads, head_dim, block_size = _heads(bench)
    values = bench.randn(num_blocks + 1, kv_heads, block_size, head_dim)
    if not FORMATS[name].is_quantized:
        return values, None, values
    codes, params = quantize(values, FORMATS[name])
    return codes, params, dequantize(codes, params, FORMATS[name]).to(bench.dtype)
