"""The engine as a service: load, serve, drain, close, and what happens when the device fails.

Puts the parts together and owns none of their work. torch is imported by the load alone, in a thread, so
that health checks are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from services.engine.config import EngineConfig, user_cache_dir
from services.engine.core.admission import CoreLimits
from services.engine.core.batch import ForwardRunner, Runner
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.errors import IntegrityError
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.loop import GC_THRESHOLDS, EngineLoop
from services.engine.metrics import EngineMetrics, MetricsServer
from services.engine.rpc import convert
from services.engine.rpc.errors import engine_failed, shutting_down
from services.engine.rpc.servicer import SERVICE_NAME, EngineServicer
from services.engine.runner.config import RunnerConfig, RunnerInfo
from weft import __version__, logs
from weft.artifact.store import ArtifactStore
from weft.limits import limits_of
from weft.process_metrics import add_process_metrics
from weft.rpc.errors import StatusError
from weft.rpc.server import Server, in_daemon_thread
from weft.v1.engine_service_pb2_grpc import add_EngineServiceServicer_to_server

FAULT_EXIT_CODE = 70
# After a fault the event loop ends the streams and the process; if it cannot, this ends the process.
FAULT_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 0.2
# A step may run this much longer than its own bound before health says so.
HUNG_GRACE_S = 1.0

log = logs.get_logger("engine")


def runner_config(config: EngineConfig) -> RunnerConfig:
    """The part of the configuration that concerns the runner."""
    return RunnerConfig(
        source=config.source,
        artifacts=config.artifacts,
        model=config.model,
        version=config.version,
        device=config.device,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        is_deterministic=config.deterministic,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_memory_bytes=config.kv_memory,
        gpu_memory=config.gpu_memory,
        has_graphs=config.cuda_graphs,
        max_batched_tokens=config.max_batched_tokens,
        max_batch_size=config.max_batch_size,
        max_model_len=config.max_model_len,
        num_threads=config.threads,
        has_native_kernels=config.native_kernels,
        quantize_head=config.quantize_head,
        cache_dir=config.cache_dir or user_cache_dir(),
    )


def load_model(config: EngineConfig) -> tuple[Runner, RunnerInfo]:
    """Load what the configuration names. Takes seconds to minutes and cannot be interrupted."""
    from services.engine.runner.model_runner import load_runner

    runner = load_runner(runner_config(config))
    return runner, runner.info


def make_core(config: EngineConfig, runner: Runner | ForwardRunner, info: RunnerInfo) -> EngineCore:
    """The core around a runner."""
    blocks = BlockManager(
        info.num_blocks,
        info.block_size,
        namespace=info.artifact_digest,
        has_prefix_cache=config.prefix_cache,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_batch_size=config.max_batch_size,
            max_batched_tokens=config.max_batched_tokens,
            prefill_chunk=min(config.prefill_chunk, config.max_batched_tokens),
        ),
        blocks,
    )
    limits = CoreLimits(info.vocab_size, info.max_model_len, config.max_queue_size)
    return EngineCore(runner, scheduler, blocks, limits)


class EngineApplication:
    """One engine process, between `serve` and the parts."""

    service_names = (SERVICE_NAME,)

    def __init__(
        self,
        config: EngineConfig,
        *,
        load_model: Callable[[EngineConfig], tuple[Runner | ForwardRunner, RunnerInfo]] | None = None,
    ) -> None:
        """`load_model` loads something else than the configuration names: a runner without a model."""
        self._config = config
        self._load_model = load_model
        self._registry = CollectorRegistry()
        self._metrics_server: MetricsServer | None = None
        self._core: EngineCore | None = None
        self._loop: EngineLoop | None = None
        self._servicer: EngineServicer | None = None
        self._watch: asyncio.Task[None] | None = None
        self._held: int | None = None

    @property
    def core(self) -> EngineCore:
        """The core; its owner is the loop's thread. Raises RuntimeError before `load` has made it."""
        if self._core is None:
            raise RuntimeError("nothing is loaded")
        return self._core

    async def load(self, server: Server) -> None:
        """Load the model, start the loop, register the service. Raises what the runner raises."""
        config = self._config
        if config.metrics is not None:
            add_process_metrics(self._registry, "engine")
            self._metrics_server = MetricsServer(self._registry, config.metrics)
            log.info("metrics", address=str(self._metrics_server.address))
        started = time.monotonic()
        load_runner = self._load_model or load_model
        runner, info = await in_daemon_thread(lambda: load_runner(config), "model-load")
        events = asyncio.get_running_loop()
        if config.artifacts is not None and info.artifact_version:
            # Gateways read the tokenizer of the version that is served, for as long as it is.
            self._held = ArtifactStore(config.artifacts).hold(info.model_name, info.artifact_version)

        def on_fault(error: BaseException) -> None:
            last_resort = threading.Timer(FAULT_TIMEOUT_S, os._exit, (FAULT_EXIT_CODE,))
            last_resort.daemon = True
            last_resort.start()
            log.failure("device or loop fault", error)
            events.call_soon_threadsafe(self._on_fault, server)

        self._core = make_core(config, runner, info)
        metrics: list[EngineMetrics] = []
        loop = EngineLoop(self._core, on_fault=on_fault, observe=lambda report: metrics[0].observe(report))
        metrics.append(
            EngineMetrics(
                self._registry,
                loop.load,
                model_name=info.model_name,
                block_size=info.block_size,
                num_blocks=info.num_blocks,
                rpcs=server.counters,
            )
        )
        response = convert.info_response(
            info,
            max_batch_size=config.max_batch_size,
            max_batched_tokens=config.max_batched_tokens,
            max_queue_size=config.max_queue_size,
            has_prefix_cache=config.prefix_cache,
            weft_version=__version__,
        )
        self._servicer = EngineServicer(
            loop, response, on_drain=server.set_not_serving, limits=limits_of(config)
        )
        add_EngineServiceServicer_to_server(self._servicer, server.grpc)
        # What was loaded stays: no collection needs to look through it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        loop.start()
        self._loop = loop
        self._watch = asyncio.create_task(self._watch_steps(loop, server))
        log.info(
            "loaded",
            seconds=round(time.monotonic() - started, 3),
            model=info.model_name,
            version=info.artifact_version,
            architecture=info.architecture,
            numerics=info.numerics_id,
            deterministic=info.is_deterministic,
            blocks=info.num_blocks,
            block_size=info.block_size,
            max_model_len=info.max_model_len,
        )

    def _on_fault(self, server: Server) -> None:
        server.request_stop(FAULT_EXIT_CODE)
        if self._servicer is not None:
            self._servicer.fail_all(engine_failed())

    async def _watch_steps(self, loop: EngineLoop, server: Server) -> None:
        """Health follows the steps: NOT_SERVING while one hangs, SERVING again when it has ended after
        all.
        """
        is_hung = False
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            beat = loop.heartbeat()
            was_hung, is_hung = is_hung, beat.step_elapsed_s > beat.step_bound_s + HUNG_GRACE_S
            if is_hung == was_hung:
                continue
            log.error("step hangs" if is_hung else "step has ended after all", step=beat.step)
            if not loop.is_draining and not server.is_stopping:
                server.health.set_serving(not is_hung)

    async def drain(self) -> None:
        """Let what runs finish, within --drain-seconds; then end the links."""
        if self._servicer is None:
            return
        try:
            async for num_live in self._servicer.drain(self._config.drain_seconds):
                log.debug("draining", live=num_live)
        except StatusError as error:
            log.error("drain gave up", reason=error.message, live=self._servicer.num_live)
        self._servicer.fail_all(shutting_down())

    async def close(self) -> None:
        """Stop the loop and everything beside it."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._loop is not None and self._core is not None:
            await asyncio.to_thread(self._loop.stop, 5.0)
            counters = self._loop.load().counters
            log.info("sequences", begun=counters.begun, ended=counters.ended, live=self._core.num_live)
            try:
                self._core.check_integrity()
            except IntegrityError as error:
                log.failure("the block accounting does not add up", error)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        if self._held is not None:
            os.close(self._held)
            self._held = None
