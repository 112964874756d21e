"""Bad input to the live stack, over gRPC and HTTP: the right status, and nobody else notices.

Every case runs beside a steady stream whose tokens must be what they are without it.
"""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from pathlib import Path

import grpc
import pytest

from tests.e2e.test_streams import read, request_of
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation

ROOT = Path(__file__).resolve().parents[2]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def generate(text="Hello", chat=None, token_ids=None, stop=(), **sampling):
    request = pb.GenerateRequest(
        sampling=generation.SamplingParams(**{"max_tokens": 4, **sampling}), stop=stop
    )
    if chat is not None:
        request.chat.CopyFrom(chat)
    elif token_ids is not None:
        request.token_ids.CopyFrom(pb.TokenIds(ids=token_ids))
    elif text is not None:
        request.text = text
    return request


BAD_REQUESTS = {
    "no prompt": generate(text=None),
    "an empty prompt": generate(token_ids=[]),
    "a prompt longer than the model": generate(text="word " * 3000),
    "prompt and max_tokens longer than the model": generate(max_tokens=1024),
    "max_tokens 0": generate(max_tokens=0),
    "max_tokens 2^31": generate(max_tokens=2**31),
    "temperature -1": generate(temperature=-1.0),
    "temperature NaN": generate(temperature=float("nan")),
    "temperature infinite": generate(temperature=float("inf")),
    "top_p 0": generate(top_p=0.0),
    "top_p 2": generate(top_p=2.0),
    "a token id of vocabulary size": generate(token_ids=[1, 4096]),
    "a token id of 2^32 - 1": generate(token_ids=[2**32 - 1]),
    "10,000 stop strings": generate(stop=[f"stop {i}" for i in range(10_000)]),
    "an empty stop string": generate(stop=[""]),
    "n 0": generate(n=0),
    "n 1,000,000": generate(n=1_000_000),
    "logprobs 21": generate(logprobs=21),
    "a bias on no token": generate(logit_bias=[generation.SamplingParams.LogitBias(token_id=4096, bias=1)]),
    "min_tokens above max_tokens": generate(min_tokens=9),
    "repetition_penalty 0": generate(repetition_penalty=0.0),
    "no messages": generate(chat=pb.ChatPrompt()),
    "a role that is a token": generate(
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="end|><|user", content="x")])
    ),
    "a bad request id": pb.GenerateRequest(text="x", request_id="a/../b\n"),
    "priority 1,000": pb.GenerateRequest(text="x", priority=1000),
}


@pytest.fixture
def steady(stack):
    """A stream that runs while the test does, checked against itself alone."""
    request = request_of("The steady stream", seed=77, max_tokens=80)
    expected = read(stack.client.Generate(request, timeout=60))[:2]
    results = []
    thread = threading.Thread(
        target=lambda: results.append(read(stack.client.Generate(request, timeout=120))[:2])
    )
    thread.start()
    yield
    thread.join(120)
    assert results == [expected]


def test_bad_requests_over_grpc(stack, steady):
    for name, request in BAD_REQUESTS.items():
        with pytest.raises(grpc.RpcError) as caught:
            read(stack.client.Generate(request, timeout=20))
        assert caught.value.code() is INVALID, (name, caught.value)
        assert len(caught.value.details()) > 5, name
        assert "Traceback" not in caught.value.details()


def test_bad_requests_to_the_engine_itself(stack, steady):
    for name, request in {
        "empty": engine_pb.GenerateTokensRequest(),
        "vocabulary": engine_pb.GenerateTokensRequest(prompt_token_ids=[4096]),
        "max_tokens": engine_pb.GenerateTokensRequest(
            prompt_token_ids=[1], sampling=generation.SamplingParams(max_tokens=2**31)
        ),
        "nan": engine_pb.GenerateTokensRequest(
            prompt_token_ids=[1], sampling=generation.SamplingParams(temperature=float("nan"), max_tokens=2)
        ),
        "n": engine_pb.GenerateTokensRequest(prompt_token_ids=[1], sampling=generation.SamplingParams(n=2)),
    }.items():
        with pytest.raises(grpc.RpcError) as caught:
            list(stack.engine_client.GenerateTokens(request, timeout=20))
        assert caught.value.code() is INVALID, (name, caught.value)


def test_what_is_unknown_is_not_found(stack):
    generate = stack.client.Generate
    for call in (
        lambda: read(generate(pb.GenerateRequest(text="x", model="nobody"), timeout=5)),
        lambda: read(generate(pb.GenerateRequest(text="x", model="demo@never"), timeout=5)),
        lambda: read(generate(pb.GenerateRequest(text="x", session_id="nobody"), timeout=5)),
        lambda: read(generate(pb.GenerateRequest(text="x", resume_token="nobody"), timeout=5)),
        lambda: stack.client.GetSession(pb.GetSessionRequest(session_id="nobody"), timeout=5),
        lambda: stack.client.Cancel(pb.CancelRequest(request_id="nobody"), timeout=5),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_message_over_the_cap(stack, steady):
    with pytest.raises(grpc.RpcError) as caught:
        read(stack.client.Generate(pb.GenerateRequest(text="x" * (9 << 20)), timeout=20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def post(stack, body, path="/v1/completions", content_length=None):
    """Send raw bytes; the status and the parsed body."""
    host = stack.http.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        headers = {"content-type": "application/json", "content-length": str(content_length or len(body))}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}")
    finally:
        connection.close()


def test_bad_requests_over_http(stack, steady):
    good = {"model": "demo", "prompt": "Hello", "max_tokens": 3}
    for name, body in {
        "not JSON": b"{",
        "invalid UTF-8": b'{"model": "demo", "prompt": "\xff\xfe", "max_tokens": 3}',
        "a lone surrogate": b'{"model": "demo", "prompt": "\\ud800", "max_tokens": 3}',
        "NaN": b'{"model": "demo", "prompt": "x", "temperature": NaN}',
        "deep": b"[" * 100_000,
        "twice the same key": b'{"model": "demo", "model": "demo", "prompt": "x"}',
        **{
            name: json.dumps({**good, **change}).encode()
            for name, change in {
                "empty prompt": {"prompt": []},
                "max_tokens 0": {"max_tokens": 0},
                "max_tokens 2^31": {"max_tokens": 2**31},
                "temperature": {"temperature": -1},
                "top_p": {"top_p": 2},
                "token id": {"prompt": [4096]},
                "stops": {"stop": ["x"] * 10_000},
                "unknown field": {"frobnicate": 1},
                "boolean": {"max_tokens": True},
                "text for a number": {"n": "1"},
            }.items()
        },
    }.items():
        status, answer = post(stack, body)
        assert status == 400, (name, status, answer)
        assert answer["error"]["message"], name
    assert post(stack, json.dumps({**good, "model": "nobody"}).encode())[0] == 404
    assert post(stack, json.dumps(good).encode())[0] == 200


def test_a_hundred_megabytes_over_http_are_refused_before_they_are_read(stack, steady):
    host = stack.http.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(100 << 20))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    connection.close()


def test_a_template_that_never_ends_is_ended(own_stack, tmp_path):
    """The model's own directory holds the hostile template."""
    source = tmp_path / "tokenizer"
    shutil.copytree(ROOT / "models/demo", source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    stack = own_stack(source=source)
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="x")])
    with pytest.raises(grpc.RpcError) as caught:
        read(stack.client.Generate(generate(chat=chat), timeout=20))
    assert caught.value.code() in (grpc.StatusCode.INTERNAL, INVALID)
    assert read(stack.client.Generate(generate(), timeout=20))[1]
