"""x times a 4-bit weight, dequantised in registers on its way into the tensor core.

The launcher of `w4a16_kernel`. The inputs may be split over several programs; each then stores an fp32
partial sum, and `w4a16_reduce` adds them in order. Knows one packed weight; does not choose its launch
configuration.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.launch_configs import (
    LaunchConfig,
    w4a16_deterministic_tile,
    w4a16_tiles,
)
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.kernels.gpu.silu_mul import Activation
from services.engine.kernels.gpu.w4a16_kernel import w4a16_kernel
from services.engine.kernels.gpu.w4a16_reduce import w4a16_reduce
from services.engine.kernels.gpu.w4a16_repack import PackedWeight


def w4a16(
    x: Tensor,
    packed: PackedWeight,
    tile: LaunchConfig,
    num_splits: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    partial: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, in] times a packed weight -> [rows, out] in x's dtype, plus bias [out], plus residual
    [rows, out]; with an `activation` [rows, out / 2] = activation(first half) * second half.

    The inputs are cut into `num_splits` ranges; their fp32 sums go to `partial` [splits, rows, out] and are
    added by a second launch. That is also done for one split where gate and up lie in different programs.
    ValueError if shapes, strides or types do not fit.
    """
    num_rows = x.shape[0]
    width = packed.out_features // 2 if activation else packed.out_features
    _check(x, packed, bias, residual, activation)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device) if out is None else out
    if num_rows == 0:
        return out
    is_partial = num_splits > 1 or (activation is not None and not packed.is_interleaved)
    if not is_partial:
        _launch(
            x, packed, tile, 1, out, bias=bias, residual=residual, activation=activation, is_partial=False
        )
        return out
    shape = (num_splits, num_rows, packed.out_features)
    if partial is None:
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    elif partial.shape != shape or partial.dtype != torch.float32:
        raise ValueError(f"partial sums are fp32 {shape}, not {partial.dtype} {tuple(partial.shape)}")
    _launch(x, packed, tile, num_splits, partial, is_partial=True)
    return w4a16_reduce(partial, out, bias=bias, residual=residual, activation=activation)


