"""Every client under clients/ against a live stack: real processes, and tokens that are known beforehand."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent import futures

import pytest

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from tests.clients.conftest import CLIENTS, ROOT, run
from tools.mock_engine.oracle import expected_tokens
from weft.client import AsyncClient, Client

PROMPT = "Once upon a time"
LIBRARY = Tokenizer.from_file(str(ROOT / "models/demo/tokenizer.json"))


def expected(target, seed, num_tokens, sample_index=0):
    """(token ids, text) of what the mock engines draw after `PROMPT`."""
    with Client(target) as client:
        ids = expected_tokens(client.tokenize(PROMPT), seed, sample_index, num_tokens)
        return ids, client.detokenize(ids)


def test_threads(stack):
    with Client(stack.target) as client:
        stream = client.generate(PROMPT, seed=3, max_tokens=40, n=2)
        stream.text()
        for index, completion in enumerate(stream.completions):
            ids, text = expected(stack.target, 3, 40, index)
            assert completion.token_ids == ids
            assert completion.text == text
        assert stream.started.seed == 3


async def test_asyncio(stack):
    async with AsyncClient(stack.target) as client:
        streams = [client.generate(PROMPT, seed=seed, max_tokens=30) for seed in range(8)]
        await asyncio.gather(*(stream.text() for stream in streams))
    for seed, stream in enumerate(streams):
        assert stream.completions[0].token_ids == expected(stack.target, seed, 30)[0]


@pytest.mark.parametrize("script", ["generate.py", "several.py"])
def test_the_python_files_to_copy(stack, script):
    done = run(sys.executable, str(CLIENTS / "python" / script), stack.target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_python_file_with_no_server(stack):
    done = run(sys.executable, str(CLIENTS / "python" / "generate.py"), "127.0.0.1:9")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
    assert "Traceback" not in done.stderr


def test_reflection_lists_and_calls(stack):
    script = str(CLIENTS / "reflection" / "call.py")
    listed = run(sys.executable, script, stack.target)
    assert "weft.v1.GatewayService" in listed.stdout.split(), listed.stderr
    request = {"text": PROMPT, "sampling": {"seed": "5", "max_tokens": 20}}
    done = run(sys.executable, script, stack.target, "weft.v1.GatewayService/Generate", json.dumps(request))
    assert done.returncode == 0, done.stderr
    events = []
    decoder, rest = json.JSONDecoder(), done.stdout.strip()
    while rest:
        event, end = decoder.raw_decode(rest)
        events.append(event)
        rest = rest[end:].lstrip()
    ids, text = expected(stack.target, 5, 20)
    assert "".join(event.get("delta", {}).get("text", "") for event in events) == text
    assert [i for event in events for i in event.get("delta", {}).get("token_ids", [])] == ids
    assert events[-1]["finish"]["reason"] == "FINISH_REASON_LENGTH"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["weft.v1.GatewayService/Nothing"], "Nothing"),
        (["weft.v1.Nothing/Generate"], "weft.v1.Nothing"),
        (["weft.v1.GatewayService/Generate", '{"text": '], "Failed to load JSON"),
        (["weft.v1.GatewayService/Generate", "{}"], "INVALID_ARGUMENT"),
    ],
)
def test_reflection_with_mistakes(stack, arguments, said):
    done = run(sys.executable, str(CLIENTS / "reflection" / "call.py"), stack.target, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


NODE_STREAMS = """
import { WeftClient } from "./weft.mjs";
const [target, count, length] = process.argv.slice(1);
const client = new WeftClient(target);
const one = async (seed) => {
  const ids = [];
  let text = "", reason = "";
  const onEvent = (event) => { if (event.finish) reason = event.finish.reason; };
  const sampling = { seed, max_tokens: Number(length) };
  const request = { text: "Once upon a time", sampling, resumable: true };
  for await (const delta of client.generate(request, { onEvent })) {
    ids.push(...delta.token_ids);
    text += delta.text;
  }
  return { ids, text, reason };
};
const models = await client.call("ListModels", {});
const streams = await Promise.all(Array.from({ length: Number(count) }, (_, seed) => one(seed)));
client.close();
console.log(JSON.stringify({ models: models.models.map((model) => model.name), streams }));
"""


def node_streams(node, target, count, num_tokens):
    """`count` streams at once by the Node client: their answer, parsed."""
    numbers = (str(count), str(num_tokens))
    command = ("node", "--input-type=module", "-e", NODE_STREAMS, "--", target, *numbers)
    done = run(*command, cwd=node, timeout=90)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["streams"]) == count
    return answer


def test_node(node, stack):
    answer = node_streams(node, stack.target, 8, 60)
    assert answer["models"] == ["demo"]
    for seed, stream in enumerate(answer["streams"]):
        ids, text = expected(stack.target, seed, 60)
        assert stream == {"ids": ids, "text": text, "reason": "FINISH_REASON_LENGTH"}


def test_the_node_file_to_copy(node, stack):
    done = run("node", "generate.mjs", "127.0.0.1:9", cwd=node)
    assert done.returncode == 1
    assert done.stderr.startswith("14: ")


def test_streams_of_every_client_outlive_an_engine(node, stack):
    """The last test of the module: it kills one of the two engines in the middle of everybody's streams."""

    def threads():
        with Client(stack.target) as client:
            stream = client.generate(PROMPT, seed=100, max_tokens=900)
            stream.text()
            return stream.completions[0].token_ids

    with futures.ThreadPoolExecutor(2) as pool:
        python, javascript = pool.submit(threads), pool.submit(node_streams, node, stack.target, 4, 400)
        stack.kill_busy(among=5)
        assert python.result(90) == expected(stack.target, 100, 900)[0]
        for seed, stream in enumerate(javascript.result(90)["streams"]):
            assert stream["ids"] == expected(stack.target, seed, 400)[0]
