"""What a turn adds to a session: for chats exactly what the model's template writes for the whole
conversation behind the tokens that are kept, or a refusal.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.gateway.resolution import tokenize
from services.gateway.sessions.turn_prompt import Kept, turn_prompt
from services.gateway.text.assets import ModelAssets
from services.gateway.text.chat_template import ChatTemplate
from services.gateway.text.detokenizer import Vocabulary
from services.gateway.text.generation_config import GenerationDefaults
from services.gateway.text.tokenization import Tokenizer
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}"
    "{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEMO = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GOOD = {
    "demo": (DEMO, "<|end|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}
# Each rewrites what was, or ends an answer in a way of its own.
LAST_SYSTEM = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST]' + (s if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
THINKS_FIRST = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
DROPS_THOUGHTS = CHATML.replace("m.content +", "m.content.split('</think>')[-1].strip() +")
SPACE_BEFORE_END = MISTRAL.replace("m.content + eos_token", "m.content + ' ' + eos_token")
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<start_of_turn>", "<end_of_turn>", "</s>", "[INST]", "[/INST]"]


@asynccontextmanager
async def started(
    demo_model: Path, template: str, end: str
) -> AsyncIterator[tuple[ModelAssets, engine_pb.GetInfoResponse]]:
    document = json.loads((demo_model / "tokenizer.json").read_bytes())
    entry = document["added_tokens"][0]
    for number, content in enumerate(SPECIALS):
        document["added_tokens"].append({**entry, "id": 4096 + number, "content": content, "special": True})
    tokenizer = Tokenizer(json.dumps(document).encode())
    chat = ChatTemplate(template, {"bos_token": "<|bos|>", "eos_token": end}, num_workers=1)
    await chat.start()
    defaults = GenerationDefaults.parse({})
    assets = ModelAssets(tokenizer, Vocabulary(tokenizer), defaults, chat, "", "sha256:0")
    (end_id,) = [token.id for token in tokenizer.added_tokens if token.content == end]
    try:
        yield (
            assets,
            engine_pb.GetInfoResponse(vocab_size=5000, max_model_len=100_000, eos_token_ids=[end_id]),
        )
    finally:
        await assets.close()


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=text) for role, text in messages])
    )


def text_of(rng: random.Random) -> str:
    words = ["weave", "Warp", "<|im_end|>", "é", "[INST]", "1,024", "<|user|>", "shuttle", "ok", "\n"]
    return "x" + " ".join(rng.choices(words, k=rng.randint(1, 8))) + "."


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("ends", [True, False])
async def test_a_session_equals_the_whole_conversation_rendered(demo_model, name, ends):
    """Whether the model drew its end token (it is kept) or was cut before it (the template writes it)."""
    template, end = GOOD[name]
    rng = random.Random(name)
    async with started(demo_model, template, end) as (assets, info):
        for has_system in (False, name != "mistral"):
            conversation = [("system", text_of(rng))] if has_system else []
            new = [*conversation, ("user", text_of(rng))]
            kept = Kept([], 0, ())
            conversation = []
            for _ in range(4):
                added = await turn_prompt(chat(*new), kept, assets, info)
                conversation += new
                token_ids = kept.token_ids + added.token_ids
                assert token_ids == await tokenize(chat(*conversation), assets, info)
                answer = text_of(rng)
                output = await assets.tokenizer.encode_more(answer)
                if ends:
                    output.append(info.eos_token_ids[0])
                kept = Kept(token_ids + output, len(output), added.roles)
                conversation.append(("assistant", answer))
                new = [("user", text_of(rng))]


@pytest.mark.parametrize(
    ("template", "end", "messages", "answer", "problem"),
    [
        (LAST_SYSTEM, "</s>", [("system", "s"), ("user", "u")], "a", "rewrites earlier turns"),
        (THINKS_FIRST, "<|im_end|>", [("user", "u")], "a", "rewrites earlier turns"),
        (DROPS_THOUGHTS, "<|im_end|>", [("user", "u")], "hm\n</think>\na", "leaves out what was thought"),
        (SPACE_BEFORE_END, "</s>", [("user", "u")], "a", "ends an answer otherwise"),
        (NO_END, "</s>", [("user", "u")], "a", "ends an answer otherwise"),
    ],
)
async def test_a_template_that_would_not_write_what_is_kept_is_refused(
    demo_model, template, end, messages, answer, problem
):
    async with started(demo_model, template, end) as (assets, info):
        added = await turn_prompt(chat(*messages), Kept([], 0, ()), assets, info)
        output = [*await assets.tokenizer.encode_more(answer), info.eos_token_ids[0]]
        kept = Kept(added.token_ids + output, len(output), added.roles)
        with pytest.raises(StatusError, match=problem) as caught:
            await turn_prompt(chat(("user", "more")), kept, assets, info)
        assert (caught.value.code.name, caught.value.reason) == ("INVALID_ARGUMENT", "SESSION_TEMPLATE")
        assert caught.value.field_violations[0][0] == "chat"


async def test_a_thought_is_no_matter_where_there_was_none(demo_model):
    async with started(demo_model, DROPS_THOUGHTS, "<|im_end|>") as (assets, info):
        kept = Kept([9, 10], 1, ("user", "assistant"))
        added = await turn_prompt(chat(("user", "more")), kept, assets, info)
        assert assets.vocabulary.decode(added.token_ids, skip_special_tokens=False) == (
            "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_a_template_may_refuse_the_order_of_roles(demo_model):
    async with started(demo_model, MISTRAL, "</s>") as (assets, info):
        kept = Kept([9, 10], 1, ("user", "assistant"))
        with pytest.raises(StatusError, match="roles must alternate"):
            await turn_prompt(chat(("assistant", "more")), kept, assets, info)


async def test_text_goes_on_without_a_second_begin_token(demo_model):
    async with started(demo_model, DEMO, "<|end|>") as (assets, info):
        first = await turn_prompt(pb.GenerateRequest(text="Once upon"), Kept([], 0, ()), assets, info)
        assert (first.token_ids[0], first.roles) == (0, None)
        more = await turn_prompt(
            pb.GenerateRequest(text=" a time<|end|>"), Kept(first.token_ids, 1, None), assets, info
        )
        assert not assets.tokenizer.special_ids.intersection(more.token_ids)
        whole = await tokenize(pb.GenerateRequest(text="Once upon a time<|end|>"), assets, info)
        assert first.token_ids + more.token_ids == whole


@pytest.mark.parametrize("field", ["text", "chat", "token_ids"])
async def test_an_empty_turn_is_refused(demo_model, field):
    request = {
        "text": pb.GenerateRequest(text=""),
        "chat": pb.GenerateRequest(chat=pb.ChatPrompt()),
        "token_ids": pb.GenerateRequest(token_ids=pb.TokenIds()),
    }[field]
    async with started(demo_model, DEMO, "<|end|>") as (assets, info):
        for kept in (Kept([], 0, ()), Kept([5, 1], 1, ("user", "assistant"))):
            with pytest.raises(StatusError) as caught:
                await turn_prompt(request, kept, assets, info)
            assert caught.value.code.name == "INVALID_ARGUMENT"


async def test_a_chat_cannot_go_on_from_what_was_no_chat(demo_model):
    async with started(demo_model, DEMO, "<|end|>") as (assets, info):
        with pytest.raises(StatusError, match="was no chat"):
            await turn_prompt(chat(("user", "u")), Kept([5, 6], 1, None), assets, info)


async def test_a_session_has_so_many_messages(demo_model):
    async with started(demo_model, DEMO, "<|end|>") as (assets, info):
        kept = Kept([5, 1], 1, ("user", "assistant") * 511)
        await turn_prompt(chat(("user", "u")), kept, assets, info)
        kept = Kept([5, 1], 1, ("user", "assistant") * 512)
        with pytest.raises(StatusError, match="at most 1024"):
            await turn_prompt(chat(("user", "u")), kept, assets, info)


async def test_ids_are_taken_as_they_are(demo_model):
    async with started(demo_model, DEMO, "<|end|>") as (assets, info):
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, 1, 2, 2]))
        for kept in (Kept([], 0, ()), Kept([5, 1], 1, ("user", "assistant"))):
            added = await turn_prompt(request, kept, assets, info)
            assert (added.token_ids, added.roles) == ([0, 1, 2, 2], None)
