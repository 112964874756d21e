"""Words of codes become operands: every code, every place in a word, and the order the helpers speak of."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from services.engine.kernels.gpu.kv_codes import (
    codes_per_word,
    num_planes,
    operand_unit,
    pair_row,
    pair_tile,
    plane_column,
    plane_factor,
    plane_tile,
    row_factor,
)
from services.engine.kernels.gpu.rounding import has_fp8_conversion, is_interpreting

ROWS = 64


@triton.jit
def _pair_kernel(
    words_ptr,
    tile_ptr,
    rows_ptr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    USE_CVT: tl.constexpr,
    USE_PERMUTE: tl.constexpr,
):
    width: tl.constexpr = codes_per_word(FORMAT) * WORDS
    pair, word, row = tl.arange(0, TOKENS // 2), tl.arange(0, WORDS), tl.arange(0, width)
    even_ptr = words_ptr + pair[None, :, None] * 2 * WORDS + word[None, None, :]
    even, odd = tl.load(even_ptr), tl.load(even_ptr + WORDS)
    tile = pair_tile(even, odd, tl.float16, FORMAT, USE_CVT, USE_PERMUTE)
    factor = row_factor(row, WORDS, FORMAT, USE_CVT)
    tile = tile.to(tl.float32) * factor[None, :, None]
    at = row[None, :, None] * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    tl.store(tile_ptr + at, tile)
    tl.store(rows_ptr + row, pair_row(row, WORDS, FORMAT))


@triton.jit
def _plane_kernel(
    words_ptr,
    plane_ptr,
    columns_ptr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    J: tl.constexpr,
    FORMAT: tl.constexpr,
    USE_CVT: tl.constexpr,
    USE_PERMUTE: tl.constexpr,
):
    row, word, column = tl.arange(0, ROWS), tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
    words = tl.load(words_ptr + row[None, :, None] * WORDS + word[None, None, :])
    unit: tl.constexpr = operand_unit(FORMAT, USE_CVT) * plane_factor(J, FORMAT)
    plane = plane_tile(words, J, FORMAT, USE_CVT, USE_PERMUTE).to(tl.float32) * unit
    at = row[None, :, None] * 2 * WORDS + column[None, None, :]
    tl.store(plane_ptr + at, plane)
    tl.store(columns_ptr + column, plane_column(column, J, FORMAT))


def _codes(kv_format, device):
    """(words int32 [ROWS, words], values fp32 [ROWS, head_dim]): all codes but the NaNs of fp8."""
    generator = torch.Generator().manual_seed(5)
    head_dim = 64
    codes = torch.randint(0, 256, (ROWS, head_dim // (2 if kv_format == "int4" else 1)), generator=generator)
    codes[: 256 // codes.shape[1]] = torch.arange(256).view(-1, codes.shape[1])
    codes = codes.to(torch.uint8)
    if kv_format == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0x7E
        values = codes.view(torch.float8_e4m3fn).float()
    elif kv_format == "int4":
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(1).float()
    else:
        values = codes.float()
    return codes.view(torch.int32).to(device), values.to(device)


def _ways(kv_format, device):
    """(use_cvt, use_permute): inline assembly runs on a device, and emulated in the interpreter."""
    ways = [(False, False), (False, True)]
    if kv_format == "fp8" and (is_interpreting() or has_fp8_conversion(torch.device(device))):
        ways.append((True, True))
    return ways


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8"])
def test_a_tile_of_token_pairs_holds_every_code_at_its_row(kv_format, device):
    words, values = _codes(kv_format, device)
    head_dim = values.shape[1]
    for use_cvt, use_permute in _ways(kv_format, device):
        tile = torch.full((head_dim, ROWS), float("nan"), device=device)
        rows = torch.full((head_dim,), -1, dtype=torch.int32, device=device)
        _pair_kernel[(1,)](words, tile, rows, ROWS, words.shape[1], kv_format, use_cvt, use_permute)
        assert sorted(rows.tolist()) == list(range(head_dim))
        assert torch.equal(tile, values[:, rows.long()].T)


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8"])
def test_planes_of_codes_hold_every_code_at_their_columns(kv_format, device):
    words, values = _codes(kv_format, device)
    width = 2 * words.shape[1]
    for use_cvt, use_permute in _ways(kv_format, device):
        seen = []
        for plane in range(num_planes(kv_format)):
            tile = torch.full((ROWS, width), float("nan"), device=device)
            columns = torch.full((width,), -1, dtype=torch.int32, device=device)
            _plane_kernel[(1,)](
                words, tile, columns, ROWS, words.shape[1], plane, kv_format, use_cvt, use_permute
            )
            assert torch.equal(tile, values[:, columns.long()])
            seen += columns.tolist()
        assert sorted(seen) == list(range(values.shape[1]))
