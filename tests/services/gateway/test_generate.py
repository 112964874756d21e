"""Generate from end to end, against an engine whose every token is known."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc
import pytest

from services.gateway.text import chat_template
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen


def oracle_ids(fixture_engine: Any, seed: int, sample_index: int, count: int) -> list[int]:
    import sys

    oracle = sys.modules[type(fixture_engine).__module__].oracle
    return [oracle(seed, sample_index, position) for position in range(count)]


async def extend(found: list[Any], call: Any) -> None:
    async for response in call:
        found.append(response)  # noqa: PERF401 - what came before an error counts


async def collect(call: Any) -> dict[int, Any]:
    """Everything of one Generate call, by sample; `None` holds the Started."""
    found: dict[Any, Any] = {}
    async for response in call:
        kind = response.WhichOneof("event")
        if kind == "started":
            assert not found
            found[None] = response.started
            continue
        event = getattr(response, kind)
        sample = found.setdefault(event.sample_index, {"text": "", "ids": [], "logprobs": [], "finish": None})
        assert sample["finish"] is None, "something came after the finish"
        if kind == "delta":
            sample["text"] += event.text
            sample["ids"] += event.token_ids
            sample["logprobs"] += event.logprobs
            assert event.next_offset == len(sample["text"].encode())
        else:
            sample["finish"] = event
    return found


def ask(text: str = "Once upon a time", **fields: Any) -> pb.GenerateRequest:
    sampling = {
        name: fields.pop(name)
        for name in list(fields)
        if name in gen.SamplingParams.DESCRIPTOR.fields_by_name
    }
    if "token_ids" in fields:
        return pb.GenerateRequest(sampling=gen.SamplingParams(**sampling), **fields)
    return pb.GenerateRequest(text=text, sampling=gen.SamplingParams(**sampling), **fields)


async def test_one_request(gateway: Any, engine: Any) -> None:
    found = await collect(gateway.stub.Generate(ask(max_tokens=50, seed=3, request_id="r-1")))
    ids = oracle_ids(engine, 3, 0, 50)
    assert found[0]["ids"] == ids
    assert found[0]["text"] == engine.library.decode(ids)
    finish = found[0]["finish"]
    assert finish.reason == gen.FINISH_REASON_LENGTH
    assert (finish.usage.completion_tokens, finish.usage.cached_tokens) == (50, 3)
    assert finish.receipt.queue_ms == 1.5
    assert found[None].request_id == "r-1"
    assert found[None].seed == 3
    submit = engine.submits[0]
    assert list(submit.prompt_token_ids) == engine.library.encode("Once upon a time").ids
    assert found[None].prompt_tokens == len(submit.prompt_token_ids) == finish.usage.prompt_tokens
    # From the model's generation_config.json, since the request left them open.
    assert (round(submit.sampling.temperature, 3), round(submit.sampling.top_p, 3)) == (0.8, 0.95)
    assert not submit.sampling.HasField("n")
    assert 0 < submit.budget_ms <= 1_800_000


async def test_the_request_wins_over_the_generation_config(gateway: Any, engine: Any) -> None:
    await collect(gateway.stub.Generate(ask(max_tokens=1, temperature=0.0, top_p=0.5)))
    assert engine.submits[0].sampling.temperature == 0.0
    assert engine.submits[0].sampling.top_p == 0.5


async def test_an_unset_seed_is_drawn_and_told(gateway: Any, engine: Any) -> None:
    first, second = [await collect(gateway.stub.Generate(ask(max_tokens=5))) for _ in range(2)]
    assert first[None].seed != second[None].seed
    assert first[0]["ids"] == oracle_ids(engine, first[None].seed, 0, 5)


async def test_unset_max_tokens_fill_the_context(gateway: Any, engine: Any) -> None:
    engine.steps_per_frame = 64
    found = await collect(gateway.stub.Generate(ask(seed=1)))
    assert found[None].prompt_tokens + len(found[0]["ids"]) == 1024


async def test_samples_have_their_own_slots(gateway: Any, engine: Any) -> None:
    found = await collect(gateway.stub.Generate(ask(max_tokens=20, seed=9, n=4)))
    for index in range(4):
        assert found[index]["ids"] == oracle_ids(engine, 9, index, 20)
    assert len({submit.slot for submit in engine.submits}) == 4
    assert [submit.sample_index for submit in engine.submits] == [0, 1, 2, 3]


async def test_64_at_once_each_get_their_own(gateway: Any, engine: Any) -> None:
    async def one(seed: int) -> None:
        found = await collect(gateway.stub.Generate(ask(max_tokens=40, seed=seed)))
        assert found[0]["ids"] == oracle_ids(engine, seed, 0, 40)

    for _ in range(2):
        await asyncio.gather(*(one(seed) for seed in range(64)))
    assert not engine.violations
    assert max(submit.slot for submit in engine.submits) < 64
    assert gateway.link.num_live == 0


async def test_end_token_is_counted_and_not_shown(gateway: Any, engine: Any) -> None:
    engine.say("The end is near.")
    found = await collect(gateway.stub.Generate(ask(max_tokens=50)))
    assert found[0]["text"] == "The end is near."
    assert found[0]["ids"] == [*engine.text_ids, 1]
    assert found[0]["finish"].reason == gen.FINISH_REASON_STOP
    assert found[0]["finish"].stop_string == ""
    assert found[0]["finish"].usage.completion_tokens == len(engine.text_ids) + 1


async def test_special_tokens_are_shown_on_request(gateway: Any, engine: Any) -> None:
    engine.text, engine.text_ids = "", [623, 3, 226]
    found = await collect(gateway.stub.Generate(ask(max_tokens=50, skip_special_tokens=False)))
    assert found[0]["text"] == engine.library.decode([623, 3, 226], skip_special_tokens=False)
    assert "<|user|>" in found[0]["text"]


@pytest.mark.parametrize("steps_per_frame", [1, 7, 64])
async def test_stop_strings_across_tokens_and_frames(gateway: Any, engine: Any, steps_per_frame: int) -> None:
    """Text and usage are the same however many tokens a frame brings; what came too late is reported."""
    engine.say("It was a dark and stormy night; the rain fell in torrents, except at intervals.")
    engine.steps_per_frame = steps_per_frame
    found = await collect(gateway.stub.Generate(ask(max_tokens=100, stop=["stormy night; th", "zebra"])))
    assert found[0]["text"] == "It was a dark and "
    finish = found[0]["finish"]
    assert (finish.reason, finish.stop_string) == (gen.FINISH_REASON_STOP, "stormy night; th")
    needed = next(
        n
        for n in range(len(engine.text_ids))
        if "stormy night; th" in engine.library.decode(engine.text_ids[:n])
    )
    assert finish.usage.completion_tokens == needed == len(found[0]["ids"])
    if steps_per_frame == 64:
        assert finish.receipt.discarded_tokens > 0
    assert engine.cancels or steps_per_frame == 64


async def test_no_stop_before_min_tokens(gateway: Any, engine: Any) -> None:
    engine.say("one two one two one two one two")
    found = await collect(gateway.stub.Generate(ask(max_tokens=100, min_tokens=6, stop=["two"])))
    text = found[0]["text"] + "two"
    assert text.count("two") > 1
    assert found[0]["finish"].usage.completion_tokens > 6


async def test_held_back_text_comes_at_the_end(gateway: Any, engine: Any) -> None:
    engine.say("almost a sto")
    found = await collect(gateway.stub.Generate(ask(max_tokens=100, stop=["stop"])))
    assert found[0]["text"] == "almost a sto"


async def test_logprobs(gateway: Any, engine: Any) -> None:
    found = await collect(gateway.stub.Generate(ask(max_tokens=5, seed=2, logprobs=2)))
    logprobs = found[0]["logprobs"]
    assert [p.chosen.token_id for p in logprobs] == found[0]["ids"]
    assert [t.token_id for t in logprobs[0].top] == [300, 301]
    assert logprobs[0].chosen.text == engine.library.decode([logprobs[0].chosen.token_id])


async def test_chat_is_rendered_with_the_models_template(gateway: Any, engine: Any) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Who <|end|> are you?")])
    await collect(
        gateway.stub.Generate(pb.GenerateRequest(chat=chat, sampling=gen.SamplingParams(max_tokens=1)))
    )
    ids = list(engine.submits[0].prompt_token_ids)
    assert ids[:2] == [0, 3]
    assert ids[-2:] == [1, 4]
    assert not {0, 1, 2, 3, 4, 5}.intersection(ids[2:-2])


@pytest.mark.parametrize("role", ["end", "system|><|user", "", "x" * 10_000, "bos"])
async def test_a_role_cannot_spell_a_special_token(gateway: Any, role: str) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content="hi")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(pb.GenerateRequest(chat=chat)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_from_call(caught.value).field_violations[0][0] == "chat.messages[0].role"


async def test_a_client_that_leaves_frees_its_slot(gateway: Any, engine: Any, settle: Any) -> None:
    call = gateway.stub.Generate(ask(n=3))
    async for response in call:
        if response.HasField("delta"):
            break
    begin = time.monotonic()
    call.cancel()
    await settle(lambda: not engine.slots)
    assert time.monotonic() - begin < 0.5
    assert len(engine.cancels) == 3
    await settle(lambda: gateway.link.num_live == 0)


async def test_200_random_cancels(gateway: Any, engine: Any, settle: Any) -> None:
    chance = random.Random(5)
    engine.step_s = 0.001

    async def one(seed: int) -> None:
        call = gateway.stub.Generate(ask(max_tokens=60, seed=seed, n=1 + seed % 3))
        count = chance.randrange(12)
        await asyncio.sleep(chance.random() * 0.01)
        try:
            async for _ in call:
                count -= 1
                if count <= 0:
                    break
        finally:
            call.cancel()

    for start in range(0, 200, 40):
        await asyncio.gather(*(one(seed) for seed in range(start, start + 40)))
    await settle(lambda: not engine.slots and gateway.link.num_live == 0)
    assert engine.num_begun == engine.num_ended
    assert not engine.violations
    assert gateway.application.gateway.admission.num_live == 0


async def test_cancel_by_id(gateway: Any, engine: Any) -> None:
    call = gateway.stub.Generate(ask(seed=1, request_id="mine"))
    task = asyncio.create_task(collect(call))
    await asyncio.sleep(0.1)
    await gateway.stub.Cancel(pb.CancelRequest(request_id="mine"))
    found = await task
    assert found[0]["finish"].reason == gen.FINISH_REASON_CANCELLED
    assert found[0]["finish"].usage.completion_tokens == len(found[0]["ids"]) > 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Cancel(pb.CancelRequest(request_id="mine"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_live_id_cannot_be_taken(gateway: Any) -> None:
    call = gateway.stub.Generate(ask(request_id="same"))
    async for response in call:
        if response.HasField("delta"):
            break
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(ask(request_id="same")))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    call.cancel()


async def test_an_id_is_free_again_after_its_end(gateway: Any) -> None:
    for _ in range(2):
        await collect(gateway.stub.Generate(ask(request_id="again", max_tokens=2)))


async def test_a_deadline_ends_the_output_and_not_the_call(gateway: Any, engine: Any) -> None:
    engine.step_s = 0.01
    found = await collect(gateway.stub.Generate(ask(seed=1), timeout=0.6))
    assert found[0]["finish"].reason == gen.FINISH_REASON_DEADLINE
    assert len(found[0]["ids"]) == found[0]["finish"].usage.completion_tokens > 5


async def test_no_token_before_the_deadline_is_an_error(gateway: Any, engine: Any) -> None:
    engine.step_s = 0.3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(ask(seed=1), timeout=0.32))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_error_in_one_request_leaves_the_others_alone(gateway: Any, engine: Any) -> None:
    engine.error_at["bad"] = 5

    async def one(seed: int) -> None:
        found = await collect(gateway.stub.Generate(ask(max_tokens=30, seed=seed)))
        assert found[0]["ids"] == oracle_ids(engine, seed, 0, 30)

    async def bad() -> None:
        call = gateway.stub.Generate(ask(request_id="bad", seed=1))
        found: list[Any] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await extend(found, call)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert error_from_call(caught.value).error_id == "e1"
        assert any(response.HasField("delta") for response in found)

    await asyncio.gather(bad(), *(one(seed) for seed in range(16)))


async def test_an_error_in_one_sample_ends_the_whole_request(gateway: Any, engine: Any, settle: Any) -> None:
    engine.error_at["bad"] = 5
    with pytest.raises(grpc.aio.AioRpcError):
        await collect(gateway.stub.Generate(ask(request_id="bad", n=4, seed=1)))
    await settle(lambda: not engine.slots)


async def test_a_refusal_that_lasts_reaches_the_client(start_gateway: Any, engine: Any) -> None:
    gateway = await start_gateway(engine, engine_wait_seconds=0.5)
    engine.reject = gen.Failure(code=8, message="queue full", retry_after_ms=250)
    begin = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(ask()))
    assert 0.4 < time.monotonic() - begin < 2.5
    assert len(engine.submits) > 1
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_from_call(caught.value).retry_after_s == 0.25
    assert ("grpc-retry-pushback-ms", "250") in [tuple(pair) for pair in caught.value.trailing_metadata()]


async def test_a_bug_in_the_text_path_ends_one_request(
    gateway: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.gateway.streams.sample_output import SampleOutput

    push = SampleOutput.push

    def failing(self: SampleOutput, token_id: int) -> bool:
        if self._min_tokens == 7 and self.num_tokens == 9:
            raise RuntimeError("a secret")
        return push(self, token_id)

    monkeypatch.setattr(SampleOutput, "push", failing)
    good = asyncio.create_task(collect(gateway.stub.Generate(ask(max_tokens=40, seed=1))))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(ask(max_tokens=40, seed=1, min_tokens=7)))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert (await good)[0]["ids"] == oracle_ids(engine, 1, 0, 40)
    assert gateway.link.is_up


async def test_tokenize_and_detokenize(gateway: Any, engine: Any) -> None:
    text = "A <|user|> wrote é."
    answer = await gateway.stub.Tokenize(pb.TokenizeRequest(text=text))
    engine.library.encode_special_tokens = True
    assert list(answer.token_ids) == engine.library.encode(text).ids
    back = await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == text
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi")])
    assert (await gateway.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids[0] == 0


async def test_models(gateway: Any) -> None:
    (model,) = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.version, model.max_model_len, model.vocab_size) == ("demo", "v1", 1024, 4096)


async def test_an_unknown_model_is_not_found(gateway: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(ask(model="other")))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (chat_template.ConversationRefused("roles must alternate"), grpc.StatusCode.INVALID_ARGUMENT),
        (chat_template.TemplateError("used more than its 2 s"), grpc.StatusCode.INTERNAL),
        (chat_template.TemplateBusy("busy"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_a_template_does_to_the_status(
    gateway: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: grpc.StatusCode
) -> None:
    async def render(messages: Any) -> str:
        raise error

    monkeypatch.setattr(gateway.link.assets.template, "render", render)
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(pb.GenerateRequest(chat=chat)))
    assert caught.value.code() == code
    assert str(error) in caught.value.details()
    assert (error_from_call(caught.value).retry_after_s is not None) == (code.name == "RESOURCE_EXHAUSTED")


async def test_a_cancel_before_the_request_has_begun(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def render(messages: Any) -> str:
        await asyncio.sleep(0.3)
        return "hi"

    monkeypatch.setattr(gateway.link.assets.template, "render", render)
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi")])
    task = asyncio.create_task(
        collect(gateway.stub.Generate(pb.GenerateRequest(chat=chat, request_id="early")))
    )
    await asyncio.sleep(0.1)
    await gateway.stub.Cancel(pb.CancelRequest(request_id="early"))
    found = await task
    assert found[0]["finish"].reason == gen.FINISH_REASON_CANCELLED
    assert found[0]["ids"] == []


@pytest.mark.parametrize("min_tokens", [0, 30])
async def test_an_engine_lost_in_the_middle_changes_nothing(
    gateway: Any, engine: Any, settle: Any, min_tokens: int
) -> None:
    """Text, ids, logprobs, stop string and usage of two samples, with a stop string half held back."""
    engine.say("é€😀 she wove " * 12 + "THE END of it, and " * 3)
    request = ask(n=2, seed=1, logprobs=2, stop=["END of it, and THE", "END of it"], min_tokens=min_tokens)
    whole = await collect(gateway.stub.Generate(request))
    assert whole[0]["finish"].stop_string == "END of it"
    engine.step_s = 0.005
    for tokens in (3, 20, 45):
        before = gateway.link.counters.tokens
        task = asyncio.create_task(collect(gateway.stub.Generate(request)))
        await settle(lambda goal=before + 2 * tokens: gateway.link.counters.tokens >= goal)
        await engine.die()
        await engine.start()
        found = await task
        for index in (0, 1):
            was, is_now = whole[index], found[index]
            assert is_now["text"] == was["text"]
            assert is_now["ids"] == was["ids"]
            assert list(is_now["logprobs"]) == list(was["logprobs"])
            assert is_now["finish"].stop_string == was["finish"].stop_string
            assert is_now["finish"].usage == was["finish"].usage
            assert len(is_now["logprobs"]) == is_now["finish"].usage.completion_tokens
