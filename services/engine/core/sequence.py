"""A sequence: the engine's unit of work, one sample of one request.

Knows its tokens and which blocks hold them. Does not know how blocks are managed, who asked, or what a model
is.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from collections.abc import Sequence as SequenceABC
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.engine.core.batch import Chunk


class SequenceStatus(enum.Enum):
    """Where a sequence stands. A finished sequence never comes back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Every field is resolved: no field means "default".

    `top_k` 0, `top_p` 1 and `min_p` 0 are off; `temperature` 0 is greedy. `logprobs` None asks for none, 0
    for the chosen token's, k for the k likeliest as well. `seed` is an unsigned 64-bit key.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of one request.

    `prompt_token_ids` and, of a resume, the `emitted_token_ids` that were delivered before are how
    `token_ids` begins; what is drawn goes behind them. `priority`: lower runs first. `deadline` and `arrival`
    are seconds of the core's clock. `has_host_state`: each token changes something on the host that the next
    one's draw needs, so no step is built on a token that is still in flight. `num_bypassed` counts admissions
    of later requests while this one could not be placed. For `retain_s` seconds after it gave its blocks back
    they are evicted after others'.

    In blocks: `block_table[i]` holds the positions from i * block_size, `num_slots` in all. `prefix_names`
    is the hash chain over full blocks of `token_ids`, as far as anyone needed it: the i-th names all before
    block i. In tokens, counted from the first, num_recorded <= num_computed <= num_scheduled <= num_foreseen:
    * `num_recorded_tokens`: the block manager knows what the blocks hold so far;
    * `num_computed_tokens`: K and V are in the cache, and the step that put them there has been collected;
    * `num_scheduled_tokens`: the steps scheduled so far compute them;
    * `num_foreseen_tokens`: a step may compute them: the known ones, and the one being drawn, unless it is
      the last or there is `has_host_state`. It is at most `max_foreseen_tokens` while one is being drawn.
    `drawn_row` is the row of the newest step in which this sequence's token is drawn. `decode_chunks` serve
    its decodes in turn while it runs: when a step is scheduled, the one in flight may still need the other.
    """

    key: Hashable
    prompt_token_ids: list[int]
    params: SamplingParams
    emitted_token_ids: InitVar[SequenceABC[int]] = ()
    sample_index: int = 0
    priority: int = 0
    deadline: float | None = None
    arrival: float = 0.0
    must_complete: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    has_host_state: bool = False
    retain_s: float = 0.0

    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    block_table: list[int] = field(default_factory=list)
    num_slots: int = 0
    num_recorded_tokens: int = 0
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_foreseen_tokens: int = field(init=False)
    max_foreseen_tokens: int = 0
    drawn_row: int = 0
    decode_chunks: tuple[Chunk, ...] = ()
    num_emitted: int = field(init=False)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    is_paused: bool = False
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    last_itl_s: float = 0.0
    prefix_names: list[bytes] = field(default_factory=list)
    num_bypassed: int = 0
    token_ids: list[int] = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    """Every id that ends this sequence once min_tokens are out."""
    banned_token_ids: frozenset[int] = field(init=False)
    max_length: int = field(init=False)
    """Prompt and max_tokens together."""

    def __post_init__(self, emitted_token_ids: SequenceABC[int]) -> None:
        self.token_ids = [*self.prompt_token_ids, *emitted_token_ids]
        self.num_foreseen_tokens = len(self.token_ids)
        self.num_emitted = len(emitted_token_ids)
        self.max_length = len(self.prompt_token_ids) + self.params.max_tokens
        self.stop_ids = self.params.stop_token_ids
        if not self.params.ignore_eos:
            self.stop_ids |= self.eos_token_ids
        self.update_bans()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of what is behind the prompt, emitted tokens included."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens are behind the prompt, emitted ones included."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose K and V are not in the cache yet; the last of them yields the next logits."""
        return len(self.token_ids) - self.num_computed_tokens

    def update_bans(self) -> None:
        """Recompute `banned_token_ids`: the stop ids while fewer than min_tokens are out, else nothing."""
        is_early = self.num_output_tokens < self.params.min_tokens
        self.banned_token_ids = self.stop_ids if is_early else frozenset()

    def append(self, token_id: int) -> FinishReason | None:
        """Take one sampled token. Returns why the sequence ends with it, or None when it goes on."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if self.num_foreseen_tokens < num_tokens:
            self.num_foreseen_tokens = num_tokens
        if self.banned_token_ids:
            self.update_bans()
        is_last = token_id in self.stop_ids or num_tokens >= self.max_length
        return self.stop_reason() if is_last else None

    def stop_reason(self) -> FinishReason | None:
        """Why the sequence ends after its newest token, or None when it goes on."""
        if not self.num_output_tokens:
            return None
        # With fewer than min_tokens out, the stop ids are banned and not yet in force.
        if self.token_ids[-1] in self.stop_ids and not self.banned_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_length else None
