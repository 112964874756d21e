"""Which engines may take a sample at all. Pure; which of them does is the Choice's matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.gateway.links.engine_client import EngineLink
from services.gateway.routing.choice import is_exact
from services.gateway.streams.live import LiveSample
from weft.v1 import engine_service_pb2 as engine_pb


class HasInfo(Protocol):
    """A link, as far as its engine's artifact is concerned."""

    @property
    def info(self) -> engine_pb.GetInfoResponse | None:
        """What the engine said of itself."""


def serves(link: HasInfo, info: engine_pb.GetInfoResponse) -> bool:
    """Whether the link's engine serves, or served before it was lost, the same artifact."""
    other = link.info
    return (
        other is not None
        and other.artifact_digest == info.artifact_digest
        and other.model_name == info.model_name
        and other.artifact_version == info.artifact_version
    )


def candidates(sample: LiveSample, links: Sequence[EngineLink], *, is_late: bool) -> list[EngineLink]:
    """Engines that could take the sample now.

    Those that would draw the very tokens of the one before, if there are any. Where the only such ones have
    just had no room, it waits for them until it `is_late`, before it goes on where other tokens might be
    drawn.
    """
    resolved, refused_by = sample.request.resolved, sample.route.refused_by
    num_tokens = len(resolved.prompt_token_ids) + resolved.sampling.max_tokens
    able = [
        link
        for link in links
        if link.is_usable
        and link.info is not None
        and num_tokens <= link.info.max_model_len
        and serves(link, resolved.info)
    ]
    fitting = [link for link in able if _holds(link, num_tokens)]
    # Without any, an engine shall say so; but what has begun waits for one that is large enough.
    able = fitting if fitting or sample.token_ids else able
    exact = [link for link in able if is_exact(link, sample)]
    wanted = exact if exact and not is_late else able
    return [link for link in wanted if link.target not in refused_by]


def _holds(link: EngineLink, num_tokens: int) -> bool:
    """Whether so many tokens fit into the engine's whole cache; the last one needs no place in it."""
    info = link.info
    if info is None or not info.num_blocks or not info.block_size:
        return True
    return num_tokens - 1 <= info.num_blocks * info.block_size
