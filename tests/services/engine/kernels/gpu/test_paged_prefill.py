"""Prefill attention against its twin: ragged batches, every cache format, and a row's bits in any company."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from services.engine.kernels import reference
from services.engine.kernels.gpu.paged_prefill import paged_prefill
from services.engine.kernels.gpu.paged_prefill_config import PrefillConfig, choose_config
from services.engine.kernels.kv_format import FORMATS, LayerCache, quantize
from services.engine.kernels.metadata import AttentionMetadata

SMALL = PrefillConfig(block_m=16, tile=32, num_warps=4, num_stages=2)
WIDE = PrefillConfig(block_m=64, tile=64, num_warps=4, num_stages=2)
NAN_PARAMS = 0x7FC07FC0
"""Two bfloat16 NaNs."""


@dataclass
class Batch:
    """A ragged batch whose cache holds NaN wherever no sequence has a token."""

    query: torch.Tensor
    cache: LayerCache
    block_tables: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    num_padding_rows: int

    @property
    def starts(self):
        return [sum(self.query_lens[:i]) for i in range(len(self.query_lens) + 1)]

    def run(self, **options):
        """The kernel's output, written over NaN."""
        device = self.query.device
        out = torch.full_like(self.query, torch.nan)
        options = {"max_query_len": max(self.query_lens), "scale": self.query.shape[2] ** -0.5} | options
        result = paged_prefill(
            self.query,
            self.cache,
            self.block_tables,
            torch.tensor(self.starts, dtype=torch.int32, device=device),
            torch.tensor(self.context_lens, dtype=torch.int32, device=device),
            out=out,
            **options,
        )
        assert result is out
        return out

    def expected(self, sliding_window=None, softcap=None):
        """The twin's output, in fp32."""
        positions = [
            position
            for rows, context in zip(self.query_lens, self.context_lens, strict=True)
            for position in range(context - rows, context)
        ] + [0] * self.num_padding_rows
        metadata = AttentionMetadata(
            positions=torch.tensor(positions, device=self.query.device),
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            block_tables=self.block_tables.long(),
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            block_size=self.cache.block_size,
            num_padding_rows=self.num_padding_rows,
        )
        query = self.query.float()
        scale = query.shape[2] ** -0.5
        return reference.paged_attention(
            query, self.cache, metadata, scale, sliding_window=sliding_window, softcap=softcap
        )


def make_batch(
    device,
    query_lens,
    context_lens,
    heads=(4, 2),
    head_dim=64,
    block_size=16,
    dtype=torch.float32,
    kv="float32",
    num_padding_rows=0,
    seed=0,
):
    """Keys off zero, values with an outlier channel, physical blocks in no order."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    needed = [-(-context // block_size) for context in context_lens]
    num_blocks = sum(needed) + 2
    blocks = torch.randperm(num_blocks, generator=generator).split([*needed, 2])
    # Entries past a sequence's last block name the scratch block, which holds NaN.
    tables = torch.full((len(needed), max(needed) + 1), num_blocks, dtype=torch.int32)
    keys, values = torch.full((2, num_blocks + 1, kv_heads, block_size, head_dim), torch.nan).unbind(0)
    for sequence, context in enumerate(context_lens):
        tables[sequence, : needed[sequence]] = blocks[sequence].int()
        for index, block in enumerate(blocks[sequence].tolist()):
            count = min(block_size, context - index * block_size)
            keys[block, :, :count] = torch.randn(kv_heads, count, head_dim, generator=generator) + 0.7
            values[block, :, :count] = torch.randn(kv_heads, count, head_dim, generator=generator)
            values[block, :, :count, 3] *= 8
    query = torch.randn(sum(query_lens) + num_padding_rows, num_heads, head_dim, generator=generator)
    return Batch(
        query=query.to(device, dtype),
        cache=make_cache(keys.to(device), values.to(device), kv),
        block_tables=tables.to(device),
        query_lens=list(query_lens),
        context_lens=list(context_lens),
        num_padding_rows=num_padding_rows,
    )


def make_cache(keys, values, kv):
    kv_format = FORMATS[kv]
    if not kv_format.is_quantized:
        return LayerCache(kv_format, keys.to(kv_format.storage), values.to(kv_format.storage))
    tensors = []
    for x in (keys, values):
        codes, params = quantize(x.nan_to_num(), kv_format)
        is_unowned = x[..., 0].isnan()
        tensors.append(
            (codes.masked_fill(is_unowned[..., None], 0x7F), params.masked_fill(is_unowned, NAN_PARAMS))
        )
    (k, k_params), (v, v_params) = tensors
    return LayerCache(kv_format, k, v, k_params, v_params)


def tolerance(*dtypes):
    return max({torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] for dtype in dtypes)


def check(batch, sliding_window=None, softcap=None, **options):
    got = batch.run(sliding_window=sliding_window, softcap=softcap, **options).float()
    expected = batch.expected(sliding_window, softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * tolerance(batch.query.dtype))


RAGGED = {"query_lens": [1, 5, 0, 64, 33, 1], "context_lens": [77, 5, 0, 100, 130, 1]}


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "config"),
    [
        ((4, 2), 64, 16, SMALL),
        ((3, 1), 80, 128, WIDE),
        ((2, 2), 96, 32, WIDE),
        ((8, 1), 128, 64, None),
        ((4, 1), 256, 256, WIDE),
    ],
)
def test_a_ragged_batch_in_one_launch(device, heads, head_dim, block_size, config):
    batch = make_batch(
        device, **RAGGED, heads=heads, head_dim=head_dim, block_size=block_size, num_padding_rows=3
    )
    check(batch, config=config)
    assert batch.run(config=config)[-3:].eq(0).all()


@pytest.mark.parametrize("window", [1, 20, 68])
def test_sliding_window(device, window):
    """Of 68, the last row's first key is the second of a tile that no row sees less of."""
    check(make_batch(device, [1, 40, 7], [90, 101, 7]), sliding_window=window, config=SMALL)


