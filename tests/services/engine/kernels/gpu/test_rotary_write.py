"""Rotation and KV write against the twin: every bit stored, and that nothing else was touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kernels import reference
from services.engine.kernels.gpu import rotary_write
from services.engine.kernels.kv_format import FORMATS, KVFormat, LayerCache, dequantize
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.rope import RopeConfig, rotary_tables

BLOCK_SIZE = 16
SLOTS = torch.tensor([19, 0, 47])
POISON = {torch.uint8: 0xEE, torch.int32: 0x7FC07FC0}


def _cache(kv_format: KVFormat, kv_heads: int, head_dim: int, device: str) -> LayerCache:
    shape = (4, kv_heads, BLOCK_SIZE)
    storage = kv_format.storage

    def poisoned(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.full(size, POISON.get(dtype, float("nan")), dtype=dtype, device=device)

    codes = [poisoned(*shape, kv_format.row_size(head_dim), dtype=storage) for _ in range(2)]
    params = [poisoned(*shape, dtype=torch.int32) if kv_format.is_quantized else None for _ in range(2)]
    return LayerCache(kv_format, *codes, *params)


def _metadata(slots: Tensor) -> AttentionMetadata:
    rows = len(slots)
    return AttentionMetadata(torch.zeros(rows), slots, torch.zeros(1, 1), [rows], [rows], BLOCK_SIZE)


def _inputs(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(rows, heads, head_dim, generator=generator) * 3
    # Keys off zero, as models have them, and one head all on one side of it.
    qkv += 4 * torch.randn(head_dim, generator=generator)
    qkv[0, -1] = qkv[0, -1].abs() + 1
    cos, sin = rotary_tables(RopeConfig(theta=1e4), head_dim, 64)
    positions = torch.arange(rows) * 7 + 3
    return qkv.to(dtype), cos[positions].contiguous(), sin[positions].contiguous()


def _bits(x: Tensor) -> Tensor:
    return x.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def _assert_same_cache(actual: LayerCache, expected: LayerCache) -> None:
    for name in ("k", "v", "k_params", "v_params"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(_bits(ours), _bits(theirs)), name


def _run_both(
    name: str, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, kv_heads: int, device: str
) -> tuple[Tensor, LayerCache, Tensor, LayerCache]:
    """(query, cache) of the kernel, then of the twin. The twin runs on the CPU: on CUDA torch multiplies by
    the reciprocal of a constant instead of dividing by it.
    """
    head_dim = qkv.shape[-1]
    ours, theirs = (_cache(FORMATS[name], kv_heads, head_dim, place) for place in (device, "cpu"))
    slots = SLOTS[: len(qkv)]
    expected = reference.rotary_write_kv(qkv, cos, sin, num_heads, theirs, _metadata(slots))
    moved = (part.to(device) for part in (qkv, cos, sin))
    query = rotary_write.rotary_write_kv(*moved, num_heads, ours, slots.to(device))
    return query, ours, expected, theirs


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_queries_and_codes_have_the_bits_of_the_twin(
    name: str, head_dim: int, device: str, poison_empty: None
) -> None:
    qkv, cos, sin = _inputs(3, 3 + 2 * 2, head_dim, torch.float32)
    query, ours, expected, theirs = _run_both(name, qkv, cos, sin, 3, 2, device)
    assert torch.equal(query.cpu(), expected)
    _assert_same_cache(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8", "fp8"])
def test_narrow_activations_are_rounded_before_they_are_quantised(
    dtype: torch.dtype, name: str, device: str
) -> None:
    qkv, cos, sin = _inputs(2, 4 + 2, 96, dtype)
    query, ours, expected, theirs = _run_both(name, qkv, cos, sin, 4, 1, device)
    assert torch.equal(_bits(query), _bits(expected))
    _assert_same_cache(ours, theirs)


@pytest.mark.parametrize(("name", "head_dim"), [("int8", 2), ("fp8", 6), ("float32", 10), ("int4", 12)])
def test_odd_heads(name: str, head_dim: int, device: str) -> None:
    qkv, cos, sin = _inputs(3, 5 + 2 * 3, head_dim, torch.float32)
    query, ours, expected, theirs = _run_both(name, qkv, cos, sin, 5, 3, device)
    assert torch.equal(query.cpu(), expected)
    _assert_same_cache(ours, theirs)


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_more_heads_than_one_program_takes(name: str, device: str) -> None:
    qkv, cos, sin = _inputs(1, 11 + 2 * 9, 128, torch.float32)
    query, ours, expected, theirs = _run_both(name, qkv, cos, sin, 11, 9, device)
    assert torch.equal(query.cpu(), expected)
    _assert_same_cache(ours, theirs)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_normed_before_they_are_rotated(dtype: torch.dtype, is_wide: bool, device: str) -> None:
    qkv, cos, sin = _inputs(3, 3 + 2 * 2, 100, dtype)
    generator = torch.Generator().manual_seed(5)
    q_norm, k_norm = (1 + 0.5 * torch.randn(2, 100, generator=generator)).to(
        torch.float32 if is_wide else dtype
    )
    ours, theirs = (_cache(FORMATS["float32"], 2, 100, place) for place in (device, "cpu"))
    expected = reference.rotary_write_kv(qkv, cos, sin, 3, theirs, _metadata(SLOTS), q_norm, k_norm, 1e-6)
    moved = [part.to(device) for part in (qkv, cos, sin, q_norm, k_norm, SLOTS)]
    query = rotary_write.rotary_write_kv(
        *moved[:3], 3, ours, moved[5], q_norm=moved[3], k_norm=moved[4], eps=1e-6
    )
    step = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(query.cpu(), expected, rtol=step, atol=step)
    torch.testing.assert_close(ours.k.cpu(), theirs.k, rtol=step, atol=step, equal_nan=True)
    # Half-precision results differ only where the scale's last bit moves a rounding.
    assert dtype == torch.float32 or float((query.cpu() != expected).float().mean()) < 0.02
    assert torch.equal(_bits(ours.v), _bits(theirs.v))


@pytest.mark.parametrize("name", ["int8", "float32"])
def test_projection_may_be_a_part_of_wider_rows(name: str, device: str) -> None:
    qkv, cos, sin = _inputs(3, 4 + 2 * 2, 64, torch.float32)
    wide = torch.full((3, 8 * 64 + 40), float("nan"), device=device)
    wide[:, 8 : 8 + 8 * 64] = qkv.flatten(1).to(device)
    view = wide[:, 8 : 8 + 8 * 64].unflatten(1, (8, 64))
    ours = _cache(FORMATS[name], 2, 64, device)
    query = rotary_write.rotary_write_kv(view, cos.to(device), sin.to(device), 4, ours, SLOTS.to(device))
    _, same, expected, _ = _run_both(name, qkv, cos, sin, 4, 2, device)
    assert torch.equal(query.cpu(), expected)
    _assert_same_cache(ours, same)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_equal_values_tiny_values_and_large_ones(name: str, device: str) -> None:
    heads = torch.zeros(3, 2, 16)
    heads[0, 0] = 7.0
    heads[0, 1] = -3.3
    heads[1, 0, 3] = 1e-38
    heads[1, 1] = torch.linspace(-1e-30, 2e-30, 16)
    heads[2, 0] = torch.linspace(-1.5e38, 1.5e38, 16)
    heads[2, 1] = -0.0
    heads[1, 0, 8:] = -0.0
    ours, theirs = (_cache(FORMATS[name], 2, 16, place) for place in (device, "cpu"))
    reference.write_kv(heads, heads.flip(1), theirs, _metadata(SLOTS))
    moved = heads.to(device)
    rotary_write.write_kv(moved, moved.flip(1), ours, SLOTS.to(device))
    _assert_same_cache(ours, theirs)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.3e38])
def test_what_is_not_finite_stays_visible_and_alone(name: str, value: float, device: str) -> None:
    """3.3e38 against its negative: both are finite and their distance is not; float16 cannot hold either."""
    heads = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(1))
    heads[1, 1, 13] = value
    heads[1, 1, 2] = -3.3e38 if value == 3.3e38 else 1.0
    ours = _cache(FORMATS[name], 2, 20, device)
    rotary_write.write_kv(heads.to(device), heads.to(device), ours, SLOTS.to(device))
    for codes, params in ((ours.k, ours.k_params), (ours.v, ours.v_params)):
        wide = codes.float() if params is None else dequantize(codes, params, ours.kv_format)
        is_finite = wide.transpose(1, 2).flatten(0, 1)[SLOTS].isfinite().all(-1).cpu()
        expected = torch.ones(3, 2, dtype=torch.bool)
        expected[1, 1] = name == "fp8" and value == 3.3e38
        assert torch.equal(is_finite, expected)


def test_every_fp32_number_near_a_float8_rounds_as_torch_rounds(device: str) -> None:
    """All 127 magnitudes, the midpoints between them, and both neighbours of each, in heads whose largest
    value is 448, so that the scale is one.
    """
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    around = torch.cat((codes, middles))
    bits = around.view(torch.int32)
    points = torch.cat((around, (bits + 1).view(torch.float32), (bits - 1).clamp_min(0).view(torch.float32)))
    points = points[points <= 448]
    points = torch.cat((points, -points, torch.zeros(-2 * len(points) % 254)))
    heads = points.view(-1, 1, 254)
    heads = torch.cat((torch.full((len(heads), 1, 2), 448.0), heads), -1)
    rows = len(heads)
    slots = torch.arange(rows) * 2
    cache = _cache(FORMATS["fp8"], 1, 256, device)
    rotary_write.write_kv(heads.to(device), heads.to(device), cache, slots.to(device))
    stored = cache.k.view(-1, 256)[slots.to(device)].cpu()
    assert int(cache.k_params.view(-1)[slots[0]]) == 0x3F80
    assert torch.equal(stored, heads[:, 0].to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_any_heads_any_magnitude(seed: int, device: str) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    name, head_dim = pick(*FORMATS), pick(4, 12, 64, 80, 96, 128, 256)
    dtype = pick(torch.float32, torch.float16, torch.bfloat16)
    num_heads, kv_heads = pick(1, 3, 8, 14, 33), pick(1, 2, 5, 9)
    qkv, cos, sin = _inputs(2, num_heads + 2 * kv_heads, head_dim, dtype)
    exponents = torch.randint(-12, 4 if dtype == torch.float16 else 30, qkv.shape[:2], generator=draw)
    qkv = (qkv.float() * 10.0 ** exponents[..., None]).to(dtype)
    query, ours, expected, theirs = _run_both(name, qkv, cos, sin, num_heads, kv_heads, device)
    assert torch.equal(_bits(query), _bits(expected))
    _assert_same_cache(ours, theirs)


def test_addresses_are_wider_than_32_bits(device: str) -> None:
    """A slot beyond 2^32 values. The memory between is never touched."""
    blocks = (1 << 32) // (BLOCK_SIZE * 64) + 1
    codes = torch.empty(blocks, 1, BLOCK_SIZE, 64, dtype=torch.uint8, device=device)
    params = torch.empty(blocks, 1, BLOCK_SIZE, dtype=torch.int32, device=device)
    # Keys and values are equal, so they may share their memory.
    cache = LayerCache(FORMATS["int8"], codes, codes, params, params)
    heads = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).to(device)
    small = _cache(FORMATS["int8"], 1, 64, device)
    rotary_write.write_kv(heads, heads, small, torch.tensor([5], device=device))
    rotary_write.write_kv(heads, heads, cache, torch.tensor([blocks * BLOCK_SIZE - 1], device=device))
    assert torch.equal(cache.v[-1, 0, -1], small.v[0, 0, 5])
    assert torch.equal(cache.v_params[-1, 0, -1], small.v_params[0, 0, 5])


def test_no_rows_are_no_launch(device: str) -> None:
    cache = _cache(FORMATS["int8"], 2, 64, device)
    qkv, table = torch.empty(0, 6, 64, device=device), torch.empty(0, 32, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    assert rotary_write.rotary_write_kv(qkv, table, table, 2, cache, slots).shape == (0, 2, 64)


def test_what_does_not_fit_is_refused(device: str) -> None:
    qkv, cos, sin = (part.to(device) for part in _inputs(3, 6, 64, torch.float32))
    slots = SLOTS.to(device)
    cache = _cache(FORMATS["int8"], 2, 64, device)
    weight = torch.ones(64, device=device)
    refused = [
        (lambda: rotary_write.rotary_write_kv(qkv, cos, sin, 3, cache, slots), "does not hold"),
        (lambda: rotary_write.rotary_write_kv(qkv, cos[:2], sin[:2], 2, cache, slots), "cos and sin"),
        (lambda: rotary_write.rotary_write_kv(qkv, cos, sin, 2, cache, slots, weight), "together"),
        (lambda: rotary_write.rotary_write_kv(qkv, cos, sin, 2, cache, slots[:2]), "slot_mapping"),
        (lambda: rotary_write.write_kv(qkv[:, :2], qkv[:, :1], cache, slots), "differ"),
        (lambda: rotary_write.write_kv(qkv[:, :2, :62], qkv[:, :2, :62], cache, slots), "cache"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    narrow = _cache(FORMATS["int4"], 2, 62, device)
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_write.write_kv(qkv[:, :2, :62], qkv[:, :2, :62], narrow, slots)
