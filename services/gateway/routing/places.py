"""How much more may be sent to the engines of one artifact. Knows links and their loads; holds nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from services.gateway.routing.eligibility import serves
from weft.v1 import engine_service_pb2 as engine_pb

# An engine gets this part of its batch on top, and two sequences at least, so that what comes free at one
# step is taken at the next one without a round trip to here: measured with outputs of eight tokens, a batch
# of eight is 90% full with one ahead, 99% with two. What is sent ahead waits in the engine's own order.
# As many may be there of this gateway however full the engine is of others' sequences: those others see each
# place of their own come free at once, and this one sees it with the next heartbeat, when it is taken again.
AHEAD_PART = 1 / 8
MIN_AHEAD = 2
# Prompts for so many steps are enough to keep an engine computing.
PREFILL_STEPS = 2
UNBOUNDED = 1 << 40


class Places(NamedTuple):
    """What the engines of one artifact take now: `num_sequences` more, as long as fewer than `num_ahead` of
    those sent, or of fewer than `num_prompt_tokens`, lack their first token.
    """

    num_sequences: int
    num_ahead: int = UNBOUNDED
    num_prompt_tokens: int = UNBOUNDED


class Load(Protocol):
    """How busy an engine is."""

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at once."""

    @property
    def num_waiting(self) -> int:
        """Sequences that waited there lately."""

    def num_sequences(self, num_live: int) -> int:
        """Sequences there, when `num_live` are this gateway's."""

    def is_full(self, num_live: int) -> bool:
        """Whether the engine would refuse another one."""


class Engine(Protocol):
    """What is asked of a link."""

    @property
    def info(self) -> engine_pb.GetInfoResponse | None:
        """What the engine said of itself."""

    @property
    def load(self) -> Load:
        """How busy it is."""

    @property
    def num_live(self) -> int:
        """Sequences of this gateway on it."""

    @property
    def num_paused(self) -> int:
        """Of these, the ones that have given their places up."""


def find_places(engines: Iterable[Engine], info: engine_pb.GetInfoResponse) -> Places | None:
    """What engines of this artifact take now; None when there is no such engine."""
    found: Places | None = None
    for engine in engines:
        its = engine.info
        if its is None or not serves(engine, info):
            continue
        size = engine.load.max_batch_size
        ahead = max(MIN_AHEAD, int(size * AHEAD_PART))
        num_own = engine.num_live - engine.num_paused
        num_free = size + ahead - engine.load.num_sequences(num_own)
        if engine.load.num_waiting - engine.num_paused >= ahead:
            # Short of blocks, perhaps; and who waits has mostly run before, so nobody is put beside it.
            num_free = 0
        num_free = max(0, num_free, ahead - num_own)
        if engine.load.is_full(engine.num_live):
            num_free = 0
        num_tokens = PREFILL_STEPS * its.max_batched_tokens or UNBOUNDED
        before = found or Places(0, 0, 0)
        found = Places(
            before.num_sequences + num_free,
            before.num_ahead + ahead,
            before.num_prompt_tokens + num_tokens,
        )
    return found
