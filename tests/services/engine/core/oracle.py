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
    """Implements ForwardRunner over a list of slots. `fail` may name (stage, key) pairs that raise, `once`
    those that raise one time.
    """

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.slots = [[POISON] * block_size for _ in range(num_blocks)]
        self.fail = {}
        self.once = {}
        self.num_forwards = 0
        self.num_computed_tokens = 0
        self.forgotten = []

    def _error(self, stage, key):
        return self.once.pop((stage, key), None) or self.fail.get((stage, key))

    def _maybe_fail(self, stage, *keys):
        errors = [error for key in keys if (error := self._error(stage, key)) is not None]
        if errors:
            raise errors[0]

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
        self._maybe_fail("forward", *[chunk.sequence.key for chunk in chunks])
        rows = []
        for chunk in chunks:
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


class Launched:
    """One step as a device has it: a copy of all that the host knew at the launch."""

    def __init__(self, chunks, copies, before):
        self.copies = list(copies)
        self.rows = [
            (
                chunk.sequence,
                list(chunk.sequence.block_table),
                chunk.start,
                list(chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]),
                chunk.length,
                chunk.is_sampling,
                chunk.input_row,
                chunk.output_position,
            )
            for chunk in chunks
        ]
        self.before = before
        self.is_ahead = before is not None and not before.is_collected
        self.drawn_for = [chunk.sequence for chunk in chunks if chunk.is_sampling]
        self.drawn = []
        self.error = None
        self.is_done = self.is_collected = False


class DelayedRunner(OracleRunner):
    """The oracle as a device with a queue: a step runs at some time between its launch and its collection, in
    order, on what was known at its launch and on the tokens drawn by the step before.

    A step fails at its launch, or at its collection (stage "forward"). Whatever was launched on top of a
    failed step computes rubbish. What only a wrong core can bring about is kept in `violations`.
    """

    has_overlap = True

    def __init__(self, num_blocks, block_size):
        super().__init__(num_blocks, block_size)
        self.violations = []
        self.num_in_flight_inputs = 0
        self._num_drawn = {}
        self._rng = random.Random(0)
        self._queue = []
        self._newest = None

    def reseed(self, seed):
        """Let steps run, and fail, at other times."""
        self._rng.seed(seed)

    def prepare(self, chunk):
        super().prepare(chunk)
        self._num_drawn.setdefault(chunk.sequence, chunk.sequence.num_output_tokens)

    def forget(self, sequence):
        self._num_drawn.pop(sequence, None)

    def _require(self, is_right, text):
        if not is_right:
            self.violations.append(text)

    def launch(self, chunks, copies):
        self._maybe_fail("launch", *[chunk.sequence.key for chunk in chunks])
        for chunk in chunks:
            end = chunk.start + chunk.length
            self._require(end < chunk.sequence.max_length, "a step for a token past max_tokens")
        step = self._newest = Launched(chunks, copies, self._newest)
        self._queue.append(step)
        self._require(len(self._queue) <= 2, "more than two steps in flight")
        self._run(self._rng.randrange(len(self._queue) + 1))
        return step

    def collect(self, launched):
        self._require(self._queue[0] is launched, "a step collected out of order")
        self._run(self._rng.randint(1, len(self._queue)))
        self._queue.pop(0)
        launched.is_collected = True
        if launched.error is not None:
            raise launched.error
        return launched.drawn

    def _run(self, count):
        for step in self._queue[:count]:
            if not step.is_done:
                self._run_step(step)
                step.before = None

    def _run_step(self, step):
        step.is_done = True
        self.num_forwards += 1
        is_rubbish = step.is_ahead and step.before.error is not None
        for sequence, *_ in step.rows:
            step.error = step.error or self._error("forward", sequence.key)
        if step.error is not None and self._rng.random() < 0.5:
            return  # It failed before it wrote anything.
        try:
            self.copy_blocks(step.copies)
        except AssertionError as error:
            self.violations.append(str(error))
        for row in step.rows:
            self._run_row(step, is_rubbish, *row)

    def _run_row(
        self, step, is_rubbish, sequence, table, start, tokens, length, is_sampling, input_row, position
    ):
        if input_row is not None:
            self.num_in_flight_inputs += 1
            self._require(len(tokens) == length - 1, "a row for a token that the host knew")
            self._require(step.before.drawn_for[input_row] is sequence, "the row of another sequence's draw")
            drawn = None if is_rubbish else step.before.drawn[input_row]
            is_rubbish = not isinstance(drawn, SampledToken)
            tokens = [*tokens, POISON if is_rubbish else drawn.token_id]
        self._require(len(tokens) == length, "neither a token nor a row to take it from")
        for slot, token in enumerate(tokens, start):
            block, offset = divmod(slot, self.block_size)
            self.slots[table[block]][offset] = token
        self.num_computed_tokens += length
        if not is_sampling:
            return
        history = [token for index in table for token in self.slots[index]][: start + length]
        is_whole = POISON not in history and len(history) == start + length
        self._require(is_whole or is_rubbish, f"{sequence.key}: unwritten slots in its own history")
        if sequence in self._num_drawn:
            # As penalties are counted on a device: by draws, beginning with what the host knew.
            is_next = self._num_drawn[sequence] == position
            self._require(is_next or is_rubbish, f"{sequence.key}: draw {position} out of order")
            self._num_drawn[sequence] += 1
        error = self._error("sample", sequence.key)
        step.drawn.append(
            error or SampledToken(next_token(history, sequence.params.seed, sequence.sample_index))
        )


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def make_core(
    num_blocks=32,
    block_size=4,
    *,
    overlap=False,
    prefix_cache=True,
    min_head=1,
    clock=None,
    max_queue_size=512,
    **limits,
):
    """A core over an oracle runner, with small limits."""
    runner = (DelayedRunner if overlap else OracleRunner)(num_blocks, block_size)
    clock = clock or Clock()
    blocks = BlockManager(num_blocks, block_size, min_head=min_head, has_prefix_cache=prefix_cache, now=clock)
    scheduler = Scheduler(SchedulerConfig(**limits), blocks)
    core_limits = CoreLimits(VOCABULARY, max_model_len=10_000, max_queue_size=max_queue_size)
    core = EngineCore(runner, scheduler, blocks, core_limits, now=clock)
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
