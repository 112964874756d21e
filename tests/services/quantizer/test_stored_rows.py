"""Rows dealt out and put back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.quantizer.stored_rows import join_rows, split_rows


@settings(deadline=None, max_examples=50)
@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_runs=st.integers(1, 5),
    columns=st.integers(0, 3),
)
def test_what_is_dealt_out_comes_back_in_its_order(shares, num_runs, columns):
    """`columns` 0: one number per row, as a bias has it."""
    num_rows = sum(shares) * num_runs
    numbers = torch.arange(num_rows * max(columns, 1))
    tensor = numbers.view(num_rows, columns) if columns else numbers
    sizes = [share * num_runs for share in shares]
    parts = split_rows(tensor, sizes, num_runs)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(join_rows(parts, num_runs), tensor)


def test_each_run_gives_every_part_its_share_in_turn():
    """Two key-value heads with two query heads each: q q k v, q q k v."""
    stored = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21])
    q, k, v = split_rows(stored, [4, 2, 2], 2)
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 2, 3], [10, 11], [20, 21])
