"""A step on top of the one in flight: nothing that comes late, or in excess, reaches a client."""

from __future__ import annotations

import pytest

from services.engine.core.errors import DeviceFault, InternalFailure
from services.engine.core.sequence import FinishReason, SamplingParams
from tests.services.engine.core.oracle import (
    Clock,
    DelayedRunner,
    collect,
    expected_output,
    make_core,
    make_sequence,
    output_of,
    run,
)


def make(num_blocks=64, block_size=4, **limits):
    return make_core(num_blocks, block_size, overlap=True, **limits)


def assert_clean(core, runner):
    core.check_integrity()
    assert not runner.violations
    counters = core.report().counters
    assert not core.has_work()
    counts = core.blocks.counts()
    assert counts.active == 0
    assert counts.free + counts.cached == core.blocks.num_blocks
    assert counters.begun == counters.ended


def finish(core, runner, sequences, failed=()):
    """Run to the end; everyone but the failed got what the oracle says."""
    tokens, ends = run(core)
    for sequence in sequences:
        start = sequence.num_emitted
        if sequence.key in failed:
            assert isinstance(ends[sequence.key].error, InternalFailure)
        else:
            assert output_of(tokens, sequence.key, start) == expected_output(sequence)[start:]
            assert ends[sequence.key].reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert_clean(core, runner)
    return tokens, ends


def eos_of(prompt, position, max_tokens=20):
    """A token that a sequence of this prompt draws at `position` and not before."""
    whole = expected_output(make_sequence("x", prompt, max_tokens=max_tokens))
    assert whole.index(whole[position]) == position
    return frozenset({whole[position]})


