"""Words of codes become operands: every code, every place in a word, and the order the helpers speak of."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from services.engine.kernels.gpu import kv_codes
from services.engine.kernels.gpu.kv_codes import (
    code_tile,
    column_factor,
    num_planes,
    operand_unit,
    plane_column,
    plane_factor,
    plane_tile,
    tile_column,
)
from services.engine.kernels.gpu.rounding import has_fp8_conversion

ROWS = 64


@triton.jit
def _tile_kernel(
    words_ptr,
    tile_ptr,
    columns_ptr,
    factors_ptr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    USE_CVT: tl.constexpr,
):
    per_word: tl.constexpr = kv_codes.codes_per_word(FORMAT)
    width: tl.constexpr = per_word * WORDS
    row, word, column = tl.arange(0, ROWS), tl.arange(0, WORDS), tl.arange(0, width)
    words = tl.load(words_ptr + row[:, None] * WORDS + word[None, :])
    tile = code_tile(words, FORMAT, USE_CVT).to(tl.float32) * operand_unit(FORMAT, USE_CVT)
    tl.store(tile_ptr + row[:, None] * width + column[None, :], tile)
    tl.store(columns_ptr + column, tile_column(column, FORMAT))
    tl.store(factors_ptr + column, column_factor(column, FORMAT))


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
):
    row, word, column = tl.arange(0, ROWS), tl.arange(0, WORDS), tl.arange(0, 2 * WORDS)
    words = tl.load(words_ptr + row[None, :, None] * WORDS + word[None, None, :])
    unit: tl.constexpr = operand_unit(FORMAT, USE_CVT) * plane_factor(J, FORMAT)
    plane = plane_tile(words, J, FORMAT, USE_CVT).to(tl.float32) * unit
    at = row[None, :, None] * 2 * WORDS + column[None, None, :]
    tl.store(plane_ptr + at, plane)
    tl.store(columns_ptr + column, plane_column(column, J, FORMAT))


def _codes(kv_format, device):
    """(words int32 [ROWS, words], values fp32 [ROWS, head_dim]): all codes but fp8's NaNs, in random places."""
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


def _conversions(kv_format, device):
    return [False, True] if kv_format == "fp8" and has_fp8_conversion(torch.device(device)) else [False]


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8"])
def test_a_tile_of_codes_holds_every_code_at_its_column(kv_format, device):
    words, values = _codes(kv_format, device)
    head_dim = values.shape[1]
    for use_cvt in _conversions(kv_format, device):
        tile = torch.full((ROWS, head_dim), float("nan"), device=device)
        columns = torch.full((head_dim,), -1, dtype=torch.int32, device=device)
        factors = torch.full((head_dim,), float("nan"), device=device)
        _tile_kernel[(1,)](words, tile, columns, factors, ROWS, words.shape[1], kv_format, use_cvt)
        assert sorted(columns.tolist()) == list(range(head_dim))
        assert torch.equal(tile * factors, values[:, columns.long()])


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8"])
def test_planes_of_codes_hold_every_code_at_their_columns(kv_format, device):
    words, values = _codes(kv_format, device)
    width = 2 * words.shape[1]
    for use_cvt in _conversions(kv_format, device):
        seen = []
        for plane in range(num_planes(kv_format)):
            tile = torch.full((ROWS, width), float("nan"), device=device)
            columns = torch.full((width,), -1, dtype=torch.int32, device=device)
            _plane_kernel[(1,)](words, tile, columns, ROWS, words.shape[1], plane, kv_format, use_cvt)
            assert torch.equal(tile, values[:, columns.long()])
            seen += columns.tolist()
        assert sorted(seen) == list(range(values.shape[1]))
