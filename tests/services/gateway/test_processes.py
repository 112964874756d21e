"""Several gateway processes behind one address: the launcher by itself, then real ones and an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from services.gateway.config import load
from services.gateway.processes import MIN_BACKOFF_S, Launcher, PortTaken, reserve
from tools.mock_engine import MockEngine
from weft.rpc.address import parse_address
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "models" / "demo"
WAITS = "import time; time.sleep(60)"
# Ends well after SIGTERM, and says when it is ready for it.
DRAINS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
DEAF = DRAINS.replace("lambda *_: sys.exit(int(sys.argv[2]))", "signal.SIG_IGN")


def script(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", text, *map(str, arguments)]


async def exists(*paths: Path) -> None:
    async with asyncio.timeout(30):
        while not all(path.exists() for path in paths):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_process_that_dies_is_started_again_ever_more_slowly() -> None:
    launcher = Launcher(1, lambda _: script("import os; os.kill(os.getpid(), 9)"))
    task = asyncio.create_task(launcher.run())
    async with asyncio.timeout(60):
        begun = asyncio.get_running_loop().time()
        while launcher.children[0].num_starts < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    pauses_s = asyncio.get_running_loop().time() - begun
    assert pauses_s > MIN_BACKOFF_S * (2 + 4 + 8)
    launcher.on_signal(signal.SIGTERM)
    await task


async def test_one_that_dies_does_not_touch_the_others(tmp_path: Path) -> None:
    def command(index: int) -> list[str]:
        return script(DRAINS, tmp_path / str(index), 0)

    launcher = Launcher(2, command)
    task = asyncio.create_task(launcher.run())
    await exists(tmp_path / "0", tmp_path / "1")
    first, second = (child.process for child in launcher.children)
    assert first is not None
    assert second is not None
    (tmp_path / "0").unlink()
    first.kill()
    await exists(tmp_path / "0")
    assert second.returncode is None
    assert [child.num_starts for child in launcher.children] == [2, 1]
    launcher.on_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await task == 0


@pytest.mark.parametrize("code", [1, 2])
async def test_what_cannot_start_ends_all(tmp_path: Path, code: int) -> None:
    def command(index: int) -> list[str]:
        return script(DRAINS, tmp_path / "up", 0) if index else script(f"raise SystemExit({code})")

    async with asyncio.timeout(30):
        assert await Launcher(2, command).run() == code


async def test_the_exit_code_is_a_bad_one_if_there_is_one(tmp_path: Path) -> None:
    launcher = Launcher(2, lambda index: script(DRAINS, tmp_path / str(index), 3 * index))
    task = asyncio.create_task(launcher.run())
    await exists(tmp_path / "0", tmp_path / "1")
    launcher.on_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        assert await task == 3


async def test_a_second_signal_kills(tmp_path: Path) -> None:
    launcher = Launcher(2, lambda index: script(DEAF, tmp_path / str(index), 0))
    task = asyncio.create_task(launcher.run())
    await exists(tmp_path / "0", tmp_path / "1")
    launcher.on_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert not task.done()
    launcher.on_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await task == 1


async def test_one_that_cannot_be_made_again_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory, or no process id, is left for a moment: that ends nothing that runs."""
    launcher = Launcher(2, lambda index: script(DRAINS, tmp_path / str(index), 0))
    task = asyncio.create_task(launcher.run())
    await exists(tmp_path / "0", tmp_path / "1")
    make, num_failures = asyncio.create_subprocess_exec, 0

    async def fail_twice(*arguments: Any, **options: Any) -> Any:
        nonlocal num_failures
        num_failures += 1
        if num_failures <= 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await make(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_twice)
    (tmp_path / "0").unlink()
    assert launcher.children[0].process is not None
    launcher.children[0].process.kill()
    await exists(tmp_path / "0")
    launcher.on_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await task == 0


