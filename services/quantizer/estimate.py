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
from services.quantizer.group_fitting import max_rows_at_once
from services.quantizer.inputs import Inputs
from services.quantizer.source import STORED_DTYPES, TOKENS_PER_BATCH, VOCABULARY_SLICE, Source

_MIB = 1 << 20
_FP32 = 4
_SLACK = 96 * _MIB  # small tensors, buffers of libraries, what the allocator keeps of the last block
_MOMENTS = 2  # of each input: over the windows that integers are found on, and those that judge
_GRAM_COPIES = 3  # of the Gram matrix at hand: scaled, factorized, and what LAPACK takes beside
_FIT_COPIES = 12  # of the rows that are fitted at once, in fp32
_LINEAR_COPIES = 3  # of the largest linear, when its error is measured
_LOGITS_COPIES = 9  # of one chunk's logits of one model: of all three twice, and what compares them


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes that decide.

    Attributes:
        groups: per input that quantizable linears of one block share, its channels and (outputs of each).
        block_parameters: of one block, all.
        hidden_size, vocab_size: of the model.
        outer_bytes: the largest tensor outside of the blocks, as stored.
        calibration_tokens, sequence_length, evaluation_tokens: of the texts.
        score_bytes: of eager attention over one batch.
        has_exact: whether the source's own stream goes beside the calibration, group by group.
        is_ahead: whether the calibration goes through a block before the block is searched on it.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    block_parameters: int
    hidden_size: int
    vocab_size: int
    outer_bytes: int
    calibration_tokens: int
    sequence_length: int
    evaluation_tokens: int
    score_bytes: int = 0
    has_exact: bool = True
    is_ahead: bool = False

    @classmethod
    def of(
        cls, source: Source, inputs: Inputs, skipped: set[str], *, has_exact: bool, is_ahead: bool
    ) -> Workload:
        """Of one run. `skipped` linears are not searched."""
        shapes = {name: tuple(p.shape) for name, p in source.block(0).named_parameters()}
        groups = [g for g in source.architecture.groups if not skipped.intersection(g.linears)]
        weights = [[shapes[f"{name}.weight"] for name in group.linears] for group in groups]
        outer = [
            math.prod(source.checkpoint.shape(name)) * STORED_DTYPES[source.checkpoint.dtype(name)].itemsize
            for name in source.outer_names()
        ]
        texts = [ids for ids in (inputs.calibration, inputs.evaluation) if ids is not None]
        return cls(
            tuple((group[0][1], tuple(shape[0] for shape in group)) for group in weights),
            sum(math.prod(shape) for shape in shapes.values()),
            source.hidden_size,
            source.vocab_size,
            max(outer),
            inputs.calibration.numel(),
            inputs.calibration.shape[1],
            0 if inputs.evaluation is None else inputs.evaluation.numel(),
            max(source.score_bytes(ids.shape[1]) for ids in texts),
            has_exact,
            is_ahead,
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
    # Ahead of the search a stream is kept before the block and behind it.
    calibrated = (2 if workload.has_exact or workload.is_ahead else 1) * workload.calibration_tokens
    return calibrated + len(VARIANTS) * workload.evaluation_tokens + NUM_PROMPTS * PROMPT_LENGTH


def _beginning(workload: Workload) -> dict[str, int]:
    longest = max(workload.calibration_tokens, workload.evaluation_tokens)
    return {"embedding": workload.outer_bytes, "embedded text": 2 * _FP32 * workload.hidden_size * longest}


def _search(workload: Workload) -> dict[str, int]:
    """The block as it was and as far as it has come, with its integers; what is known of the inputs; and all
    that finding integers takes, or running a batch.
    """
    moments = [_moments(workload, num_in, outs) for num_in, outs in workload.groups]
    fits = [_fit(num_in, outs) for num_in, outs in workload.groups]
    if workload.has_exact:  # one group at a time, and the outputs of the module before it are kept
        known, work = max(zip(moments, fits, strict=True), key=sum)
        kept = 2 * _FP32 * workload.hidden_size * workload.calibration_tokens
    else:
        known, work, kept = sum(moments), max(fits), 0
    return {
        "a block in fp32": _FP32 * workload.block_parameters,
        "the block quantized": (_FP32 + 1) * workload.block_parameters,
        "Gram matrices": known,
        "kept outputs": kept,
        "search": max(work, _activations(workload)),
    }


def _moments(workload: Workload, num_in: int, outs: tuple[int, ...]) -> int:
    pulls = num_in * sum(outs) if workload.has_exact else 0
    return _MOMENTS * _FP32 * (num_in**2 + pulls)


def _fit(num_in: int, outs: tuple[int, ...]) -> int:
    rows = min(max(outs), max_rows_at_once(num_in))
    work = max(_FIT_COPIES * rows * num_in, _LINEAR_COPIES * max(outs) * num_in)
    return _FP32 * (_GRAM_COPIES * num_in**2 + work)


def _folding(workload: Workload) -> dict[str, int]:
    """The block twice, as it was and as it will be, and its integers; then a batch through each."""
    return {
        "a block in fp32": _FP32 * workload.block_parameters,
        "the block quantized": (_FP32 + 1) * workload.block_parameters,
        "a batch inside of it": _activations(workload),
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
    widest = max(max(num_in, *outs) for num_in, outs in workload.groups)
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
