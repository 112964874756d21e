"""The decisions taken at load: dtype, determinism, cache size, and the record of them.

Knows configuration and hardware; `ModelRunner` is assembled from these by `load_runner`.
"""

from __future__ import annotations

import logging
import platform
from importlib.metadata import version

import torch

from services.engine.kernels import int4pack, native, native_layer, native_linear
from services.engine.kernels.kv_format import KVFormat
from services.engine.kernels.numerics import KEY_TILE, Numerics
from services.engine.models.config import ModelConfig
from services.engine.models.llama import Llama
from services.engine.models.quantization import PER_CHANNEL
from services.engine.runner.config import RunnerConfig, RunnerConfigError, RunnerInfo
from services.engine.runner.kv_cache import KVCache, kv_bytes_per_token
from services.engine.runner.source import Source

AUTO_FLOAT32_WEIGHTS = 64_000_000
"""Up to so many layer weights, dtype auto is float32 where the native kernels do not serve: dequantising them
takes about 20 ms of a step on two cores.
"""

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_numerics(config: RunnerConfig, model: ModelConfig) -> Numerics:
    """dtype and determinism on a CPU, and whether the native kernels are in use from now on. Raises
    RunnerConfigError for a combination that there is not.
    """
    if config.dtype == "float16":
        raise RunnerConfigError("dtype float16 is for GPUs: a CPU computes it many times slower")
    wants_native = config.has_native_kernels and config.dtype in ("auto", "bfloat16")
    native.use(native.library(config.cache_dir) if wants_native else None)
    dtype = _auto_dtype(config, model) if config.dtype == "auto" else _DTYPES[config.dtype]
    if dtype != torch.bfloat16:
        native.use(None)
    has_native = native.active() is not None
    is_deterministic = config.is_deterministic
    if is_deterministic is None:
        is_deterministic = dtype == torch.float32 or has_native
    if is_deterministic and dtype != torch.float32 and not has_native:
        raise RunnerConfigError(
            "deterministic mode on a CPU needs dtype float32, or the native kernels: torch's bfloat16 "
            "products round by batch size"
        )
    # The native products give a row the same bits beside any others: nothing needs to be padded.
    return Numerics(dtype, is_deterministic, row_tile=1) if has_native else Numerics(dtype, is_deterministic)


def is_head_quantized(config: RunnerConfig, model: ModelConfig) -> bool:
    """Whether the output head is rounded to 8 bits: as told; "auto" does so for quantised models."""
    has_native = native.active() is not None
    if config.quantize_head == "int8" and not has_native:
        _log.warning(
            "the output head stays as it is stored: 8 bits need the native kernels, in bfloat16 on a CPU"
        )
    is_wanted = config.quantize_head == "int8" or (
        config.quantize_head == "auto" and model.quantization is not None
    )
    return has_native and is_wanted


def _auto_dtype(config: RunnerConfig, model: ModelConfig) -> torch.dtype:
    """bfloat16 where the native kernels compute all of the model's products, and so keep the guarantee of
    equal bits; else float32, with that guarantee, while it costs little; else bfloat16 if the CPU is fast at
    it.
    """
    if _is_native_throughout(config, model):
        return torch.bfloat16
    if config.is_deterministic or num_layer_weights(model) <= AUTO_FLOAT32_WEIGHTS:
        return torch.float32
    if model.quantization is not None:
        shape = (model.hidden_size, 64, abs(model.quantization.group_size))
        is_fast = int4pack.is_supported(*shape, Numerics(torch.bfloat16, is_deterministic=False))
    else:
        is_fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if is_fast else torch.float32


def _is_native_throughout(config: RunnerConfig, model: ModelConfig) -> bool:
    """Whether no linear and no attention would be left to torch."""
    numerics = Numerics(torch.bfloat16, is_deterministic=True)
    group = PER_CHANNEL if model.quantization is None else model.quantization.group_size
    widths = (model.hidden_size, model.num_heads * model.head_dim, model.intermediate_size)
    return (
        config.kv_dtype in ("auto", "bfloat16")
        and native_layer.takes_attention(
            model.head_dim, model.num_heads // model.num_kv_heads, model.attention_softcap
        )
        and all(
            native_linear.is_supported(width, width if group == PER_CHANNEL else group, numerics)
            for width in widths
        )
    )


