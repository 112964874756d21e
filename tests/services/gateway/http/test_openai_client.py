"""The official OpenAI client against the HTTP port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from weft.rpc.address import parse_address
from weft.rpc.auth import Authenticator, hash_key

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture
async def gateway(start_gateway: Any, engine: Any) -> Any:
    """A request that no engine has room for is told so soon."""
    return await start_gateway(engine, http=parse_address("127.0.0.1:0"), engine_wait_seconds=0.5)


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=gateway.http_url + "/v1", api_key="unused", max_retries=0
    ) as client:
        yield client


async def test_completion(client: openai.AsyncOpenAI, engine: Any) -> None:
    engine.say("there was a weaver who lived by the sea.")
    answer = await client.completions.create(model="demo", prompt="Once", max_tokens=50, seed=1)
    assert answer.choices[0].text == engine.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(engine.text_ids) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_completion_stops_after_16_tokens_unless_told(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt="Once")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_completion_of_token_ids(client: openai.AsyncOpenAI, engine: Any) -> None:
    await client.completions.create(model="demo", prompt=[0, 623, 226], max_tokens=1)
    assert list(engine.submits[0].prompt_token_ids) == [0, 623, 226]


async def test_several_prompts_are_choices_in_order(client: openai.AsyncOpenAI, engine: Any) -> None:
    prompts = ["Once", "upon a time", "there"]
    alone = [
        await client.completions.create(model="demo", prompt=prompt, n=2, seed=7, max_tokens=9)
        for prompt in prompts
    ]
    assert alone[0].usage is not None
    engine.submits.clear()
    answer = await client.completions.create(model="demo", prompt=prompts, n=2, seed=7, max_tokens=9)
    assert [c.index for c in answer.choices] == list(range(6))
    assert [c.text for c in answer.choices] == [c.text for one in alone for c in one.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    assert answer.usage.completion_tokens == 6 * 9
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3 * 3
    ids = [list(submit.prompt_token_ids) for submit in engine.submits]
    assert len(ids) == 6
    of_ids: Any = ids[::2]
    again = await client.completions.create(model="demo", prompt=of_ids, n=2, seed=7, max_tokens=9)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]
    texts = [""] * 6
    stream = await client.completions.create(
        model="demo", prompt=prompts, n=2, seed=7, max_tokens=9, stream=True
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in answer.choices]


async def test_one_of_several_prompts_that_fails_fails_them_all(
    client: openai.AsyncOpenAI, engine: Any, settle: Any
) -> None:
    engine.error_at["x-1"] = 5
    prompts = ["Once", "upon", "a"]
    fields: dict[str, Any] = {"model": "demo", "max_tokens": 900, "extra_body": {"request_id": "x"}}
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(prompt=prompts, **fields)
    await settle(lambda: not engine.slots)
    stream = await client.completions.create(prompt=prompts, stream=True, **fields)
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
    await settle(lambda: not engine.slots)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        await client.completions.create(model="demo", prompt=["Once", ""], max_tokens=900)
    await settle(lambda: not engine.slots)


async def test_streamed_completion_with_usage(client: openai.AsyncOpenAI, engine: Any) -> None:
    engine.say("there was a weaver; she wove é€😀 by the sea.")
    stream = await client.completions.create(
        model="demo", prompt="Once", max_tokens=80, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == engine.text
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(engine.text_ids) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("is_chat", [False, True])
async def test_each_chunk_says_what_its_choice_has_used(
    client: openai.AsyncOpenAI, engine: Any, is_chat: bool
) -> None:
    engine.say("there was a weaver; she wove é€😀 by the sea.")
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    fields: Any = {"model": "demo", "max_tokens": 80, "n": 2, "stream": True, "stream_options": options}
    if is_chat:
        stream = await client.chat.completions.create(messages=MESSAGES, **fields)
    else:
        stream = await client.completions.create(prompt="Once", **fields)
    chunks = [chunk async for chunk in stream]
    total = chunks[-1].usage
    assert total is not None
    assert not chunks[-1].choices
    sums = 0
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        counts = [chunk.usage.completion_tokens for chunk in mine]
        assert counts == sorted(counts)
        assert counts[0] == 0 if is_chat else counts[0] >= 1
        assert len(set(counts)) > 5
        assert {chunk.usage.prompt_tokens for chunk in mine} == {total.prompt_tokens}
        assert all(c.usage.total_tokens == c.usage.prompt_tokens + c.usage.completion_tokens for c in mine)
        sums += counts[-1]
    assert sums == total.completion_tokens


async def test_chat(client: openai.AsyncOpenAI, engine: Any) -> None:
    engine.say("I am a loom.")
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == "I am a loom."
    assert answer.choices[0].message.role == "assistant"
    ids = list(engine.submits[0].prompt_token_ids)
    assert [i for i in ids if i < 6] == [0, 2, 1, 3, 1, 4]


async def test_streamed_chat_of_two(client: openai.AsyncOpenAI, engine: Any) -> None:
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, n=2, max_completion_tokens=30, seed=7
    )
    texts, reasons, roles = ["", ""], [None, None], [None, None]
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] = roles[choice.index] or choice.delta.role
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert roles == ["assistant", "assistant"]
    assert reasons == ["length", "length"]
    assert texts[0] != texts[1]
    assert all(texts)


async def test_stop_strings(client: openai.AsyncOpenAI, engine: Any) -> None:
    engine.say("one, two, three, four")
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES, stop=["three", "zzz"])
    assert answer.choices[0].message.content == "one, two, "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": "three"}


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert len(content.content) == 4
    assert [len(token.top_logprobs) for token in content.content] == [3] * 4
    assert content.content[0].logprob == -0.5
    old = await client.completions.create(model="demo", prompt="x", max_tokens=4, logprobs=2)
    logprobs = old.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs is not None
    assert logprobs.tokens is not None
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert len(top) == 3, "the two likeliest, and the one that was drawn"
        assert top[token] == -0.5
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == ["demo", "demo@v1"]
    assert (await client.models.retrieve("demo")).owned_by == "weft"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("../../etc/passwd")


async def test_errors_have_the_types_of_the_library(client: openai.AsyncOpenAI, engine: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="demo", messages=MESSAGES, top_p=2)
    assert caught.value.param == "top_p"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="demo", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    from weft.v1 import generation_pb2 as gen

    engine.reject = gen.Failure(code=8, message="queue full", retry_after_ms=1500)
    with pytest.raises(openai.RateLimitError) as full:
        await client.completions.create(model="demo", prompt="x")
    assert full.value.response.headers["retry-after"] == "2"
    engine.reject = None


async def test_an_error_after_the_first_event_ends_the_stream(
    client: openai.AsyncOpenAI, engine: Any
) -> None:
    engine.error_at["bad"] = 5
    stream = await client.completions.create(
        model="demo", prompt="x", max_tokens=50, stream=True, extra_body={"request_id": "bad"}
    )
    found: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            found.append(chunk.choices[0].text)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert "".join(found)
    assert "internal error" in caught.value.message


async def test_leaving_a_stream_cancels_it(client: openai.AsyncOpenAI, engine: Any, settle: Any) -> None:
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, n=2)
    async for _ in stream:
        break
    assert len(engine.slots) == 2
    await stream.close()
    await settle(lambda: not engine.slots)


async def test_leaving_a_whole_answer_cancels_it(
    client: openai.AsyncOpenAI, engine: Any, settle: Any
) -> None:
    engine.step_s = 0.05
    task = asyncio.create_task(client.chat.completions.create(model="demo", messages=MESSAGES))
    await settle(lambda: len(engine.slots) == 1)
    task.cancel()
    await settle(lambda: not engine.slots)


async def test_32_at_once(client: openai.AsyncOpenAI, engine: Any) -> None:
    async def one(seed: int) -> str:
        answer = await client.completions.create(model="demo", prompt="Once", max_tokens=20, seed=seed)
        return answer.choices[0].text

    first, second = [await asyncio.gather(*(one(seed) for seed in range(32))) for _ in range(2)]
    assert first == second
    assert len(set(first)) == 32


async def test_keys(start_engine: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(
        await start_engine(),
        http=parse_address("127.0.0.1:0"),
        authenticator=Authenticator({"a": hash_key("right")}),
    )
    for key, is_right in (("right", True), ("wrong", False)):
        async with openai.AsyncOpenAI(
            base_url=gateway.http_url + "/v1", api_key=key, max_retries=0
        ) as client:
            if is_right:
                assert (await client.models.list()).data
            else:
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()
                with pytest.raises(openai.AuthenticationError):
                    await client.completions.create(model="demo", prompt="x")
