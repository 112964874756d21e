"""What the router remembers of one sample: where it has been and how that went. Data; the router's alone."""

from __future__ import annotations

from dataclasses import dataclass

from weft.v1 import generation_pb2 as pb


@dataclass(slots=True)
class Route:
    """`num_placements` counts every Submit that an engine did not refuse for want of room. Of those,
    `num_fruitless` in a row ended with the engine's death before the sample got on.
    """

    num_placements: int = 0
    num_fruitless: int = 0
    # Tokens that the sample had when it was placed last.
    num_tokens_then: int = 0
    # Since when it has been looking for an engine, in seconds of the event loop's clock.
    lost_at: float | None = None
    # Of the deterministic engine that began it; None: another engine could not go on bit for bit anyway.
    numerics_id: str | None = None
    # Its engine died: the next start is one of the retries that the whole gateway has only so many of.
    is_charged: bool = False
    # Engines that had no room for it, since it last ran.
    refused_by: tuple[str, ...] = ()
    refused_at: float = 0.0
    # The newest refusal, of a sample that no engine has taken in yet.
    refusal: pb.Failure | None = None
    # The tokens that it had when somebody looked last, and since when it has had them.
    num_tokens_seen: int = 0
    seen_at: float = 0.0

    def settle(self) -> None:
        """An engine has taken it in."""
        self.lost_at = self.refusal = None
        self.refused_by = ()

    def is_stuck(self, num_tokens: int, now: float, for_s: float) -> bool:
        """Whether it has had so many tokens, and no more, for so long. To be asked again and again."""
        if num_tokens != self.num_tokens_seen:
            self.num_tokens_seen, self.seen_at = num_tokens, now
        return now - self.seen_at >= for_s
