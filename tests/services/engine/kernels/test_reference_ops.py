"""The plain twins against loops written out, and the bits of a row alone against the same row among
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.engine.kernels import ops, reference
from services.engine.kernels.kv_format import FORMATS, LayerCache
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.rope import RopeConfig, inverse_frequencies, rotary_tables

ROW_OPS = ["rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "softcap", "rotary", "embedding"]


def _rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 63, 100, 256])
def test_rms_norm_is_the_formula(width: int) -> None:
    x, weight = _rows(5, width), _rows(1, width, seed=1)[0]
    y = ops.rms_norm(x, weight, 1e-5)
    for row in range(5):
        mean_square = sum(float(value) ** 2 for value in x[row]) / width
        for i in range(width):
            expected = float(x[row, i]) / math.sqrt(mean_square + 1e-5) * float(weight[i])
            assert float(y[row, i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_add_rms_norm_returns_the_sum_and_its_norm() -> None:
    x, residual, weight = _rows(3, 48), _rows(3, 48, 1), _rows(1, 48, 2)[0]
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(x + residual, weight, 1e-6))


@pytest.mark.parametrize("width", [63, 100, 257])
def test_silu_mul_is_the_formula(width: int) -> None:
    x = _rows(4, 2 * width)
    gate, up = x[:, :width].double(), x[:, width:].double()
    expected = gate * torch.sigmoid(gate) * up
    assert torch.allclose(ops.silu_mul(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [63, 100, 257])
def test_gelu_mul_is_the_tanh_formula(width: int) -> None:
    x = 3 * _rows(4, 2 * width)
    gate, up = x[:, :width].double(), x[:, width:].double()
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.allclose(ops.gelu_mul(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [ops.silu_mul, ops.gelu_mul])
def test_large_negative_gates_stay_finite(op: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(op(torch.tensor([[-200.0, 3.0]])), torch.tensor([[-0.0]]))


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_is_the_formula_and_leaves_its_input(cap: float) -> None:
    x = 10 * _rows(4, 101)
    x[0, :3] = torch.tensor([1e30, -1e30, 0.0])
    before = x.clone()
    expected = cap * (x.double() / cap).tanh()
    assert torch.allclose(ops.softcap(x, cap).double(), expected, rtol=0, atol=4e-7 * cap)
    assert torch.equal(x, before)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("width", [62, 100, 258])
def test_row_alone_has_the_bits_it_has_among_others(op: str, width: int) -> None:
    x, weight = _rows(67, width), _rows(1, width, 1)[0]
    table = _rows(67, width // 2, 2)

    def apply(rows: slice) -> Tensor:
        if op == "rms_norm":
            return ops.rms_norm(x[rows], weight, 1e-5)
        if op == "add_rms_norm":
            return ops.add_rms_norm(x[rows], x[rows] * 2, weight, 1e-5)[0]
        if op in ("silu_mul", "gelu_mul"):
            return getattr(ops, op)(x[rows])
        if op == "softcap":
            return ops.softcap(x[rows], 2.0)
        if op == "rotary":
            return ops.rotary(x[rows].unsqueeze(1), table[rows].cos(), table[rows].sin())
        return ops.embedding(torch.arange(67)[rows], x)

    together = apply(slice(None))
    alone = torch.cat([apply(slice(row, row + 1)) for row in range(67)])
    assert torch.equal(together, alone)


def test_a_lone_very_wide_row_is_summed_as_among_others() -> None:
    x = _rows(3, 40000)
    assert torch.equal(reference.row_mean_square(x)[:1], reference.row_mean_square(x[:1]))


def test_rotary_rotates_pairs_half_a_head_apart() -> None:
    x = _rows(2, 2 * 6).view(2, 2, 6)
    cos, sin = rotary_tables(RopeConfig(theta=100.0), 6, 8)
    y = ops.rotary(x, cos[[3, 5]], sin[[3, 5]])
    for row, position in enumerate((3, 5)):
        for head in range(2):
            for pair in range(3):
                angle = position * 100.0 ** (-2 * pair / 6)
                a, b = float(x[row, head, pair]), float(x[row, head, pair + 3])
                turned = (
                    a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle),
                )
                assert float(y[row, head, pair]) == pytest.approx(turned[0], abs=1e-5)
                assert float(y[row, head, pair + 3]) == pytest.approx(turned[1], abs=1e-5)


def test_linear_scaling_divides_positions() -> None:
    plain = inverse_frequencies(RopeConfig(theta=1e4), 16)
    assert torch.equal(inverse_frequencies(RopeConfig(theta=1e4, kind="linear", factor=4.0), 16), plain / 4)


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(RopeConfig(theta=1e4, kind="yarn"), 16)


@pytest.mark.parametrize("block_size", [16, 128, 256])
def test_write_kv_stores_each_head_in_its_slot(block_size: int) -> None:
    k_cache = torch.full((4, 3, block_size, 5), float("nan"))
    v_cache = k_cache.clone()
    slots = torch.tensor([block_size + 2, 7, 3 * block_size - 1])
    metadata = AttentionMetadata(
        torch.zeros(3, dtype=torch.int64), slots, torch.zeros(1, 1), [3], [3], block_size
    )
    key, value = _rows(3, 15).view(3, 3, 5), _rows(3, 15, 1).view(3, 3, 5)
    ops.write_kv(key, value, LayerCache(FORMATS["float32"], k_cache, v_cache), metadata)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot // block_size, :, slot % block_size], key[row])
        assert torch.equal(v_cache[slot // block_size, :, slot % block_size], value[row])
    assert int(torch.isfinite(k_cache).sum()) == int(torch.isfinite(v_cache).sum()) == 3 * 15


def _qkv_step(
    rows: int, kv_dtype: str = "float32"
) -> tuple[Tensor, Tensor, Tensor, LayerCache, AttentionMetadata]:
    """(qkv of 4 heads, 2 kv heads of 6, cos, sin, an empty cache of blocks of 16, slots 3, 4, ...)."""
    kv_format = FORMATS[kv_dtype]
    k = torch.zeros(8, 2, 16, kv_format.row_size(6), dtype=kv_format.storage)
    params = torch.zeros(8, 2, 16, dtype=torch.int32) if kv_format.is_quantized else None
    cache = LayerCache(kv_format, k, k.clone(), params, None if params is None else params.clone())
    slots = torch.arange(3, 3 + rows)
    metadata = AttentionMetadata(slots, slots, torch.zeros(1, 1, dtype=torch.int64), [rows], [3 + rows], 16)
    cos, sin = rotary_tables(RopeConfig(theta=100.0), 6, 128)
    return _rows(rows, 48).view(rows, 8, 6), cos[slots], sin[slots], cache, metadata


@pytest.mark.parametrize("has_norms", [False, True])
def test_rotary_write_kv_is_norm_then_rotary_then_write(has_norms: bool) -> None:
    qkv, cos, sin, cache, metadata = _qkv_step(5)
    norms = [_rows(1, 6, seed)[0] for seed in (3, 4)] if has_norms else [None, None]
    query = ops.rotary_write_kv(qkv, cos, sin, 4, cache, metadata, q_norm=norms[0], k_norm=norms[1], eps=1e-5)
    for row in range(5):
        for head in range(8):
            vector = qkv[row, head]
            if has_norms and head < 6:
                weight = norms[0 if head < 4 else 1]
                vector = vector / torch.sqrt(vector.square().mean() + 1e-5) * weight
            if head < 6:
                first, second = vector[:3], vector[3:]
                turned = (first * cos[row] - second * sin[row], second * cos[row] + first * sin[row])
                vector = torch.cat(turned)
            found = query[row, head] if head < 4 else (cache.k, cache.v)[head // 6][0, head % 2, 3 + row]
            assert torch.allclose(found, vector, atol=1e-5), (row, head)
    assert not bool(cache.k[1:].any())


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "int4", "fp8"])
def test_rows_written_alone_have_the_bits_of_those_written_together(kv_dtype: str) -> None:
    norms = {"q_norm": _rows(1, 6, 3)[0], "k_norm": _rows(1, 6, 4)[0], "eps": 1e-6}
    qkv, cos, sin, together, metadata = _qkv_step(67, kv_dtype)
    query = ops.rotary_write_kv(qkv, cos, sin, 4, together, metadata, **norms)  # type: ignore[arg-type]
    alone = _qkv_step(67, kv_dtype)[3]
    for row in range(67):
        slots = metadata.slot_mapping[row : row + 1]
        one = AttentionMetadata(slots, slots, metadata.block_tables, [1], [4], 16)
        span = slice(row, row + 1)
        found = ops.rotary_write_kv(qkv[span], cos[span], sin[span], 4, alone, one, **norms)  # type: ignore[arg-type]
        assert torch.equal(found, query[span])
    for name in ("k", "v", "k_params", "v_params"):
        first, second = getattr(together, name), getattr(alone, name)
        assert (first is None and second is None) or torch.equal(first, second)


def test_linears_with_an_activation_are_one_after_the_other() -> None:
    numerics = Numerics(torch.float32, is_deterministic=True)
    gate_up = ops.make_dense_linear(_rows(14, 10, 1), None, numerics)
    x = _rows(3, 10)
    assert torch.equal(ops.linear_silu_mul(x, gate_up), ops.silu_mul(ops.linear(x, gate_up)))
    assert torch.equal(ops.linear_gelu_mul(x, gate_up), ops.gelu_mul(ops.linear(x, gate_up)))


def test_a_norm_weight_in_fp32_is_rounded_once() -> None:
    x, weight = _rows(3, 48).bfloat16(), 1 + 0.1 * _rows(1, 48, 2)[0]
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert float((ops.rms_norm(x, weight, 1e-6) != exact.bfloat16()).float().mean()) < 0.01
    assert ops.rms_norm(x, weight, 1e-6).dtype == torch.bfloat16


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(NotImplementedError, match="meta"):
        ops.silu_mul(torch.empty(2, 4, device="meta"))
