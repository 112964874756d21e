"""The core, driven by the oracle runner: every token right, every block accounted for, each end told once."""

from __future__ import annotations

import pytest

from services.engine.core.errors import (
    DeadlineUnmet,
    DeviceFault,
    DoesNotFit,
    Draining,
    DuplicateRequest,
    InternalFailure,
    InvalidRequest,
    QueueFull,
)
from services.engine.core.sequence import FinishReason, SamplingParams, Sequence, SequenceStatus
from tests.services.engine.core.oracle import (
    Clock,
    collect,
    expected_output,
    make_core,
    make_sequence,
    output_of,
    run,
)


def assert_clean(core):
    core.check_integrity()
    counts = core.blocks.counts()
    assert counts.active == 0
    assert counts.free + counts.cached == core.blocks.num_blocks
    counters = core.report().counters
    assert counters.begun == counters.ended


def run_all(core, sequences):
    for sequence in sequences:
        core.add(sequence)
    tokens, ends = run(core)
    for sequence in sequences:
        assert (
            output_of(tokens, sequence.key, sequence.num_emitted)
            == expected_output(sequence)[sequence.num_emitted :]
        )
    assert_clean(core)
    return tokens, ends


def prompts(count, length=9):
    return [[(i * 31 + j * 7) % 90 for j in range(length + i % 5)] for i in range(count)]


def test_one_sequence_ends_at_max_tokens():
    core, _ = make_core()
    _, ends = run_all(core, [make_sequence("a", [1, 2, 3], max_tokens=4)])
    assert ends["a"].reason is FinishReason.LENGTH
    assert ends["a"].num_output_tokens == 4
    assert ends["a"].num_prompt_tokens == 3


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prefill_chunk", [1, 3, 7, 512])
def test_a_mixed_batch_draws_what_each_would_alone(prefix_cache, prefill_chunk):
    core, runner = make_core(
        64, 4, prefix_cache=prefix_cache, prefill_chunk=prefill_chunk, max_batched_tokens=24
    )
    run_all(core, [make_sequence(i, p, max_tokens=3 + i % 6, seed=i) for i, p in enumerate(prompts(12))])
    assert runner.num_forwards > 6


def test_preemption_changes_no_token():
    core, _ = make_core(10, 4, max_batch_size=8)
    sequences = [make_sequence(i, p, max_tokens=12, seed=i) for i, p in enumerate(prompts(6, 8))]
    _, ends = run_all(core, sequences)
    assert core.report().counters.preemptions > 0
    assert all(end.reason is FinishReason.LENGTH for end in ends.values())


@pytest.mark.parametrize("cut", range(9))
def test_a_resume_goes_on_at_any_offset(cut):
    whole = expected_output(make_sequence("x", [5, 6, 7], max_tokens=9))
    core, _ = make_core()
    sequence = make_sequence("a", [5, 6, 7], max_tokens=9, output=whole[:cut])
    core.add(sequence)
    tokens, ends = run(core)
    assert output_of(tokens, "a", cut) == whole[cut:]
    assert ends["a"].num_output_tokens == 9
    assert_clean(core)


def test_a_resume_of_what_had_ended_ends_at_once():
    whole = expected_output(make_sequence("x", [5, 6, 7], max_tokens=3))
    core, runner = make_core()
    core.add(make_sequence("a", [5, 6, 7], max_tokens=3, output=whole))
    tokens, ends = run(core)
    assert not tokens
    assert ends["a"].reason is FinishReason.LENGTH
    assert runner.num_forwards == 0


def test_stop_tokens_are_honoured_after_min_tokens_only():
    prompt = [3, 1, 4]
    free = expected_output(make_sequence("x", prompt, max_tokens=20))
    eos = frozenset({free[2]})
    early = make_sequence("a", prompt, params=SamplingParams(max_tokens=20, seed=7), eos_token_ids=eos)
    core, _ = make_core()
    core.add(early)
    tokens, ends = run(core)
    assert output_of(tokens, "a") == free[: free.index(free[2]) + 1]
    assert ends["a"].reason is FinishReason.STOP

    ignoring = SamplingParams(max_tokens=6, seed=7, ignore_eos=True)
    core.add(make_sequence("b", prompt, params=ignoring, eos_token_ids=eos))
    tokens, ends = run(core)
    assert output_of(tokens, "b") == free[:6]
    assert ends["b"].reason is FinishReason.LENGTH

    late = make_sequence(
        "c", prompt, params=SamplingParams(max_tokens=9, seed=7, min_tokens=5), eos_token_ids=eos
    )
    assert late.banned_token_ids == eos
    core.add(late)
    _, ends = run(core)
    assert ends["c"].num_output_tokens >= 5
    assert not late.banned_token_ids


