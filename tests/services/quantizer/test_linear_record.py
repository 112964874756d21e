"""What a report tells of a linear's weights."""

import torch

from services.quantizer.linear_record import _histogram


def test_a_bin_holds_more_than_fp32_counts():
    many = (1 << 24) + 4096
    counts = _histogram(torch.zeros(many + 1).index_fill_(0, torch.tensor([many]), 1.0), -1.0, 1.0)
    assert counts[32] == many
    assert counts[63] == 1
    assert sum(counts) == many + 1


def test_values_beyond_the_ends_count_as_the_ends():
    assert _histogram(torch.tensor([[-3.0, -1.0], [1.0, 2.0]]), -1.0, 1.0) == [2] + [0] * 62 + [2]
    assert _histogram(torch.ones(2, 3), 1.0, 1.0) == [6] + [0] * 63
