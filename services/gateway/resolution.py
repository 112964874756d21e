"""From what a client wrote to a request with nothing left open: every check, every default, every token id.

Both faces of the gateway, gRPC and HTTP, come through here. Nothing is accepted and ignored.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from services.gateway.request import ResolvedRequest
from services.gateway.text.assets import ModelAssets
from services.gateway.text.chat_template import ConversationRefused, TemplateBusy, TemplateError
from services.gateway.text.tokenization import INLINE_BYTES, TokenizationError
from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.errors import StatusError, internal_error, invalid_argument, new_error_id
from weft.sampling import (
    validate_labels,
    validate_length,
    validate_sampling,
    validate_stop,
    validate_token_ids,
)
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as pb

MAX_SEARCHED_BYTES = 16 << 10
USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_ROLE = re.compile(r"[a-z_]{1,32}")
log = logs.get_logger("gateway")
if TYPE_CHECKING:
    from services.gateway.sessions.turn import Turn


def refuse_unknown_fields(message: Message) -> None:
    """INVALID_ARGUMENT naming the numbers of fields that this version does not know, nested ones included.

    Millions of them fit into a message, so they are looked for one by one only where that is quick.
    """
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    size = message.ByteSize()
    if known.ByteSize() == size:
        return
    if size > MAX_SEARCHED_BYTES:
        raise invalid_argument([("request", "holds fields that this version does not know")])
    found = dict.fromkeys(_unknown_fields(message, ""))
    raise invalid_argument([(path, "is no field of this version") for path in list(found)[:20]])


def _unknown_field_set(message: Message) -> Iterable[Any]:
    found: Iterable[Any] = cast(Any, UnknownFieldSet)(message)
    return found


def _unknown_fields(message: Message, path: str) -> Iterable[str]:
    for field in _unknown_field_set(message):
        yield f"{path}{field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        values = value if descriptor.is_repeated else (value,)
        for item in values:
            yield from _unknown_fields(item, f"{path}{descriptor.name}.")


def check_fields(
    request: gateway_pb.GenerateRequest,
    info: engine_pb.GetInfoResponse,
    limits: RequestLimits = DEFAULT_LIMITS,
) -> None:
    """Every check that needs no tokenizer, in one refusal. Raises StatusError."""
    violations: list[tuple[str, str]] = []
    violations += validate_labels(
        request_id=request.request_id, priority=request.priority, cache_salt=request.cache_salt
    )
    violations += validate_stop(request.stop, limits=limits)
    violations += validate_sampling(
        request.sampling, vocab_size=info.vocab_size, max_model_len=info.max_model_len, limits=limits
    )
    violations += oversize(request, limits)
    if request.WhichOneof("prompt") is None:
        violations.append(("prompt", "one of text, chat, token_ids must be set"))
    if violations:
        raise invalid_argument(violations)


async def tokenize(
    prompt: gateway_pb.GenerateRequest | gateway_pb.TokenizeRequest,
    assets: ModelAssets,
    info: engine_pb.GetInfoResponse,
) -> list[int]:
    """The token ids of a prompt of any kind. Raises StatusError."""
    kind = prompt.WhichOneof("prompt")
    try:
        if kind == "text":
            if not prompt.text:
                raise invalid_argument([("text", "must not be empty")])
            token_ids = await assets.tokenizer.encode_text(prompt.text)
            if not token_ids:
                raise invalid_argument([("text", "holds nothing that the model's tokenizer knows")])
            return token_ids
        if kind == "chat":
            return await _tokenize_chat(prompt.chat, assets)
        if kind == "token_ids" and isinstance(prompt, gateway_pb.GenerateRequest):
            ids = prompt.token_ids.ids
            check_length(len(ids), None, info, "token_ids")  # first: a message holds millions of ids
            violations = validate_token_ids(ids, vocab_size=info.vocab_size, field="token_ids.ids")
            if violations:
                raise invalid_argument(violations)
            return list(ids)
    except TokenizationError as error:
        raise _as_internal("tokenizer failed", error) from error
    raise invalid_argument([("prompt", "one of text, chat, token_ids must be set")])


def check_length(
    num_prompt_tokens: int, max_tokens: int | None, info: engine_pb.GetInfoResponse, field: str
) -> None:
    """INVALID_ARGUMENT for a prompt that leaves no room, or not enough, in the model's context."""
    violations = validate_length(
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
        max_model_len=info.max_model_len,
        prompt_field=field,
    )
    if violations:
        error = invalid_argument(violations)
        error.reason = "CONTEXT_LENGTH_EXCEEDED"
        raise error


def oversize(
    prompt: gateway_pb.GenerateRequest | gateway_pb.TokenizeRequest, limits: RequestLimits
) -> list[tuple[str, str]]:
    """What of a prompt is larger than the limits, before anything looks into it."""
    kind = prompt.WhichOneof("prompt")
    if kind == "chat" and len(prompt.chat.messages) > limits.max_messages:
        return [("chat.messages", f"must have at most {limits.max_messages} entries")]
    # The message's own size: what is around the text in it is a few bytes, and quicker to count.
    if kind == "chat" and prompt.chat.ByteSize() > limits.max_text_bytes:
        num_bytes = sum(len(message.content.encode()) for message in prompt.chat.messages)
    else:
        num_bytes = len(prompt.text.encode())
    if num_bytes > limits.max_text_bytes:
        return [(kind or "prompt", f"must have at most {limits.max_text_bytes} bytes")]
    return []