# What starts a launcher, and what its processes are: each draws a line when it may be signalled, in one
# write, for two of them share the pipe.
STARTS = """
import asyncio, signal, sys
from services.gateway.processes import Launcher
child = [sys.executable, "-c", sys.argv[1]]
sys.exit(asyncio.run(Launcher(2, lambda index: child).run()))
"""


async def start_launcher(child: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTS, child,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


async def lines(process: asyncio.subprocess.Process, count: int) -> list[str]:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return [(await process.stdout.readline()).decode().strip() for _ in range(count)]


async def test_a_terminals_interrupt_is_one_signal_to_each() -> None:
    """It goes to the whole group: who also heard it from the launcher would take it for the second."""
    child = """
import os, signal, time
num = 0
def on_signal(*_):
    global num
    num += 1
signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
os.write(1, b"up\\n")
while not num:
    time.sleep(0.01)
time.sleep(1.0)
os.write(1, b"%d\\n" % num)
"""
    process = await start_launcher(child)
    assert await lines(process, 2) == ["up", "up"]
    os.killpg(process.pid, signal.SIGINT)
    assert await lines(process, 2) == ["1", "1"]
    async with asyncio.timeout(30):
        assert await process.wait() == 0


async def test_processes_end_when_the_launcher_was_killed_before_they_could_ask() -> None:
    child = """
import os, time
parent = os.getppid()
os.write(1, b"up\\n")
while os.getppid() == parent:
    time.sleep(0.01)
from services.gateway.processes import end_with_parent
end_with_parent(parent)
os.write(1, b"goes on\\n")
"""
    process = await start_launcher(child)
    assert await lines(process, 2) == ["up", "up"]
    process.kill()
    assert await lines(process, 2) == ["", ""]
    await process.wait()


def test_a_reserved_port_is_shared_with_nobody_else() -> None:
    holder, address = reserve(parse_address("127.0.0.1:0"))
    with holder:
        assert address.port
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", address.port))
        with socket.socket() as sharing:
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sharing.bind(("127.0.0.1", address.port))
            sharing.listen(1)
            with pytest.raises(PortTaken, match="cannot listen on"):
                reserve(address)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--processes", "0"], "--processes"),
        (["--processes", "2", "--process-index", "2"], "--process-index"),
        (["--processes", "2", "--admin", "127.0.0.1:0"], "--admin"),
        (["--processes", "2", "--http", "127.0.0.1:0", "--process-http", "127.0.0.1:0"], "--process-http"),
        (["--http", "127.0.0.1:0", "--process-http", "127.0.0.1:8000"], "--process-http"),
    ],
)
def test_bad_flags(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--tokenizer", "x", *flags])
    assert caught.value.code == 2
    assert f"{named}:" in capsys.readouterr().err


class Running:
    """A launcher as a process, and what all its processes logged."""

    def __init__(self, process: asyncio.subprocess.Process, first_port: int) -> None:
        self.process = process
        self.first_port = first_port
        self.events: list[dict[str, Any]] = []
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if line.startswith(b"{"):
                self.events.append(json.loads(line))

    def seen(self, event: str) -> list[dict[str, Any]]:
        return [found for found in self.events if found["event"] == event]

    async def wait_for(self, event: str, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(60):
            while len(self.seen(event)) < count:
                assert self.process.returncode is None, self.events[-3:]
                await asyncio.sleep(0.02)
        return self.seen(event)


@pytest.fixture
async def mock() -> AsyncIterator[MockEngine]:
    """The engine of the tests beside this one takes a single link; this takes any number."""
    async with MockEngine(step_ms=2) as mock:
        yield mock


def two_free_ports() -> int:
    """The first of two in a row, below those that the system gives out by itself."""
    for first in random.sample(range(20_000, 30_000, 2), 100):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", first))
            other.bind(("127.0.0.1", first + 1))
            return first
    raise AssertionError("no two free ports")


def num_links(mock: MockEngine) -> int:
    assert mock.server is not None
    return mock.server.counters.begun - mock.server.counters.ended


@pytest.fixture
async def running(mock: MockEngine) -> AsyncIterator[Running]:
    first = two_free_ports()
    flags = (
        *("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--process-http", f"127.0.0.1:{first}"),
        *("--engine", mock.address),
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", "serve", "--processes", "2", "--tokenizer", DEMO,
        *map(str, flags), cwd=ROOT, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    found = Running(process, first)
    try:
        await found.wait_for("serving", 2)
        yield found
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(20):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await found.reader


def request(tokens: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", sampling=gen.SamplingParams(seed=1, max_tokens=tokens), **fields)


async def collect(address: str, message: pb.GenerateRequest) -> list[int]:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = GatewayServiceStub(channel).Generate(message, timeout=60)
        try:
            return [token_id async for response in call for token_id in response.delta.token_ids]
        finally:
            call.cancel()


async def test_two_processes_share_the_work_and_outlive_one_of_them(
    running: Running, mock: MockEngine, settle: Callable[..., Any]
) -> None:
    address = running.seen("sharing")[0]["addresses"][0]
    assert {event["address"] for event in running.seen("serving")} == {address}
    assert num_links(mock) == 2  # each has a link of its own
    expected = await collect(address, request(5))
    texts = await asyncio.gather(*(collect(address, request(5)) for _ in range(24)))
    assert texts == [expected] * 24

    async with httpx.AsyncClient() as http:
        pages = [await http.get(f"http://127.0.0.1:{running.first_port + i}/metrics") for i in range(2)]
    ended = [
        float(line.split()[1])
        for page in pages
        for line in page.text.splitlines()
        if line.startswith('weft_gateway_requests_ended_total{code="OK"}')
    ]
    assert sum(ended) == 25
    pids = [event["child_pid"] for event in running.seen("process started")]
    os.kill(pids[0], signal.SIGKILL)
    await settle(lambda: num_links(mock) == 1, 30.0)
    assert await collect(address, request(5)) == expected
    await running.wait_for("serving", 3)
    await settle(lambda: num_links(mock) == 2, 30.0)
    assert running.seen("process started")[-1]["index"] == 0

    lasting = asyncio.create_task(collect(address, request(500)))
    await settle(lambda: mock.core.num_live > 0, 30.0)
    running.process.send_signal(signal.SIGTERM)
    assert len(await lasting) == 500
    async with asyncio.timeout(30):
        assert await running.process.wait() == 0
    await settle(lambda: not num_links(mock), 30.0)


async def test_what_needs_one_owner_is_refused(running: Running) -> None:
    address = running.seen("sharing")[0]["addresses"][0]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GatewayServiceStub(channel)

        async def code_and_text(call: Any) -> tuple[grpc.StatusCode, str]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            return caught.value.code(), caught.value.details()

        async def read(message: pb.GenerateRequest) -> None:
            async for _ in stub.Generate(message, timeout=30):
                pass

        for name, call in (
            ("resumable", read(request(2, resumable=True, request_id="a"))),
            ("resume_token", read(pb.GenerateRequest(resume_token="abc"))),
            ("session_id", read(request(2, session_id="s"))),
            ("Cancel", stub.Cancel(pb.CancelRequest(request_id="a"), timeout=30)),
            ("CreateSession", stub.CreateSession(pb.CreateSessionRequest(), timeout=30)),
            ("GetSession", stub.GetSession(pb.GetSessionRequest(session_id="s"), timeout=30)),
            ("DeleteSession", stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"), timeout=30)),
        ):
            code, text = await code_and_text(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION, name
            assert text.startswith(f"{name}: not with --processes 2"), text
        await read(request(2, request_id="a"))


async def test_processes_end_when_the_launcher_is_killed(
    running: Running, mock: MockEngine, settle: Callable[..., Any]
) -> None:
    running.process.kill()
    await running.process.wait()
    await settle(lambda: not num_links(mock), 30.0)
