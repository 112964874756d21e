"""`weft generate`, `chat` and `models` against a small in-process gateway."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from typer.testing import CliRunner

from cli.__main__ import app
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc
from weft.v1 import generation_pb2 as generation

ROOT = Path(__file__).resolve().parents[2]


class FakeGateway(gateway_grpc.GatewayServiceServicer):
    """Answers every prompt with three pieces; remembers what it was asked, and by whom."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.remaining: list[float | None] = []
        self.cancelled = threading.Event()
        self.address = ""
        self.sessions: dict[str, int] = {}

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        if request.session_id:
            self.sessions[request.session_id] += 1
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining.append(context.time_remaining())
        if request.text == "bad":
            detail = any_pb2.Any()
            violation = error_details_pb2.BadRequest.FieldViolation(
                field="sampling.top_p", description="must be\nat most 1"
            )
            detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
            context.abort_with_status(
                rpc_status.to_status(
                    status_pb2.Status(
                        code=code_pb2.INVALID_ARGUMENT, message="a field is out of range", details=[detail]
                    )
                )
            )
        yield pb.GenerateResponse(started=pb.Started(request_id="r", seed=7))
        if request.text == "late" or [m.content for m in request.chat.messages][-1:] == ["late"]:
            yield pb.GenerateResponse(delta=pb.Delta(text="half a"))
            context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is gone")
        if request.text == "endless":
            context.add_callback(self.cancelled.set)
            while context.is_active():
                yield pb.GenerateResponse(delta=pb.Delta(text="on and "))
                time.sleep(0.02)
            return
        for index in range(request.sampling.n or 1):
            for piece in ("Once ", "upon ", f"é {index}"):
                chosen = generation.TokenLogprob(token_id=5, logprob=-0.5, text=piece)
                logprobs = [pb.DeltaLogprobs(chosen=chosen)] if request.sampling.HasField("logprobs") else []
                yield pb.GenerateResponse(delta=pb.Delta(sample_index=index, text=piece, logprobs=logprobs))
            yield pb.GenerateResponse(
                finish=pb.Finish(
                    sample_index=index,
                    reason=generation.FINISH_REASON_STOP,
                    stop_string="END",
                    usage=generation.Usage(prompt_tokens=4, completion_tokens=3, cached_tokens=2),
                )
            )

    def CreateSession(
        self, request: pb.CreateSessionRequest, context: grpc.ServicerContext
    ) -> pb.CreateSessionResponse:
        if request.session_id in self.sessions:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is one")
        self.sessions[request.session_id] = 0
        return pb.CreateSessionResponse()

    def GetSession(
        self, request: pb.GetSessionRequest, context: grpc.ServicerContext
    ) -> pb.GetSessionResponse:
        session = pb.Session(num_turns=self.sessions[request.session_id])
        return pb.GetSessionResponse(session=session)

    def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSessionResponse:
        del self.sessions[request.session_id]
        return pb.DeleteSessionResponse()

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[pb.Model(name="demo", version="v1", max_model_len=1024, vocab_size=4096)]
        )


@pytest.fixture
def fake() -> Iterator[FakeGateway]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = FakeGateway()
    gateway_grpc.add_GatewayServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0).wait()


def weft(fake: FakeGateway, *args: str, stdin: str | bytes | None = None, **env: str) -> Result:
    return CliRunner().invoke(app, [args[0], "--server", fake.address, *args[1:]], input=stdin, env=env)


def test_generate_streams_the_text_and_nothing_else(fake: FakeGateway) -> None:
    result = weft(fake, "generate", "Tell me")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Once upon é 0\n", "")
    (request,) = fake.requests
    # What was not asked for is not sent: the defaults are the server's.
    assert request == pb.GenerateRequest(text="Tell me", sampling=generation.SamplingParams())


