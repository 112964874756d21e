"""Updates of a request as the messages that gRPC clients read. Pure."""

from __future__ import annotations

from services.gateway.request import ResolvedRequest, SampleUpdate
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2


def started(resolved: ResolvedRequest) -> pb.GenerateResponse:
    """The first event of a request."""
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=resolved.request_id,
            model=resolved.info.model_name,
            seed=resolved.seed,
            prompt_tokens=len(resolved.prompt_token_ids),
        )
    )


def responses(resolved: ResolvedRequest, update: SampleUpdate) -> list[pb.GenerateResponse]:
    """The events of an update: a delta where there is text or a token, then the end."""
    found = []
    if update.text or update.token_ids:
        delta = pb.Delta(
            sample_index=update.sample_index,
            text=update.text,
            token_ids=update.token_ids,
            next_offset=update.next_offset,
        )
        if update.logprobs:
            _add_logprobs(delta, resolved, update)
        found.append(pb.GenerateResponse(delta=delta))
    if update.end is not None:
        end = update.end
        found.append(
            pb.GenerateResponse(
                finish=pb.Finish(
                    sample_index=update.sample_index,
                    reason=end.reason,
                    stop_string=end.stop_string,
                    usage=end.usage,
                    receipt=end.receipt,
                )
            )
        )
    return found


def _add_logprobs(delta: pb.Delta, resolved: ResolvedRequest, update: SampleUpdate) -> None:
    vocabulary = resolved.assets.vocabulary

    def token(token_id: int, logprob: float) -> generation_pb2.TokenLogprob:
        text = vocabulary.piece(token_id).decode("utf-8", "replace")
        return generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob, text=text)

    for token_id, entry in zip(update.token_ids, update.logprobs, strict=False):
        top = zip(entry.top_token_ids, entry.top_logprobs, strict=False)
        delta.logprobs.add(chosen=token(token_id, entry.logprob), top=[token(i, p) for i, p in top])
