"""A runner with block memory and no model: it writes token ids into blocks and reads them back.

Knows chunks, blocks and the oracle. Does not know scheduling, links, or whether what it is told is right: a
wrong block table, a copy that was lost, or a block of another sequence shows as a wrong next token, and a
slot that nobody wrote as a failed sequence.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Sequence as SequenceABC

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import Sequence
from tools.mock_engine import oracle

POISON = 0xFFFFFFFF
"""What an unwritten slot holds; no token id. Ids are below 2 ** 24, so no four bytes of them look like it."""
_POISON_BYTES = b"\xff" * oracle.TOKEN_BYTES


class UnwrittenSlots(Exception):
    """A sequence's own history has slots that nobody wrote."""


class DeviceBroken(Exception):
    """The device that is not there has failed, as it was asked to."""


class HashRunner:
    """A `ForwardRunner`. A step takes `step_s` seconds and `token_s` more for each token it computes, slept
    without holding the interpreter up. `vocabulary` is how many different ids are drawn.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        step_s: float = 0.0,
        token_s: float = 0.0,
        hang_s: float = 60.0,
        vocabulary: int = oracle.NUM_TOKEN_IDS,
    ) -> None:
        if sys.byteorder != "little":
            raise RuntimeError("block memory is read as little-endian bytes")
        self.block_size = block_size
        self.step_s = step_s
        self.token_s = token_s
        self.hang_s = hang_s
        self.vocabulary = vocabulary
        self.memory = [array(oracle.TYPECODE, [POISON]) * block_size for _ in range(num_blocks)]
        self._will_hang = False
        self._hangs = False
        self._will_break = False
        self._is_released = threading.Event()

    def break_next(self) -> None:
        """The next step ends in a fault of the device. From any thread or signal handler."""
        self._will_break = True

    def hang_next(self) -> None:
        """The next step takes `hang_s`, or until `release`. From any thread or signal handler."""
        self._is_released.clear()
        self._will_hang = True

    @property
    def is_hanging(self) -> bool:
        """Whether a step hangs, or the next one will."""
        return self._will_hang or self._hangs

    def release(self) -> None:
        """End the hanging step."""
        self._will_hang = False
        self._is_released.set()

    def prepare(self, chunk: Chunk) -> None:
        """Nothing to prepare."""

    def copy_blocks(self, copies: SequenceABC[BlockCopy]) -> None:
        """Copy the heads; what is behind them is nobody's."""
        for source, destination, num_tokens in copies:
            head = self.memory[source][:num_tokens]
            if POISON in head:
                raise UnwrittenSlots(f"copy of {num_tokens} tokens of block {source}")
            rest = array(oracle.TYPECODE, [POISON]) * (self.block_size - num_tokens)
            self.memory[destination] = head + rest

    def forward(self, chunks: SequenceABC[Chunk]) -> list[bytes]:
        """Write every chunk's tokens, then read the history of those that draw."""
        if self._will_hang:
            self._will_hang, self._hangs = False, True
            self._is_released.wait(self.hang_s)
            self._hangs = False
        if self._will_break:
            raise DeviceBroken("the device is broken")
        duration_s = self.step_s
        if self.token_s:
            duration_s += self.token_s * sum(chunk.length for chunk in chunks)
        if duration_s > 0:
            time.sleep(duration_s)
        memory, size = self.memory, self.block_size
        histories = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.start
            table = sequence.block_table
            if chunk.length == 1:
                memory[table[start // size]][start % size] = sequence.token_ids[start]
            else:
                self._write(sequence, start, start + chunk.length)
            if chunk.is_sampling:
                end = start + chunk.length
                used = table[: -(-end // size)]
                # An array joins as its bytes.
                histories.append(b"".join([memory[index] for index in used])[: end * oracle.TOKEN_BYTES])
        return histories

    def _write(self, sequence: Sequence, start: int, end: int) -> None:
        size = self.block_size
        while start < end:
            index, offset = divmod(start, size)
            stop = min(end, (index + 1) * size)
            tokens = array(oracle.TYPECODE, sequence.token_ids[start:stop])
            self.memory[sequence.block_table[index]][offset : offset + stop - start] = tokens
            start = stop

    def sample(
        self, logits: SequenceABC[bytes], chunks: SequenceABC[Chunk]
    ) -> list[SampledToken | Exception]:
        """Draw from what was read back."""
        rows: list[SampledToken | Exception] = []
        for history, chunk in zip(logits, chunks, strict=True):
            sequence = chunk.sequence
            num_tokens = chunk.start + chunk.length
            if len(history) != num_tokens * oracle.TOKEN_BYTES or _POISON_BYTES in history:
                rows.append(UnwrittenSlots(f"{sequence.key!r}: of {num_tokens} tokens some were not written"))
                continue
            params = sequence.params
            key = oracle.sample_key(params.seed, sequence.sample_index)
            token_id = oracle.token_after(history, key, self.vocabulary)
            if params.logprobs is None:
                rows.append(SampledToken(token_id))
            else:
                top = oracle.top_logprobs(token_id, params.logprobs)
                rows.append(SampledToken(token_id, oracle.logprob(token_id), top))
        return rows

    def forget(self, sequence: Sequence) -> None:
        """Nothing is held for a sequence."""

    def is_device_fault(self, error: BaseException) -> bool:
        """There is no device; but it can be asked to fail."""
        return isinstance(error, DeviceBroken)
