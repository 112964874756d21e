"""Which tile, and how many splits, a matrix product with a 4-bit or a fixed-order weight is launched with.

Pure functions of shapes and of the number of multiprocessors: nothing is tried out at run time, so the same
shape always takes the same path. The tiles were chosen by their machine code (registers, instructions per
weight); among those of a row class, and for the splits, a model of how long a launch takes decides. Its
constants are estimates for an H200, not measurements. Knows no tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

MAX_FUSED_ROWS = 256
"""Above this many rows the weight is dequantised once and multiplied as a dense one."""
MAX_SPLITS = 16
REFERENCE_NUM_SMS = 132
"""Multiprocessors of an H100 and H200. The deterministic mode splits for these, whatever the device."""
_ROW_CLASSES = (8, 16, 32, 64, 128, 256)
_DETERMINISTIC_ROWS = 32


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m, block_n, block_k: rows of x, outputs and inputs of one tile.
        num_warps, num_stages, unroll: as given to the compiler.
        programs_per_sm: how many fit on a multiprocessor of sm_90, by registers and shared memory.
        instructions: of the machine, per weight, in the main loop on sm_90.
        has_scale: whether weights are scaled before the product, not sums after it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    instructions: float
    has_scale: bool = False
    unroll: int = 1


_ROWS_8 = LaunchConfig(8, 128, 128, 4, 4, programs_per_sm=6, instructions=2.4)
_ROWS_16 = LaunchConfig(16, 128, 128, 4, 4, programs_per_sm=4, instructions=2.4)
_ROWS_16_TWICE = LaunchConfig(16, 128, 128, 4, 2, programs_per_sm=2, instructions=2.9, unroll=2)
_ROWS_32 = LaunchConfig(32, 128, 128, 4, 4, programs_per_sm=3, instructions=2.6)
_ROWS_64 = LaunchConfig(64, 128, 128, 4, 3, programs_per_sm=2, instructions=3.3, has_scale=True)
_ROWS_64_WIDE = LaunchConfig(64, 256, 128, 8, 3, programs_per_sm=1, instructions=3.2, has_scale=True)
_ROWS_128 = LaunchConfig(128, 256, 64, 8, 4, programs_per_sm=1, instructions=3.8, has_scale=True)
_TILES = {
    8: (_ROWS_8,),
    16: (_ROWS_16,),
    32: (_ROWS_32,),
    64: (_ROWS_64, _ROWS_64_WIDE),
    128: (_ROWS_64_WIDE, _ROWS_128),
    256: (_ROWS_64_WIDE, _ROWS_128),
}
DENSE_TILE = LaunchConfig(32, 128, 64, 4, 4, programs_per_sm=2, instructions=1.4)
"""The one tile of the deterministic dense product."""
DENSE_TILE_FP32 = LaunchConfig(16, 64, 32, 4, 2, programs_per_sm=7, instructions=20.8)
"""The same for fp32, which has no tensor core that keeps its precision."""
_MAX_PARTIAL_BYTES = 64 << 20

_MEMORY_BANDWIDTH = 4.2e6
"""Bytes per us from memory."""
_L2_BANDWIDTH = 5.5e6
"""Bytes per us from the L2 cache to all multiprocessors of an H200."""
_LATENCY_US = 1.2
"""From a request to its data under load; a program pays it once, and hides it after."""
_LAUNCH_US = 1.5
"""What a second launch costs inside a CUDA graph."""
_FLOPS_PER_SM = 4.8e6
"""Tensor-core operations per us of one multiprocessor, in a kernel that also dequantises."""
_ISSUE_PER_SM = 1.7e5
"""Instructions of single threads in a us: 4 schedulers x 32 threads x 1,980 MHz, two thirds of them used."""


def row_class(num_rows: int) -> int:
    """The largest number of rows that is launched as num_rows is. ValueError above MAX_FUSED_ROWS."""
    for limit in _ROW_CLASSES:
        if num_rows <= limit:
            return limit
    raise ValueError(f"{num_rows} rows are more than the {MAX_FUSED_ROWS} of the fused product")


def w4a16_tiles(rows: int, span: int) -> tuple[LaunchConfig, ...]:
    """The tiles to choose from for a row class, where one scale covers `span` inputs.

    Scaling sums costs one instruction for each row and span, scaling weights one for two weights: with short
    spans the latter is less from 32 rows on, and at 16 rows a second tile a pass hides what a pass costs.
    The largest tile has no registers left for the scales of short spans.
    """
    if span >= 64:
        return _TILES[rows]
    if span == 32 and rows <= 16:
        return (_ROWS_8,) if rows == 8 else (_ROWS_16_TWICE,)
    tiles = _TILES[rows] if rows <= 64 else _TILES[rows][:1]
    return tuple(replace(tile, has_scale=True) for tile in tiles)


def w4a16_deterministic_tile(span: int) -> LaunchConfig:
    """The one tile of the deterministic mode, for any number of rows."""
    return w4a16_tiles(_DETERMINISTIC_ROWS, span)[0]


@functools.lru_cache(maxsize=4096)
def choose_w4a16(rows: int, span: int, outputs: int, inputs: int, num_sms: int) -> tuple[LaunchConfig, int]:
    """(tile, splits of the inputs) with the least predicted time for a row class."""
    choices = [(tile, splits) for tile in w4a16_tiles(rows, span) for splits in possible_splits(tile, inputs)]
    return min(choices, key=lambda choice: predict_us(*choice, rows, outputs, inputs, num_sms))


@functools.lru_cache(maxsize=4096)
def choose_fixed_splits(tile: LaunchConfig, outputs: int, inputs: int, weight_bits: int) -> int:
    """Splits for the deterministic mode: they depend on the weight's shape alone."""
    return min(
        possible_splits(tile, inputs),
        key=lambda splits: predict_us(
            tile, splits, tile.block_m, outputs, inputs, REFERENCE_NUM_SMS, weight_bits
        ),
    )


