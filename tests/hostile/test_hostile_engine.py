"""The list's items at the engine's own door: its checks are its own, and a gateway may be hostile too."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.hostile.hostile_cases import INVALID, OK, PROMPTS, SAMPLING, Case
from tests.hostile.hostile_stack import CODES, CONTEXT, VOCABULARY, Stack, running_stack
from tests.services.engine.rpc.harness import Gateway, linked
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.errors import error_from_call
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as gen

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [311, 312, 313]
ABOUT_SAMPLING = [case for case in SAMPLING if case.status == OK or case.field.startswith("sampling.")]
ABOUT_IDS = [case for case in PROMPTS if case.id[:4] in ("H035", "H036", "H037", "H038", "H039", "H047")]


def opened(stack: Stack, **options: Any) -> Any:
    """A link of a gateway of our own."""

    class Engine:
        stub = stack.engine_stub

    return linked(Engine(), **options)  # type: ignore[arg-type]


def as_submit(case: Case) -> pb.Submit:
    """The gateway's request as a gateway would pass it on without looking at it."""
    request = gateway_pb.GenerateRequest.FromString(case.data())
    submit = pb.Submit(slot=3, prompt_token_ids=request.token_ids.ids, sampling=request.sampling)
    if not submit.sampling.HasField("max_tokens"):
        submit.sampling.max_tokens = 4
    submit.sampling.seed = request.sampling.seed
    return submit


def wanted(case: Case) -> tuple[str, str]:
    """The gateway's answer in the engine's names. It takes one sample at a time, and no stop strings."""
    if case.id.startswith(("H007-n-8",)):
        return INVALID, "sampling.n"
    field = case.field.replace("token_ids.ids", "prompt_token_ids")
    return case.status, "prompt_token_ids" if field == "token_ids" else field


@pytest.mark.parametrize("case", [*ABOUT_SAMPLING, *ABOUT_IDS], ids=lambda case: case.id)
async def test_generate_tokens(stack: Stack, case: Case) -> None:
    submit = as_submit(case)
    request = pb.GenerateTokensRequest(prompt_token_ids=submit.prompt_token_ids, sampling=submit.sampling)
    if case.id == "H035-context-1":
        request.sampling.max_tokens = 1
    status, field = wanted(case)
    found: list[int] = []
    async with stack.watched():
        if status == OK:
            async for response in stack.engine_stub.GenerateTokens(request, timeout=20):
                found += response.token_ids
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stack.engine_stub.GenerateTokens(request, timeout=20).read()
            assert caught.value.code().name == status
            assert error_from_call(caught.value).field_violations[0][0] == field
    if status == OK:
        prompt, sampling = list(request.prompt_token_ids), request.sampling
        assert found == expected_tokens(prompt, sampling.seed, 0, sampling.max_tokens)


async def test_submits_on_one_link(stack: Stack) -> None:
    """Every bad Submit is rejected alone: the link and its other slots go on."""
    cases = [case for case in (*ABOUT_SAMPLING, *ABOUT_IDS) if wanted(case)[0] != OK]
    messages = {case.id: as_submit(case) for case in cases}
    async with stack.watched(), opened(stack) as gateway:
        await good(gateway, 900)
        for case in cases:
            status, field = wanted(case)
            gateway.rejected.clear()
            await gateway.send(submit=messages[case.id])
            await gateway.read_until(lambda: gateway.rejected)
            failure = gateway.rejected[3]
            assert CODES[failure.code] == status, case.id
            assert failure.field_violations[0].field == field, case.id
        await checked(gateway, 900)


async def good(gateway: Gateway, num_tokens: int, slot: int = 0, **fields: Any) -> None:
    sampling = gen.SamplingParams(max_tokens=num_tokens, seed=7, ignore_eos=True)
    await gateway.send(submit=pb.Submit(slot=slot, prompt_token_ids=PROMPT, sampling=sampling, **fields))


async def checked(gateway: Gateway, num_tokens: int, slot: int = 0) -> None:
    await gateway.read_until(lambda: slot in gateway.finished, 30)
    assert gateway.tokens[slot] == expected_tokens(PROMPT, 7, 0, num_tokens)


async def test_H037_emitted_ids_are_ids_too(stack: Stack) -> None:
    async with stack.watched(), opened(stack) as gateway:
        for ids, field in (([VOCABULARY], "emitted_token_ids[0]"), ([300] * 6, "emitted_token_ids")):
            gateway.rejected.clear()
            await good(gateway, 5, 1, emitted_token_ids=ids)
            await gateway.read_until(lambda: gateway.rejected)
            assert gateway.rejected[1].field_violations[0].field == field


