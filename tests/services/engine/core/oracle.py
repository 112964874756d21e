"""A runner without a model, for tests of everything above it.

It keeps the token ids in simulated block memory and draws each next token as a keyed hash of the whole
history *read back through the block table*. A wrong table, a lost copy, a stale block or another sequence's
data changes the very next token.
"""

from __future__ import annotations

import random
from hashlib import blake2b

from services.engine.core.admission import CoreLimits
from services.engine.core.batch import SampledToken
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import SamplingParams, Sequence

VOCABULARY = 97
POISON = -1


def next_token(history, seed, sample_index, vocabulary=VOCABULARY):
    """The oracle: what follows this history under this key."""
    key = f"{seed}/{sample_index}".encode()
    text = ",".join(map(str, history)).encode()
    return int.from_bytes(blake2b(text, key=key, digest_size=8).digest(), "little") % vocabulary


def expected_output(sequence, vocabulary=VOCABULARY):
    """What an undisturbed engine draws for a sequence, its resumed tokens included."""
    out = []
    params = sequence.params
    while len(out) < params.max_tokens:
        out.append(
            next_token(sequence.prompt_token_ids + out, params.seed, sequence.sample_index, vocabulary)
        )
        if len(out) >= params.min_tokens and out[-1] in sequence.stop_ids:
            break
    return out


class OracleRunner:
    """Implements Runner over a list of slots. `fail` may name (stage, key) pairs that raise."""

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.slots = [[POISON] * block_size for _ in range(num_blocks)]
        self.fail = {}
        self.num_forwards = 0
        self.num_computed_tokens = 0
        self.forgotten = []

    def _maybe_fail(self, stage, key):
        error = self.fail.get((stage, key))
        if error is not None:
            raise error

    def prepare(self, chunk):
        self._maybe_fail("prepare", chunk.sequence.key)

    def copy_blocks(self, copies):
        for source, destination, num_tokens in copies:
            head = self.slots[source][:num_tokens]
            if POISON in head:
                raise AssertionError(f"copy of {num_tokens} tokens reads unwritten slots of block {source}")
            self.slots[destination] = head + [POISON] * (self.block_size - num_tokens)

    def forward(self, chunks):
        self.num_forwards += 1
        rows = []
        for chunk in chunks:
            self._maybe_fail("forward", chunk.sequence.key)
            sequence = chunk.sequence
            for position in range(chunk.start, chunk.start + chunk.length):
                block, offset = divmod(position, self.block_size)
                self.slots[sequence.block_table[block]][offset] = sequence.token_ids[position]
            self.num_computed_tokens += chunk.length
            if chunk.is_sampling:
                rows.append(self._read(sequence, chunk.start + chunk.length))
        return rows

    def _read(self, sequence, length):
        history = [token for index in sequence.block_table for token in self.slots[index]][:length]
        if POISON in history or len(history) != length:
            raise AssertionError(f"{sequence.key}: unwritten slots in its own history")
        return history

    def sample(self, logits, chunks):
        rows = []
        for history, chunk in zip(logits, chunks, strict=True):
            sequence = chunk.sequence
            try:
                self._maybe_fail("sample", sequence.key)
                rows.append(SampledToken(next_token(history, sequence.params.seed, sequence.sample_index)))
            except Exception as error:
                rows.append(error)
        return rows

    def forget(self, sequence):
        self.forgotten.append(sequence.key)

    def is_device_fault(self, error):
        return "CUDA error" in str(error)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def make_core(
    num_blocks=32, block_size=4, *, prefix_cache=True, min_head=1, clock=None, max_queue_size=512, **limits
):
    """A core over an oracle runner, with small limits."""
    runner = OracleRunner(num_blocks, block_size)
    blocks = BlockManager(num_blocks, block_size, min_head=min_head, has_prefix_cache=prefix_cache)
    scheduler = Scheduler(SchedulerConfig(**limits), blocks)
    core_limits = CoreLimits(VOCABULARY, max_model_len=10_000, max_queue_size=max_queue_size)
    core = EngineCore(runner, scheduler, blocks, core_limits, now=clock or Clock())
    return core, runner


def make_sequence(key, prompt, max_tokens=5, *, seed=7, output=(), sample_index=0, **fields):
    """A sequence with an explicit prompt; ends at max_tokens unless params say otherwise."""
    params = fields.pop("params", None) or SamplingParams(max_tokens=max_tokens, seed=seed)
    return Sequence(key, list(prompt), params, list(output), sample_index, **fields)


def run(core, max_steps=10_000):
    """Step until nothing is live. Returns tokens and end per key; checks positions as a client would."""
    tokens, ends = {}, {}
    for _ in range(max_steps):
        if not core.num_live and not core.has_work():
            return tokens, ends
        collect(core.step(), tokens, ends)
        core.check_integrity()
    raise AssertionError("the core does not come to an end")


def collect(report, tokens, ends):
    """Add one report's events to what is known."""
    for event in report.tokens:
        assert event.key not in ends, "a token after the end"
        tokens.setdefault(event.key, {})
        assert event.position not in tokens[event.key], "a position twice"
        tokens[event.key][event.position] = event.token_id
    for end in report.finished:
        assert end.key not in ends, "two ends"
        ends[end.key] = end


def output_of(tokens, key, start=0):
    """The tokens of a key in order; fails on a gap."""
    positions = tokens.get(key, {})
    assert sorted(positions) == list(range(start, start + len(positions))), "a gap in positions"
    return [positions[i] for i in sorted(positions)]


def random_prompt(rng: random.Random, pool, max_length=30):
    """A prompt that often shares its head with an earlier one."""
    head = []
    if pool and rng.random() < 0.6:
        head = rng.choice(pool)
        head = head[: rng.randint(1, len(head))]
    tail = [
        rng.randrange(VOCABULARY)
        for _ in range(rng.randint(0 if head else 1, max_length - min(len(head), max_length - 1)))
    ]
    prompt = (head + tail)[:max_length] or [1]
    pool.append(prompt)
    return prompt
