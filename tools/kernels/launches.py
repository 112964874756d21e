"""What the engine really launches: the model's own code run on tensors without memory, its launches written
down.

`compile_cases()` of a kernel module says what its author expects to be launched. Here a decoder layer of the
shape of known models runs on torch's meta device as if on sm_90, through the GPU's operations, and each
distinct launch, with Triton's own specialisation of its arguments, becomes one more case. A launch that
spills, or does not compile, is found whether or not anyone thought of it. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from services.engine.kernels import gpu, ops
from services.engine.kernels.gpu import w4a16_repack
from services.engine.kernels.gpu.backend import GpuBackend
from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.sampling import PARAM_WORDS, draw
from services.engine.kernels.kv_format import FORMATS, LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch
from services.engine.models.llama import Llama
from services.engine.models.registry import ARCHITECTURES
from tools.kernels.gates import MULTIPROCESSORS

ARCHS = (90,)
META = torch.device("meta")
GROUP, BLOCK_SIZE, MAX_CONTEXT = 128, 128, 8192
HOPPER = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=MULTIPROCESSORS[90].shared_per_block,
)
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN_7B = LLAMA_8B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
}
GEMMA_9B = LLAMA_8B | {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "hidden_size": 3584,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 4096,
}
"""A layer with a window and one without; both cap their scores."""
DECODES = (1, 2, 8, 16, 24, 64, 100, 256)
PREFILLS = ((2, 1), (17,), (512,), (300, 1, 1, 63))
CONTEXTS = (256, 4096)


def launch_key(case: CompileCase) -> str:
    """Equal for launches with the same machine code but for the arithmetic of addresses: Triton makes a copy
    of a kernel for every size that is 1 or a multiple of 16, and those count as one.
    """
    declared = {param.name for param in case.kernel.params if param.is_constexpr}
    constants = {name: str(value) for name, value in case.constexprs.items() if name in declared}
    absent = {name for name, value in case.constexprs.items() if value is None}
    pointers = {name: kind for name, kind in case.signature.items() if kind.startswith("*")}
    launch = (case.num_warps, case.num_stages, case.max_registers, case.has_fp_fusion)
    parts = (sorted(constants.items()), sorted(absent), sorted(pointers.items()), launch)
    return f"{case.kernel.__module__}.{case.kernel.__name__} {parts}"


class Recorder:
    """Takes the place of a launch. `context` names what is being run; `cases` what was launched, each
    distinct launch once, named after the first.
    """

    def __init__(self) -> None:
        self.context = ""
        self.cases: dict[str, CompileCase] = {}
        self._backend = make_backend(GPUTarget("cuda", ARCHS[0], 32))
        self._binders: dict[Any, Any] = {}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Bind and specialise the arguments as Triton does at a launch, and keep the result."""
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self._backend
            )
        bound, specialization, options = self._binders[kernel](*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(
            self._backend, kwargs, bound, specialization, options
        )
        names = list(signature)
        typed = {name: type_ for name, type_ in signature.items() if type_ != "constexpr"}
        aligned = {names[path[0]] for path in attrs}
        case = CompileCase(
            name="",
            kernel=kernel,
            signature=typed,
            constexprs={names[path[0]]: value for path, value in constexprs.items()},
            num_warps=options.num_warps,
            num_stages=options.num_stages,
            unaligned=frozenset(typed.keys() - aligned),
            has_fp_fusion=options.enable_fp_fusion,
            max_registers=options.maxnreg,
            notes={"spills": "a launch that nobody listed may save a register before its loop"},
        )
        key = launch_key(case)
        if key not in self.cases:
            name = f"launched/{kernel.__name__.strip('_').removesuffix('_kernel')}/{self.context}"
            number = sum(known.name.partition("#")[0] == name for known in self.cases.values())
            self.cases[key] = replace(case, name=f"{name}#{number + 1}" if number else name)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Within, launches are written down, meta tensors use the GPU's operations, and the device is sm_90."""
    recorder = Recorder()

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        recorder.launch(kernel, *args, **kwargs)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.dict(ops._BACKENDS, {"meta": GpuBackend}),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=HOPPER),
        mock.patch.object(w4a16_repack, "_params", _params),
    ):
        yield recorder


_checked_params = w4a16_repack._params


