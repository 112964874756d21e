"""The tokens that a new turn adds to a session.

What the session holds is never rendered or tokenized again. A chat's new messages are what the model's
template writes behind the last answer: it is asked to render the whole conversation with stand-ins for what
was said, and where it would not write the earlier turns as they are kept, the turn is refused. Knows nothing
of how sessions are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from services.gateway.resolution import messages_of, render, tokenize
from services.gateway.text.assets import ModelAssets
from weft.rpc.errors import StatusError, invalid_argument
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb

MAX_SESSION_MESSAGES = 1024
# To decode more of them would hold the event loop for milliseconds.
INLINE_TOKENS = 4096
# Stands for what was said. Letters, so that no tokenizer joins it with what templates write around it.
_WORD = "ok"
_THOUGHT_END = "</think>"
_THOUGHT = f"<think>\n{_WORD}\n{_THOUGHT_END}\n\n{_WORD}"


class Kept(NamedTuple):
    """What a session holds. `num_output` of the tokens, at the end, are the last answer. `roles` are those of
    every message, answers included; None once a turn was no chat.
    """

    token_ids: list[int]
    num_output: int
    roles: tuple[str, ...] | None


class TurnPrompt(NamedTuple):
    """The tokens that a turn adds, and the roles of the session once it has its answer."""

    token_ids: list[int]
    roles: tuple[str, ...] | None


async def turn_prompt(
    request: gateway_pb.GenerateRequest, kept: Kept, assets: ModelAssets, info: engine_pb.GetInfoResponse
) -> TurnPrompt:
    """What `request`, whose fields are checked, adds to what is kept. Raises StatusError."""
    kind = request.WhichOneof("prompt")
    is_first = not kept.token_ids
    if kind == "chat":
        if is_first:
            roles = tuple(message.role for message in request.chat.messages)
            return TurnPrompt(await tokenize(request, assets, info), (*roles, "assistant"))
        return await _further_chat(request.chat, kept, assets, info)
    if kind == "text" and not is_first:
        return TurnPrompt(await _further_text(request.text, assets), None)
    return TurnPrompt(await tokenize(request, assets, info), None)


async def _further_text(text: str, assets: ModelAssets) -> list[int]:
    if not text:
        raise invalid_argument([("text", "must not be empty")])
    token_ids = await assets.tokenizer.encode_more(text)
    if not token_ids:
        raise invalid_argument([("text", "holds nothing that the model's tokenizer knows")])
    return token_ids


async def _further_chat(
    chat: gateway_pb.ChatPrompt, kept: Kept, assets: ModelAssets, info: engine_pb.GetInfoResponse
) -> TurnPrompt:
    if kept.roles is None:
        raise _refusal("a turn of this session was no chat, so no template can go on with it")
    messages, marker = await messages_of(chat, assets)
    roles = (*kept.roles, *(message["role"] for message in messages))
    if len(roles) > MAX_SESSION_MESSAGES:
        raise invalid_argument([("chat.messages", f"a session has at most {MAX_SESSION_MESSAGES} of them")])
    answer = kept.token_ids[len(kept.token_ids) - kept.num_output :]
    has_thought = await _has_thought(answer, assets)
    stand_in = _THOUGHT if has_thought else _WORD
    history = [{"role": role, "content": _WORD} for role in kept.roles[:-1]]
    before = await render(history, assets) + stand_in
    whole = await render([*history, {"role": "assistant", "content": stand_in}, *messages], assets)
    if not whole.startswith(before):
        what = "leaves out what was thought before an answer" if has_thought else "rewrites earlier turns"
        raise _refusal(f"the model's template {what}, so it cannot go on with tokens that are kept")
    head = await assets.tokenizer.encode_chat(before, marker)
    token_ids = await assets.tokenizer.encode_chat(whole, marker)
    if token_ids[: len(head)] != head:
        raise _refusal("what the model's template writes after an answer cannot be told from the answer")
    rest = _without_end(token_ids[len(head) :], answer, assets, info)
    return TurnPrompt(rest, (*roles, "assistant"))


async def _has_thought(answer: Sequence[int], assets: ModelAssets) -> bool:
    def decode() -> str:
        return assets.vocabulary.decode(answer, skip_special_tokens=False)

    return _THOUGHT_END in (decode() if len(answer) <= INLINE_TOKENS else await asyncio.to_thread(decode))


def _without_end(
    rest: list[int], answer: Sequence[int], assets: ModelAssets, info: engine_pb.GetInfoResponse
) -> list[int]:
    """The template writes the end token of the answer; where the model has drawn it, it is there already."""
    last = answer[-1]
    ends = {*info.eos_token_ids, *assets.defaults.eos_token_ids}
    if rest and rest[0] == last and (last in ends or last in assets.tokenizer.special_ids):
        rest = rest[1:]
    elif last in ends:
        raise _refusal("the model's template ends an answer otherwise than the model did")
    if not rest:
        raise _refusal("the model's template writes nothing for these messages")
    return rest


def _refusal(text: str) -> StatusError:
    error = invalid_argument([("chat", f"{text}; send the turn as text or token_ids")])
    error.reason = "SESSION_TEMPLATE"
    return error