def test_a_shared_prefix_is_computed_once_even_when_both_arrive_together():
    shared = list(range(40))
    core, runner = make_core(64, 4)
    sequences = [make_sequence(i, [*shared, 50 + i], max_tokens=2, seed=i) for i in range(8)]
    _, ends = run_all(core, sequences)
    assert runner.num_computed_tokens <= 40 + 8 * (1 + 2)
    assert sum(end.num_cached_tokens for end in ends.values()) == 7 * 40


def test_samples_of_one_short_prompt_share_its_computation():
    core, runner = make_core(64, 16)
    sequences = [make_sequence(i, [9, 8, 7, 6, 5], max_tokens=2, sample_index=i) for i in range(4)]
    run_all(core, sequences)
    assert runner.num_computed_tokens == 5 + 3 * 1 + 4


def test_a_second_turn_reuses_prompt_and_output():
    core, runner = make_core(64, 4)
    first = make_sequence("a", list(range(10)), max_tokens=7)
    run_all(core, [first])
    before = runner.num_computed_tokens
    turn = make_sequence("b", [*first.token_ids, 11, 12], max_tokens=1)
    _, ends = run_all(core, [turn])
    assert ends["b"].num_cached_tokens == 16  # All but the last drawn token, which was never computed.
    assert runner.num_computed_tokens - before == 3


def test_cache_salt_keeps_prefixes_apart():
    core, _ = make_core()
    run_all(core, [make_sequence("a", list(range(12)))])
    _, ends = run_all(core, [make_sequence("b", list(range(12)), cache_salt="other")])
    assert ends["b"].num_cached_tokens == 0
    _, ends = run_all(core, [make_sequence("c", list(range(12)))])
    assert ends["c"].num_cached_tokens == 11


@pytest.mark.parametrize("stage", ["prepare", "forward", "sample"])
def test_a_failing_request_ends_alone(stage):
    core, runner = make_core(64, 4, max_batched_tokens=16, prefill_chunk=5)
    sequences = [make_sequence(i, p, max_tokens=6, seed=i) for i, p in enumerate(prompts(6))]
    runner.fail[stage, 3] = ValueError("planted")
    for sequence in sequences:
        core.add(sequence)
    tokens, ends = run(core)
    for sequence in sequences:
        if sequence.key != 3:
            assert output_of(tokens, sequence.key) == expected_output(sequence)
            assert ends[sequence.key].reason is FinishReason.LENGTH
    assert ends[3].reason is FinishReason.ERROR
    assert isinstance(ends[3].error, InternalFailure)
    assert "planted" not in str(ends[3].error)
    assert_clean(core)


def test_nobody_finds_the_blocks_of_a_sequence_that_failed():
    """Its keys and values may be what made it fail: numbers that are none, for all with the same prefix."""
    core, runner = make_core(64, 4, min_head=1, prefill_chunk=8)
    prompt = list(range(22))
    runner.fail["sample", "bad"] = ValueError("logits are not finite")
    core.add(make_sequence("bad", prompt))
    _, ends = run(core)
    assert ends["bad"].reason is FinishReason.ERROR
    assert core.blocks.counts().cached == 0
    _, ends = run_all(core, [make_sequence("again", prompt)])
    assert ends["again"].num_cached_tokens == 0


def test_a_failure_leaves_the_blocks_that_others_own_with_them():
    core, runner = make_core(64, 4, min_head=1)
    prompt = list(range(22))
    good = make_sequence("good", prompt, max_tokens=8)
    core.add(good)
    core.step()
    runner.fail["sample", "bad"] = ValueError("logits are not finite")
    core.add(make_sequence("bad", [*prompt, 30], max_tokens=8))
    tokens, ends = run(core)
    assert ends["bad"].num_cached_tokens > 0
    assert ends["bad"].reason is FinishReason.ERROR
    assert output_of(tokens, "good", 1) == expected_output(good)[1:]
    assert_clean(core)