def test_generate_sends_every_field(fake: FakeGateway) -> None:
    args = shlex.split(
        "--model m --max-tokens 9 --min-tokens 1 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25 "
        "--seed 18446744073709551615 --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2 "
        "--logit-bias 5=-100 --logit-bias 6=1.5 --stop END --stop STOP --stop-token-id 3 --ignore-eos -n 2 "
        "--logprobs 0 --request-id r1 --priority -5 --must-complete --cache-salt s --show-special-tokens "
        "--timeout 30"
    )
    assert weft(fake, "generate", "x", *args).exit_code == 0
    (request,) = fake.requests
    assert request == pb.GenerateRequest(
        model="m",
        text="x",
        stop=["END", "STOP"],
        request_id="r1",
        priority=-5,
        must_complete=True,
        cache_salt="s",
        skip_special_tokens=False,
        sampling=generation.SamplingParams(
            max_tokens=9,
            min_tokens=1,
            temperature=0.5,
            top_k=4,
            top_p=0.75,
            min_p=0.25,
            seed=2**64 - 1,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias=[
                generation.SamplingParams.LogitBias(token_id=5, bias=-100),
                generation.SamplingParams.LogitBias(token_id=6, bias=1.5),
            ],
            stop_token_ids=[3],
            ignore_eos=True,
            n=2,
            logprobs=0,
        ),
    )
    assert 0 < (fake.remaining[0] or 0) <= 30


def test_every_sampling_field_of_the_wire_has_an_option(fake: FakeGateway) -> None:
    names = set(generation.SamplingParams.DESCRIPTOR.fields_by_name)
    text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
    missing = [
        n for n in names if f"--{n.removesuffix('s').replace('_', '-')}" not in text and f"-{n} " not in text
    ]
    assert not missing


def test_several_samples_are_told_apart(fake: FakeGateway) -> None:
    result = weft(fake, "generate", "x", "-n", "2", "--stats")
    assert result.stdout == "--- sample 0\nOnce upon é 0\n--- sample 1\nOnce upon é 1\n"
    assert "[stop at 'END'] 4 prompt tokens (2 cached), 3 completion tokens" in result.stderr


def test_logprobs_go_to_stderr(fake: FakeGateway) -> None:
    result = weft(fake, "generate", "x", "--logprobs", "0")
    assert result.stderr.splitlines()[0] == "'Once ' -0.500"


def test_json_is_one_event_a_line(fake: FakeGateway) -> None:
    events = [json.loads(line) for line in weft(fake, "generate", "x", "--json").stdout.splitlines()]
    assert [next(iter(event)) for event in events] == ["started", "delta", "delta", "delta", "finish"]


@pytest.mark.parametrize("args", [(), ("-",)])
def test_the_prompt_may_come_from_stdin(fake: FakeGateway, args: tuple[str, ...]) -> None:
    assert weft(fake, "generate", *args, stdin="zwei\nZeilen ü\n").exit_code == 0
    assert fake.requests[0].text == "zwei\nZeilen ü"


def test_chat_and_token_id_prompts(fake: FakeGateway) -> None:
    weft(fake, "generate", "--chat", "hi")
    weft(fake, "generate", "--token-ids", "1,2,3")
    assert fake.requests[0].chat.messages[0] == pb.ChatMessage(role="user", content="hi")
    assert list(fake.requests[1].token_ids.ids) == [1, 2, 3]


def test_stdin_that_is_not_text_is_refused(fake: FakeGateway) -> None:
    result = weft(fake, "generate", stdin=b"\xff\xfe")
    assert (result.exit_code, result.stderr) == (
        1,
        "weft: stdin is not UTF-8: invalid start byte at byte 0\n",
    )
    assert not fake.requests


def test_the_key_is_a_bearer_token(fake: FakeGateway) -> None:
    weft(fake, "generate", "x", "--api-key", "k1")
    weft(fake, "generate", "x", WEFT_API_KEY="k2")
    weft(fake, "generate", "x")
    assert [m.get("authorization") for m in fake.metadata] == ["Bearer k1", "Bearer k2", None]


def test_an_error_is_one_line_with_status_and_field(fake: FakeGateway) -> None:
    result = weft(fake, "generate", "bad")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert (
        result.stderr
        == "weft: INVALID_ARGUMENT: a field is out of range; sampling.top_p: must be at most 1\n"
    )


def test_an_error_after_some_text_ends_the_line_first(fake: FakeGateway) -> None:
    result = weft(fake, "generate", "late")
    assert (result.exit_code, result.stdout) == (1, "half a\n")
    assert result.stderr == "weft: UNAVAILABLE: the engine is gone\n"