@pytest.mark.parametrize(("window", "kv"), [(None, "float32"), (20, "float32"), (None, "int8")])
@pytest.mark.parametrize("softcap", [0.3, 5.0])
def test_scores_within_a_cap(device, window, kv, softcap):
    batch = make_batch(device, **RAGGED, head_dim=256, kv=kv)
    check(batch, sliding_window=window, softcap=softcap, config=SMALL)


def test_half_precision(device):
    dtypes = ["float16"] + (["bfloat16"] if device == "cuda" else [])
    for name in dtypes:
        batch = make_batch(device, [1, 40, 7], [90, 101, 7], dtype=getattr(torch, name), kv=name)
        check(batch)


@pytest.mark.parametrize(
    ("kv", "head_dim", "block_size"),
    [
        ("int8", 64, 16),
        ("int4", 64, 128),
        ("fp8", 64, 32),
        ("int8", 80, 64),
        ("int4", 80, 16),
        ("fp8", 96, 256),
    ],
)
def test_quantized_caches(device, kv, head_dim, block_size):
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
    for dtype in dtypes:
        check(
            make_batch(
                device, [1, 40], [90, 101], dtype=dtype, kv=kv, head_dim=head_dim, block_size=block_size
            ),
            config=PrefillConfig(32, 64, 4, 2),
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_random_batches(device, seed):
    """Everything against everything: formats, shapes, windows, the launcher's own choices."""
    choose = random.Random(seed).choice
    dtype = choose([torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else []))
    name = str(dtype).removeprefix("torch.")
    query_lens = [choose([0, 1, 1, 2, 9, 40]) for _ in range(choose([1, 3, 6]))] + [1]
    batch = make_batch(
        device,
        query_lens,
        [rows + choose([0, 0, 1, 63, 128, 200]) * (rows > 0) for rows in query_lens],
        heads=choose([(1, 1), (3, 1), (8, 2), (16, 2), (6, 6)]),
        head_dim=choose([64, 80, 96, 128, 256]),
        block_size=choose([16, 32, 64, 128, 256]),
        dtype=dtype,
        kv=choose([name, "int8", "int4", "fp8"]),
        num_padding_rows=choose([0, 5]),
        seed=seed,
    )
    window = choose([None, None, 1, 33, 100])
    check(batch, window)
    check(batch, window, deterministic=True)


def test_rows_wider_than_the_cache(device):
    check(make_batch(device, [9], [50], dtype=torch.float32, kv="float16"))
    with pytest.raises(ValueError, match="shared memory"):
        make_batch(device, [9], [50], dtype=torch.float16, kv="float32").run()


def test_where_blocks_lie_does_not_show(device):
    """Same keys in other physical blocks, same bits."""
    batch = make_batch(device, [3, 20], [40, 90])
    first = batch.run()
    num_blocks = batch.cache.k.shape[0]
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).to(device)
    k, v = torch.empty_like(batch.cache.k), torch.empty_like(batch.cache.v)
    k[order], v[order] = batch.cache.k, batch.cache.v
    batch.cache = LayerCache(batch.cache.kv_format, k, v)
    batch.block_tables = order[batch.block_tables.long()].int()
    assert torch.equal(batch.run(), first)