def _check(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
) -> None:
    if packed.span is None:
        raise ValueError(f"no kernel for groups of {packed.group_size} inputs")
    if x.ndim != 2 or x.shape[1] != packed.in_features or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} with strides {x.stride()} is not [rows, {packed.in_features}]")
    is_known = x.dtype in (torch.bfloat16, torch.float16) or (is_interpreting() and x.dtype == torch.float32)
    if not is_known or (x.dtype == torch.float16) != (packed.dtype == torch.float16):
        raise ValueError(f"the weight is packed for {packed.dtype}, x is {x.dtype}")
    if activation and residual is not None:
        raise ValueError(f"{activation}(gate) * up has no residual")
    if residual is not None and (
        residual.shape != (x.shape[0], packed.out_features) or not residual.is_contiguous()
    ):
        raise ValueError(f"residual {tuple(residual.shape)} is not [{x.shape[0]}, {packed.out_features}]")
    if bias is not None and bias.shape != (packed.out_features,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit {packed.out_features} outputs")


def _launch(
    x: Tensor,
    packed: PackedWeight,
    tile: LaunchConfig,
    num_splits: int,
    out: Tensor,
    *,
    is_partial: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> None:
    num_blocks = packed.padded_inputs // tile.block_k
    grid = (
        triton.cdiv(x.shape[0], tile.block_m),
        triton.cdiv(packed.padded_outputs, tile.block_n),
        num_splits,
    )
    is_interpreted = is_interpreting()
    w4a16_kernel[grid](
        x,
        packed.words,
        packed.params,
        bias,
        residual,
        out,
        x.shape[0],
        packed.in_features,
        packed.out_features,
        packed.params.shape[1],
        triton.cdiv(num_blocks, num_splits),
        x.stride(0),
        **_constexprs(tile, packed.group_stride, packed.span, packed.in_features),
        IS_PARTIAL=is_partial,
        IS_INTERLEAVED=packed.is_interleaved,
        ACTIVATION=activation or "",
        INTERPRET=is_interpreted,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _constexprs(tile: LaunchConfig, group: int, span: int | None, in_features: int) -> dict[str, object]:
    return {
        "GROUP": group,
        "SPAN": span,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "HAS_SCALE": tile.has_scale,
        "EVEN_K": in_features % 128 == 0,
        "NUM_STAGES": tile.num_stages,
        "UNROLL": tile.unroll,
    }


def compile_cases() -> list[CompileCase]:
    """Every tile for every span, and the ends of the kernel that one tile can have."""
    cases = []
    for rows, spans in ((8, (128, 64, 32)), (16, (128, 64, 32, 16)), (32, (128, 64, 32)), (64, (128, 32))):
        for span in spans:
            cases += [
                _case(f"w4a16/rows{rows}/outputs{tile.block_n}/span{span}", tile, span)
                for tile in w4a16_tiles(rows, span)
            ]
    few, many = w4a16_tiles(8, 128)[0], w4a16_tiles(128, 128)[-1]
    fixed = w4a16_deterministic_tile(128)
    cases += [
        _case("w4a16/rows16/fp16", w4a16_tiles(16, 128)[0], 128, dtype="fp16"),
        _case("w4a16/rows128/span128", many, 128),
        _case("w4a16/rows128/span64", many, 64),
        _case("w4a16/rows8/uneven", few, 128, is_even=False),
        _case("w4a16/rows8/gate_up", few, 128, is_interleaved=True),
    ]
    for name, tile in (("rows8", few), ("rows128", many), ("fixed", fixed)):
        cases += [
            _case(f"w4a16/{name}/bias", tile, 128, end="bias"),
            _case(f"w4a16/{name}/residual", tile, 128, end="residual"),
            _case(f"w4a16/{name}/silu", tile, 128, end="silu", is_interleaved=True),
            _case(f"w4a16/{name}/gelu", tile, 128, end="gelu", is_interleaved=True),
        ]
    return cases


def _case(
    name: str,
    tile: LaunchConfig,
    span: int,
    *,
    dtype: str = "bf16",
    end: str = "partial",
    is_interleaved: bool = False,
    is_even: bool = True,
) -> CompileCase:
    sizes = ("num_rows", "in_features", "out_features", "param_rows", "blocks_per_split", "stride_x_m")
    signature = {"x_ptr": f"*{dtype}", "words_ptr": "*i32", "params_ptr": "*i32"}
    signature["out_ptr"] = "*fp32" if end == "partial" else f"*{dtype}"
    signature |= dict.fromkeys(sizes, "i32")
    constexprs = _constexprs(tile, span, span, 128 if is_even else 192)
    constexprs |= {"IS_PARTIAL": end == "partial", "IS_INTERLEAVED": is_interleaved}
    constexprs |= {"ACTIVATION": end if end in ("silu", "gelu") else "", "INTERPRET": False}
    for pointer, used_by in (("bias_ptr", ("bias", "silu", "gelu")), ("residual_ptr", ("residual",))):
        if end in used_by:
            signature[pointer] = f"*{dtype}"
        else:
            constexprs[pointer] = None
    return CompileCase(
        name=name,
        kernel=w4a16_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=frozenset({"num_rows", "param_rows", "blocks_per_split"}),
        elements_per_iteration=tile.block_n * tile.block_k * tile.unroll,
        max_instructions=_max_instructions(tile.block_m, span) if is_even else None,
        has_tensor_cores=True,
    )


def _max_instructions(rows: int, span: int) -> float:
    """Gate for the machine instructions per weight: a short span has more scales, and more bytes to hide."""
    if rows <= 16:
        return 3.0 if span >= 32 else 4.0
    if rows <= 32:
        return 3.5 if span >= 32 else 4.0
    return 4.0 if span >= 32 else 4.7
