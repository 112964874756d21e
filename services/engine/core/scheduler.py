"""Decides what the next step computes.

Every step may mix decodes and prefill chunks under a token budget. Order is priority, then deadline, then
arrival, with ageing. Knows blocks through the block manager; does not know clients, text or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.engine.core import ranks
from services.engine.core.batch import Batch, Chunk
from services.engine.core.block import Match
from services.engine.core.block_manager import BlockManager
from services.engine.core.coming_heads import ComingHeads
from services.engine.core.integrity import check_lists, check_running
from services.engine.core.pauses import Pauses
from services.engine.core.sequence import Sequence, SequenceStatus

MAX_BLOCKED = 32
"""So many sequences without room are looked at in one step; who comes behind them waits with them."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step. `prefill_chunk`: most prompt tokens of one sequence per step. `ageing_s`: waiting
    this long is worth one step of priority. `max_bypasses`: later requests that may be placed before one that
    does not fit yet; after that, room is kept for it. `pause_grace_s`: who is paused for so long gives its
    blocks up, needed or not.
    """

    max_batch_size: int = 64
    max_batched_tokens: int = 2048
    prefill_chunk: int = 512
    ageing_s: float = 10.0
    max_bypasses: int = 64
    pause_grace_s: float = 10.0


class Scheduler:
    """Two lists, running and waiting, and one verb: `schedule`.

    With `has_overlap` a step may be scheduled on top of the one in flight: a sequence's next decode does not
    wait for the token that is being drawn.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.has_overlap = False
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cache_queries = 0
        self.num_cache_hits = 0
        self._blocks = blocks
        self._pauses = Pauses(config.pause_grace_s)
        # Who runs and may have more than its newest token to compute; who has not is found out when asked.
        self._prefilling: dict[Sequence, None] = {}
        # The blocks available when nobody waiting found room. Until there are more, or something else that
        # matters changes, nobody will.
        self._stalled_at: int | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.status = SequenceStatus.WAITING
        self._stalled_at = None
        can_overlap = self.has_overlap and not sequence.has_host_state
        sequence.max_foreseen_tokens = sequence.max_length - 1 if can_overlap else 0
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Drop a sequence, wherever it is, and release its blocks; if not sound, for nobody to find."""
        if sequence.status is SequenceStatus.RUNNING:
            self._take_out(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._stalled_at = None
        self._pauses.end(sequence)
        self._blocks.release(sequence, is_sound=is_sound)

    def reorder(self) -> None:
        """A sequence's priority or deadline changed."""
        self.running.sort(key=ranks.rank)
        self._stalled_at = None

    def set_paused(self, sequence: Sequence, is_paused: bool, now: float) -> None:
        """Stop, or go on, scheduling a sequence. A paused one gives way to those that wait."""
        sequence.is_paused = is_paused
        self._pauses.begin(sequence, now) if is_paused else self._pauses.end(sequence)
        self._stalled_at = None

    def has_runnable(self) -> bool:
        """Whether anything could be scheduled, given blocks."""
        return any(not s.is_paused for s in self.running) or any(not s.is_paused for s in self.waiting)

    def num_tokens_to_prefill(self) -> int:
        """Tokens to compute before those who wait or prefill draw their next one. Any thread may ask; the
        answer may be one step old.
        """
        waiting = sum(s.num_uncomputed_tokens for s in self.waiting.copy())
        # One that decodes has at most its newest token, and the one in flight, to compute.
        running = (s.num_uncomputed_tokens for s in self._prefilling.copy())
        return waiting + sum(num_tokens for num_tokens in running if num_tokens > 2)

    def schedule(self, now: float) -> Batch:
        """Choose the next step's work and get its blocks. `now` in seconds of the core's clock."""
        batch = Batch()
        for sequence in self._pauses.overdue(now):
            if sequence.status is SequenceStatus.RUNNING:
                self._preempt(sequence, batch)
        budget = self._schedule_running(batch)
        if self.waiting and budget and self._has_place() and not batch.preempted:
            budget = self._admit(batch, budget, now)
        batch.num_tokens = self.config.max_batched_tokens - budget
        return batch

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every live sequence is in one list, with counts that fit together. Raises IntegrityError."""
        check_lists(self.running, self.waiting, sequences)
        check_running(self.running, self._prefilling, self._pauses.num_running())

    # -- running ------------------------------------------------------------

    def _schedule_running(self, batch: Batch) -> int:
        """Decodes first, then prefill chunks; both in order of rank. Returns the budget left."""
        others = self._schedule_decodes(batch)
        budget = self.config.max_batched_tokens - len(batch.chunks)
        for sequence in others:
            start = sequence.num_scheduled_tokens
            length = min(sequence.num_foreseen_tokens - start, budget, self.config.prefill_chunk)
            if length <= 0 or sequence.is_paused:
                continue
            if self._reserve_or_preempt(sequence, start + length, batch):
                batch.add(sequence, length)
                budget -= length
        return budget

    def _schedule_decodes(self, batch: Batch) -> list[Sequence]:
        """Every running sequence that lacks one token. Returns the others: most steps have none, and are made
        here without a call per sequence.
        """
        others: list[Sequence] = []
        chunks, budget = batch.chunks, self.config.max_batched_tokens
        for sequence in tuple(self.running):
            start = sequence.num_scheduled_tokens
            end = start + 1
            if sequence.num_foreseen_tokens != end or sequence.is_paused:
                others.append(sequence)
            elif len(chunks) < budget and (
                start < sequence.num_slots or self._reserve_or_preempt(sequence, end, batch)
            ):
                spare, chunk = sequence.decode_chunks
                sequence.decode_chunks = chunk, spare
                chunk.start = start
                chunk.input_row = sequence.drawn_row if end > len(sequence.token_ids) else None
                sequence.drawn_row = len(chunks)
                chunks.append(chunk)
                sequence.num_scheduled_tokens = end
                if end < sequence.max_foreseen_tokens:
                    sequence.num_foreseen_tokens = end + 1
        batch.num_sampling = len(chunks)
        return others

    def _reserve_or_preempt(self, sequence: Sequence, num_tokens: int, batch: Batch) -> bool:
        """Get blocks for a running sequence, taking them from the back if need be; False: it was preempted
        itself, now or before.
        """
        while sequence.status is SequenceStatus.RUNNING:
            if self._blocks.reserve(sequence, num_tokens):
                return True
            victim = self._victim(batch)
            if victim is None:
                return False
            self._preempt(victim, batch)
        return False

    def _victim(self, batch: Batch) -> Sequence | None:
        """Who loses its blocks: a paused sequence first, then the last in order not yet in this step."""
        placed = {id(chunk.sequence) for chunk in batch.chunks}
        unplaced = (s for s in reversed(self.running) if id(s) not in placed)
        return self._last_paused() or next(unplaced, None)

    def _last_paused(self) -> Sequence | None:
        """The running sequence that gives way before any other."""
        if not self._pauses.num_running():
            return None
        return next((s for s in reversed(self.running) if s.is_paused), None)

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        """Take a running sequence's blocks. A token that a step in flight draws for it still counts."""
        self._take_out(sequence)
        self._blocks.release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.add(sequence)
        batch.preempted.append(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        ranks.take_out(self.running, sequence)
        self._prefilling.pop(sequence, None)
        sequence.decode_chunks = ()  # They point back to it: a circle would wait for the collector.

    # -- waiting ------------------------------------------------------------

    def _admit(self, batch: Batch, budget: int, now: float) -> int:
        """Move sequences from waiting to running while budget, batch size and blocks last. Returns the budget
        left.
        """
        if self._stalled_at is not None and self._blocks.num_available <= self._stalled_at:
            return budget
        self._prefilling = {s: None for s in self._prefilling if s.num_uncomputed_tokens > 1}
        coming = ComingHeads(self._blocks, self._prefilling)
        ageing_s = self.config.ageing_s
        candidates = sorted(
            (s for s in self.waiting if not s.is_paused), key=lambda s: ranks.aged_rank(s, now, ageing_s)
        )
        blocked: list[Sequence] = []
        is_stalled = True
        for sequence in candidates:
            if not budget or not self._has_place():
                break
            if coming.is_worth_waiting_for(sequence):
                is_stalled = False
                continue
            self._make_place(batch)
            match = self._find_room(sequence, batch)
            if match is None:
                blocked.append(sequence)
                if sequence.num_bypassed >= self.config.max_bypasses or len(blocked) == MAX_BLOCKED:
                    break
                continue
            is_stalled = False
            budget -= self._start(sequence, match, budget, batch, now)
            coming.add(sequence)
            for passed in blocked:
                passed.num_bypassed += 1
        if is_stalled and not batch.preempted:
            self._stalled_at = self._blocks.num_available
        return budget

    def _has_place(self) -> bool:
        """Whether the batch takes one more: paused sequences give their places up."""
        is_full = len(self.running) >= self.config.max_batch_size
        return not is_full or self._last_paused() is not None

    def _make_place(self, batch: Batch) -> None:
        if len(self.running) >= self.config.max_batch_size and (paused := self._last_paused()) is not None:
            self._preempt(paused, batch)

    def _find_room(self, sequence: Sequence, batch: Batch) -> Match | None:
        """The sequence's match, if all of its tokens get blocks with one to spare for each running sequence
        to grow.

        Paused sequences give way. An engine with nothing running has room: what can never fit was refused.
        """
        while True:
            match = self._blocks.match(sequence)
            num_active = len(self.running) - self._pauses.num_running()
            room = self._blocks.num_available - min(num_active, self._blocks.num_blocks // 16)
            if self._blocks.blocks_to_find(match, len(sequence)) <= room:
                return match
            if match.head is not None:
                # The source of a copy is one block more; a sequence as large as the cache must do without.
                match = Match(match.blocks)
                if self._blocks.blocks_to_find(match, len(sequence)) <= room:
                    return match
            paused = self._last_paused()
            if paused is None:
                return None
            self._preempt(paused, batch)

    def _start(self, sequence: Sequence, match: Match, budget: int, batch: Batch, now: float) -> int:
        """Give blocks to a sequence and its first chunk to the batch. Returns the tokens spent."""
        copy = self._blocks.allocate(sequence, match)
        if copy is not None:
            batch.copies.append(copy)
        # The room was checked for the whole sequence; reserving all at once keeps it so.
        self._blocks.reserve(sequence, len(sequence))
        self.waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.num_bypassed = 0
        if sequence.first_scheduled_at is None:
            sequence.first_scheduled_at = now
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, len(sequence.prompt_token_ids))
            self.num_cache_queries += len(sequence.prompt_token_ids)
            self.num_cache_hits += sequence.num_cached_tokens
        sequence.decode_chunks = Chunk(sequence, 0, 1, True), Chunk(sequence, 0, 1, True)
        ranks.insert(self.running, sequence)
        self._prefilling[sequence] = None
        length = min(sequence.num_uncomputed_tokens, budget, self.config.prefill_chunk)
        batch.add(sequence, length)
        return length
