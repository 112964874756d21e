"""What a run will need at its peak, said before it begins; a run that cannot fit is refused.

The peak is the largest of four moments: the beginning (the embedding table beside the streams), a block's
search, its folding and evaluation, and the end (the output projection beside the streams). Every term follows
from shapes; the interpreter with its libraries is measured. docs/quantizer.md has the formulas. Knows what
each part keeps in memory, and computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from services.quantizer import host_memory
from services.quantizer.canary import NUM_PROMPTS, PROMPT_LENGTH
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.evaluation import LOGITS_PER_CHUNK, TOKENS_PER_CHUNK, VARIANTS
from services.quantizer.inputs import Inputs
from services.quantizer.source import STORED_DTYPES, TOKENS_PER_BATCH, VOCABULARY_SLICE, Source

_MIB = 1 << 20
_FP32 = 4
_SLACK = 64 * _MIB  # small tensors, buffers of libraries, what the allocator keeps of the last block
_SEARCH_COPIES = 6  # of the largest linear's weight in fp32, while candidates are tried
_GRAM_COPIES = 2  # of the largest Gram matrix, scaled for a candidate
_LOGITS_COPIES = 7  # of one chunk's logits of one model: of all three twice, and what compares them
_NUM_INSPECTED_WINDOWS = 8
_INSPECTED_COPIES = 4  # of their hidden states: what two modules took and gave


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes that decide.

    Attributes:
        linears: (out, in) of one block's quantizable linears.
        grams: inputs of every group of linears that share one.
        block_parameters: of one block, all.
        hidden_size, vocab_size: of the model.
        outer_bytes: the largest tensor outside of the blocks, as stored.
        calibration_tokens, sequence_length, evaluation_tokens: of the texts.
        score_bytes: of eager attention over one batch.
    """

    linears: tuple[tuple[int, int], ...]
    grams: tuple[int, ...]
    block_parameters: int
    hidden_size: int
    vocab_size: int
    outer_bytes: int
    calibration_tokens: int
    sequence_length: int
    evaluation_tokens: int
    score_bytes: int = 0

    @classmethod
    def of(cls, source: Source, inputs: Inputs, skipped: set[str]) -> Workload:
        """Of one run. `skipped` linears are not searched."""
        shapes = {name: tuple(p.shape) for name, p in source.block(0).named_parameters()}
        groups = [g for g in source.architecture.groups if not skipped.intersection(g.linears)]
        weights = [shapes[f"{name}.weight"] for group in groups for name in group.linears]
        outer = [
            math.prod(source.checkpoint.shape(name)) * STORED_DTYPES[source.checkpoint.dtype(name)].itemsize
            for name in source.outer_names()
        ]
        texts = [ids for ids in (inputs.calibration, inputs.evaluation) if ids is not None]
        return cls(
            tuple((shape[0], shape[1]) for shape in weights),
            tuple(shapes[f"{group.linears[0]}.weight"][1] for group in groups),
            sum(math.prod(shape) for shape in shapes.values()),
            source.hidden_size,
            source.vocab_size,
            max(outer),
            inputs.calibration.numel(),
            inputs.calibration.shape[1],
            0 if inputs.evaluation is None else inputs.evaluation.numel(),
            max(source.score_bytes(ids.shape[1]) for ids in texts),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the peak by what they are for: on the host, and on a device with memory of its own."""

    host: Mapping[str, int]
    device: Mapping[str, int]

    @property
    def host_bytes(self) -> int:
        """All on the host."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """All on the device; 0 when it is the CPU."""
        return sum(self.device.values())


def estimate(workload: Workload, baseline: int, *, has_device: bool, num_local_workers: int = 0) -> Estimate:
    """`baseline`: bytes that this process uses before it loads a weight."""
    streams = _FP32 * workload.hidden_size * _stream_tokens(workload)
    always = {"interpreter and libraries": baseline, "streams": streams, "slack": _SLACK}
    computed = _largest(_search(workload), _folding(workload), _end(workload))
    if has_device:
        # Weights and what is computed of them lie there; streams, tables and what is written, here.
        kept = {"a block's integers, packed": workload.block_parameters}
        return Estimate({**always, **_beginning(workload), **kept}, {**computed, "slack": _SLACK})
    host = {**always, **_largest(_beginning(workload), computed)}
    if num_local_workers:
        host["local workers"] = num_local_workers * (baseline + sum(_search(workload).values()))
    return Estimate(host, {})


def _largest(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda parts: sum(parts.values()))


def check_fits(
    workload: Workload, config: QuantizerConfig, device: torch.device
) -> tuple[Estimate, int | None]:
    """The estimate, and what the process may have on the host in all (None when the system does not say).

    Raises QuantizerError with figures when the run cannot fit.
    """
    baseline = host_memory.used_bytes()
    found = estimate(
        workload,
        baseline,
        has_device=device.type != "cpu",
        num_local_workers=_num_local_workers(config),
    )
    free = host_memory.available_bytes()
    available = config.memory_limit or (None if free is None else free + baseline)
    if available is not None and found.host_bytes > available:
        raise _refusal("memory", found.host, available)
    if found.device:
        device_free, _ = torch.cuda.mem_get_info(device)
        if found.device_bytes > device_free:
            raise _refusal(f"memory of {config.device}", found.device, device_free)
    return found, available


def plan_text(found: Estimate, available: int | None, blocks: int, resumed: int) -> str:
    """One line for people."""
    text = f"{blocks} blocks, {resumed} of them finished already; " if resumed else f"{blocks} blocks; "
    text += f"needs up to {mebibytes(found.host_bytes)} of memory"
    text += "" if available is None else f", {mebibytes(available)} available"
    return text + (f"; up to {mebibytes(found.device_bytes)} on the device" if found.device else "")


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{-(-size // _MIB)} MiB"


def _stream_tokens(workload: Workload) -> int:
    evaluated = len(VARIANTS) * workload.evaluation_tokens
    return workload.calibration_tokens + evaluated + NUM_PROMPTS * PROMPT_LENGTH


def _beginning(workload: Workload) -> dict[str, int]:
    longest = max(workload.calibration_tokens, workload.evaluation_tokens)
    return {"embedding": workload.outer_bytes, "embedded text": 2 * _FP32 * workload.hidden_size * longest}


def _search(workload: Workload) -> dict[str, int]:
    """Of the whole block the source's weights; of one linear all that a candidate takes."""
    weight = max(num_out * num_in for num_out, num_in in workload.linears)
    inspected = min(workload.calibration_tokens, _NUM_INSPECTED_WINDOWS * workload.sequence_length)
    workspace = _FP32 * (_SEARCH_COPIES * weight + _GRAM_COPIES * max(workload.grams) ** 2)
    return {
        "a block in fp32": _FP32 * workload.block_parameters,
        "Gram matrices": _FP32 * sum(num_in**2 for num_in in workload.grams),
        "search": max(workspace, _activations(workload)),
        "inspected windows": _INSPECTED_COPIES * _FP32 * workload.hidden_size * inspected,
    }


def _folding(workload: Workload) -> dict[str, int]:
    """The block twice, as it was and as it will be, and its integers; then a batch through each."""
    weight = max(num_out * num_in for num_out, num_in in workload.linears)
    workspace = _FP32 * (_SEARCH_COPIES * weight + _GRAM_COPIES * max(workload.grams) ** 2)
    return {
        "a block in fp32": _FP32 * workload.block_parameters,
        "the block quantized": (_FP32 + 1) * workload.block_parameters,
        "Gram matrices": _FP32 * sum(num_in**2 for num_in in workload.grams),
        "search": max(workspace, _activations(workload)),
    }


def _end(workload: Workload) -> dict[str, int]:
    chunk = max(1, min(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // workload.vocab_size))
    rows = max(min(chunk, workload.evaluation_tokens), PROMPT_LENGTH)
    return {
        "output projection": workload.outer_bytes,
        "a slice of it in fp32": _FP32 * workload.hidden_size * min(VOCABULARY_SLICE, workload.vocab_size),
        "logits": _LOGITS_COPIES * _FP32 * rows * workload.vocab_size,
    }


def _activations(workload: Workload) -> int:
    """Inside of a block, of one batch: the residual, normed, q, k, v, attended; gate, up, their product."""
    longest = max(workload.calibration_tokens, workload.evaluation_tokens)
    tokens = min(longest, max(TOKENS_PER_BATCH, workload.sequence_length))
    widest = max(max(shape) for shape in workload.linears)
    return _FP32 * tokens * (4 * workload.hidden_size + 4 * widest) + workload.score_bytes


def _num_local_workers(config: QuantizerConfig) -> int:
    kind, _, count = (config.workers or "").partition(":")
    return int(count) if kind == "local" and count.isdigit() else 0


def _refusal(what: str, parts: Mapping[str, int], available: int) -> QuantizerError:
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {mebibytes(size)}" for name, size in largest)
    return QuantizerError(
        f"{what}: {mebibytes(sum(parts.values()))} needed, {mebibytes(available)} available; the largest "
        f"parts: {named}; lower --samples, --sequence-length or --evaluation-tokens, or give more memory"
    )
