"""The arithmetic of device memory, and that every refusal says its figures."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from services.engine.runner.config import RunnerConfigError
from services.engine.runner.memory_budget import (
    GIB,
    GRAPH_RESERVE,
    MemoryUse,
    blocks_that_fit,
    check_cache,
    check_weights,
    graph_bytes,
    resolve_limit,
)


def test_the_default_leaves_a_tenth_of_what_is_free():
    assert resolve_limit(None, 80 * GIB, 80 * GIB).limit == 72 * GIB
    assert resolve_limit(None, 80 * GIB, 10 * GIB).limit == 9 * GIB


def test_a_fraction_is_of_the_device_and_bytes_are_bytes():
    assert resolve_limit(0.5, 80 * GIB, 79 * GIB).limit == 40 * GIB
    assert resolve_limit(24 * GIB, 80 * GIB, 79 * GIB).limit == 24 * GIB


@pytest.mark.parametrize("wanted", [1.0, 0.9, 79 * GIB + 1])
def test_more_than_is_free_is_refused(wanted):
    with pytest.raises(RunnerConfigError, match=r"gpu_memory: .* free: another process"):
        resolve_limit(wanted, 80 * GIB, 70 * GIB)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded():
    budget = resolve_limit(16 * GIB, 80 * GIB, 80 * GIB)
    check_weights(budget, 16 * GIB)
    with pytest.raises(RunnerConfigError, match=r"weights take 16\.00 GiB, the engine may use 16\.00"):
        check_weights(budget, 16 * GIB + 1)


USE = MemoryUse(10 * GIB, GIB, GIB // 2)


def test_the_cache_takes_exactly_what_is_left():
    budget = resolve_limit(20 * GIB, 80 * GIB, 80 * GIB)
    block = 16 << 20
    blocks = blocks_that_fit(budget, USE, block, 10)
    used = 10 * GIB + GIB + GIB // 2 + (blocks + 1) * block
    assert used <= budget.limit < used + block


def test_room_for_one_whole_sequence_or_a_refusal_with_figures():
    budget = resolve_limit(12 * GIB, 80 * GIB, 80 * GIB)
    block = 16 << 20
    fitting = blocks_that_fit(budget, USE, block, 1)
    assert blocks_that_fit(budget, USE, block, fitting) == fitting
    with pytest.raises(RunnerConfigError, match=r"10\.00 GiB, activations 1\.00 GiB, graphs 0\.50 GiB"):
        blocks_that_fit(budget, USE, block, fitting + 1)
    with pytest.raises(RunnerConfigError):
        blocks_that_fit(budget, MemoryUse(12 * GIB, GIB), block, 1)


def test_a_cache_of_a_given_size_leaves_room_for_the_rest_or_is_refused():
    budget = resolve_limit(12 * GIB, 80 * GIB, 80 * GIB)
    check_cache(budget, USE, GIB // 2)
    with pytest.raises(
        RunnerConfigError, match=r"0\.50 GiB is asked for, and of 12\.00 GiB the weights take"
    ):
        check_cache(budget, USE, GIB // 2 + 1)


def test_graphs_keep_their_logits():
    assert graph_bytes(128_000, 0) == GRAPH_RESERVE
    assert graph_bytes(128_000, 100) - GRAPH_RESERVE == 100 * 128_000 * 4
