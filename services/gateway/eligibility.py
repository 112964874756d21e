"""Which engines may take a sample at all. Pure; which of them does is the Choice's matter."""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.choice import is_exact
from services.gateway.engine_client import EngineLink
from services.gateway.live import LiveSample
from weft.v1 import engine_service_pb2 as engine_pb


def serves(link: EngineLink, info: engine_pb.GetInfoResponse) -> bool:
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
    exact = [link for link in able if is_exact(link, sample)]
    wanted = exact if exact and not is_late else able
    return [link for link in wanted if link.target not in refused_by]