def rows_per_launch(tile: LaunchConfig, num_splits: int, outputs: int) -> int:
    """Rows of one launch such that its partial sums stay within bounds: whole tiles, at least one."""
    tiles = _MAX_PARTIAL_BYTES // (num_splits * outputs * 4 * tile.block_m)
    return max(tiles, 1) * tile.block_m


def possible_splits(tile: LaunchConfig, inputs: int) -> list[int]:
    """Numbers of splits that leave none empty."""
    blocks = -(-inputs // tile.block_k)
    candidates = range(1, min(blocks, MAX_SPLITS) + 1)
    return [splits for splits in candidates if -(-blocks // -(-blocks // splits)) == splits]


def predict_us(
    tile: LaunchConfig,
    num_splits: int,
    num_rows: int,
    outputs: int,
    inputs: int,
    num_sms: int,
    weight_bits: int = 4,
) -> float:
    """Microseconds, by a model of which nothing is measured.

    Programs run in waves. A step of one takes as long as its bytes (those prefetched hide the latency; all
    programs share the L2 cache) or its arithmetic (programs on one multiprocessor share that). Everything
    takes as long as memory needs for the weight. Partial sums are written and read once.
    """
    blocks = -(-inputs // tile.block_k)
    programs = -(-num_rows // tile.block_m) * -(-outputs // tile.block_n) * num_splits
    slots = num_sms * tile.programs_per_sm
    resident = min(programs, slots)
    weights = tile.block_n * tile.block_k
    step_bytes = weights * weight_bits // 8 + min(num_rows, tile.block_m) * tile.block_k * 2
    in_flight = max(tile.num_stages - 1, 1) * tile.unroll * step_bytes
    transfer_us = step_bytes / min(in_flight / _LATENCY_US, _L2_BANDWIDTH / resident)
    issue_us = weights * tile.instructions / _ISSUE_PER_SM
    compute_us = max(2 * weights * tile.block_m / _FLOPS_PER_SM, issue_us) * -(-resident // num_sms)
    steps = -(-blocks // num_splits)
    main_us = -(-programs // slots) * (_LATENCY_US + steps * max(transfer_us, compute_us))
    main_us = max(main_us, _LATENCY_US + outputs * inputs * weight_bits / 8 / _MEMORY_BANDWIDTH)
    if num_splits == 1:
        return main_us
    return main_us + _LAUNCH_US + num_splits * num_rows * outputs * 8 / _L2_BANDWIDTH
