"""Decode attention against fp64 over what the cache holds, within a bound that its roundings explain.

The bound, element by element: a score is a sum of head_dim products in fp32; a weight times its scale is
rounded once to the tensor cores' operand (2^-11 for fp16, 2^-8 for bf16); the output once to the query's
dtype. Nothing in it knows of the error of quantising: codes are multiplied as they are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from services.engine.kernels import reference
from services.engine.kernels.gpu.paged_decode import paged_decode
from services.engine.kernels.gpu.paged_decode_config import num_splits, workspace_size
from services.engine.kernels.kv_format import FORMATS, LayerCache, dequantize, quantize, unpack_params
from services.engine.kernels.metadata import AttentionMetadata

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
            "max_context": max(self.context_lens, default=0),
            "scale": self.query.shape[2] ** -0.5,
            "split_size": SPLIT,
        }
        lens = torch.tensor(self.context_lens, dtype=torch.int32, device=self.query.device)
        return paged_decode(
            self.query, self.cache, self.block_tables, lens, **{**given, "out": out, **options}
        )

    def rows(self, *index):
        """The batch of these sequences alone."""
        return replace(
            self,
            query=self.query[list(index)],
            block_tables=self.block_tables[list(index)],
            context_lens=[self.context_lens[i] for i in index],
        )

    def expected(self, sliding_window=None, softcap=None):
        """(output, bound of its error), fp64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        bound = torch.zeros_like(out)
        for i, context in enumerate(self.context_lens):
            first = max(context - (sliding_window or context), 0)
            if context:
                out[i], bound[i] = self._expected_row(i, torch.arange(first, context), softcap)
        # The output's own rounding; fp16 has no steps below 2^-24.
        smallest = 2.0**-25 if self.query.dtype == torch.float16 else 0.0
        return out, bound + (out.abs() * ROUNDING[self.query.dtype]).clamp_min(smallest)

    def _expected_row(self, i, positions, softcap):
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
        scores = torch.einsum("hd,hkd->hk", query, keys) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.softmax(-1)
        out = torch.einsum("hk,hkd->hd", weights, values)
        sizes = torch.einsum("hd,hkd->hk", query.abs(), key_size) * scale
        score_error = sizes.amax(-1, keepdim=True) * (query.shape[1] + 32) * FP32
        # A capped score has an error of the cap's own size, and one of the exp2 in it.
        score_error += 0.0 if softcap is None else 16 * softcap * FP32
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
    context_lens,
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


def check(batch, sliding_window=None, softcap=None, **options):
    got = batch.run(sliding_window=sliding_window, softcap=softcap, **options).cpu().double()
    expected, bound = batch.expected(sliding_window, softcap)
    excess = ((got - expected).abs() - bound).max().item()
    assert excess <= 0, f"error {(got - expected).abs().max():.2e}, {excess:.2e} over the bound"


@pytest.mark.parametrize("kv", ["float32", "float16", "bfloat16", "int8", "int4", "fp8"])
def test_every_format_and_dtype_of_the_query(kv, device):
    check(make_batch(device, RAGGED, dtype=torch.float16, kv=kv))
    check(make_batch(device, [100, 1], heads=(2, 1), dtype=torch.float32, kv=kv))
    if device == "cuda":
        # The interpreter multiplies and rounds bfloat16 in its own way.
        check(make_batch(device, RAGGED, dtype=torch.bfloat16, kv=kv))


@pytest.mark.parametrize(
    ("heads", "kv"), [((2, 2), "int8"), ((3, 1), "float16"), ((8, 1), "int4"), ((20, 1), "fp8")]
)
def test_groups_of_query_heads(heads, kv, device):
    check(make_batch(device, [16, 140], heads=heads, kv=kv))


@pytest.mark.parametrize(
    ("head_dim", "kv"),
    [
        (80, "float16"),
        (80, "int4"),
        (96, "int8"),
        (96, "fp8"),
        (128, "int4"),
        (256, "float16"),
        (256, "int8"),
    ],
)
def test_head_sizes_without_reading_past_a_row(head_dim, kv, device):
    check(make_batch(device, [65], heads=(2, 1), head_dim=head_dim, kv=kv))


@pytest.mark.parametrize(("block_size", "kv"), [(32, "int4"), (64, "int8"), (128, "float16"), (256, "fp8")])
def test_block_sizes_below_and_above_a_tile(block_size, kv, device):
    check(make_batch(device, [260, 1, 63], heads=(2, 1), block_size=block_size, kv=kv))


