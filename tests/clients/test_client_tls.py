"""TLS, and what comes twice, by every client, against a gateway that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tests.clients.conftest import run
from tests.weft.rpc.certificates import Authority
from weft.client import AsyncClient, Client
from weft.rpc.errors import StatusError, status_message, trailers
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.gateway_service_pb2_grpc import GatewayServiceServicer, add_GatewayServiceServicer_to_server

LOST = StatusError(grpc.StatusCode.UNAVAILABLE, "Socket closed", retry_after_s=0.01)
ENDED = StatusError(
    grpc.StatusCode.UNAVAILABLE, "lost", retry_after_s=0.01, reason="X", metadata={"resume_token": "t1"}
)


def delta(text: str, token_id: int, offset: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text, token_ids=[token_id], next_offset=offset))


FINISH = pb.GenerateResponse(finish=pb.Finish(reason=generation_pb2.FINISH_REASON_STOP))
# One list an attempt: what is said, and at last how it ends. A token without text comes again by offset.
ATTEMPTS = [
    [delta("a", 1, 1), delta("", 2, 1), ENDED],
    [delta("b", 3, 2), delta("", 4, 2), LOST],
    [delta("", 4, 2), delta("c", 5, 3), FINISH],
]


class Scripted(GatewayServiceServicer):
    def __init__(self) -> None:
        self.requests = []

    def Generate(self, request, context):
        self.requests.append(request)
        for event in ATTEMPTS[len(self.requests) - 1]:
            if isinstance(event, StatusError):
                context.set_trailing_metadata(trailers(event))
                context.abort(event.code, status_message(event))
            yield event


@pytest.fixture
def server(tmp_path: Path):
    """A gateway over TLS: (its script, its address, its authority)."""
    authority = Authority(tmp_path)
    pair = authority.sign("server")
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
    scripted = Scripted()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_GatewayServiceServicer_to_server(scripted, server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield scripted, f"localhost:{port}", authority.ca
    server.stop(0).wait()


def check(scripted: Scripted, text: str, token_ids: list[int]) -> None:
    assert (text, token_ids) == ("abc", [1, 2, 3, 4, 5])
    first, by_token, by_offset = scripted.requests
    assert (first.resume_token, first.resumable) == ("", True)
    assert (by_token.resume_token, by_token.request_id) == ("t1", "")
    # The token leads to a place before what has come since.
    assert (by_offset.resume_token, by_offset.resume_offset) == ("", 2)
    assert by_offset.request_id == first.request_id


def test_threads(server) -> None:
    scripted, target, ca = server
    with Client(target, credentials=grpc.ssl_channel_credentials(ca.read_bytes())) as client:
        stream = client.generate("x", resumable=True)
        text = stream.text()
    check(scripted, text, stream.completions[0].token_ids)


def test_asyncio(server) -> None:
    scripted, target, ca = server

    async def work():
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        async with AsyncClient(target, credentials=credentials) as client:
            stream = client.generate("x", resumable=True)
            return await stream.text(), stream.completions[0].token_ids

    check(scripted, *asyncio.run(work()))


NODE = """
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import { WeftClient } from "./weft.mjs";
const [target, ca] = process.argv.slice(1);
const client = new WeftClient(target, { credentials: grpc.credentials.createSsl(readFileSync(ca)) });
const ids = [];
let text = "";
for await (const delta of client.generate({ text: "x", resumable: true })) {
  ids.push(...delta.token_ids);
  text += delta.text;
}
client.close();
console.log(JSON.stringify({ text, ids }));
"""


def test_node(node: Path, server) -> None:
    scripted, target, ca = server
    done = run("node", "--input-type=module", "-e", NODE, "--", target, str(ca), cwd=node)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    check(scripted, answer["text"], answer["ids"])
