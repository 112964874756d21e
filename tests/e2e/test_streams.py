"""Streams through the whole of Weft: from text to text, over gRPC, HTTP and the command line."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation

ROOT = Path(__file__).resolve().parents[2]


def request_of(text, seed=1, max_tokens=24, **fields):
    sampling = generation.SamplingParams(
        max_tokens=max_tokens, seed=seed, temperature=fields.pop("temperature", 0.8)
    )
    return pb.GenerateRequest(text=text, sampling=sampling, **fields)


def read(call):
    """The text, token ids and finish of a one-sample stream."""
    text, token_ids, finish = "", [], None
    for event in call:
        kind = event.WhichOneof("event")
        if kind == "delta":
            text += event.delta.text
            token_ids += event.delta.token_ids
            assert event.delta.next_offset == len(text.encode())
        elif kind == "finish":
            assert finish is None
            finish = event.finish
    assert finish is not None
    return text, token_ids, finish


def test_sixteen_concurrent_streams_equal_each_alone(stack):
    requests = [request_of(f"It was the {i} day of", seed=i, temperature=float(i % 2)) for i in range(16)]
    alone = [read(stack.client.Generate(request, timeout=60)) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: read(stack.client.Generate(request, timeout=60)), requests))
    assert [t[:2] for t in together] == [a[:2] for a in alone]
    assert all(finish.usage.completion_tokens == len(ids) for _, ids, finish in together)
    assert stack.load().peak_batch_size > 4


def test_the_gateways_text_is_the_engines_tokens(stack):
    tokenizers = pytest.importorskip("tokenizers")
    request = request_of("The captain", temperature=0.0)
    text, token_ids, _ = read(stack.client.Generate(request, timeout=30))
    prompt = stack.client.Tokenize(pb.TokenizeRequest(text="The captain"), timeout=10).token_ids
    direct = stack.engine_client.GenerateTokens(
        engine_pb.GenerateTokensRequest(
            prompt_token_ids=prompt, sampling=generation.SamplingParams(max_tokens=24, temperature=0.0)
        ),
        timeout=30,
    )
    assert [token for response in direct for token in response.token_ids] == token_ids
    tokenizer = tokenizers.Tokenizer.from_file(str(ROOT / "models/demo/tokenizer.json"))
    assert text == tokenizer.decode(token_ids)


def test_chat_n_samples_logprobs_and_a_stop_string(stack):
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Who are you?")])
    sampling = generation.SamplingParams(max_tokens=30, seed=3, n=3, logprobs=2)
    deltas, finishes = {}, {}
    for event in stack.client.Generate(pb.GenerateRequest(chat=chat, sampling=sampling), timeout=60):
        if event.WhichOneof("event") == "delta":
            deltas.setdefault(event.delta.sample_index, []).append(event.delta)
        elif event.WhichOneof("event") == "finish":
            finishes[event.finish.sample_index] = event.finish
    assert sorted(finishes) == [0, 1, 2]
    texts = ["".join(delta.text for delta in deltas[i]) for i in range(3)]
    assert len(set(texts)) == 3
    for i in range(3):
        logprobs = [entry for delta in deltas[i] for entry in delta.logprobs]
        tokens = [token for delta in deltas[i] for token in delta.token_ids]
        assert [entry.chosen.token_id for entry in logprobs] == tokens
        assert all(len(entry.top) == 2 and entry.chosen.logprob <= 0 for entry in logprobs)

    whole, _, _ = read(
        stack.client.Generate(request_of("Once upon a time", temperature=0.0, max_tokens=40), timeout=60)
    )
    stop = whole[10:14]
    text, _, finish = read(
        stack.client.Generate(
            request_of("Once upon a time", temperature=0.0, max_tokens=40, stop=[stop]), timeout=60
        )
    )
    assert text == whole[: whole.index(stop)]
    assert finish.reason == generation.FINISH_REASON_STOP
    assert finish.stop_string == stop


def test_multiplex_carries_many_and_a_failure_ends_only_its_own(stack):
    def commands():
        for i in range(6):
            sampling = generation.SamplingParams(max_tokens=8 if i != 3 else 0, seed=i)
            generate = pb.GenerateRequest(text=f"Line {i}", sampling=sampling)
            yield pb.MultiplexRequest(stream_id=i, generate=generate)

    ends = {}
    for response in stack.client.Multiplex(commands(), timeout=60):
        if response.WhichOneof("event") == "end":
            ends[response.stream_id] = response.end.failure.code
    assert ends == {0: 0, 1: 0, 2: 0, 3: grpc.StatusCode.INVALID_ARGUMENT.value[0], 4: 0, 5: 0}


def test_two_hundred_cancels_and_disconnects_leave_nothing_behind(stack):
    rng = random.Random(3)
    steady = request_of("The steady one", seed=5, max_tokens=60)
    expected = read(stack.client.Generate(steady, timeout=60))[:2]
    results = []
    thread = threading.Thread(
        target=lambda: results.append(read(stack.client.Generate(steady, timeout=120))[:2])
    )
    thread.start()
    for i in range(200):
        leaves_with_channel = i % 4 == 0
        channel = grpc.insecure_channel(stack.address) if leaves_with_channel else None
        generate = (
            channel.unary_stream(
                "/weft.v1.GatewayService/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            if channel
            else stack.client.Generate
        )
        call = generate(request_of(f"Number {i} of many", seed=i, max_tokens=200), timeout=60)
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            next(call, None)
        if channel:
            channel.close()
        else:
            call.cancel()
    thread.join(120)
    assert results == [expected]
    load = stack.wait_until_quiet()
    assert load.active_blocks == 0


def test_deadlines(stack):
    with pytest.raises(grpc.RpcError) as caught:
        read(stack.client.Generate(request_of("Too late"), timeout=0.0005))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    began = time.monotonic()
    _, token_ids, finish = read(
        stack.client.Generate(request_of("A long tale", max_tokens=900, temperature=1.0), timeout=1.5)
    )
    if finish.reason == generation.FINISH_REASON_DEADLINE:
        assert time.monotonic() - began < 1.5
    assert token_ids


def test_http_streams_and_lists(stack):
    def post(path, body):
        request = urllib.request.Request(
            stack.http + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=60)

    models = json.load(urllib.request.urlopen(stack.http + "/v1/models", timeout=10))
    version = stack.client.ListModels(pb.ListModelsRequest(), timeout=10).models[0].version
    assert [model["id"] for model in models["data"]] == ["demo", f"demo@{version}"]
    body = {"model": "demo", "prompt": "The sea", "max_tokens": 12, "seed": 4, "temperature": 0}
    whole = json.load(post("/v1/completions", body))["choices"][0]["text"]
    lines = [line.decode().strip() for line in post("/v1/completions", {**body, "stream": True})]
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
    grpc_text, _, _ = read(
        stack.client.Generate(request_of("The sea", temperature=0.0, max_tokens=12), timeout=30)
    )
    assert grpc_text == whole


def test_the_command_line_streams(stack, python):
    command = [
        python,
        "-m",
        "cli",
        "generate",
        "--server",
        stack.address,
        "--max-tokens",
        "8",
        "--temperature",
        "0",
        "The sea",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text, _, _ = read(stack.client.Generate(request_of("The sea", temperature=0.0, max_tokens=8), timeout=30))
    assert text.strip() in done.stdout


def test_metrics_have_the_names_dashboards_know(stack):
    read(stack.client.Generate(request_of("Count me"), timeout=30))
    address = stack.engine.wait_for("metrics", 5)["address"]
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    for name in (
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:cache_config_info{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:num_preemptions_total{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:request_success_total{",
        'vllm:time_to_first_token_seconds_bucket{le="2.0"',
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{",
    ):
        assert name in text, name
    assert 'model_name="demo"' in text
