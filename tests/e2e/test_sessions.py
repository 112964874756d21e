"""Sessions with a real model (the demo model in fp32, deterministic): what was computed is used again while
it is there and computed again when it is not, and no token tells the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Stack
from tests.e2e.test_streams import read
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SAMPLING = generation.SamplingParams(seed=11, max_tokens=40, temperature=0.8)


@pytest.fixture
def stack(tmp_path):
    # A lost link is no part of the test but for the kills; the cores may be busy.
    flags = ["--sessions", str(tmp_path / "sessions.db"), "--engine-dead-seconds", "10"]
    stack = Stack(None, tmp_path / "logs", source=DEMO, gateway_flags=flags)
    yield stack
    stack.close()


def chat(client, text):
    request = pb.GenerateRequest(session_id="s", sampling=SAMPLING)
    request.chat.messages.add(role="user", content=text)
    return read(client.Generate(request, timeout=90))


def kept(client):
    request = pb.GetSessionRequest(session_id="s", include_token_ids=True)
    return list(client.GetSession(request, timeout=30).session.token_ids)


def stateless(stack, token_ids):
    """The same ids in one prompt, where the cache cannot help: under a salt of its own."""
    salt = f"only {len(token_ids)}"
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=SAMPLING, cache_salt=salt)
    return read(stack.client.Generate(request, timeout=90))


def restart_gateway(stack):
    stack.gateway._process.kill()
    stack.gateway._process.wait()
    stack.channel.close()
    stack.gateway = stack.start_gateway()
    stack.connect_gateway()


def test_a_conversation_outlives_cache_gateway_and_engine(stack):
    info = stack.engine_client.GetInfo(engine_pb.GetInfoRequest(), timeout=10)
    has_native = "native" in info.numerics_id
    assert (info.is_deterministic, info.dtype) == (True, "bfloat16" if has_native else "float32")
    stack.client.CreateSession(pb.CreateSessionRequest(session_id="s"), timeout=30)
    history = []
    questions = ["Who are you?", "And where do you live?", "What do you see there?", "Good bye."]
    for number, question in enumerate(questions):
        if number == 2:
            restart_gateway(stack)
        elif number == 3:
            stack.engine._process.kill()
            stack.engine._process.wait()
            stack.engine = stack.start_engine(stack.engine_address)
            stack.engine.wait_for("serving", 120)
        _, ids, finish = chat(stack.client, question)
        now = kept(stack.client)
        prompt = now[: len(now) - len(ids)]
        assert now[len(prompt) :] == ids
        assert prompt[: len(history)] == history
        _, again, other = stateless(stack, prompt)
        assert again == ids
        assert other.usage.cached_tokens == 0
        if number in (1, 2):  # also from a new gateway: the cache is the engine's
            assert finish.usage.cached_tokens >= len(history) - 1
        else:
            assert finish.usage.cached_tokens == 0
        history = now
    stack.wait_until_quiet()
