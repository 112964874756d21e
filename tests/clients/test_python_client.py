"""The Python client against a gateway that breaks off where it is told to."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures

import grpc
import pytest

from weft.client import AsyncClient, Client, RetryPolicy, StatusError, make_request
from weft.client.progress import Progress
from weft.rpc.errors import status_message, trailers
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.gateway_service_pb2_grpc import GatewayServiceServicer, add_GatewayServiceServicer_to_server

TEXT = "In the beginning there was a thread, and it was long."
FAST = RetryPolicy(max_attempts=4, first_wait_s=0.01, max_wait_s=0.02)


def engine_lost(token="", retry_after_s=0.01):
    metadata = {"resume_token": token} if token else {}
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        "lost",
        retry_after_s=retry_after_s,
        reason="ENGINE_LOST",
        metadata=metadata,
    )


class ScriptedGateway(GatewayServiceServicer):
    """Streams `TEXT`, one character a delta. `breaks` holds, for each attempt, after how many of its deltas
    it ends with which error.
    """

    def __init__(self):
        self.breaks = []
        self.requests = []
        self.num_open = 0
        self.was_cancelled = threading.Event()
        self.pause_s = 0.0  # after the first delta

    def Generate(self, request, context):
        self.requests.append(request)
        self.num_open += 1
        context.add_callback(self._on_end)
        where, error = self.breaks.pop(0) if self.breaks else (len(TEXT) + 1, None)
        start = request.resume_offset or (request.resume_offsets[0] if request.resume_offsets else 0)
        if request.resume_token:
            start = int(request.resume_token.split("@")[1])
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id, seed=7))
        num_samples = request.sampling.n or 1
        for index, character in enumerate(TEXT[start:], start):
            if index - start == where:
                context.set_trailing_metadata(trailers(error))
                context.abort(error.code, status_message(error))
            for sample in range(num_samples):
                delta = pb.Delta(sample_index=sample, text=character, token_ids=[ord(character)])
                delta.next_offset = index + 1
                yield pb.GenerateResponse(delta=delta)
            if self.pause_s:
                self.was_cancelled.wait(self.pause_s)
        for sample in range(num_samples):
            finish = pb.Finish(sample_index=sample, reason=generation_pb2.FINISH_REASON_STOP)
            yield pb.GenerateResponse(finish=finish)

    def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.Model(name="demo")])

    def GetSession(self, request, context):
        context.abort(grpc.StatusCode.NOT_FOUND, "there is no such session")

    def _on_end(self):
        self.num_open -= 1
        self.was_cancelled.set()


@pytest.fixture
def gateway():
    scripted = ScriptedGateway()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_GatewayServiceServicer_to_server(scripted, server)
    scripted.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield scripted
    server.stop(0).wait()


def read(target, **options):
    """The stream read by the client with threads: (completions, error)."""
    with Client(target, retry=FAST) as client:
        stream = client.generate("x", **options)
        try:
            stream.text()
        except StatusError as error:
            return stream.completions, error
        return stream.completions, None


def read_async(target, **options):
    """The same by the client for asyncio."""

    async def work():
        async with AsyncClient(target, retry=FAST) as client:
            stream = client.generate("x", **options)
            try:
                await stream.text()
            except StatusError as error:
                return stream.completions, error
            return stream.completions, None

    return asyncio.run(work())


both = pytest.mark.parametrize("run", [read, read_async], ids=["threads", "asyncio"])


@both
def test_an_undisturbed_stream(gateway, run):
    completions, error = run(gateway.target)
    assert error is None
    assert completions[0].text == TEXT
    assert completions[0].token_ids == [ord(character) for character in TEXT]
    assert completions[0].finish.reason == generation_pb2.FINISH_REASON_STOP


@both
def test_a_resume_token_is_taken_up_without_loss_or_repetition(gateway, run):
    gateway.breaks = [(5, engine_lost("t@5")), (9, engine_lost("t@14")), (0, engine_lost("t@14"))]
    completions, error = run(gateway.target, request_id="mine")
    assert error is None
    assert completions[0].text == TEXT
    assert [request.resume_token for request in gateway.requests] == ["", "t@5", "t@14", "t@14"]
    # The token stands for the id.
    assert [request.request_id for request in gateway.requests] == ["mine", "", "", ""]
    assert all(request.text == "x" for request in gateway.requests)


@both
def test_a_resumable_stream_goes_on_after_a_lost_connection(gateway, run):
    lost = StatusError(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    gateway.breaks = [(0, lost), (12, lost)]
    completions, error = run(gateway.target, resumable=True)
    assert error is None
    assert completions[0].text == TEXT
    assert [request.resume_offset for request in gateway.requests] == [0, 0, 12]
    assert len({request.request_id for request in gateway.requests}) == 1
    assert gateway.requests[0].request_id


@both
def test_several_samples_resume_at_their_own_offsets(gateway, run):
    gateway.breaks = [(7, StatusError(grpc.StatusCode.UNAVAILABLE, "Socket closed"))]
    completions, error = run(gateway.target, resumable=True, n=2)
    assert error is None
    assert [completion.text for completion in completions] == [TEXT, TEXT]
    assert list(gateway.requests[1].resume_offsets) == [7, 7]
    assert not gateway.requests[1].HasField("resume_offset")


@both
def test_output_that_cannot_be_taken_up_is_not_asked_for_again(gateway, run):
    gateway.breaks = [(5, engine_lost())]
    completions, error = run(gateway.target)
    assert error is not None
    assert error.reason == "ENGINE_LOST"
    assert completions[0].text == TEXT[:5]
    assert len(gateway.requests) == 1


@both
def test_a_token_outlives_a_connection_that_is_lost_before_it_led_anywhere(gateway, run):
    gateway.breaks = [(5, engine_lost("t@5")), (0, StatusError(grpc.StatusCode.UNAVAILABLE, "Socket closed"))]
    completions, error = run(gateway.target)
    assert error is None
    assert completions[0].text == TEXT
    assert [request.resume_token for request in gateway.requests] == ["", "t@5", "t@5"]


def test_an_error_behind_the_last_finish_is_no_success():
    """The output is whole, but the session does not hold it."""
    progress = Progress(make_request("x", resumable=True, session_id="s"), FAST, None)
    progress.take(pb.GenerateResponse(finish=pb.Finish(reason=generation_pb2.FINISH_REASON_STOP)))
    error = StatusError(grpc.StatusCode.UNAVAILABLE, "disk", retry_after_s=1.0, reason="SESSIONS_UNAVAILABLE")
    with pytest.raises(StatusError, match="disk"):
        progress.wait_after(error)
    # The end of the call was lost with the connection: nothing is missing.
    assert progress.wait_after(StatusError(grpc.StatusCode.UNAVAILABLE, "Socket closed")) > 0


@both
def test_a_busy_server_is_asked_again_before_the_first_token(gateway, run):
    full = StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.02, reason="QUEUE_FULL")
    gateway.breaks = [(0, full), (0, full)]
    completions, error = run(gateway.target)
    assert error is None
    assert completions[0].text == TEXT
    assert len(gateway.requests) == 3


@both
def test_tries_end(gateway, run):
    gateway.breaks = [(0, engine_lost())] * 9
    _, error = run(gateway.target)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert len(gateway.requests) == FAST.max_attempts


@both
def test_a_wait_beyond_the_deadline_is_not_begun(gateway, run):
    gateway.breaks = [(0, engine_lost(retry_after_s=60.0))]
    _, error = run(gateway.target, timeout_s=5.0)
    assert error.code is grpc.StatusCode.UNAVAILABLE


@both
@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED])
def test_other_errors_are_the_callers(gateway, run, code):
    gateway.breaks = [(0, StatusError(code, "no", field_violations=[("text", "is bad")]))]
    _, error = run(gateway.target)
    assert error.code is code
    assert error.field_violations == (("text", "is bad"),)
    assert len(gateway.requests) == 1


def test_leaving_a_stream_cancels_its_call(gateway):
    with Client(gateway.target) as client:
        with client.generate("x") as stream:
            assert next(stream).text == TEXT[0]
        assert gateway.was_cancelled.wait(5)
        assert list(stream) == []


async def test_leaving_an_async_stream_cancels_its_call(gateway):
    async with AsyncClient(gateway.target) as client:
        async with client.generate("x") as stream:
            async for delta in stream:
                assert delta.text == TEXT[0]
                break
        assert await asyncio.to_thread(gateway.was_cancelled.wait, 5)


async def test_a_cancelled_task_leaves_as_cancelled(gateway):
    got = asyncio.Event()

    async def work():
        async with AsyncClient(gateway.target) as client:
            async for _ in client.generate("x"):
                got.set()
                await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await got.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_is_cancelled_as_its_stream_is_closed_leaves_as_cancelled(gateway):
    got = asyncio.Event()

    async def work(stream):
        async for _ in stream:
            got.set()

    gateway.pause_s = 60.0
    async with AsyncClient(gateway.target) as client:
        stream = client.generate("x")
        task = asyncio.create_task(work(stream))
        await got.wait()
        await stream.aclose()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_the_other_methods(gateway):
    with Client(gateway.target) as client:
        assert [model.name for model in client.models()] == ["demo"]
        with pytest.raises(StatusError) as raised:
            client.get_session("none")
        assert raised.value.code is grpc.StatusCode.NOT_FOUND


def test_requests_from_plain_values():
    request = make_request(
        [{"role": "user", "content": "hi"}], temperature=0, n=2, logit_bias={5: -1.0}, max_tokens=None
    )
    assert request.chat.messages[0].content == "hi"
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("max_tokens")
    assert request.sampling.logit_bias[0].token_id == 5
    assert list(make_request([1, 2]).token_ids.ids) == [1, 2]
    assert make_request("x", resumable=True).request_id
    with pytest.raises(TypeError, match="temprature"):
        make_request("x", temprature=1)


def test_tokens_that_come_twice_are_told_once():
    """A resume by offset brings tokens again that had no text after them."""
    request = pb.GenerateRequest(text="x", request_id="r", resumable=True)
    progress = Progress(request, RetryPolicy(), None)

    def take(text, token_ids, next_offset):
        delta = pb.Delta(text=text, token_ids=token_ids, next_offset=next_offset)
        return progress.take(pb.GenerateResponse(delta=delta))

    take("ab", [1, 2], 2)
    assert take("", [3], 2).token_ids == (3,)
    progress.wait_after(StatusError(grpc.StatusCode.UNAVAILABLE, "lost"))
    assert progress.next_request().resume_offset == 2
    assert take("", [3], 2) is None
    assert take("c", [4], 3).token_ids == (4,)
    progress.wait_after(StatusError(grpc.StatusCode.UNAVAILABLE, "lost", metadata={"resume_token": "t"}))
    assert progress.next_request().resume_token == "t"
    take("d", [5], 4)
    progress.wait_after(StatusError(grpc.StatusCode.UNAVAILABLE, "lost"))
    again = progress.next_request()
    assert (again.resume_token, again.resume_offset) == ("", 4), "the token's place lies behind"
    assert progress.completions[0].token_ids == [1, 2, 3, 4, 5]
    assert progress.completions[0].text == "abcd"