@pytest.mark.parametrize(
    ("window", "kv"), [(1, "int8"), (40, "float16"), (130, "float16"), (130, "fp8"), (1000, "int8")]
)
def test_a_window_hides_and_skips_what_lies_before_it(window, kv, device):
    contexts = [1, 39, 129, 300]
    batch = make_batch(device, contexts, heads=(2, 1), kv=kv)
    scratch = batch.cache.k.shape[0] - 1
    for row, context in enumerate(contexts):
        # Blocks that left the window may have gone to others: their entries name the block of NaN.
        batch.block_tables[row, : max(context - window, 0) // 16] = scratch
    check(batch, sliding_window=window)


@pytest.mark.parametrize(
    ("kv", "window"), [("float32", None), ("float16", 37), ("int8", None), ("int4", 200), ("fp8", None)]
)
@pytest.mark.parametrize("softcap", [0.3, 50.0])
def test_scores_within_a_cap(kv, window, softcap, device):
    dtype = torch.float32 if kv == "float32" else torch.float16
    batch = make_batch(device, RAGGED, heads=(4, 2), head_dim=256, kv=kv, dtype=dtype)
    check(batch, sliding_window=window, softcap=softcap)
    # Scores far beyond the cap, of both signs.
    batch = make_batch(device, RAGGED, heads=(4, 2), head_dim=64, kv=kv, dtype=dtype, change=_huge_query)
    check(batch, sliding_window=window, softcap=softcap)


def test_a_split_that_ends_with_the_window_is_in_the_grid(device):
    """129 keys back from key 257: three splits of 128 are touched."""
    check(make_batch(device, [257], heads=(1, 1)), sliding_window=130)


def _mixed_scales(query, keys, values):
    """Vectors of values from 1e-6 to 1e3, and constant ones, whose scale is 2^-100."""
    tokens = torch.arange(values.shape[2])
    values *= (10.0 ** (tokens % 10 - 6.0))[:, None]
    values[:, :, tokens % 4 == 1] = 3.0
    values[:, :, tokens % 8 == 3] = 0.0
    keys[:, :, tokens % 8 == 5] = -1.0


def _constant_values_with_most_weight(query, keys, values):
    """A sink: one key in sixteen has nearly all weight, and a large value without any range."""
    query.fill_(1.0)
    keys *= 0.1
    keys[:, :, 7] = 40.0
    values[:, :, 7] = -32768.0


def _large_scale_with_least_weight(query, keys, values):
    """A value with a scale of 1e4 on a key that has next to no weight, beside scales of 1e-5."""
    query.fill_(1.0)
    values *= 1e-5
    keys[:, :, 4] = -20.0
    values[:, :, 4] = torch.linspace(-1e6, 1e6, values.shape[3])


def _huge_query(query, keys, values):
    query *= 1e4
    keys *= 1e-4
    keys[:, :, ::3] = 1e-4


def _tiny_query(query, keys, values):
    query *= 1e-5
    keys *= 1e5


@pytest.mark.parametrize("kv", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    "change",
    [
        _mixed_scales,
        _constant_values_with_most_weight,
        _large_scale_with_least_weight,
        _huge_query,
        _tiny_query,
    ],
)
def test_scales_far_apart_neither_overflow_nor_vanish(change, kv, device):
    check(make_batch(device, [1, 150], heads=(2, 1), kv=kv, change=change))


@pytest.mark.parametrize("kv", ["int8", "int4", "fp8"])
def test_a_query_beyond_the_range_of_fp16(kv, device):
    """Its dtype is bfloat16, the tensor cores' operand is not. Written in fp32: see bfloat16 above."""

    def change(query, keys, values):
        query *= 1e8
        keys *= 1e-8

    batch = make_batch(device, [1, 150], heads=(2, 1), dtype=torch.bfloat16, kv=kv, change=change)
    check(batch, out=torch.full(batch.query.shape, torch.nan, device=device))


@pytest.mark.parametrize("kv", ["float16", "int8", "int4", "fp8"])
def test_a_row_has_the_same_bits_alone_and_behind_any_bound(kv, device):
    batch = make_batch(device, [100, 300, 128], heads=(2, 1), kv=kv)
    together = batch.run()
    for row, context in enumerate(batch.context_lens):
        alone = batch.rows(row)
        assert torch.equal(alone.run(), together[row : row + 1])
        assert torch.equal(alone.run(max_context=context + 1000), together[row : row + 1])


@pytest.mark.parametrize("kv", ["float16", "int4"])
def test_the_same_bits_wherever_the_blocks_lie(kv, device):
    batch = make_batch(device, [77, 200], heads=(2, 1), kv=kv)
    order = torch.randperm(batch.cache.k.shape[0], generator=torch.Generator().manual_seed(3)).to(device)
    cache = batch.cache
    tensors = (cache.k, cache.v, cache.k_params, cache.v_params)
    moved = LayerCache(cache.kv_format, *(None if x is None else x[order] for x in tensors))
    tables = order.argsort().int()[batch.block_tables.long()]
    assert torch.equal(replace(batch, cache=moved, block_tables=tables).run(), batch.run())


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_agrees_with_the_twin(kv, device):
    batch = make_batch(device, [1, 150], dtype=torch.float32, kv=kv)
    metadata = AttentionMetadata(
        positions=torch.tensor([0, 149], device=device),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        block_tables=batch.block_tables.long(),
        query_lens=[1, 1],
        context_lens=batch.context_lens,
        block_size=16,
    )
    expected = reference.paged_attention(batch.query, batch.cache, metadata, 0.125, sliding_window=100)
    torch.testing.assert_close(batch.run(sliding_window=100), expected, rtol=0, atol=1e-5)


def test_a_query_between_other_tensors_and_a_workspace_from_outside(device):
    batch = make_batch(device, [150, 20])
    expected = batch.run()
    size = workspace_size(2, 4, 64, num_splits(150, SPLIT))
    workspace = torch.full((size + 5,), torch.nan, device=device)
    wide = torch.full((2, 8, 64), torch.nan, dtype=batch.query.dtype, device=device)
    wide[:, 2:6] = batch.query
    out = torch.full_like(batch.query, torch.nan)
    replace(batch, query=wide[:, 2:6]).run(workspace=workspace, out=out)
    assert torch.equal(out, expected)
    assert workspace[size:].isnan().all()
    with pytest.raises(ValueError, match="workspace"):
        batch.run(workspace=workspace[: size - 1])


def test_the_number_of_splits():
    assert [num_splits(n, 128) for n in (0, 1, 128, 129, 1000)] == [1, 1, 1, 2, 8]
    assert [num_splits(1000, 128, window) for window in (1, 2, 129, 130, 5000)] == [1, 2, 2, 3, 8]


def test_rows_of_padding_alone_are_zeros(device):
    batch = make_batch(device, [0, 0], kv="int8")
    for bound in (0, 1000):
        assert torch.equal(batch.run(max_context=bound), torch.zeros_like(batch.query))


def test_no_row_launches_nothing(device):
    assert make_batch(device, [5]).rows().run().shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_size": 100}, "split_size"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"softcap": 0.0}, "softcap"),
        ({"out": torch.zeros(1, 4, 65)}, "out"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, device):
    with pytest.raises(ValueError, match=message):
        make_batch(device, [5]).run(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: replace(batch, query=batch.query[:, :3]), "kv heads"),
        (lambda batch: replace(batch, query=batch.query[..., :32]), "head_dim"),
        (lambda batch: replace(batch, block_tables=batch.block_tables.long()), "block_tables"),
        (lambda batch: replace(batch, block_tables=batch.block_tables[:0]), "block_tables"),
        (lambda batch: replace(batch, block_tables=batch.block_tables[:, :0]), "block_tables"),
        (lambda batch: replace(batch, cache=replace(batch.cache, k_params=None)), "params"),
        (lambda batch: replace(batch, cache=replace(batch.cache, v=batch.cache.v[:, :1])), "dense"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, device):
    with pytest.raises(ValueError, match=message):
        change(make_batch(device, [5], kv="int8")).run()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_shape(seed, device):
    rng = random.Random(seed)
    kv = rng.choice(["float16", "int8", "int4", "fp8"])
    kv_heads = rng.choice([1, 2, 3])
    batch = make_batch(
        device,
        [rng.choice([0, 1, 15, 64, 127, rng.randrange(1, 520)]) for _ in range(rng.randrange(1, 4))],
        heads=(kv_heads * rng.choice([1, 2, 5, 8, 9, 17]), kv_heads),
        head_dim=rng.choice([64, 72, 80, 96, 128, 160, 256]),
        block_size=rng.choice([16, 32, 64, 128, 256]),
        dtype=rng.choice([torch.float16, torch.float32]),
        kv=kv,
        seed=seed,
    )
    check(batch, sliding_window=rng.choice([None, None, rng.randrange(1, 400)]))
