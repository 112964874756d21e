"""The engine's configuration: every flag of `serve`. Knows no torch and loads nothing."""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.engine.runner.config import BLOCK_SIZES, DTYPES, HEAD_FORMATS, KV_DTYPES
from weft.config import ConfigError, load_config, option, parse_size
from weft.limits import SamplingLimitFlags, limit_flag
from weft.logs import LEVELS
from weft.rpc.address import Address, parse_address
from weft.rpc.guard import ServerFlags, check_server_flags

PROG = "python -m services.engine serve"
ENV_PREFIX = "WEFT_ENGINE_"
MAX_COUNT = 1 << 20


def parse_gpu_memory(text: str) -> float | int:
    """A fraction of the device when it is a number up to 1, else a size in bytes."""
    if text.strip().replace(".", "", 1).isdigit() and float(text) <= 1:
        return float(text)
    return parse_size(text)


@dataclass(frozen=True)
class EngineConfig(ServerFlags, SamplingLimitFlags):
    """Flags of `serve`; WEFT_ENGINE_* variables stand in for them."""

    artifacts: Path | None = option(None, "artifact root; needs --model", metavar="DIR")
    model: str | None = option(None, "name of the model below the artifact root", metavar="NAME")
    version: str | None = option(None, "version to serve instead of the current one", metavar="V")
    source: Path | None = option(
        None, "a Hugging Face or AutoAWQ checkpoint directory to serve as it is", metavar="HF_DIR"
    )
    listen: Address = option(
        parse_address("127.0.0.1:50051"), "address to listen on", parse=parse_address, metavar="HOST:PORT"
    )
    metrics: Address | None = option(
        None, "address to serve Prometheus metrics on", parse=parse_address, metavar="HOST:PORT"
    )
    device: str = option("cpu", "where the model runs: cpu, cuda, or cuda:N for the Nth GPU")
    dtype: str = option("auto", "type of the activations; auto takes what is fast here", choices=DTYPES)
    kv_dtype: str = option(
        "auto", "type of K and V in the cache; auto is that of the activations", choices=KV_DTYPES
    )
    deterministic: bool | None = option(
        None, "bit-equal logits in any batch; unset means on for float32 and for the native kernels on a CPU"
    )
    native_kernels: bool = option(
        True, "on a CPU in bfloat16, compute with kernels in C, compiled at the first start; needs gcc"
    )
    quantize_head: str = option(
        "auto",
        "round an output head in 16 bits to 8 when it is loaded; auto does so for a quantized model on the "
        "native kernels",
        choices=HEAD_FORMATS,
    )
    block_size: int = option(128, "tokens in a block of the KV cache", metavar="N")
    num_blocks: int | None = option(None, "blocks of the KV cache", metavar="N")
    kv_memory: int | None = option(
        None, "memory of the KV cache, as in 1GiB", parse=parse_size, metavar="SIZE"
    )
    gpu_memory: float | int | None = option(
        None,
        "memory of the GPU to use, weights included: 40GiB, or a fraction of it such as 0.8; unset takes "
        "nine tenths of what is free",
        parse=parse_gpu_memory,
        metavar="SIZE",
    )
    cuda_graphs: bool = option(True, "run decode steps as CUDA graphs, on a GPU")
    max_batch_size: int = option(64, "sequences that run at once", metavar="N")
    max_batched_tokens: int = option(2048, "tokens that one step computes", metavar="N")
    prefill_chunk: int = option(512, "prompt tokens of one sequence that one step computes", metavar="N")
    max_model_len: int | None = option(
        None, "longest prompt and output together; unset takes the model's", metavar="N"
    )
    max_queue_size: int = option(512, "sequences that may wait", metavar="N")
    prefix_cache: bool = option(True, "reuse the cache of earlier prompts")
    threads: int | None = option(None, "threads to compute with; unset leaves it to torch", metavar="N")
    cache_dir: Path | None = option(
        None,
        "where measurements are kept between starts; unset means ~/.cache/weft when it can be written",
        metavar="DIR",
    )
    api_key_file: Path | None = option(
        None, "file of hashed API keys; without it everybody may call", metavar="FILE"
    )
    # What gateways send is larger than what their clients do: prompts as token ids, with what was emitted.
    max_message_bytes: int = limit_flag("max_message_bytes", 64 << 20)
    drain_seconds: float = option(30.0, "how long running sequences may go on after a signal", metavar="S")
    log_level: str = option("info", "what is logged", choices=LEVELS)

    def __post_init__(self) -> None:
        self._check_source()
        check_server_flags(self)
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError("--block-size", f"{self.block_size} is none of {sizes}")
        if self.num_blocks is not None and self.kv_memory is not None:
            raise ConfigError("--num-blocks", "either it or --kv-memory, not both")
        for name in (
            "num_blocks",
            "kv_memory",
            "max_batch_size",
            "max_batched_tokens",
            "prefill_chunk",
            "max_model_len",
            "max_queue_size",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("--" + name.replace("_", "-"), "must be at least 1")
        for name in ("max_batch_size", "max_batched_tokens", "max_queue_size"):
            if getattr(self, name) > MAX_COUNT:
                raise ConfigError("--" + name.replace("_", "-"), f"must be at most {MAX_COUNT}")
        if self.max_batched_tokens < self.max_batch_size:
            # Else a full batch of decodes would not fit into a step.
            raise ConfigError("--max-batched-tokens", "must not be below --max-batch-size")
        if self.drain_seconds < 0:
            raise ConfigError("--drain-seconds", "must not be negative")

    def _check_source(self) -> None:
        if (self.artifacts is None) == (self.source is None):
            raise ConfigError("--artifacts", "either it or --source must be given, and not both")
        if self.artifacts is not None and not self.model:
            raise ConfigError("--model", "is needed with --artifacts")
        if self.source is not None and self.version is not None:
            raise ConfigError("--version", "belongs to --artifacts")


def user_cache_dir() -> Path | None:
    """~/.cache/weft when it is there or can be made, and can be written; else None. Makes nothing."""
    try:
        directory = Path.home() / ".cache" / "weft"
    except RuntimeError:
        return None  # a user without a home
    nearest = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    can_write = os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)
    return directory if can_write else None


def load(argv: Sequence[str]) -> EngineConfig:
    """The configuration from flags and environment; exits with code 2 when it is bad."""
    return load_config(
        EngineConfig, argv, prog=PROG, env_prefix=ENV_PREFIX, description="Serve one model over gRPC."
    )
