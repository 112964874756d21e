"""What a runner is told at load, and what it says about itself afterwards. Two frozen records; no behaviour
but checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("auto", "float32", "bfloat16", "float16")
HEAD_FORMATS = ("auto", "none", "int8")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4")


class RunnerConfigError(ValueError):
    """A setting cannot be served; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Either `source` (a checkpoint directory) or `artifacts` and `model` (and `version`) say what to load.

    `kv_dtype` "auto" stores K and V as the activations are. `is_deterministic` None follows the dtype: on for
    float32 on a CPU, off otherwise. `num_blocks` wins over `kv_memory_bytes`; without both the cache holds
    `max_batch_size` sequences of full length, but at most 1 GiB; on a GPU, what `gpu_memory` (bytes, or a
    fraction of the device as a float) leaves beside weights and activations. `has_graphs`: decode steps of a
    GPU are CUDA graphs. `cache_dir` keeps measurements between starts. `is_poisoned` fills the cache with
    NaN. `has_native_kernels`: on a CPU in bfloat16, use the kernels in C where they can be had.
    `quantize_head` "int8" rounds an output head in 16 bits to 8 while it is loaded; "auto" does so for a
    quantised model on the native kernels.
    """

    source: Path | None = None
    artifacts: Path | None = None
    model: str | None = None
    version: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    is_deterministic: bool | None = None
    block_size: int = 128
    num_blocks: int | None = None
    kv_memory_bytes: int | None = None
    gpu_memory: float | int | None = None
    has_graphs: bool = True
    max_batched_tokens: int = 2048
    max_batch_size: int = 64
    max_model_len: int | None = None
    num_threads: int | None = None
    cache_dir: Path | None = None
    is_poisoned: bool = False
    has_native_kernels: bool = True
    quantize_head: str = "auto"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.artifacts is None):
            raise RunnerConfigError("give either source or artifacts")
        if self.artifacts is not None and not self.model:
            raise RunnerConfigError("artifacts needs a model name")
        if self.dtype not in DTYPES:
            raise RunnerConfigError(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.kv_dtype not in KV_DTYPES:
            known = ", ".join(KV_DTYPES)
            raise RunnerConfigError(f"kv_dtype must be one of {known}, found {self.kv_dtype!r}")
        if self.quantize_head not in HEAD_FORMATS:
            known = ", ".join(HEAD_FORMATS)
            raise RunnerConfigError(f"quantize_head must be one of {known}, found {self.quantize_head!r}")
        if self.quantize_head == "int8" and self.device != "cpu":
            raise RunnerConfigError(f"quantize_head int8 is for CPUs; the device is {self.device}")
        self._check_gpu_memory()
        if self.block_size not in BLOCK_SIZES:
            raise RunnerConfigError(f"block_size must be one of {BLOCK_SIZES}, found {self.block_size}")
        for name in ("max_batched_tokens", "max_batch_size"):
            if getattr(self, name) < 1:
                raise RunnerConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("num_blocks", "kv_memory_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunnerConfigError(f"{name} must be at least 1, found {value}")

    def _check_gpu_memory(self) -> None:
        wanted = self.gpu_memory
        if wanted is None:
            return
        if self.device == "cpu":
            raise RunnerConfigError("gpu_memory is for GPUs; the device is cpu (see kv_memory_bytes)")
        if wanted <= 0 or (isinstance(wanted, float) and wanted > 1):
            raise RunnerConfigError(f"gpu_memory must be bytes or a fraction in (0, 1], found {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What is loaded and how it computes. `numerics_id`: equal ids mean equal bits for equal inputs.

    `kernel_paths` maps an operation to the code that runs it, for people. `crossover_rows`: rows from which
    4-bit linears are dequantised instead of multiplied packed (None where there is only one path).
    """

    model_name: str
    artifact_version: str
    artifact_digest: str
    tokenizer_digest: str
    architecture: str
    vocab_size: int
    num_layers: int
    max_model_len: int
    num_blocks: int
    block_size: int
    kv_bytes_per_token: int
    weight_bytes: int
    dtype: str
    kv_dtype: str
    device: str
    numerics_id: str
    is_deterministic: bool
    num_threads: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    crossover_rows: int | None = None
    kernel_paths: dict[str, str] = field(default_factory=dict)