def _params(zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
    """Scales and zero points as packed. Packing looks at their values, so there must be some."""
    packed = _checked_params(
        torch.zeros(zeros.shape, dtype=zeros.dtype), torch.ones(scales.shape).half(), dtype
    )
    return packed.to(META)


class MetaWeights:
    """Stands in for the loader of a checkpoint: shapes and dtypes alone."""

    def __init__(self, numerics: Numerics, weight_bits: int) -> None:
        self.numerics = numerics
        self.scratch = Scratch()
        self._weight_bits = weight_bits

    def dense(self, name: str, shape: tuple[int, ...], *, offset: float = 0.0) -> Tensor:
        """A tensor of this shape."""
        return torch.empty(shape, dtype=torch.float32 if offset else self.numerics.dtype, device=META)

    def head(self, embedding: Tensor, name: str) -> Linear:
        """An output projection of its own."""
        return ops.make_dense_linear(self.dense("head", tuple(embedding.shape)), None, self.numerics)

    def linear(
        self,
        parts: Mapping[str, int],
        in_features: int,
        has_bias: bool,
        *,
        order: Tensor | None = None,
        **kind: bool,
    ) -> Linear:
        """One fused linear for all parts."""
        out_features = sum(parts.values())
        if self._weight_bits != 4:
            weight = self.dense("weight", (out_features, in_features))
            return ops.make_dense_linear(weight, None, self.numerics)
        groups = in_features // GROUP
        values = torch.empty(in_features, out_features, dtype=torch.uint8, device=META)
        zeros = torch.empty(groups, out_features, dtype=torch.uint8, device=META)
        scales = torch.empty(groups, out_features, dtype=torch.float16, device=META)
        return ops.make_int4_linear(values, zeros, scales, None, self.numerics, self.scratch, **kind)


def compile_cases() -> list[CompileCase]:
    """Every distinct launch of the models' decodes and prefills, and of sampling, that no kernel module
    lists.
    """
    listed = {launch_key(case) for case in _listed_cases()}
    return [case for key, case in recorded().items() if key not in listed]


def _listed_cases() -> Iterator[CompileCase]:
    for info in pkgutil.iter_modules(gpu.__path__):
        module = importlib.import_module(f"{gpu.__name__}.{info.name}")
        yield from getattr(module, "compile_cases", list)()


def recorded() -> dict[str, CompileCase]:
    """Every distinct launch, by its key."""
    with recording() as recorder, torch.inference_mode():
        for model, raw in (("8B", LLAMA_8B), ("7B", QWEN_7B), ("9B", GEMMA_9B)):
            for is_deterministic in (False, True):
                for weight_bits in (4, 16):
                    mode = f"{model}/{weight_bits} bits" + ("/fixed" if is_deterministic else "")
                    _run_model(recorder, mode, raw, weight_bits, is_deterministic)
        _run_sampling(recorder)
    return recorder.cases


def _run_model(
    recorder: Recorder, mode: str, raw: Mapping[str, Any], weight_bits: int, is_deterministic: bool
) -> None:
    numerics = Numerics(torch.bfloat16, is_deterministic, device=META)
    weights: Any = MetaWeights(numerics, weight_bits)
    architecture = ARCHITECTURES[raw["architectures"][0]]
    model = architecture(architecture.parse(raw), weights, MAX_CONTEXT)
    for name in ("bfloat16", "fp8", "int8", "int4") if weight_bits == 4 else ("bfloat16",):
        cache = _cache(name, model.config.num_kv_heads, model.config.head_dim)
        batches = [(1,) * count for count in DECODES] + list(PREFILLS)
        for lengths, context in itertools.product(batches, CONTEXTS):
            shape = f"{len(lengths)} rows" if set(lengths) == {1} else f"prefill {sum(lengths)}"
            recorder.context = f"{mode}/{name}/{shape}"
            _run_step(model, cache, lengths, max(context, max(lengths)))


def _run_step(model: Llama, cache: LayerCache, lengths: tuple[int, ...], context: int) -> None:
    """One forward of sequences with these many rows each."""
    rows, num_seqs = sum(lengths), len(lengths)
    metadata = AttentionMetadata(
        positions=torch.empty(rows, dtype=torch.int64, device=META),
        slot_mapping=torch.empty(rows, dtype=torch.int64, device=META),
        block_tables=torch.empty(num_seqs, -(-context // BLOCK_SIZE), dtype=torch.int32, device=META),
        query_lens=list(lengths),
        context_lens=[context] * num_seqs,
        block_size=BLOCK_SIZE,
    )
    ids = torch.empty(rows, dtype=torch.int64, device=META)
    caches = [cache] * model.config.num_layers
    model.forward(ids, metadata, caches, torch.empty(num_seqs, dtype=torch.int64, device=META))


def _cache(name: str, num_kv_heads: int, head_dim: int) -> LayerCache:
    kv_format = FORMATS[name]
    shape = (64, num_kv_heads, BLOCK_SIZE, kv_format.row_size(head_dim))
    k, v = (torch.empty(shape, dtype=kv_format.storage, device=META) for _ in range(2))
    if not kv_format.is_quantized:
        return LayerCache(kv_format, k, v)
    params = [torch.empty(shape[:3], dtype=torch.int32, device=META) for _ in range(2)]
    return LayerCache(kv_format, k, v, *params)


def _run_sampling(recorder: Recorder) -> None:
    for rows in (1, 64):
        for has_filters in (False, True):
            recorder.context = f"{rows} rows" + ("/filtered" if has_filters else "")
            draw(
                torch.empty(rows, LLAMA_8B["vocab_size"], device=META),
                torch.empty(rows, PARAM_WORDS, dtype=torch.int32, device=META),
                has_filters=has_filters,
                token_ids=torch.empty(rows, dtype=torch.int64, device=META),
                status=torch.empty(rows, dtype=torch.int32, device=META),
            )
