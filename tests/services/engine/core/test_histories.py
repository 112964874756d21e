"""Random histories: whatever happens in whatever order, no token is wrong and no block is lost; and a client
sees the same with steps overlapped as without.

Each history is a configuration and a list of commands; hypothesis shrinks a failing one to its few essential
lines.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.core.errors import RequestError
from services.engine.core.sequence import FinishReason, SamplingParams
from tests.services.engine.core.oracle import (
    Clock,
    collect,
    expected_output,
    make_core,
    make_sequence,
    output_of,
)

FAILURES = (("prepare", False), ("forward", False), ("sample", False), ("launch", False), ("forward", True))
FAILURES += (("launch", True),)
COMMANDS = (
    "add",
    "add",
    "add",
    "step",
    "step",
    "step",
    "step",
    "cancel",
    "pause",
    "resume",
    "fail",
    "wait",
    "resubmit",
    "look",
)

commands = st.lists(
    st.tuples(st.sampled_from(COMMANDS), st.integers(0, 2**20), st.integers(0, 2**20)),
    min_size=1,
    max_size=40,
)
configurations = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(4, 24),
        "block_size": st.sampled_from([1, 2, 4, 5, 8]),
        "prefix_cache": st.booleans(),
        "min_head": st.integers(1, 3),
        "prefill_chunk": st.integers(1, 12),
        "max_batched_tokens": st.integers(4, 24),
        "max_batch_size": st.integers(1, 4),
        "max_queue_size": st.integers(1, 8),
        "max_bypasses": st.integers(0, 3),
    }
)


class History:
    """Runs commands against a core and remembers what a careful client would."""

    def __init__(self, configuration, *, overlap):
        self.clock = Clock()
        self.core, self.runner = make_core(clock=self.clock, overlap=overlap, **configuration)
        if overlap:
            self.runner.reseed(configuration["num_blocks"] * configuration["block_size"])
        self.num_added, self.resubmitted = 0, set()
        self.sequences, self.tokens, self.ends, self.failing = {}, {}, {}, set()

    def do(self, name, a, b):
        getattr(self, name)(a, b)
        self.core.check_integrity()

    def add(self, a, b, output=()):
        # Few distinct heads, so that prefixes are shared, diverge inside blocks, and are evicted.
        head = [(a % 3 + i) % 7 for i in range(b % 19)]
        prompt = [*head, *[(a >> 4) % 5] * ((a >> 8) % 6)]
        params = SamplingParams(max_tokens=1 + (b >> 5) % 9, seed=a % 2, min_tokens=(b >> 9) % 3)
        deadline = self.clock.time + (b >> 12) % 5 if a % 5 == 0 else None
        key = self._new_key()
        eos = frozenset({(a >> 12) % 20})
        sequence = make_sequence(
            key,
            prompt,
            params=params,
            output=output,
            priority=(a >> 6) % 3 - 1,
            deadline=deadline,
            eos_token_ids=eos,
            retain_s=(0.0, 0.0, 1.0, 1000.0)[(a >> 15) % 4],
        )
        try:
            self.core.add(sequence)
        except RequestError:
            return
        self.sequences[key] = sequence

    def resubmit(self, a, b):
        """Cancel a live sequence and go on with what it has given, as a failover does."""
        key = self._new_key()
        sequence = self._pick(a)
        if sequence is None:
            return
        self.core.cancel(sequence.key)
        self.resubmitted.add(key)
        again = make_sequence(
            key,
            sequence.prompt_token_ids,
            params=sequence.params,
            output=sequence.output_token_ids,
            eos_token_ids=sequence.eos_token_ids,
        )
        try:
            self.core.add(again)
        except RequestError:
            return
        self.sequences[key] = again

    def step(self, a, b):
        self.clock.time += 0.01
        collect(self.core.step(), self.tokens, self.ends)

    def cancel(self, a, b):
        sequence = self._pick(a)
        if sequence is not None:
            self.core.cancel(sequence.key)

    def pause(self, a, b):
        sequence = self._pick(a)
        if sequence is not None:
            self.core.set_paused(sequence.key, True)

    def resume(self, a, b):
        sequence = self._pick(a)
        if sequence is not None:
            self.core.set_paused(sequence.key, False)

    def fail(self, a, b):
        sequence = self._pick(a)
        if sequence is not None:
            stage, is_once = FAILURES[b % len(FAILURES)]
            # Even one that does not come again may hit a sequence that runs alone after somebody else's.
            self.failing.add(sequence.key)
            (self.runner.once if is_once else self.runner.fail)[stage, sequence.key] = ValueError("planted")

    def look(self, a, b):
        """Whoever looks for a prefix finds as much as if all had been written down before."""
        sequence = self._pick(a)
        if sequence is None:
            return
        blocks, size = self.core.blocks, self.core.blocks.block_size
        ids = sequence.token_ids[: 1 + b % (len(sequence) + 1)]
        probe = make_sequence("probe", [*ids, (b >> 10) % 7])
        found = blocks.match(probe).num_tokens(size)
        for running in self.core.scheduler.running:
            blocks.record(running)
        assert blocks.match(probe).num_tokens(size) == found

    def wait(self, a, b):
        self.clock.time += (b % 4) / 2

    def _new_key(self):
        self.num_added += 1
        return self.num_added

    def _pick(self, a):
        live = [s for s in self.sequences.values() if s.key not in self.ends and s.finish_reason is None]
        return live[a % len(live)] if live else None

    def finish(self):
        """Let everything end, then check each sequence against the oracle and the pool against its size."""
        for sequence in self.sequences.values():
            self.core.set_paused(sequence.key, False)
        for _ in range(2000):
            if not self.core.num_live and not self.core.has_work():
                break
            self.step(0, 0)
            self.core.check_integrity()
        collect(self.core.report(), self.tokens, self.ends)
        assert set(self.ends) == set(self.sequences), "every admitted sequence ends exactly once"
        assert not getattr(self.runner, "violations", None)
        for key, sequence in self.sequences.items():
            self._check(sequence, self.ends[key])
        counts = self.core.blocks.counts()
        assert counts.active == 0
        assert counts.free + counts.cached == self.core.blocks.num_blocks
        counters = self.core.report().counters
        assert counters.begun == counters.ended == len(self.sequences)

    def _check(self, sequence, end):
        whole = expected_output(sequence)
        got = output_of(self.tokens, sequence.key, sequence.num_emitted)
        assert got == whole[sequence.num_emitted : sequence.num_emitted + len(got)]
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert sequence.output_token_ids == whole
        elif end.reason is FinishReason.ERROR:
            assert sequence.key in self.failing
        assert end.num_output_tokens == sequence.num_emitted + len(got)


def assert_same_streams(one, other):
    """Whoever was in both, and ended by itself in both, got the same; else as much as both got."""
    for key in one.sequences.keys() & other.sequences.keys():
        if key in one.resubmitted | other.resubmitted:
            continue  # With what had come by then, so not the same request.
        ends = one.ends[key], other.ends[key]
        left, right = (output_of(history.tokens, key) for history in (one, other))
        if {end.reason for end in ends} <= {FinishReason.STOP, FinishReason.LENGTH}:
            assert left == right
            assert ends[0].reason is ends[1].reason
            assert ends[0].num_output_tokens == ends[1].num_output_tokens == len(left)
        shorter = min(len(left), len(right))
        assert left[:shorter] == right[:shorter]


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations, commands)
def test_no_history_breaks_the_core(configuration, history):
    runs = [History(configuration, overlap=overlap) for overlap in (False, True)]
    for run in runs:
        for command in history:
            run.do(*command)
        run.finish()
    assert_same_streams(*runs)