@pytest.mark.parametrize("command", [("generate", "x"), ("models",)])
def test_no_server_is_unavailable(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [command[0], "--server", "127.0.0.1:1", *command[1:]])
    assert result.exit_code == 1
    assert result.stderr.startswith("weft: UNAVAILABLE: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [
        ("--logit-bias", "five=1"),
        ("--logit-bias", "5"),
        ("--seed", "-1"),
        ("--top-k", "5000000000"),
        ("--token-ids", "1,x"),
        ("--token-ids", "1"),
        ("--token-ids", "-1"),
        ("--priority", "99999999999"),
        ("--stop", "\udcff"),
        ("--model", "\udcff"),
    ],
)
def test_what_the_wire_cannot_hold_is_a_usage_error(fake: FakeGateway, args: tuple[str, ...]) -> None:
    assert weft(fake, "generate", "x", *args).exit_code == 2
    assert not fake.requests


def test_an_argument_that_is_not_text_is_a_usage_error(fake: FakeGateway) -> None:
    for args in (("generate", "\udcff"), ("generate", "--chat", "\udcff"), ("chat", "--system", "\udcff")):
        result = weft(fake, *args)
        assert result.exit_code == 2, args
        assert "Traceback" not in result.stderr
    assert not fake.requests


def test_a_key_with_its_files_line_end_is_sent_without(fake: FakeGateway) -> None:
    weft(fake, "generate", "x", WEFT_API_KEY="k2\n")
    assert fake.metadata[0]["authorization"] == "Bearer k2"
    bad = weft(fake, "generate", "x", "--api-key", "k\n1")
    assert bad.exit_code == 2
    assert "k\n1" not in bad.output


def test_models(fake: FakeGateway) -> None:
    table = weft(fake, "models")
    assert table.exit_code == 0
    assert "demo" in table.stdout
    assert json.loads(weft(fake, "models", "--json").stdout)["max_model_len"] == 1024


def test_chat_keeps_the_conversation(fake: FakeGateway) -> None:
    result = weft(fake, "chat", "--system", "Be brief.", stdin="one\n\ntwo\n/reset\nthree\n/exit\nfour\n")
    assert result.exit_code == 0
    assert result.stdout == "Once upon é 0\n" * 3
    turns = [[(m.role, m.content) for m in r.chat.messages] for r in fake.requests]
    system, answer = ("system", "Be brief."), ("assistant", "Once upon é 0")
    assert turns == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_chat_in_a_session_sends_what_is_new(fake: FakeGateway) -> None:
    args = ("chat", "--session", "talk", "--system", "Be brief.")
    assert weft(fake, *args, stdin="one\ntwo\n").stdout == "Once upon é 0\n" * 2
    assert weft(fake, *args, stdin="three\n/reset\nfour\n").exit_code == 0
    assert {request.session_id for request in fake.requests} == {"talk"}
    assert [[m.content for m in r.chat.messages] for r in fake.requests] == [
        ["Be brief.", "one"],
        ["two"],
        ["three"],
        ["Be brief.", "four"],
    ]


def test_an_error_in_a_conversation(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script it is the end; a person keeps the conversation and may go on."""
    turns = "one\nlate\ntwo\n"
    script = weft(fake, "chat", stdin=turns)
    assert (script.exit_code, script.stdout) == (1, "Once upon é 0\nhalf a\n")
    assert script.stderr == "weft: UNAVAILABLE: the engine is gone\n"
    fake.requests.clear()
    monkeypatch.setattr("cli.chat.is_interactive", lambda: True)
    person = weft(fake, "chat", stdin=turns)
    assert person.exit_code == 0
    assert person.stderr == "weft: UNAVAILABLE: the engine is gone\n"
    assert [m.content for m in fake.requests[2].chat.messages] == ["one", "Once upon é 0", "two"]


def test_chat_of_what_is_not_text_is_refused(fake: FakeGateway) -> None:
    result = weft(fake, "chat", stdin=b"\xff\n")
    assert result.exit_code in (1, 2)
    assert "UTF-8" in result.stderr
    assert not fake.requests


def test_ctrl_c_cancels_the_call_and_exits_130(fake: FakeGateway) -> None:
    command = [sys.executable, "-m", "cli", "generate", "--server", fake.address, "endless"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(6) == b"on and"
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert child.stderr.read() == b""
    assert fake.cancelled.wait(10), "the server was not told"


def test_help_and_version_from_a_bare_clone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("weft ")
