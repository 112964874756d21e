"""The fused 4-bit product and its reduction against the twin in fp64: every tile, edge and epilogue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels import reference
from services.engine.kernels.gpu.launch_configs import LaunchConfig, w4a16_deterministic_tile, w4a16_tiles
from services.engine.kernels.gpu.silu_mul import Activation
from services.engine.kernels.gpu.w4a16 import w4a16
from services.engine.kernels.gpu.w4a16_repack import pack

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


def _weight(in_features: int, out_features: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, out_features), generator=generator, dtype=torch.uint8)
    zeros[:, 0], zeros[:, -1] = 0, 15
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 1e-3).half()
    return values, zeros, scales


def _rows(num_rows: int, in_features: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """x with an outlier channel, inside a buffer whose other rows and columns are NaN."""
    x = torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(seed))
    x[:, in_features // 3] *= 200
    buffer = torch.full((num_rows + 3, in_features + 8), NAN, dtype=dtype, device=device)
    buffer[:num_rows, :in_features] = x.to(dtype)
    return buffer[:num_rows, :in_features]


def _check(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    tile: LaunchConfig,
    num_splits: int = 1,
    *,
    has_bias: bool = False,
    has_residual: bool = False,
    activation: Activation | None = None,
    is_interleaved: bool = False,
) -> None:
    rows, in_features, out_features, group = shape
    weight = _weight(in_features, out_features, group)
    packed = pack(*(part.to(device) for part in weight), dtype, is_interleaved=is_interleaved)
    x = _rows(rows, in_features, dtype, device)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(out_features, generator=generator).to(device, dtype) if has_bias else None
    residual = None
    if has_residual:
        residual = torch.randn(rows, out_features, generator=generator).to(device, dtype)
    width = out_features // 2 if activation else out_features
    out = torch.full((rows + 1, width), NAN, dtype=dtype, device=device)
    partial = None
    if num_splits > 1:
        partial = torch.full((num_splits, rows, out_features), NAN, device=device)
    y = w4a16(
        x,
        packed,
        tile,
        num_splits,
        bias=bias,
        residual=residual,
        activation=activation,
        partial=partial,
        out=out[:rows],
    )
    expected = x.double().cpu() @ reference.dequantize_int4(*weight).double()
    if bias is not None:
        expected += bias.double().cpu()
    if activation:
        gate = expected[:, :width]
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        expected = gate * expected[:, width:]
    if residual is not None:
        expected += residual.double().cpu()
    error = (y.double().cpu() - expected).abs().amax() / expected.abs().amax()
    assert float(error) < TOLERANCE[dtype]
    assert bool(out[rows].isnan().all()), "a row that does not exist was written"


def _tile(rows: int, span: int, index: int = 0) -> LaunchConfig:
    return w4a16_tiles(rows, span)[index]


def _name(value: object) -> str:
    if isinstance(value, LaunchConfig):
        return f"{value.block_m}x{value.block_n}x{value.block_k}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "tile", "num_splits"),
    [
        ((1, 128, 8, 128), _tile(8, 128), 1),
        ((3, 384, 136, 128), _tile(8, 128), 3),
        ((8, 192, 200, 64), _tile(8, 64), 1),
        ((5, 96, 24, 32), _tile(8, 32), 1),
        ((16, 640, 24, 128), _tile(16, 128), 2),
        ((9, 320, 136, 64), _tile(16, 64), 1),
        ((16, 160, 136, 32), _tile(16, 32), 2),
        ((17, 384, 200, 128), _tile(32, 128), 1),
        ((32, 192, 136, 64), _tile(32, 64), 1),
        ((31, 96, 200, 32), _tile(32, 32), 1),
        ((63, 384, 136, 128), _tile(64, 128), 2),
        ((64, 320, 384, 64), _tile(64, 64, 1), 1),
        ((65, 160, 24, 32), _tile(64, 32), 1),
        ((65, 128, 136, 128), _tile(128, 128, 1), 1),
        ((100, 192, 384, 64), _tile(128, 64, 1), 2),
        ((40, 256, 136, 128), w4a16_deterministic_tile(128), 2),
        ((70, 96, 136, 32), w4a16_deterministic_tile(32), 1),
    ],
    ids=_name,
)
def test_product_is_the_twins(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], tile: LaunchConfig, num_splits: int
) -> None:
    _check(device, dtype, shape, tile, num_splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "group"), [(100, 100), (320, 320), (48, 16), (288, 96), (512, 256), (40, 40)]
)
def test_groups_of_other_sizes(device: str, dtype: torch.dtype, in_features: int, group: int) -> None:
    packed = pack(*_weight(in_features, 8, group), dtype)
    assert packed.span is not None
    _check(device, dtype, (5, in_features, 136, group), _tile(8, packed.span))


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(
    "end", ["bias", "residual", "both", "silu", "silu and bias", "gelu", "gelu and bias"]
)
def test_epilogues(device: str, end: str, is_interleaved: bool, num_splits: int) -> None:
    _check(
        device,
        DTYPES[0],
        (9, 256, 152, 128),
        _tile(16, 128),
        num_splits,
        has_bias=end.endswith("bias") or end == "both",
        has_residual=end in ("residual", "both"),
        activation=next((name for name in ("silu", "gelu") if end.startswith(name)), None),
        is_interleaved=is_interleaved,
    )


@pytest.mark.parametrize(
    ("shape", "tile", "num_splits"),
    [((3, 384, 136, 128), _tile(8, 128), 3), ((65, 192, 200, 64), _tile(128, 64, 1), 1)],
    ids=_name,
)
def test_half_precision(
    device: str, shape: tuple[int, int, int, int], tile: LaunchConfig, num_splits: int
) -> None:
    _check(device, torch.float16, shape, tile, num_splits, has_bias=True, has_residual=True)


def test_bfloat16_is_rounded_once(device: str) -> None:
    weight = _weight(256, 24, 128)
    packed = pack(*(part.to(device) for part in weight), torch.bfloat16)
    x = _rows(5, 256, torch.bfloat16, device)
    y = w4a16(x, packed, _tile(8, 128), 2)
    exact = (x.double().cpu() @ reference.dequantize_int4(*weight).double()).float()
    # A sum that fp32 leaves at the edge between two bfloat16 numbers may fall on either side.
    differing = y.cpu() != exact.bfloat16()
    assert float(differing.double().mean()) <= 0.02
    assert torch.allclose(y.cpu().float(), exact, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("zero", [0, 15])
@pytest.mark.parametrize("rows", [8, 128])
def test_zero_points_are_exact(device: str, zero: int, rows: int) -> None:
    """All codes equal to their zero point give exactly nothing, whatever x is."""
    values = torch.full((256, 16), zero, dtype=torch.uint8, device=device)
    zeros = torch.full((2, 16), zero, dtype=torch.uint8, device=device)
    packed = pack(values, zeros, torch.full((2, 16), 0.01, device=device), DTYPES[0])
    y = w4a16(_rows(3, 256, DTYPES[0], device), packed, _tile(rows, 128), 1)
    assert torch.equal(y, torch.zeros_like(y))


def _check_rows_alone(device: str, span: int, counts: list[int]) -> None:
    tile = w4a16_deterministic_tile(span)
    packed = pack(*(part.to(device) for part in _weight(256, 24, span)), DTYPES[0])
    x = _rows(70, 256, DTYPES[0], device)
    together = w4a16(x, packed, tile, 2)
    assert torch.equal(w4a16(x.flip(0), packed, tile, 2).flip(0), together)
    for count in counts:
        assert torch.equal(w4a16(x[:count], packed, tile, 2), together[:count]), f"{count} rows"
        last = slice(count - 1, count)
        assert torch.equal(w4a16(x[last], packed, tile, 2), together[last]), f"row {count - 1}"


@pytest.mark.parametrize("span", [128, 32])
def test_a_row_alone_has_the_bits_it_has_among_others(device: str, span: int) -> None:
    _check_rows_alone(device, span, [1, 3, 17, 32, 33, 64, 69])


@pytest.mark.slow
def test_a_row_alone_has_the_bits_it_has_in_batches_of_every_size(device: str) -> None:
    _check_rows_alone(device, 128, list(range(1, 71)))


def test_no_rows_give_no_rows(device: str) -> None:
    packed = pack(*(part.to(device) for part in _weight(128, 24, 128)), DTYPES[0])
    x = torch.empty(0, 128, dtype=DTYPES[0], device=device)
    assert w4a16(x, packed, _tile(8, 128), 1).shape == (0, 24)


def test_what_does_not_fit_is_refused(device: str) -> None:
    packed = pack(*(part.to(device) for part in _weight(128, 24, 128)), DTYPES[0])
    x, tile = _rows(3, 128, DTYPES[0], device), _tile(8, 128)
    with pytest.raises(ValueError, match=r"\[rows, 128\]"):
        w4a16(x[:, :64], packed, tile, 1)
    with pytest.raises(ValueError, match="residual"):
        w4a16(x, packed, tile, 1, residual=x.new_zeros(2, 24))
    with pytest.raises(ValueError, match="bias"):
        w4a16(x, packed, tile, 1, bias=x.new_zeros(23))
    with pytest.raises(ValueError, match="partial"):
        w4a16(x, packed, tile, 1, activation="silu", partial=x.new_zeros(1, 3, 23).float())
    with pytest.raises(ValueError, match="packed for"):
        w4a16(x.double(), packed, tile, 1)
    odd = pack(*(part.to(device) for part in _weight(72, 24, 24)), DTYPES[0])
    with pytest.raises(ValueError, match="groups of 24"):
        w4a16(_rows(3, 72, DTYPES[0], device), odd, tile, 1)