def num_layer_weights(model: ModelConfig) -> int:
    """Weights of all decoder linears."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
    return model.num_layers * (heads + 3 * model.hidden_size * model.intermediate_size)


def numerics_id(numerics: Numerics, kv_format: KVFormat, paths: dict[str, str], fingerprint: str) -> str:
    """Equal ids mean equal bits: what was chosen, where it runs, and the fingerprint of logits that were
    computed.
    """
    name = str(numerics.dtype).removeprefix("torch.")
    weights = "+".join(sorted(set(paths.values())))
    mode = "deterministic" if numerics.is_deterministic else "fast"
    return (
        f"{name}-kv{kv_format.name}-{_where(numerics)}-{weights}-{mode}"
        f"-torch{torch.__version__.split('+')[0]}-{fingerprint}"
    )


def _where(numerics: Numerics) -> str:
    """The class of device, and what else there decides the order of sums."""
    device = numerics.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # A fast engine splits sums by how many multiprocessors share them.
        split = "" if numerics.is_deterministic else f"x{properties.multi_processor_count}"
        return f"cuda-sm{properties.major}{properties.minor}{split}-triton{version('triton')}"
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    return f"cpu-{platform.machine()}-{capability}-t{torch.get_num_threads()}-tile{KEY_TILE}v1"


def make_info(
    config: RunnerConfig,
    source: Source,
    model: Llama,
    cache: KVCache,
    numerics: Numerics,
    max_model_len: int,
    fingerprint: str,
    crossover_rows: int | None,
) -> RunnerInfo:
    """The runner's record of itself."""
    paths = linear_paths(model)
    return RunnerInfo(
        model_name=source.model_name,
        artifact_version=source.version,
        artifact_digest=source.digest,
        tokenizer_digest=source.tokenizer_digest,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        num_layers=model.config.num_layers,
        max_model_len=max_model_len,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        kv_bytes_per_token=kv_bytes_per_token(model.config, cache.kv_format),
        weight_bytes=weight_bytes(model),
        dtype=str(numerics.dtype).removeprefix("torch."),
        kv_dtype=cache.kv_format.name,
        device=config.device,
        numerics_id=numerics_id(numerics, cache.kv_format, paths, fingerprint),
        is_deterministic=numerics.is_deterministic,
        num_threads=torch.get_num_threads(),
        bos_token_id=model.config.bos_token_id,
        eos_token_ids=model.config.eos_token_ids,
        crossover_rows=crossover_rows,
        kernel_paths={"attention": _attention_path(numerics), **paths},
    )


def _attention_path(numerics: Numerics) -> str:
    if numerics.device.type == "cpu":
        return f"tiled-{KEY_TILE}" if native.active() is None else f"native+tiled-{KEY_TILE}"
    return "triton-ragged" if numerics.is_deterministic else "triton-ragged+triton-split-kv"


def linear_paths(model: Llama) -> dict[str, str]:
    """Which code runs each kind of linear: {"qkv": ..., "head": ...}; several are joined by "+"."""
    found: dict[str, set[str]] = {}
    for name, linear in model.linears.items():
        found.setdefault(name.rsplit(".", 1)[-1], set()).add(linear.path)
    return {kind: "+".join(sorted(paths)) for kind, paths in found.items()}


def weight_bytes(model: Llama) -> int:
    """Bytes of all weights in memory; a head tied to the embedding counts once."""
    total = model.embedding.nbytes + sum(linear.num_bytes for linear in model.linears.values())
    norms = sum(norm.nbytes for layer in model.layers for norm in layer.norms)
    is_shared = model.config.tie_word_embeddings and model.linears["head"].path == "dense"
    tied = model.linears["head"].num_bytes if is_shared else 0
    return total + norms + model.norm.nbytes - tied