async def test_H115_a_live_slot_twice(stack: Stack) -> None:
    """The second Submit is rejected, the first goes on: its tokens are its own."""
    async with stack.watched(), opened(stack) as gateway:
        await good(gateway, 300)
        await good(gateway, 5)
        await gateway.read_until(lambda: gateway.rejected)
        assert CODES[gateway.rejected[0].code] == "ALREADY_EXISTS"
        await checked(gateway, 300)
        await good(gateway, 5)  # the slot is free again after its end
        gateway.finished.clear()
        gateway.tokens.clear()
        gateway.first_position.clear()
        await checked(gateway, 5)


async def test_H115_commands_for_slots_of_nobody(stack: Stack) -> None:
    async with stack.watched(), opened(stack) as gateway:
        for slot in (0, 5, 2**32 - 1):
            await gateway.send(cancel=pb.Cancel(slot=slot))
            await gateway.send(pause=pb.Pause(slot=slot))
            await gateway.send(resume=pb.Resume(slot=slot))
            await gateway.send(update=pb.Update(slot=slot, priority=1, budget_ms=5))
        await good(gateway, 20)
        await checked(gateway, 20)
        assert len(gateway.finished) == 1


@pytest.mark.parametrize("amounts", [[2**32], [2**64 - 1] * 3, [2**63, 2**63], [0] * 1000])
async def test_H115_credit_beyond_all_numbers(stack: Stack, amounts: list[int]) -> None:
    """2^64-1 is also how -1 is spelled in an unsigned field: credit is only ever added, up to a bound."""
    async with stack.watched(), opened(stack) as gateway:
        for amount in amounts:
            await gateway.send(credit=pb.FrameCredit(bytes=amount))
        await good(gateway, 50)
        await checked(gateway, 50)


async def test_H115_no_credit_and_everything_else(stack: Stack) -> None:
    """A gateway that gives no credit, pauses, and leaves: what it held comes free."""
    async with stack.watched(), opened(stack, credit=0) as gateway:
        for slot in range(50):
            await good(gateway, 900, slot)
            await gateway.send(pause=pb.Pause(slot=slot))
        await gateway.read_until(lambda: len(gateway.accepted) == 50)
        await asyncio.sleep(0.2)
        assert not gateway.tokens


FIRSTS = {
    "nothing": (pb.ConnectRequest(), "INVALID_ARGUMENT"),
    "a submit": (pb.ConnectRequest(submit=pb.Submit()), "INVALID_ARGUMENT"),
    "version 0": (pb.ConnectRequest(hello=pb.GatewayHello()), "FAILED_PRECONDITION"),
    "version 2^32-1": (
        pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=2**32 - 1)),
        "FAILED_PRECONDITION",
    ),
    "an id of 1 MiB": (
        pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=1, gateway_id="x" * (1 << 20))),
        "INVALID_ARGUMENT",
    ),
}


@pytest.mark.parametrize("first", FIRSTS)
async def test_H115_links_that_begin_badly(stack: Stack, first: str) -> None:
    message, code = FIRSTS[first]
    async with stack.watched():
        call = stack.engine_stub.Connect()
        await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code().name == code
        call.cancel()


async def test_H115_a_submit_after_the_drain() -> None:
    async with running_stack() as stack:
        async with opened(stack) as gateway:
            await good(gateway, 50)
            await gateway.read_until(lambda: gateway.accepted)
            drain = stack.engine_stub.Drain(pb.DrainRequest(deadline_ms=20_000))
            await drain.read()
            await good(gateway, 5, 1)
            await gateway.read_until(lambda: gateway.rejected)
            assert CODES[gateway.rejected[1].code] == "UNAVAILABLE"
            assert gateway.rejected[1].retry_after_ms > 0
            await checked(gateway, 50)
            drain.cancel()


async def test_H113_one_id_twice(stack: Stack) -> None:
    """A live id is refused whatever the body, unless it is resumable; after its end it is free."""

    def request(text: str = "a") -> gateway_pb.GenerateRequest:
        sampling = gen.SamplingParams(max_tokens=CONTEXT // 2, ignore_eos=True, seed=1)
        return gateway_pb.GenerateRequest(text=text, request_id="twice", sampling=sampling)

    async with stack.watched():
        first = stack.stub.Generate(request())
        await first.read()
        for text in ("a", "b"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stack.stub.Generate(request(text)).read()
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        while await first.read() is not grpc.aio.EOF:
            pass
        again = stack.stub.Generate(request("b"))
        assert (await again.read()).started.request_id == "twice"
        again.cancel()
