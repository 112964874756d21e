"""The whole path on this machine, from a checkpoint to streamed text.

Two engines serve sixteen streams; in the middle one of the engines is killed, and the streams go on. With
`is_up` one engine serves in the foreground instead, and how to call it is printed. A second run finds the
artifact of the first and skips the quantization. Does not know how its options came in.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from rich.console import Console

from cli.demo.processes import ROOT, Service, ServiceError, Stack, command_of, run
from cli.demo.streams import MAX_TOKENS, Fault, Load, Stream, demo_streams, run_streams
from cli.demo.view import summary, watching
from weft.artifact.manifest import ArtifactError
from weft.artifact.store import ArtifactStore

MODEL = "demo"
# In a wheel the model lies beside this file, in a checkout among the models.
MODEL_PLACES = (Path(__file__).parent / "model", ROOT / "models" / MODEL)
READY_TIMEOUT_S = 180.0
REPLAYS = "weft_gateway_replays_total"
LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class DemoOptions:
    """What a run is asked for. `data` holds artifacts and logs; the ports are those of `is_up`, 0 any free
    one.
    """

    data: Path
    is_up: bool
    grpc_port: int
    http_port: int


HOW_TO_CALL = """
The services are up: gRPC on {grpc}, HTTP on {http}. Ctrl-C stops them.

  command line   {weft} generate --server {grpc} --max-tokens 60 "Once upon a time"
                 {weft} chat --server {grpc}

  Python         import grpc
                 from weft.v1 import gateway_service_pb2 as pb, gateway_service_pb2_grpc as rpc
                 stub = rpc.GatewayServiceStub(grpc.insecure_channel("{grpc}"))
                 for event in stub.Generate(pb.GenerateRequest(text="Once upon a time")):
                     print(event.delta.text, end="", flush=True)

  curl           curl -N http://{http}/v1/completions -H 'content-type: application/json' \\
                   -d '{{"model": "demo", "prompt": "Once upon a time", "max_tokens": 60, "stream": true}}'

  grpcurl        grpcurl -plaintext -d '{{"text": "Once upon a time"}}' \\
                   {grpc} weft.v1.GatewayService/Generate
"""


def run_demo(options: DemoOptions) -> int:
    """Run the demo; 0 when every stream ended well and every service stopped well."""
    signal.signal(signal.SIGTERM, interrupt)
    console = Console()
    stack = Stack()
    try:
        problems = work(console, stack, options)
    except ServiceError as error:
        problems = [str(error)]
    except grpc.RpcError as error:
        problems = [f"{error}\n{stack.tails()}"]
    except OSError as error:
        problems = [f"{error.filename or options.data}: {error.strerror or error}"]
    except KeyboardInterrupt:
        problems = [] if options.is_up else ["interrupted"]
    finally:
        # A second Ctrl-C would leave the services behind; each of them ends within its own limit.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stopped = stack.stop()
    for problem in (all_problems := [*problems, *stopped]):
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if all_problems else 0


def demo_model() -> Path:
    """The demo model's folder. Raises ServiceError."""
    for place in MODEL_PLACES:
        if (place / "config.json").is_file():
            return place
    raise ServiceError("this installation came without the demo model")


def check_before(options: DemoOptions) -> None:
    """What would fail minutes later fails now. Raises OSError, ServiceError."""
    options.data.mkdir(parents=True, exist_ok=True)
    probe = options.data / ".writable"
    probe.touch()
    probe.unlink()
    if not options.is_up:
        return
    for flag, port in (("--listen", options.grpc_port), ("--http", options.http_port)):
        with contextlib.closing(socket.socket()) as listener:
            # As the services do: a port whose last connections are still closing is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((LOCALHOST, port))
                listener.listen()
            except OSError as error:
                reason = error.strerror or str(error)
                raise ServiceError(f"port {port}: {reason}; {flag} takes another") from None


def interrupt(number: int, frame: FrameType | None) -> None:
    """A SIGTERM leaves the same way as a Ctrl-C: in order."""
    raise KeyboardInterrupt


