"""What a run really takes, measured by the kernel: no more with more blocks, and no more than was said."""

import pytest

from benchmarks.quant_memory import Shape, measure

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_peak_is_that_of_one_block_and_was_announced(tmp_path):
    few, many = (measure(tmp_path, blocks, Shape(4)) for blocks in (1, 3))
    assert abs(many.peak - few.peak) < 40 * MIB, (few.line(), many.line())
    for measured in (few, many):
        assert 0.75 * measured.estimate < measured.peak < 1.05 * measured.estimate, measured.line()
