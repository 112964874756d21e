"""min_p, top_k and top_p on the device: which ids of a row are left, found without a sort.

Ids rank by falling logit, equal ones by rising id. Each filter keeps the first so many of that order, so what
all three leave is a prefix of it, told by its last member: a key (the logit's bits as an integer of the same
order) and, among ids with that very key, the largest id. `find_bounds` writes those two for each row.

1. scan: every program finds the largest logit and the mass of its share of the row.
2. floor: from all shares follows a key below which no id can be kept.
3. collect: what is not below is written out.
4. select: one program holds those candidates in registers and searches the keys for the edge; a row whose
   candidates are more than the room for them is searched where it lies, in many passes.

A share is made of chunks of `_CHUNK` ids from all over the row, because likely ids lie together in real
vocabularies. The launcher of `sampling_filters_kernels`: knows shapes; draws nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.kernels.gpu.sampling_filters_kernels import (
    FACTS,
    collect_kernel,
    floor_kernel,
    scan_kernel,
    select_kernel,
)

_CHUNK = 32
_SHARE = 1024
_SLOTS = 8192
_LOOP_TILE = 4096
_FEW = 4
_RANKED = 16
_PIVOTS = 2
_INTERPRETED_PIVOTS = 64
_NUM_WARPS = 4
_SELECT_WARPS = 16


def find_bounds(logits: Tensor, params: Tensor) -> Tensor:
    """int32 [n, 2]: key (see `rank_key`) and largest id of the last id that is kept, for each row of logits.

    logits: fp32 [n, vocab], n > 0, rows may lie apart. params: int32 [at least n, words], see
    `sampling.draw`. Rows that filter nothing, or are greedy, or cannot be drawn from, keep everything.
    """
    rows, vocab = logits.shape
    shares, share, room = _shape(vocab)
    device = logits.device
    maxima = torch.empty((rows, shares), dtype=torch.float32, device=device)
    masses = torch.empty_like(maxima)
    row_masses = torch.empty((rows,), dtype=torch.float64, device=device)
    facts = torch.empty((rows, FACTS.value), dtype=torch.int32, device=device)
    counts = torch.empty((rows, shares), dtype=torch.int32, device=device)
    keys = torch.empty((rows, shares * room), dtype=torch.int32, device=device)
    bounds = torch.empty((rows, 2), dtype=torch.int32, device=device)
    stride = logits.stride(0)
    grid = (shares, rows)
    words = {"PARAM_WORDS": params.shape[1], "SHARES": shares}
    parts = {"SHARES": shares, "SHARE": share, "CHUNK": _CHUNK, "num_warps": _NUM_WARPS}
    scan_kernel[grid](logits, params, maxima, masses, stride, vocab, PARAM_WORDS=params.shape[1], **parts)
    floor_kernel[(rows,)](
        *(params, maxima, masses, facts, row_masses, vocab),
        **words,
        RANKED=min(shares, _RANKED),
        num_warps=_NUM_WARPS,
    )
    collect_kernel[grid](logits, facts, counts, keys, stride, vocab, **parts, ROOM=room)
    select_kernel[(rows,)](
        logits,
        params,
        facts,
        row_masses,
        counts,
        keys,
        bounds,
        stride,
        vocab,
        **words,
        ROOM=room,
        FEW=max(1, room // _FEW),
        LOOP_TILE=_LOOP_TILE,
        PIVOTS=_INTERPRETED_PIVOTS if is_interpreting() else _PIVOTS,
        num_warps=_SELECT_WARPS,
    )
    return bounds


def _shape(vocab: int) -> tuple[int, int, int]:
    """(shares of a row, ids of a share, candidates there is room for in a share)."""
    shares = triton.next_power_of_2(triton.cdiv(vocab, _SHARE))
    share = max(_CHUNK, min(_SHARE, triton.next_power_of_2(vocab)))
    return shares, share, max(1, min(share, _SLOTS // shares))


def compile_cases() -> list[CompileCase]:
    """The vocabulary of Llama 3, and a larger one."""
    return [case for vocab in (128256, 262144) for case in _cases(vocab)]


def _cases(vocab: int) -> list[CompileCase]:
    shares, share, room = _shape(vocab)
    words = {"PARAM_WORDS": 8, "SHARES": shares}
    parts = {"SHARES": shares, "SHARE": share, "CHUNK": _CHUNK}
    search = {"ROOM": room, "FEW": max(1, room // _FEW), "LOOP_TILE": _LOOP_TILE, "PIVOTS": _PIVOTS}
    scan = ["logits_ptr", "params_ptr", "maxima_ptr", "masses_ptr", "stride_logits_n", "vocab"]
    floor = ["params_ptr", "maxima_ptr", "masses_ptr", "facts_ptr", "row_masses_ptr", "vocab"]
    collect = ["logits_ptr", "facts_ptr", "counts_ptr", "keys_ptr", "stride_logits_n", "vocab"]
    select = ["logits_ptr", "params_ptr", "facts_ptr", "row_masses_ptr", "counts_ptr", "keys_ptr"]
    select += ["bounds_ptr", "stride_logits_n", "vocab"]
    types = dict.fromkeys(("logits_ptr", "maxima_ptr", "masses_ptr"), "*fp32")
    types |= {"row_masses_ptr": "*fp64", "stride_logits_n": "i32", "vocab": "i32"}
    return [
        CompileCase(
            name=f"draw_{name}/vocab{vocab}",
            kernel=kernel,
            signature={argument: types.get(argument, "*i32") for argument in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=3,
        )
        for name, kernel, arguments, constexprs, num_warps in (
            ("scan", scan_kernel, scan, {"PARAM_WORDS": 8, **parts}, _NUM_WARPS),
            ("floor", floor_kernel, floor, {**words, "RANKED": min(shares, _RANKED)}, _NUM_WARPS),
            ("collect", collect_kernel, collect, {**parts, "ROOM": room}, _NUM_WARPS),
            ("select", select_kernel, select, {**words, **search}, _SELECT_WARPS),
        )
    ]