def slice_of(batch, sequence, begin, end):
    """Rows begin .. end of one sequence alone, as if its context ended there."""
    start = batch.starts[sequence]
    context = batch.context_lens[sequence] - batch.query_lens[sequence] + end
    return Batch(
        query=batch.query[start + begin : start + end],
        cache=batch.cache,
        block_tables=batch.block_tables[sequence : sequence + 1],
        query_lens=[end - begin],
        context_lens=[context],
        num_padding_rows=0,
    )


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"), [("float32", None, None), ("float16", 37, None), ("float32", 37, 2.0)]
)
def test_deterministic_rows_have_the_same_bits_in_any_chunk_and_batch(device, dtype, window, softcap):
    batch = make_batch(device, [50, 1, 21], [140, 70, 21], dtype=getattr(torch, dtype), kv=dtype)
    options = {"deterministic": True, "sliding_window": window, "softcap": softcap}
    whole = batch.run(**options)
    for size in (1, 7, 50):
        for begin in range(0, 50, size) if size > 1 else (0, 17, 49):
            end = min(50, begin + size)
            assert torch.equal(slice_of(batch, 0, begin, end).run(**options), whole[begin:end])
    assert torch.equal(slice_of(batch, 1, 0, 1).run(**options), whole[50:51])


def test_many_sequences(device):
    """More than one step of the search for a program's sequence, most of them decodes."""
    query_lens = [1] * 140 + [3, 0, 2]
    context_lens = [1 + i % 5 for i in range(140)] + [4, 0, 9]
    check(make_batch(device, query_lens, context_lens, heads=(1, 1)), config=SMALL)


def test_rows_of_an_empty_context_are_zero(device):
    """As the padding of a captured batch has them: a row, but no key."""
    batch = make_batch(device, [1, 1, 1], [20, 0, 0])
    out = batch.run()
    assert out[1:].eq(0).all()
    torch.testing.assert_close(out[:1], slice_of(batch, 0, 0, 1).expected(), rtol=0, atol=1e-5)


def test_a_row_does_not_read_past_its_neighbours(device):
    """Chunks of one cached sequence: what later rows' keys hold, here NaN, is not read for earlier rows."""
    batch = make_batch(device, [20], [60])
    expected = slice_of(batch, 0, 0, 5).run()
    block = batch.block_tables[0, 45 // 16]
    batch.cache.k[block, :, 45 % 16 :] = torch.nan
    batch.cache.v[block, :, 45 % 16 :] = torch.nan
    assert torch.equal(slice_of(batch, 0, 0, 5).run(), expected)


def test_query_and_out_of_other_strides(device):
    batch = make_batch(device, [4, 1], [20, 33])
    expected = batch.run()
    fused = torch.full((5, 10, 64), torch.nan, device=device)
    fused[:, 2:6] = batch.query
    batch.query = fused[:, 2:6]
    assert torch.equal(batch.run(), expected)


def test_what_does_not_fit_is_refused(device):
    batch = make_batch(device, [4], [20])
    with pytest.raises(ValueError, match="scale"):
        batch.run(scale=0.0)
    with pytest.raises(ValueError, match="window"):
        batch.run(sliding_window=0)
    with pytest.raises(ValueError, match="softcap"):
        batch.run(softcap=-1.0)
    batch.query = batch.query[..., :32]
    with pytest.raises(ValueError, match="no vectors of 32"):
        batch.run()
    batch = make_batch(device, [4], [20], heads=(4, 4))
    batch.query = batch.query[:, :3].contiguous()
    with pytest.raises(ValueError, match="3 query heads over 4"):
        batch.run()
    batch = make_batch(device, [4], [20])
    batch.block_tables = batch.block_tables.long()
    with pytest.raises(ValueError, match="int32"):
        batch.run()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_less_shared_memory_takes_smaller_tiles(device, head_dim):
    """K and V of every tile on its way, and the query, within what a program may have."""
    for shared in (227 << 10, 163 << 10, 99 << 10):
        config = choose_config(torch.bfloat16, head_dim, 4, None, 128, shared_memory=shared)
        width = 2 * (1 << (head_dim - 1).bit_length())
        assert (2 * config.tile * config.num_stages + config.block_m) * width <= shared
        assert choose_config(torch.bfloat16, head_dim, 4, None, 128, shared_memory=shared + 1024) == config
