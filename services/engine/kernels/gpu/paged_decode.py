"""Attention of one query row per sequence over the blocked cache: split over the keys, any cache format.

The launcher of `paged_decode_kernel`; what that leaves in a workspace, `paged_decode_reduce` adds in order.
Knows rows, blocks and formats of the cache; not who owns a block, nor how the rows came to be.

Split and tile sizes depend on the shapes of the model and the cache alone, so a row has the same bits
whatever rows are beside it, whatever the bound on the context, and wherever its blocks lie. A bound may be
far above the contexts, as in a CUDA graph: so a sequence has a limited number of programs, which take its
splits in turn, instead of one for every split that there could be.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.paged_decode_config import (
    SPLIT_SIZE,
    as_operands,
    check_arguments,
    launch_constants,
    max_registers,
    num_programs,
    num_splits,
    sample_launches,
    workspace_size,
)
from services.engine.kernels.gpu.paged_decode_kernel import UNALIGNED, paged_decode_kernel
from services.engine.kernels.gpu.paged_decode_reduce import paged_decode_reduce
from services.engine.kernels.gpu.rounding import has_fp8_conversion, is_interpreting
from services.engine.kernels.kv_format import LayerCache


def paged_decode(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    max_context: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    split_size: int = SPLIT_SIZE,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attention of the last position of each sequence over its context: [num_seqs, heads, head_dim].

    Args:
        query: [num_seqs, heads, head_dim], a vector's values adjacent; heads a multiple of the kv heads.
        cache: dense tensors; block_size a power of two from 16 on; head_dim a multiple of 8, up to 256.
        block_tables: int32 [num_seqs, max_blocks], rows may be apart; entries without keys are not read.
        context_lens: int32 [num_seqs], the query's own position included; 0 for a padding row: zeros.
        scale: of the scores, before the softmax.
        max_context: bound of context_lens on the host, which sizes the grid; a row beyond it is not whole.
        sliding_window: keys a row sees, its own included.
        softcap: a score becomes softcap * tanh(score / softcap).
        split_size: keys of a split, a power of two from 128 on; with another size a row has other bits.
        workspace: fp32 with at least `workspace_size` elements, instead of an allocation.

    Raises ValueError for shapes that do not fit.
    """
    check_arguments(query, cache, block_tables, context_lens, split_size, sliding_window, softcap)
    num_seqs, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    if not out.is_contiguous() or out.shape != query.shape:
        raise ValueError(
            f"out must be dense {tuple(query.shape)}: {tuple(out.shape)}, strides {out.stride()}"
        )
    if num_seqs == 0:
        return out
    splits = num_splits(max_context, split_size, sliding_window)
    partial, lse = out, out
    if splits > 1:
        partial, lse = _split_workspace(workspace, query, splits)
    constants = launch_constants(query.dtype, cache, num_heads, head_dim, split_size, sliding_window, softcap)
    k, v = as_operands(cache, constants["IS_WIDE"])
    heads = cache.num_kv_heads * triton.cdiv(constants["GROUP"], constants["BLOCK_H"])
    paged_decode_kernel[(num_seqs, heads, num_programs(query.device, num_seqs * heads, splits))](
        partial,
        lse,
        query,
        k,
        v,
        k if cache.k_params is None else cache.k_params,
        v if cache.v_params is None else cache.v_params,
        block_tables,
        context_lens,
        scale * math.log2(math.e),
        splits,
        cache.num_kv_heads,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        **constants,
        IS_SINGLE=splits == 1,
        USE_CVT=cache.kv_format.name == "fp8" and has_fp8_conversion(query.device),
        INTERPRET=is_interpreting(),
        num_warps=constants["LANES"],
        num_stages=constants["NUM_STAGES"],
        maxnreg=max_registers(constants),
        # Sums of products are fused where the kernel says so: the same in every variant of it.
        enable_fp_fusion=False,
    )
    if splits > 1:
        paged_decode_reduce(partial, lse, context_lens, out, splits, split_size, sliding_window)
    return out


def _split_workspace(workspace: Tensor | None, query: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """(results, logarithms) of splits: fp32 [num_seqs * heads * splits * head_dim], the same / head_dim."""
    num_seqs, num_heads, head_dim = query.shape
    size = workspace_size(num_seqs, num_heads, head_dim, splits)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=query.device)
    elif workspace.numel() < size or workspace.dtype != torch.float32:
        raise ValueError(f"a workspace of {size} fp32 is needed: {workspace.numel()} {workspace.dtype}")
    rows = num_seqs * num_heads * splits
    return workspace.view(-1)[: rows * head_dim], workspace.view(-1)[rows * head_dim : size]


def compile_cases() -> list[CompileCase]:
    """Launches of models that are served: cache formats, heads in a group, head and block sizes."""
    return [
        CompileCase(
            name=launch.name,
            kernel=paged_decode_kernel,
            signature=launch.signature,
            constexprs=launch.constants,
            num_warps=launch.constants["LANES"],
            num_stages=launch.constants["NUM_STAGES"],
            unaligned=frozenset(UNALIGNED),
            elements_per_iteration=2 * launch.constants["BLOCK_N"] * launch.constants["HEAD_DIM"],
            max_instructions=launch.gate,
            has_tensor_cores=not launch.constants["IS_WIDE"],
            has_fp_fusion=False,
            max_registers=max_registers(launch.constants),
            # fp32 is multiplied without tensor cores, for tests of small models: it may spill.
            is_gated=not launch.constants["IS_WIDE"],
            notes={"sm_80": "float8 is converted by integers there"} if launch.constants["USE_CVT"] else {},
        )
        for launch in sample_launches()
    ]
