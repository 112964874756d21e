"""Decode attention against fp64 over what the cache holds, within a bound that its roundings explain.

The bound, element by element: a score is a sum of head_dim products in fp32; a weight times its scale is
rounded once to the tensor cores' operand (2^-11 for fp16, 2^-8 for bf16); the output once to the query's
dtype. Nothing in it knows of the error of quantising: codes are multiplied as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from services.engine.kernels.gpu.paged_decode import paged_decode
from services.engine.kernels.kv_format import FORMATS, LayerCache, dequantize, quantize, unpack_params

NAN_PARAMS = 0x7FC07FC0
"""Two bfloat16 NaNs."""
SPLIT = 128
FP32 = 2.0**-24
ROUNDING = {torch.float32: FP32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
RAGGED = [1, 300, 15, 0, 63, 128, 16, 129]


@dataclass
class Batch:
    """One query per sequence, over a cache that holds NaN wherever no sequence has a token."""

    query: torch.Tensor
    cache: LayerCache
    block_tables: torch.Tensor
    context_lens: list[int]

    def run(self, **options):
        """The kernel's output, written over NaN."""
        out = torch.full_like(self.query, torch.nan)
        given = {
            "max_context": max(self.context_lens),
            "scale": self.query.shape[2] ** -0.5,
            "split_size": SPLIT,
        }
        lens = torch.tensor(self.context_lens, dtype=torch.int32, device=self.query.device)
        result = paged_decode(
            self.query, self.cache, self.block_tables, lens, **{**given, "out": out, **options}
        )
        assert result is out
        return out

    def rows(self, *index):
        """The batch of these sequences alone."""
        return replace(
            self,
            query=self.query[list(index)],
            block_tables=self.block_tables[list(index)],
            context_lens=[self.context_lens[i] for i in index],
        )

    def expected(self, sliding_window=None):
        """(output, bound of its error), fp64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        bound = torch.zeros_like(out)
        for i, context in enumerate(self.context_lens):
            first = max(context - (sliding_window or context), 0)
            if context:
                out[i], bound[i] = self._expected_row(i, torch.arange(first, context))
        return out, bound + out.abs() * ROUNDING[self.query.dtype]

    def _expected_row(self, i, positions):
        block_size, dtype = self.cache.block_size, self.query.dtype
        blocks = self.block_tables[i].cpu().long()[positions // block_size]
        groups = self.query.shape[1] // self.cache.num_kv_heads
        (keys, key_size, _), (values, value_size, value_codes) = (
            [
                part[blocks, :, positions % block_size].repeat_interleave(groups, 1).transpose(0, 1)
                for part in parts
            ]
            for parts in (held(self.cache, "k"), held(self.cache, "v"))
        )
        query = self.query[i].cpu().double()
        scale = query.shape[1] ** -0.5
        weights = (torch.einsum("hd,hkd->hk", query, keys) * scale).softmax(-1)
        out = torch.einsum("hk,hkd->hd", weights, values)
        sizes = torch.einsum("hd,hkd->hk", query.abs(), key_size) * scale
        score_error = sizes.amax(-1, keepdim=True) * (query.shape[1] + 32) * FP32
        is_exact = dtype == torch.float32 or self.cache.k.dtype not in (dtype, torch.uint8)
        rounding = (
            FP32 if is_exact else ROUNDING[torch.float16 if self.cache.kv_format.is_quantized else dtype]
        )
        rounded = torch.einsum("hk,hkd->hd", weights, value_codes) * rounding
        summed = torch.einsum("hk,hkd->hd", weights, value_size)
        return out, rounded + summed * (2 * score_error + (len(positions) + 32) * FP32)


def held(cache, name):
    """(values, their parts' sizes added, codes x scale), fp64 on the CPU: what K or V holds."""
    stored = getattr(cache, name).cpu()
    if not cache.kv_format.is_quantized:
        return stored.double(), stored.double().abs(), stored.double().abs()
    params = getattr(cache, f"{name}_params").cpu()
    scale, minimum = (part.double().unsqueeze(-1) for part in unpack_params(params))
    values = dequantize(stored, torch.full_like(params, 0x3F80), cache.kv_format).double() * scale
    return values + minimum, values.abs() + minimum.abs(), values.abs()


def make_batch(
    device,
    context_lens=tuple(RAGGED),
    heads=(4, 2),
    head_dim=64,
    block_size=16,
    dtype=torch.float16,
    kv="float16",
    seed=0,
    change=lambda query, keys, values: None,
):
    """Keys off zero, values with an outlier channel, physical blocks in no order, NaN in unowned slots."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    needed = [-(-context // block_size) for context in context_lens]
    num_blocks = sum(needed) + 2
    blocks = torch.randperm(num_blocks, generator=generator).split([*needed, 2])
    tables = torch.full((len(needed), max(needed) + 1), num_blocks, dtype=torch.int32)
    query = torch.randn(len(needed), num_heads, head_dim, generator=generator)
    keys, values = torch.randn(2, num_blocks + 1, kv_heads, block_size, head_dim, generator=generator).unbind(
        0
    )
    keys += 0.7
    values[..., 3] *= 8
    change(query, keys, values)
    is_owned = torch.zeros(num_blocks + 1, 1, block_size, dtype=torch.bool)
    for sequence, context in enumerate(context_lens):
        tables[sequence, : needed[sequence]] = blocks[sequence].int()
        for index, block in enumerate(blocks[sequence].tolist()):
            is_owned[block, :, : context - index * block_size] = True
    cache = make_cache(keys.to(device), values.to(device), is_owned.to(device), kv)
    return Batch(query.to(device, dtype), cache, tables.to(device), list(context_lens))


def make_cache(keys, values, is_owned, kv):
    kv_format = FORMATS[kv]
    if not kv_format.is_quantized:
        k, v = (x.to(kv_format.storage).masked_fill(~is_owned[..., None], torch.nan) for x in (keys, values))
        return LayerCache(kv_format, k, v)
    tensors = []
    for x in (keys, values):
        codes, params = quantize(x, kv_format)
        # 0x7F is a NaN of fp8.
        tensors.append(codes.masked_fill(~is_owned[..., None], 0x7F))
        tensors.append(params.masked_fill(~is_owned, NAN_PARAMS))
    return LayerCache(kv_format, tensors[0], tensors[2], tensors[1], tensors[3])


def check(batch, sliding_window=None, **options):
    got = batch.run(sliding_window=sliding_window, **options).cpu().double()
    expected, bound = batch.expected(sliding_window)
    excess = ((got - expected).abs() - bound).max().item()
    assert excess <= 0, f"error {(got - expected).abs().max():.2e}, {excess:.2e} over the bound"


def dtypes(device):
    """The interpreter's bf16 is no bf16."""
    return [torch.float16, torch.float32, *([torch.bfloat16] if device == "cuda" else [])]


@pytest.mark.parametrize("kv", ["float32", "float16", "bfloat16", "int8", "int4", "fp8"])
def test_every_format_and_dtype_of_the_query(kv, device):
    for dtype in dtypes(device):
        check(make_batch(device, dtype=dtype, kv=kv))