@pytest.mark.parametrize("num_drawn", [0, 2], ids=["first token", "later token"])
def test_an_exception_in_taking_a_token_ends_that_request_alone(monkeypatch, num_drawn):
    core, _ = make_core()
    append = Sequence.append

    def failing(sequence, token_id):
        if sequence.key == 1 and sequence.num_output_tokens == num_drawn:
            raise RuntimeError("planted")
        return append(sequence, token_id)

    monkeypatch.setattr(Sequence, "append", failing)
    sequences = [make_sequence(i, p, seed=i) for i, p in enumerate(prompts(3))]
    for sequence in sequences:
        core.add(sequence)
    tokens, ends = run(core)
    assert ends[1].reason is FinishReason.ERROR
    assert isinstance(ends[1].error, InternalFailure)
    monkeypatch.undo()
    for key in (0, 2):
        assert output_of(tokens, key) == expected_output(sequences[key])
    assert_clean(core)


def test_an_exception_at_the_door_is_that_requests_own(monkeypatch):
    core, _ = make_core()
    monkeypatch.setattr(core._admission, "_check_tokens", lambda sequence: 1 / 0)
    with pytest.raises(InternalFailure):
        core.add(make_sequence("a", [1]))
    assert core.num_live == 0
    assert_clean(core)


def test_a_failed_copy_ends_its_owner_alone(monkeypatch):
    core, runner = make_core(64, 4, min_head=1)
    run_all(core, [make_sequence("warm", [1, 2, 3, 4, 5, 6], max_tokens=1)])
    real = runner.copy_blocks

    def failing(copies):
        raise RuntimeError("planted")

    monkeypatch.setattr(runner, "copy_blocks", failing)
    core.add(make_sequence("a", [1, 2, 3, 9, 9], seed=1))
    other = make_sequence("b", [70, 71, 72], seed=2)
    core.add(other)
    tokens, ends = run(core)
    monkeypatch.setattr(runner, "copy_blocks", real)
    assert ends["a"].reason is FinishReason.ERROR
    assert output_of(tokens, "b") == expected_output(other)
    assert_clean(core)


def test_a_device_fault_is_nobodys_own():
    core, runner = make_core()
    runner.fail["forward", "a"] = RuntimeError("CUDA error: an illegal memory access was encountered")
    core.add(make_sequence("a", [1, 2]))
    with pytest.raises(DeviceFault):
        core.step()
    core.abort_all(FinishReason.ERROR)
    assert_clean(core)


