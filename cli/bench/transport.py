"""What every way of asking a server has in common. Knows no protocol."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from cli.bench.records import Record
from cli.bench.vocabulary import Prompt, Vocabulary

now = time.perf_counter


class BenchError(Exception):
    """The run cannot begin, or cannot go on. The message is the one line that the user reads."""


@dataclass(frozen=True)
class Facts:
    """What the server said before the run. Can be sent to another process."""

    model: str
    vocabulary: Vocabulary
    max_model_len: int | None = None
    version: str = ""
    digest: str = ""
    # HTTP: whether each chunk says how many tokens there are so far, which not every server can.
    has_chunk_usage: bool = False
    more: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Exchange:
    """One request as a transport sees it."""

    prompt: Prompt
    max_tokens: int
    record: Record
    seed: int
    # Turns so far, as (question, answer); the transport appends this one if `is_conversation`.
    history: list[tuple[Prompt, str]] = field(default_factory=list)
    session_id: str = ""
    pause_s: float = 0.0


class Transport(Protocol):
    """One way of asking. Belongs to the event loop it was opened on."""

    async def open(self) -> None:
        """Connect. Raises BenchError."""

    async def facts(self, *, needs_vocabulary: bool) -> Facts:
        """Ask what there is, and try one small request. Raises BenchError."""

    def use(self, facts: Facts) -> None:
        """Take facts that another process, or `facts`, found."""

    async def run(self, exchange: Exchange) -> None:
        """Send one request and read its answer into the record, whose `ended` is called exactly once whatever
        happens. A cancelled task cancels the request at the server.
        """

    async def begin_session(self, session_id: str) -> bool:
        """Make a session of this name, where the protocol has them; False where it has none.
        Raises BenchError.
        """

    async def end_session(self, session_id: str) -> None:
        """Delete it; failures do not matter any more."""

    async def close(self) -> None:
        """Let go of the server. What still runs is cancelled."""