def work(console: Console, stack: Stack, options: DemoOptions) -> list[str]:
    """Quantize, start, stream. Returns what went wrong; raises ServiceError, OSError."""
    check_before(options)
    began = time.monotonic()
    artifacts = options.data / "artifacts"
    console.rule("quantize")
    run("quantizer", ["run", "--source", str(demo_model()), "--artifacts", str(artifacts), "--name", MODEL])
    console.rule("serve")
    engines, gateway = start_services(stack, artifacts, options)
    addresses = [address_of(engine) for engine in engines]
    ready_s = time.monotonic() - began
    shown = " and ".join(addresses)
    ready = f"engine on {shown}, gateway on {address_of(gateway)}, ready after {ready_s:.1f} s"
    console.print(ready, soft_wrap=True)
    if options.is_up:
        text = HOW_TO_CALL.format(grpc=address_of(gateway), http=http_of(gateway), weft=weft_command())
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return wait_until_told(stack)
    console.rule("stream")
    streams, load = demo_streams(), Load()
    # About a third of what comes: every stream is in the middle of its text.
    fault = Fault(len(streams) * MAX_TOKENS // 3, lambda index: stack.kill(engines[index]))
    seconds = asyncio.run(stream_all(console, streams, address_of(gateway), addresses, load, fault))
    num_moved = count_moved(http_of(gateway))
    console.print(summary(streams, seconds, load, perplexities(artifacts), fault, num_moved))
    problems = complaints(streams, load, fault, num_moved)
    return [*problems, stack.tails()] if problems else []


def start_services(stack: Stack, artifacts: Path, options: DemoOptions) -> tuple[list[Service], Service]:
    """Start engines, one of them for --up and two otherwise, and a gateway; all are serving then."""
    logs = options.data / "logs"
    grpc_port, http_port = (options.grpc_port, options.http_port) if options.is_up else (0, 0)
    common = ["--artifacts", str(artifacts)]
    listen = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    # One thread is enough for a model this small; the other cores are the gateway's and the clients'.
    flags = ["serve", *common, "--model", MODEL, "--threads", "1", *listen]
    names = ["engine"] if options.is_up else ["engine", "engine-2"]
    engines = [stack.start(name, command_of("engine", flags), logs) for name in names]
    # Bound before they are loaded: the gateway may start meanwhile and waits for one of them.
    addresses = [engine.wait_for("listening", READY_TIMEOUT_S)["address"] for engine in engines]
    listen = ["--listen", f"127.0.0.1:{grpc_port}", "--http", f"127.0.0.1:{http_port}"]
    flags = ["serve", *common, "--engine", ",".join(addresses), *listen]
    gateway = stack.start("gateway", command_of("gateway", flags), logs)
    for service in (*engines, gateway):
        service.wait_for("serving", READY_TIMEOUT_S)
    wait_until_linked(gateway, len(engines))
    return engines, gateway


def weft_command() -> str:
    """What to type for the `weft` command; a bare clone has none."""
    script = Path(sys.executable).with_name("weft")
    return str(script) if script.exists() else f"{sys.executable} -m cli"


def address_of(service: Service) -> str:
    """Where a service that serves listens."""
    address: str = service.wait_for("serving", READY_TIMEOUT_S)["address"]
    return address


def http_of(gateway: Service) -> str:
    """Where the gateway's HTTP listens."""
    address: str = gateway.wait_for("http", READY_TIMEOUT_S)["address"]
    return address


def wait_until_linked(gateway: Service, count: int) -> None:
    """Wait until the gateway knows so many engines. Raises ServiceError."""
    give_up_at = time.monotonic() + READY_TIMEOUT_S
    while sum(event.get("event") == "engine up" for event in gateway.events()) < count:
        if time.monotonic() > give_up_at:
            raise ServiceError(f"the gateway did not find {count} engines\n{gateway.tail()}")
        time.sleep(0.05)


def count_moved(http: str) -> int:
    """How often the gateway has started a stream again on another engine, by its metrics."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(REPLAYS)))


def wait_until_told(stack: Stack) -> list[str]:
    """Wait for Ctrl-C (a KeyboardInterrupt), or for a service that ends by itself."""
    while not (dead := stack.dead):
        time.sleep(0.5)
    return [f"{service.name} ended by itself" for service in dead]


async def stream_all(
    console: Console,
    streams: list[Stream],
    gateway: str,
    engines: list[str],
    load: Load,
    fault: Fault,
) -> float:
    """Run the streams under the view; the seconds they took."""
    async with watching(console, streams, load):
        return await run_streams(streams, gateway, engines, load, fault)


def perplexities(artifacts: Path) -> dict[str, float]:
    """The perplexities that the quantizer measured, read from the manifest."""
    try:
        quality: dict[str, Any] = ArtifactStore(artifacts).open(MODEL).manifest.quality or {}
    except ArtifactError as error:
        raise ServiceError(f"the artifact cannot be read: {error}") from error
    names = {"source": "source", "rounding": "4-bit rounding", "chosen": "4-bit, as chosen"}
    return {shown: quality[key]["perplexity"] for key, shown in names.items() if key in quality}


def complaints(
    streams: list[Stream], load: Load, fault: Fault | None = None, num_moved: int = 0
) -> list[str]:
    """Whatever is not as it must be after the last stream."""
    found = [f"request '{stream.title}' {stream.error}" for stream in streams if stream.error]
    found += [f"request '{stream.title}' gave no token" for stream in streams if not stream.num_tokens]
    if load.now.active_blocks:
        found.append(f"{load.now.active_blocks} blocks are still active with nothing running")
    if load.now.requests_begun != load.now.requests_ended:
        found.append(f"{load.now.requests_begun} sequences begun, {load.now.requests_ended} ended")
    if fault is not None and fault.at_s is None:
        found.append("the streams ended before an engine was killed")
    elif fault is not None and not num_moved:
        found.append("no stream was on the engine that was killed")
    return found
