"""Launch choices are pure functions: in range for every shape, and fixed where bits must be."""

from __future__ import annotations

import pytest

from services.engine.kernels.gpu import launch_configs as configs

SHAPES = [(128, 128), (256, 384), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (152064, 8192)]


@pytest.mark.parametrize("span", [128, 64, 32, 16])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64, 65, 256])
def test_choice_is_one_of_the_tiles_and_leaves_no_split_empty(rows: int, span: int) -> None:
    limit = configs.row_class(rows)
    assert limit >= rows
    for outputs, inputs in SHAPES:
        tile, splits = configs.choose_w4a16(limit, span, outputs, inputs, 132)
        assert tile in configs.w4a16_tiles(limit, span)
        assert tile.block_k == 128 or tile.block_k % 64 == 0
        blocks = inputs // tile.block_k
        per_split = -(-blocks // splits)
        assert 1 <= splits <= configs.MAX_SPLITS
        assert (splits - 1) * per_split < blocks


def test_few_outputs_are_split_until_all_multiprocessors_work() -> None:
    tile, splits = configs.choose_w4a16(8, 128, 4096, 4096, 132)
    assert 132 <= 4096 // tile.block_n * splits <= 4 * 132
    assert configs.choose_w4a16(8, 128, 28672, 4096, 132)[1] == 1


def test_scaled_weights_only_where_sums_cost_more() -> None:
    assert not any(tile.has_scale for tile in configs.w4a16_tiles(32, 128))
    assert not configs.w4a16_tiles(16, 32)[0].has_scale
    assert all(tile.has_scale for rows in (8, 32, 128) for tile in configs.w4a16_tiles(rows, 16))


def test_fixed_splits_know_neither_rows_nor_device() -> None:
    tile = configs.w4a16_deterministic_tile(128)
    for outputs, inputs in SHAPES:
        splits = configs.choose_fixed_splits(tile, outputs, inputs, 4)
        assert splits in configs.possible_splits(tile, inputs)
    assert configs.choose_fixed_splits(tile, 4096, 4096, 4) > 1


def test_more_splits_cost_more_partial_sums() -> None:
    tile = configs.w4a16_tiles(64, 128)[0]
    few, many = (configs.predict_us(tile, splits, 64, 28672, 4096, 132) for splits in (2, 16))
    assert few < many


def test_launches_are_bounded_by_their_partial_sums() -> None:
    tile = configs.w4a16_deterministic_tile(128)
    rows = configs.rows_per_launch(tile, 8, 4096)
    assert rows % tile.block_m == 0
    assert rows * 8 * 4096 * 4 <= 64 << 20
    assert configs.rows_per_launch(tile, 16, 10**9) == tile.block_m


def test_more_rows_than_the_fused_product_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="257 rows"):
        configs.row_class(257)
