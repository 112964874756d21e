"""Throughput on one load: the engine's core and runner against transformers, on the same device.

All requests are there at the start; prompts are random, of random lengths; every request gets the same number
of new tokens, greedily. The clock runs from the first request to the last token and is the host's. Each side
serves the whole load once before, so that neither compiling nor the making of its cache is counted. Theirs
are continuous batching (`generate_batch`) in bf16 with random weights of the same shape, and `generate` on
padded batches.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_adapter import make_core, random_runner
from benchmarks.gpu_measure import Bench, Row
from benchmarks.gpu_model import LLAMA_8B, TINY
from services.engine.core.sequence import SamplingParams, Sequence

TARGET = 3.0
"""Times transformers' continuous batching."""
STATIC_BATCH = 32


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts and how many tokens each gets."""

    prompts: list[list[int]]
    num_new: int


def run(bench: Bench) -> None:
    """Ours in both weight widths, then theirs, then the comparison."""
    load = _load(bench)
    ours: dict[str, float] = {}
    for name, bits in (("int4", 4), ("bf16", 16)):
        case = f"weft {name} weights"
        with bench.case(case):
            ours[name] = _report(bench, case, load, _weft(bench, bits, load))
        _free()
    with bench.case("transformers' model"):
        model, config = _transformers_model(bench)
        case = "transformers generate_batch (continuous batching), bf16"
        with bench.case(case):
            rate = _report(bench, case, load, _continuous(bench, model, config))
            _compare(bench, ours, case, rate, TARGET)
        getattr(model, "destroy_cached_continuous_batching_manager", _free)()
        _free()
        case = f"transformers generate, batches of {STATIC_BATCH}, bf16"
        with bench.case(case):
            rate = _report(bench, case, load, _static(bench, model, config))
            _compare(bench, ours, case, rate, None)


def _compare(bench: Bench, ours: dict[str, float], case: str, base: float, target: float | None) -> None:
    for name, rate in ours.items():
        found = f"weft {name} over {case}"
        bench.emit(_ratio(bench, found, rate, base, target if name == "int4" else None))


def _ratio(bench: Bench, case: str, rate: float, base: float, target: float | None) -> Row:
    if bench.is_dry:
        return Row(bench.name, case, note="ran")
    return Row(bench.name, case, "tokens/s", rate, None, None, "that", base, rate / base, target)


def _load(bench: Bench) -> Load:
    requests, shortest, longest, num_new = (3, 5, 12, 2) if bench.is_dry else (96, 128, 1024, 128)
    vocabulary = (TINY if bench.is_dry else LLAMA_8B)["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (requests,), generator=generator).tolist()
    prompts = [torch.randint(5, int(vocabulary), (n,), generator=generator).tolist() for n in lengths]
    return Load(prompts, num_new)


def _report(bench: Bench, case: str, load: Load, serve: Callable[[Load], int]) -> float:
    """Serve the load twice, and emit new tokens per second of the second time."""
    serve(load)
    began = time.perf_counter()
    num_tokens = serve(load)
    seconds = time.perf_counter() - began
    expected = len(load.prompts) * load.num_new
    if num_tokens != expected:
        raise ValueError(f"{num_tokens} tokens, {expected} expected")
    prompt_tokens = sum(map(len, load.prompts))
    note = f"{len(load.prompts)} requests, {prompt_tokens} prompt tokens, {num_tokens} new, {seconds:.2f} s"
    rate = num_tokens / seconds
    bench.emit(Row(bench.name, case, "tokens/s", rate, note=note))
    return rate


def _weft(bench: Bench, weight_bits: int, load: Load) -> Callable[[Load], int]:
    batch = len(load.prompts)
    longest = max(map(len, load.prompts)) + load.num_new
    tokens = 64 if bench.is_dry else 8192
    runner = random_runner(
        bench,
        TINY if bench.is_dry else LLAMA_8B,
        weight_bits=weight_bits,
        num_blocks=batch * (-(-longest // 128) + 1),
        max_batch_size=batch,
        max_model_len=512 if bench.is_dry else 8192,
        max_batched_tokens=tokens,
    )
    runner.warm_up()

    def serve(load: Load) -> int:
        core = make_core(runner, max_batch_size=batch, max_batched_tokens=tokens)
        for index, prompt in enumerate(load.prompts):
            params = SamplingParams(max_tokens=load.num_new, temperature=0.0, ignore_eos=True)
            core.add(Sequence(index, list(prompt), params))
        num_tokens = 0
        while core.num_live:
            num_tokens += len(core.step().tokens)
        return num_tokens

    return serve


def _transformers_model(bench: Bench) -> tuple[Any, Any]:
    """(model with random weights in bf16, generation settings) of the same shape."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    raw = {
        key: value for key, value in (TINY if bench.is_dry else LLAMA_8B).items() if key != "architectures"
    }
    config = LlamaConfig(**raw)
    default = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device), torch.inference_mode(False):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    # No id ends a text: every request gets all of its tokens.
    return model, GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)


def _continuous(bench: Bench, model: Any, config: Any) -> Callable[[Load], int]:
    """transformers' own continuous batching; its manager is kept from the first load to the next. Sizes are
    its own choice on a device; on a CPU it would take most of the memory for its cache.
    """
    if not hasattr(model, "generate_batch"):
        raise ImportError("this version of transformers has no generate_batch")
    settings: dict[str, Any] = {"generation_config": config}
    if "persistent_manager" in inspect.signature(model.generate_batch).parameters:
        settings["persistent_manager"] = True
    if bench.is_dry:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)

    def serve(load: Load) -> int:
        config.max_new_tokens = load.num_new
        # It updates tensors in a thread of its own, which is outside of this one's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            outputs = model.generate_batch(load.prompts, **settings)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return serve


def _static(bench: Bench, model: Any, config: Any) -> Callable[[Load], int]:
    """Batches in order of arrival, padded on the left to the longest of each."""

    def serve(load: Load) -> int:
        config.max_new_tokens = config.min_new_tokens = load.num_new
        num_tokens = 0
        for begin in range(0, len(load.prompts), STATIC_BATCH):
            some = load.prompts[begin : begin + STATIC_BATCH]
            longest = max(map(len, some))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in some], device=bench.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=bench.device)
            output = model.generate(ids, attention_mask=mask, generation_config=config)
            num_tokens += output.shape[0] * (output.shape[1] - longest)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return num_tokens

    return serve


def _free() -> None:
    """Return a finished model's memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
