"""Updates of a request as the messages that gRPC clients read. Pure."""

from __future__ import annotations

from google.protobuf.message import Message

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
            version=resolved.info.artifact_version,
        )
    )


def _tag(message: type[Message], name: str, wire_type: int) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | wire_type)


def _varint(value: int) -> bytes:
    if value < 1 << 7:
        return bytes((value,))
    if value < 1 << 14:
        return bytes((value & 127 | 128, value >> 7))
    if value < 1 << 21:
        return bytes((value & 127 | 128, value >> 7 & 127 | 128, value >> 14))
    return bytes((value & 127 | 128,)) + _varint(value >> 7)


_VARINT, _BYTES = 0, 2
_DELTA = _tag(pb.GenerateResponse, "delta", _BYTES)
_SAMPLE_INDEX = _tag(pb.Delta, "sample_index", _VARINT)
_TEXT = _tag(pb.Delta, "text", _BYTES)
_TOKEN_IDS = _tag(pb.Delta, "token_ids", _BYTES)
_NEXT_OFFSET = _tag(pb.Delta, "next_offset", _VARINT)
_SMALL = tuple(_varint(value) for value in range(1 << 14))


def plain_delta(update: SampleUpdate) -> bytes | None:
    """The one event of most updates, tokens and text and nothing else, as it goes over the wire. None when
    the update has more, or nothing, to tell: then `responses` is for it.

    The same bytes as of the message, which would take four times as long to make: this is once per token.
    """
    sample_index, text, token_ids, logprobs, next_offset, end = update
    if end is not None or logprobs or not token_ids:
        return None
    ids = b"".join([_SMALL[i] if i < 1 << 14 else _varint(i) for i in token_ids])
    parts = [_TOKEN_IDS, _varint(len(ids)), ids]
    if text:
        data = text.encode()
        parts[:0] = (_TEXT, _varint(len(data)), data)
    if sample_index:
        parts[:0] = (_SAMPLE_INDEX, _varint(sample_index))
    if next_offset:
        parts += (_NEXT_OFFSET, _SMALL[next_offset] if next_offset < 1 << 14 else _varint(next_offset))
    body = b"".join(parts)
    return b"".join((_DELTA, _varint(len(body)), body))


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
