"""Who gets a place in the batch, and who waits for whom."""

from __future__ import annotations

from services.engine.core.scheduler import MAX_BLOCKED
from services.engine.core.sequence import FinishReason
from tests.services.engine.core.oracle import (
    Clock,
    collect,
    expected_output,
    make_core,
    make_sequence,
    output_of,
)


def test_paused_sequences_do_not_keep_others_out_of_the_batch():
    core, _ = make_core(64, 4, max_batch_size=2)
    slow = [make_sequence(i, [i, 2, 3], max_tokens=20, seed=i) for i in range(2)]
    tokens, ends = {}, {}
    for sequence in slow:
        core.add(sequence)
    for _ in range(3):
        collect(core.step(), tokens, ends)
    for sequence in slow:
        core.set_paused(sequence.key, True)
    quick = [make_sequence(10 + i, [i, 9], max_tokens=4, seed=i) for i in range(3)]
    for sequence in quick:
        core.add(sequence)
    for _ in range(12):
        collect(core.step(), tokens, ends)
        assert len(core.scheduler.running) <= 2
        core.check_integrity()
    assert {10, 11, 12} <= ends.keys()
    for sequence in slow:
        core.set_paused(sequence.key, False)
    while core.num_live:
        collect(core.step(), tokens, ends)
    for sequence in slow + quick:
        assert output_of(tokens, sequence.key) == expected_output(sequence)


def test_without_a_prefix_cache_nobody_waits_for_a_prefix():
    core, _ = make_core(256, 4, prefix_cache=False, prefill_chunk=8)
    prompt = list(range(40))
    for i in range(4):
        core.add(make_sequence(i, prompt, max_tokens=2, seed=i))
    core.step()
    assert len(core.scheduler.running) == 4


def test_a_pause_is_no_gap_between_tokens():
    """Else a stream that was paused for long counts as slow, and ends long before its deadline."""
    clock = Clock()
    core, _ = make_core(clock=clock)
    core.add(make_sequence("a", [1, 2], max_tokens=30, deadline=clock.time + 30))
    events, ends = [], {}

    def step():
        report = core.step()
        events.extend(report.tokens)
        ends.update({end.key: end for end in report.finished})
        clock.time += 0.01

    for _ in range(3):
        step()
    core.set_paused("a", True)
    clock.time += 15
    step()
    core.set_paused("a", False)
    while core.num_live:
        step()
    assert ends["a"].reason is FinishReason.LENGTH
    assert len(events) == 30
    assert sum(event.ttft_s is not None for event in events) == 1
    gaps = [event.itl_s for event in events if event.itl_s is not None]
    assert len(gaps) == 28
    assert max(gaps) < 1


def full_core(num_waiting, prompt_tokens=30):
    """A cache that one sequence fills, and others that wait for it; how often a cached head was looked up."""
    core, _ = make_core(10, 4, prefix_cache=False)
    core.add(make_sequence("running", list(range(20)), max_tokens=20))
    core.step()
    for i in range(num_waiting):
        core.add(make_sequence(i, [i] * prompt_tokens, max_tokens=5, seed=i))
    calls, match = [], core.blocks.match
    core.blocks.match = lambda sequence: calls.append(sequence.key) or match(sequence)
    return core, calls


def test_who_found_no_room_does_not_look_again_before_something_changes():
    core, calls = full_core(3)
    for _ in range(5):
        core.step()
    assert calls == [0, 1, 2]
    core.cancel(1)
    core.step()
    assert calls[3:] == [0, 2]
    core.update(2, priority=-1)
    core.step()
    assert calls[5:] == [2, 0]


def test_a_newcomer_that_fits_is_placed_beside_those_that_do_not():
    core, _ = full_core(3)
    core.step()
    core.add(make_sequence("small", [9, 9], max_tokens=2))
    core.step()
    assert [s.key for s in core.scheduler.running] == ["running", "small"]


def test_who_waits_is_placed_when_blocks_are_released_or_somebody_pauses():
    for end in (lambda core: core.cancel("running"), lambda core: core.set_paused("running", True)):
        core, _ = full_core(2)
        core.step()
        end(core)
        core.step()
        assert [s.key for s in core.scheduler.running] == [0]


def test_a_long_queue_without_room_is_not_looked_through():
    core, calls = full_core(MAX_BLOCKED + 10)
    core.step()
    assert len(calls) == MAX_BLOCKED
    core.set_paused("running", True)
    core.set_paused("running", False)
    while core.num_live:
        core.step()
        core.check_integrity()
    assert set(calls) == set(range(MAX_BLOCKED + 10))


def test_who_is_paused_for_long_gives_its_blocks_up():
    """Even while nobody needs them; what is still cached is not computed again."""
    clock = Clock()
    core, _ = make_core(64, 4, clock=clock, pause_grace_s=10.0)
    slow = make_sequence("slow", [1, 2, 3], max_tokens=40, seed=1)
    quick = make_sequence("quick", [4, 5], max_tokens=200, seed=2)
    tokens, ends = {}, {}

    def step(seconds):
        collect(core.step(), tokens, ends)
        core.check_integrity()
        clock.time += seconds

    core.add(slow)
    core.add(quick)
    for _ in range(9):
        step(0.01)
    core.set_paused("slow", True)
    for _ in range(9):
        step(1.0)
    assert slow.block_table
    for _ in range(3):
        step(1.0)
    assert not slow.block_table
    assert core.scheduler.num_preemptions == 1
    core.set_paused("slow", True)  # once more: no new pause
    step(20.0)
    step(0.01)
    assert core.scheduler.num_preemptions == 1
    core.set_paused("slow", False)
    step(0.01)
    core.set_paused("slow", True)
    step(9.0)
    step(0.01)
    assert slow.block_table, "a new pause has its own time"
    core.set_paused("slow", False)
    while core.num_live:
        step(0.01)
    assert output_of(tokens, "slow") == expected_output(slow)
    assert output_of(tokens, "quick") == expected_output(quick)