def test_the_door_refuses():
    core, _ = make_core(8, 4, max_queue_size=2)
    for field, sequence in {
        "prompt_token_ids": make_sequence("a", []),
        "prompt_token_ids ": make_sequence("a", [97]),
        "prompt_token_ids  ": make_sequence("a", [-1]),
        "emitted_token_ids": make_sequence("a", [1], output=[200]),
        "emitted_token_ids ": make_sequence("a", [1], max_tokens=1, output=[1, 2]),
        "sampling.max_tokens": make_sequence("a", [1], max_tokens=0),
        "sampling.max_tokens ": make_sequence("a", [1], max_tokens=2**31),
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            core.add(sequence)
        assert caught.value.field == field.strip()
    with pytest.raises(DoesNotFit):
        core.add(make_sequence("a", [1], max_tokens=33))
    core.add(make_sequence("exact", [1], max_tokens=32))
    with pytest.raises(DuplicateRequest):
        core.add(make_sequence("exact", [1]))
    core.add(make_sequence("b", [1]))
    with pytest.raises(QueueFull) as full:
        core.add(make_sequence("c", [1]))
    assert full.value.retry_after_s > 0
    run(core)
    core.is_draining = True
    with pytest.raises(Draining):
        core.add(make_sequence("d", [1]))
    assert_clean(core)


def test_a_queued_deadline_costs_no_forward():
    clock = Clock()
    core, runner = make_core(clock=clock, max_batch_size=1)
    core.add(make_sequence("a", [1, 2], max_tokens=3))
    core.step()
    core.add(make_sequence("b", [3, 4], deadline=clock.time + 1))
    core.step()
    clock.time += 2
    late, late_ends = run(core)
    assert runner.num_computed_tokens == 2 + 2
    assert "b" not in late
    assert late_ends["b"].reason is FinishReason.DEADLINE
    assert isinstance(late_ends["b"].error, DeadlineUnmet)
    with pytest.raises(DeadlineUnmet):
        core.add(make_sequence("c", [1], deadline=clock.time - 1))
    assert_clean(core)


def test_a_running_stream_is_ended_before_its_deadline_with_its_tokens():
    clock = Clock()
    core, _ = make_core(clock=clock)
    core.add(make_sequence("a", [1, 2], max_tokens=50, deadline=clock.time + 1.0))
    tokens, ends = {}, {}
    while core.num_live:
        collect(core.step(), tokens, ends)
        clock.time += 0.1
    collect(core.report(), tokens, ends)
    assert ends["a"].reason is FinishReason.DEADLINE
    assert ends["a"].error is None
    # 2 x the last gap of 0.1 s early: the tokens of 0.0 to 0.7 s came.
    assert len(output_of(tokens, "a")) == 8
    assert_clean(core)


def test_cancel_frees_within_the_call_and_ends_once():
    core, _ = make_core()
    core.add(make_sequence("a", list(range(20)), max_tokens=50))
    core.add(make_sequence("b", [1], max_tokens=2))
    core.step()
    assert core.blocks.counts().active > 0
    sequence = core._live["a"]
    core.cancel("a")
    core.cancel("a")
    core.cancel("nobody")
    assert sequence.status is SequenceStatus.FINISHED
    _, ends = run(core)
    assert ends["a"].reason is FinishReason.CANCELLED
    assert set(ends) == {"a", "b"}
    assert_clean(core)


def test_a_paused_sequence_waits_gives_way_and_goes_on():
    core, _ = make_core(10, 4)
    slow = make_sequence("slow", list(range(12)), max_tokens=20)
    core.add(slow)
    tokens, ends = {}, {}
    for _ in range(3):
        collect(core.step(), tokens, ends)
    core.set_paused("slow", True)
    before = slow.num_output_tokens
    assert not core.has_work()
    big = make_sequence("big", list(range(50, 70)), max_tokens=8)
    core.add(big)
    while "big" not in ends:
        collect(core.step(), tokens, ends)
        core.check_integrity()
    assert slow.num_output_tokens == before
    assert slow.num_preemptions == 1
    core.set_paused("slow", False)
    while core.num_live:
        collect(core.step(), tokens, ends)
    collect(core.report(), tokens, ends)
    assert output_of(tokens, "slow") == expected_output(slow)
    assert output_of(tokens, "big") == expected_output(big)
    assert_clean(core)


def test_priority_then_deadline_then_arrival():
    clock = Clock()
    core, _ = make_core(clock=clock, max_batch_size=1)
    for key, priority, deadline in (
        ("late", 0, None),
        ("soon", 0, 9e9),
        ("first", -1, None),
        ("last", 5, None),
    ):
        core.add(make_sequence(key, [1, len(key)], max_tokens=1, priority=priority, deadline=deadline))
        clock.time += 0.001
    order = []
    while core.num_live:
        order += [end.key for end in core.step().finished]
    assert order == ["first", "soon", "late", "last"]


def test_ageing_lets_low_priority_through():
    clock = Clock()
    core, _ = make_core(clock=clock, max_batch_size=1, ageing_s=1.0)
    core.add(make_sequence("old", [1, 2], max_tokens=1, priority=3))
    order = []
    for i in range(20):
        core.add(make_sequence(i, [3, i], max_tokens=1))
        clock.time += 1.0
        order += [end.key for end in core.step().finished]
    assert "old" in order


def test_a_large_request_does_not_stop_small_ones_and_is_not_starved():
    core, _ = make_core(16, 4, max_bypasses=5)
    core.add(make_sequence("running", list(range(20)), max_tokens=28))
    core.step()
    core.add(make_sequence("large", list(range(40, 90)), max_tokens=2))
    order, count = [], 0
    while "large" not in order:
        core.add(make_sequence(f"small{count}", [count % 90, 2], max_tokens=2))
        count += 1
        report = core.step()
        order += [end.key for end in report.finished]
        core.check_integrity()
        assert count < 200
    assert order[0].startswith("small")
    for _ in range(200):
        if not core.num_live:
            break
        core.step()
    assert_clean(core)


def test_update_changes_priority_and_deadline():
    clock = Clock()
    core, _ = make_core(clock=clock, max_batch_size=1)
    core.add(make_sequence("a", [1, 2], max_tokens=1))
    core.add(make_sequence("b", [3, 4], max_tokens=1))
    core.update("b", priority=-1)
    core.update("a", deadline=clock.time + 0.5)
    assert [end.key for end in core.step().finished] == ["b"]
    clock.time += 1
    report = core.step()
    assert [(end.key, end.reason) for end in report.finished] == [("a", FinishReason.DEADLINE)]


def test_a_late_start_is_refused_by_the_learned_cost():
    clock = Clock()
    core, runner = make_core(clock=clock)
    forward = runner.forward

    def slow(chunks):
        clock.time += 0.1 * sum(chunk.length for chunk in chunks)
        return forward(chunks)

    runner.forward = slow
    core.add(make_sequence("teach", list(range(80)), max_tokens=4))
    run(core)
    with pytest.raises(DeadlineUnmet):
        core.add(make_sequence("a", list(range(60, 80)), deadline=clock.time + 1.0))
    # What is cached costs nothing.
    core.add(make_sequence("cached", list(range(80)), deadline=clock.time + 1.0, max_tokens=1))
    run(core)
    core.add(make_sequence("b", list(range(60, 70)), deadline=clock.time + 30.0, max_tokens=3))
    with pytest.raises(DeadlineUnmet):
        core.add(make_sequence("c", [1], deadline=clock.time + 5.0, max_tokens=100, must_complete=True))
    core.cancel("b")
    assert_clean(core)


def test_who_waits_behind_a_request_does_not_make_it_late():
    clock = Clock()
    core, runner = make_core(128, 4, clock=clock, max_batch_size=1)
    forward = runner.forward

    def slow(chunks):
        clock.time += 0.01 * sum(chunk.length for chunk in chunks)
        return forward(chunks)

    runner.forward = slow
    core.add(make_sequence("teach", list(range(90)), max_tokens=4))
    run(core)
    core.add(make_sequence("running", [1, 2, 3], max_tokens=50))
    core.step()
    core.add(make_sequence("background", [7] * 90, max_tokens=2))
    core.add(make_sequence("paused", [8] * 90, max_tokens=2, priority=-5))
    core.set_paused("paused", True)
    core.add(make_sequence("soon", [9] * 20, max_tokens=2, deadline=clock.time + 0.5))
    core.add(make_sequence("first", [6] * 20, max_tokens=2, deadline=clock.time + 0.5, priority=-1))
    with pytest.raises(DeadlineUnmet):
        core.add(make_sequence("behind", [5] * 20, max_tokens=2, deadline=clock.time + 0.5))
    for key in list(core._live):
        core.cancel(key)
    assert_clean(core)


@pytest.mark.parametrize("stage", ["schedule", "update"])
def test_a_step_that_hangs_anywhere_shows(stage, monkeypatch):
    clock = Clock()
    core, _ = make_core(clock=clock)
    seen = []
    target, name = (core.scheduler, "schedule") if stage == "schedule" else (core, "_update")
    real = getattr(target, name)

    def hanging(*args):
        clock.time += 100
        seen.append((clock.time - core.step_started_at, core.step_bound_s))
        return real(*args)

    monkeypatch.setattr(target, name, hanging)
    core.add(make_sequence("a", [1, 2], max_tokens=1))
    core.step()
    assert seen[0][0] >= 100 > seen[0][1] > 0
    assert core.step_started_at is None


def test_a_hash_collision_costs_a_miss_not_a_mix_up(monkeypatch):
    monkeypatch.setattr("services.engine.core.block_manager.chain_hash", lambda parent, ids: b"same")
    core, _ = make_core(64, 4, min_head=4)
    for i in range(4):
        run_all(core, [make_sequence(i, [i, 2, 3, 4, i + 5, 6, 7, 8, 9], seed=i)])


@pytest.mark.parametrize("seed", range(3))
def test_equal_histories_give_equal_schedules(seed):
    def history():
        core, _ = make_core(12, 4, prefill_chunk=5, max_batched_tokens=16, max_batch_size=4)
        for i, prompt in enumerate(prompts(8, 7 + seed)):
            core.add(make_sequence(i, prompt, seed=seed))
        log = []
        while core.num_live:
            report = core.step()
            log.append([(t.key, t.token_id) for t in report.tokens])
        return log

    assert history() == history()
