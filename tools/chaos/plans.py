"""The two fault runs: over mock engines, whose every token the oracle knows, and over real engines with the
demo model, whose tokens are those of a run before without a fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from cli.demo.processes import ROOT, command_of
from services.gateway.text.detokenizer import Vocabulary
from tools.chaos.checker import Expected
from tools.chaos.faults import OF_REAL_ENGINES, WEIGHTS, Schedule, Times
from tools.chaos.run import Report, Requests, run
from tools.chaos.stack import LOCAL, Engine, Stack, mock_command
from tools.chaos.workload import Mix, Repeated, Spec, Workload, load_vocabulary, mock_expect
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

DEMO_MODEL = ROOT / "models" / "demo"
HANG_S = 60
UNDISTURBED_S = 300.0
MOCK_MIX = Mix()
# Real engines share the machine's cores with their gateway and clients, so they are asked for less.
DEMO_MIX = Mix(prompt_lengths=(4, 80), output_lengths=(10, 60), sample_counts=(1, 1, 1, 2, 3))
DEMO_REQUESTS_EACH = 2
DEMO_TIMES = Times(between=3.0, away=(1.5, 3.0), settle=2.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. `step_ms`, `num_blocks` and `mix` are of the run over mock engines. Without
    `kinds` there are all faults.
    """

    seed: int = 1
    seconds: float = 60.0
    num_streams: int = 64
    num_engines: int = 3
    step_ms: float = 20.0
    num_blocks: int = 2048
    gateway_flags: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    mix: Mix = MOCK_MIX

    def weights(self, weights: dict[str, int]) -> dict[str, int]:
        """How often each kind of fault comes: those asked for, or all."""
        return {kind: weight for kind, weight in weights.items() if not self.kinds or kind in self.kinds}


async def run_mock(plan: Plan, logs: Path) -> Report:
    """The run over mock engines."""
    flags = ["--step-ms", plan.step_ms, "--num-blocks", plan.num_blocks, "--hang-seconds", HANG_S]
    command = mock_command(*flags, "--drain-seconds", 1, "--tokenizer", DEMO_MODEL)
    vocabulary = load_vocabulary(DEMO_MODEL)
    expect = mock_expect(vocabulary)
    workloads = [
        Workload(plan.seed, worker, plan.mix, vocabulary, expect) for worker in range(plan.num_streams)
    ]
    async with _stack([command] * plan.num_engines, plan, logs) as stack:
        schedule = Schedule(stack.engines, plan.seed, plan.weights(WEIGHTS))
        return await _run(stack, schedule, workloads, plan, checks_logprobs=True)


async def run_demo(plan: Plan, logs: Path) -> Report:
    """The run over real engines: the demo model in float32, where equal requests give equal tokens."""
    flags = ["--source", DEMO_MODEL, "--dtype", "float32", "--deterministic", "--threads", 1]
    # One engine must run everybody at once: a place in a queue is a gap that no fault has made.
    flags += ["--max-batch-size", 256, "--listen", "127.0.0.1:0", "--drain-seconds", 1]
    command = command_of("engine", ["serve", *map(str, flags)])
    vocabulary = load_vocabulary(DEMO_MODEL)
    async with _stack([command] * plan.num_engines, plan, logs) as stack:
        drawn = [
            Workload(plan.seed, worker, DEMO_MIX, vocabulary, lambda spec: ())
            for worker in range(plan.num_streams)
        ]
        specs = [[workload.draw() for _ in range(DEMO_REQUESTS_EACH)] for workload in drawn]
        async with asyncio.timeout(UNDISTURBED_S):
            outputs = await undisturbed(stack.engines[0], specs, vocabulary)
        workloads = [
            Repeated([workload.finish(spec, outputs[spec.name]) for spec in own])
            for workload, own in zip(drawn, specs, strict=True)
        ]
        schedule = Schedule(stack.engines, plan.seed, plan.weights(OF_REAL_ENGINES), DEMO_TIMES)
        return await _run(stack, schedule, workloads, plan, checks_logprobs=False)


def _stack(commands: Sequence[Sequence[str]], plan: Plan, logs: Path) -> Stack:
    return Stack(commands, logs, gateway_flags=["--tokenizer", DEMO_MODEL, *plan.gateway_flags])


async def _run(
    stack: Stack, schedule: Schedule, workloads: Sequence[Requests], plan: Plan, *, checks_logprobs: bool
) -> Report:
    report = await run(stack, schedule, workloads, plan.seconds, checks_logprobs=checks_logprobs)
    if report.problems:
        report.problems.append(stack.tails())
    report.problems += await stack.stop()
    return report


async def undisturbed(
    engine: Engine, specs: Sequence[Sequence[Spec]], vocabulary: Vocabulary
) -> dict[str, list[Expected]]:
    """What one engine gives for each request, asked directly and without a fault, by the request's name."""
    found: dict[str, list[Expected]] = {}
    async with grpc.aio.insecure_channel(engine.address, options=LOCAL) as channel:
        stub = EngineServiceStub(channel)

        async def ask(spec: Spec) -> None:
            samples = (_tokens(stub, spec, index) for index in range(spec.num_samples))
            outputs = await asyncio.gather(*samples)
            found[spec.name] = [Expected(tokens, text=vocabulary.decode(tokens)) for tokens in outputs]

        await asyncio.gather(*(ask(spec) for own in specs for spec in own))
    return found


async def _tokens(stub: EngineServiceStub, spec: Spec, index: int) -> list[int]:
    sampling = spec.request().sampling
    sampling.ClearField("n")
    sampling.ClearField("logprobs")
    request = engine_pb.GenerateTokensRequest(
        prompt_token_ids=spec.prompt_ids, sampling=sampling, sample_index=index
    )
    tokens: list[int] = []
    call = stub.GenerateTokens(request)
    try:
        async for response in call:
            tokens += response.token_ids
    finally:
        call.cancel()
    return tokens