async def _tokenize_chat(chat: gateway_pb.ChatPrompt, assets: ModelAssets) -> list[int]:
    messages, marker = await messages_of(chat, assets)
    rendered = await render(messages, assets)
    token_ids = await assets.tokenizer.encode_chat(rendered, marker)
    if not token_ids:
        raise invalid_argument([("chat", "the rendered conversation is empty")])
    return token_ids


async def messages_of(
    chat: gateway_pb.ChatPrompt, assets: ModelAssets
) -> tuple[list[dict[str, str]], str | None]:
    """The messages as templates take them, checked, and the marker of the special tokens that are spelled out
    in them. Raises StatusError.
    """
    template = assets.template
    if template is None:
        raise invalid_argument([("chat", assets.template_problem)])
    if not chat.messages:
        raise invalid_argument([("chat.messages", "must have at least one entry")])
    for index, message in enumerate(chat.messages):
        # A role often becomes part of a special token, so it must be a word that the template expects.
        if message.role not in USUAL_ROLES and not _is_named(message.role, template.source):
            raise invalid_argument([(f"chat.messages[{index}].role", "is no role that this model knows")])
    written = [message.content for message in chat.messages]
    if sum(map(len, written)) > INLINE_BYTES:
        contents, marker = await asyncio.to_thread(assets.tokenizer.escape, written)
    else:
        contents, marker = assets.tokenizer.escape(written)
    messages = [
        {"role": message.role, "content": content}
        for message, content in zip(chat.messages, contents, strict=True)
    ]
    return messages, marker


async def render(messages: list[dict[str, str]], assets: ModelAssets) -> str:
    """The conversation as the model's template writes it, ready for an answer. Raises StatusError."""
    if assets.template is None:
        raise invalid_argument([("chat", assets.template_problem)])
    try:
        return await assets.template.render(messages)
    except ConversationRefused as error:
        raise invalid_argument([("chat", str(error))]) from error
    except TemplateBusy as error:
        raise StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_s=1.0, reason="TEMPLATES_BUSY"
        ) from error
    except TemplateError as error:
        error_id = new_error_id()
        log.failure("chat template failed", error, error_id=error_id)
        raise StatusError(grpc.StatusCode.INTERNAL, f"{error} (id {error_id})", error_id=error_id) from error


def _is_named(role: str, template: str) -> bool:
    return _ROLE.fullmatch(role) is not None and (f"'{role}'" in template or f'"{role}"' in template)


def _as_internal(event: str, error: Exception) -> StatusError:
    error_id = new_error_id()
    log.failure(event, error, error_id=error_id)
    return internal_error(error_id)


async def resolve(
    request: gateway_pb.GenerateRequest,
    info: engine_pb.GetInfoResponse,
    assets: ModelAssets,
    request_id: str,
    deadline: float | None,
    limits: RequestLimits = DEFAULT_LIMITS,
    turn: Turn | None = None,
) -> ResolvedRequest:
    """Tokenize, check lengths, fill in defaults, draw the seed. `check_fields` must have passed. With `turn`
    the prompt is what its session holds and the request adds. Raises StatusError.
    """
    prompt_token_ids = await (
        tokenize(request, assets, info) if turn is None else turn.prompt(request, assets, info)
    )
    prompt_field = request.WhichOneof("prompt") or "prompt"
    if max(prompt_token_ids) >= info.vocab_size:  # a tokenizer may know more tokens than the model
        raise invalid_argument([(prompt_field, "holds a token that the model does not have")])
    sampling = pb.SamplingParams()
    sampling.CopyFrom(request.sampling)
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    check_length(len(prompt_token_ids), max_tokens, info, prompt_field)
    room = info.max_model_len - len(prompt_token_ids)
    if sampling.min_tokens > room:
        raise invalid_argument([("sampling.min_tokens", f"the context has room for {room}")])
    num_samples = sampling.n or 1
    sampling.ClearField("n")
    assets.defaults.apply(sampling)
    if not sampling.HasField("max_tokens"):
        sampling.max_tokens = room
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    return ResolvedRequest(
        request_id=request_id,
        info=info,
        assets=assets,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        num_samples=num_samples,
        stops=tuple(request.stop),
        terminal_ids=_end_ids(sampling, info, assets, limits.max_stop_token_ids),
        skip_special_tokens=(
            request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        ),
        priority=request.priority,
        must_complete=request.must_complete,
        cache_salt=request.cache_salt,
        deadline=deadline,
        session_id="" if turn is None else turn.affinity,
        retain_seconds=0 if turn is None else turn.retain_seconds,
    )


def _end_ids(
    sampling: pb.SamplingParams, info: engine_pb.GetInfoResponse, assets: ModelAssets, max_ids: int
) -> frozenset[int]:
    """Every id that ends an output. End tokens that generation_config.json names and the engine does not know
    become stop token ids.
    """
    ids = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        known = set(info.eos_token_ids)
        for token_id in assets.defaults.eos_token_ids:
            has_room = len(sampling.stop_token_ids) < max_ids
            if token_id not in known | ids and token_id < info.vocab_size and has_room:
                sampling.stop_token_ids.append(token_id)
                ids.add(token_id)
        ids |= known
    return frozenset(ids)