class Logged(DelayedRunner):
    """Writes down in which order steps are launched and collected."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log = []

    def launch(self, chunks, copies):
        step = super().launch(chunks, copies)
        step.number = sum(entry.startswith("launch") for entry in self.log)
        self.log.append(f"launch {step.number}")
        return step

    def collect(self, launched):
        self.log.append(f"collect {launched.number}")
        return super().collect(launched)


def test_a_step_is_launched_before_the_one_before_it_is_collected(monkeypatch):
    monkeypatch.setattr("tests.services.engine.core.oracle.DelayedRunner", Logged)
    core, runner = make()
    sequence = make_sequence("a", [1, 2, 3], max_tokens=4)
    core.add(sequence)
    finish(core, runner, [sequence])
    assert runner.log == [
        "launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3",
    ]  # fmt: skip
    assert runner.num_in_flight_inputs == 3


def test_without_overlap_a_step_is_collected_before_the_next():
    core, _ = make_core()
    core.add(make_sequence("a", [1, 2, 3], max_tokens=4))
    assert [len(core.step().tokens) for _ in range(4)] == [1, 1, 1, 1]
    assert not core.has_work()


def test_the_token_behind_a_stop_token_is_dropped():
    prompt = [3, 1, 4, 1, 5]
    sequence = make_sequence("a", prompt, max_tokens=20, eos_token_ids=eos_of(prompt, 3))
    core, runner = make()
    core.add(sequence)
    _, ends = finish(core, runner, [sequence])
    assert ends["a"].reason is FinishReason.STOP
    assert ends["a"].num_output_tokens == 4
    assert core.report().counters.generation_tokens == 4
    # The prompt, four tokens of which the last is the stop token, and what was drawn behind it.
    assert runner.num_computed_tokens == 5 + 4
    # What is known is found again: all but the last token drawn, as without overlap.
    turn = make_sequence("b", [*sequence.token_ids, 9], max_tokens=1)
    core.add(turn)
    _, ends = finish(core, runner, [turn])
    assert ends["b"].num_cached_tokens == 8


def test_no_step_is_launched_for_a_token_past_max_tokens():
    core, runner = make()
    sequences = [make_sequence(i, [i, 2, 3], max_tokens=1 + i, seed=i) for i in range(5)]
    for sequence in sequences:
        core.add(sequence)
    finish(core, runner, sequences)
    assert runner.num_computed_tokens == sum(3 + i for i in range(5))


def test_no_block_is_taken_for_a_token_that_is_never_computed():
    core, runner = make(num_blocks=2)
    sequence = make_sequence("a", [1, 2, 3, 4, 5], max_tokens=4)
    core.add(sequence)
    finish(core, runner, [sequence])


def test_a_cancelled_sequence_takes_its_token_in_flight_with_it():
    core, runner = make()
    stays = make_sequence("b", [4, 5], max_tokens=9)
    core.add(make_sequence("a", [1, 2, 3], max_tokens=9))
    core.add(stays)
    tokens, ends = {}, {}
    for _ in range(3):
        collect(core.step(), tokens, ends)
    core.cancel("a")
    again = make_sequence("a", [7, 7], max_tokens=3)
    core.add(again)
    report = core.step()
    assert [end.num_output_tokens for end in report.finished] == [2]
    assert [token.key for token in report.tokens] == ["b"]
    collect(report, tokens, {})
    rest, _ = run(core)
    assert output_of(rest, "a") == expected_output(again)
    assert output_of({"b": tokens["b"] | rest["b"]}, "b") == expected_output(stays)
    assert_clean(core, runner)


def test_a_pause_lets_the_token_in_flight_through_and_no_other():
    clock = Clock()
    core, runner = make(clock=clock)
    sequence = make_sequence("a", [1, 2, 3], max_tokens=12)
    core.add(sequence)
    tokens, ends, gaps = {}, {}, []

    def step():
        report = core.step()
        collect(report, tokens, ends)
        gaps.extend(token.itl_s for token in report.tokens if token.itl_s is not None)
        core.check_integrity()
        clock.time += 0.01

    for _ in range(4):
        step()
    core.set_paused("a", True)
    before = sequence.num_output_tokens
    for _ in range(5):
        step()
    assert sequence.num_output_tokens == before + 1
    assert not core.has_work()
    clock.time += 60
    core.set_paused("a", False)
    while core.num_live:
        step()
    assert output_of(tokens, "a") == expected_output(sequence)
    assert max(gaps) < 1
    assert_clean(core, runner)


def test_a_preempted_sequence_keeps_its_token_in_flight():
    core, runner = make(num_blocks=8, max_batch_size=8)
    sequences = [make_sequence(i, [i, 2, 3, 4, 5, 6], max_tokens=14, seed=i) for i in range(4)]
    for sequence in sequences:
        core.add(sequence)
    finish(core, runner, sequences)
    assert core.report().counters.preemptions > 0


def test_who_has_state_on_the_host_waits_for_each_token():
    core, runner = make()
    bound = make_sequence("bound", [1, 2], max_tokens=5, has_host_state=True)
    free = make_sequence("free", [3, 4], max_tokens=9)
    core.add(bound)
    core.add(free)
    finish(core, runner, [bound, free])
    assert runner.num_in_flight_inputs == 8


def test_min_tokens_hold_with_a_token_in_flight():
    prompt = [3, 1, 4]
    params = SamplingParams(max_tokens=9, seed=7, min_tokens=5)
    sequence = make_sequence("a", prompt, params=params, eos_token_ids=eos_of(prompt, 2))
    core, runner = make()
    core.add(sequence)
    _, ends = finish(core, runner, [sequence])
    assert ends["a"].num_output_tokens >= 5


def test_a_prefix_is_computed_once_while_it_is_in_flight():
    shared = list(range(40))
    core, runner = make(prefill_chunk=8)
    sequences = [make_sequence(i, [*shared, 50 + i], max_tokens=2, seed=i) for i in range(8)]
    for sequence in sequences:
        core.add(sequence)
    finish(core, runner, sequences)
    assert runner.num_computed_tokens <= 40 + 8 * (1 + 2)


@pytest.mark.parametrize("stage", ["launch", "forward"])
@pytest.mark.parametrize("at", range(5))
def test_a_failure_that_does_not_come_again_ends_nobody(stage, at):
    core, runner = make(prefill_chunk=4, max_batched_tokens=8)
    sequences = [make_sequence(i, [i, 2, 3, 4, 5, 6], max_tokens=6, seed=i) for i in range(3)]
    for sequence in sequences:
        core.add(sequence)
    tokens, ends = {}, {}
    for _ in range(at):
        collect(core.step(), tokens, ends)
    runner.once[stage, 1] = ValueError("planted")
    rest, _ = run(core)
    assert not runner.once
    for sequence in sequences:
        found = {sequence.key: tokens.get(sequence.key, {}) | rest[sequence.key]}
        assert output_of(found, sequence.key) == expected_output(sequence)
    assert_clean(core, runner)


@pytest.mark.parametrize("stage", ["prepare", "launch", "forward", "sample"])
def test_a_failing_request_ends_alone(stage):
    core, runner = make(prefill_chunk=5, max_batched_tokens=16)
    sequences = [make_sequence(i, list(range(i, i + 9)), max_tokens=6, seed=i) for i in range(6)]
    runner.fail[stage, 3] = ValueError("planted")
    for sequence in sequences:
        core.add(sequence)
    _, ends = finish(core, runner, sequences, failed=(3,))
    assert ends[3].reason is FinishReason.ERROR


def test_rows_move_up_when_one_before_them_cannot_be_prepared():
    core, runner = make()
    runner.fail["prepare", 0] = ValueError("planted")
    sequences = [make_sequence(i, [i, 2, 3], seed=i) for i in range(3)]
    for sequence in sequences:
        core.add(sequence)
    finish(core, runner, sequences, failed=(0,))
    assert runner.num_in_flight_inputs == 2 * 4


@pytest.mark.parametrize("stage", ["launch", "forward"])
def test_a_copy_of_a_failed_step_is_done_again_for_its_owner_alone(stage):
    core, runner = make(min_head=1)
    first = make_sequence("first", [1, 2, 3, 4, 5, 6], max_tokens=1)
    core.add(first)
    finish(core, runner, [first])
    sequences = [make_sequence("a", [1, 2, 3, 9, 9], seed=1), make_sequence("b", [70, 71, 72], seed=2)]
    runner.once[stage, "b"] = ValueError("planted")
    for sequence in sequences:
        core.add(sequence)
    _, ends = finish(core, runner, sequences)
    assert ends["a"].num_cached_tokens == 3


@pytest.mark.parametrize("seed", range(6))
def test_who_loses_its_blocks_while_its_step_fails_draws_again(seed):
    core, runner = make(num_blocks=8, max_batch_size=8)
    runner.reseed(seed)
    sequences = [make_sequence(i, [i, 2, 3, 4, 5, 6], max_tokens=14, seed=i) for i in range(4)]
    for sequence in sequences:
        core.add(sequence)
    tokens, ends = {}, {}
    schedule = core.scheduler.schedule

    def failing(now):
        batch = schedule(now)
        for sequence in batch.preempted:
            runner.once["forward", sequence.key] = ValueError("planted")
        return batch

    core.scheduler.schedule = failing
    while core.num_live or core.has_work():
        collect(core.step(), tokens, ends)
        core.check_integrity()
    assert core.report().counters.preemptions > 0
    for sequence in sequences:
        assert output_of(tokens, sequence.key) == expected_output(sequence)
    assert_clean(core, runner)


@pytest.mark.parametrize("stage", ["prepare", "launch", "forward"])
def test_a_device_fault_at_any_time_leaves_nothing_behind(stage):
    core, runner = make(min_head=1)
    core.add(make_sequence("warm", [1, 2, 3, 4, 5, 6], max_tokens=30))
    for _ in range(3):
        core.step()
    fault = RuntimeError("CUDA error: unspecified launch failure")
    runner.fail[stage, "a"] = fault
    core.add(make_sequence("a", [1, 2, 3, 9, 9], seed=1))
    with pytest.raises(DeviceFault):
        run(core)
    core.abandon()
    core.abort_all(FinishReason.ERROR)
    assert_clean(core, runner)


def test_what_is_in_flight_when_all_is_aborted_is_waited_for():
    core, runner = make()
    for i in range(3):
        core.add(make_sequence(i, [i, 2, 3], max_tokens=30))
    for _ in range(3):
        core.step()
    core.abort_all(FinishReason.CANCELLED)
    assert core.has_work()
    core.settle()
    report = core.report()
    assert not report.tokens
    assert len(report.finished) == 3
    assert_clean(core, runner)


def test_the_wait_for_a_step_begins_when_the_device_gets_to_it():
    clock = Clock()
    core, _ = make(clock=clock)
    core.add(make_sequence("a", [1, 2], max_tokens=5))
    core.launch()
    assert core.step_started_at == clock.time
    begun = clock.time
    clock.time += 5
    core.collect()
    assert core.step_started_at == begun
    core.launch()
    clock.time += 5
    core.collect()
    assert core.step_started_at == clock.time
    while core.num_live:
        core.step()
    assert core.step_started_at is None


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_decoded_since_the_last_block_boundary_are_found(overlap):
    """They are written down late, but in time for whoever looks for them."""
    core, _ = make_core(16, 16, overlap=overlap)
    first = make_sequence("first", [1, 2, 3], max_tokens=12)
    core.add(first)
    for _ in range(8):
        core.step()
    num_computed = first.num_computed_tokens
    assert 8 <= num_computed < 16
    core.add(make_sequence("second", [*first.token_ids, 9], max_tokens=1))
    _, ends = run(core)
    assert ends["second"].num_cached_tokens == num_computed
