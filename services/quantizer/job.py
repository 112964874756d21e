"""One quantization from checkpoint to published artifact: the order of things, and nothing else.

Block by block: load, take the source and the rounded block through the evaluation, search, fold, write, go
on. Knows the parts by their interfaces; the numbers are theirs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from services.quantizer.calibration import calibration_windows, evaluation_windows, load_tokenizer
from services.quantizer.canary import CanaryRecorder
from services.quantizer.companions import companion_files, quantized_config, write_companions
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.evaluation import VARIANTS, Evaluation
from services.quantizer.grid import QuantizedWeight
from services.quantizer.identity import draft_manifest, find_current
from services.quantizer.progress import ProgressReporter
from services.quantizer.quantize import BlockQuantizer, QuantizedBlock, indivisible_linears, rounded_weights
from services.quantizer.report import build_report, report_html, report_json
from services.quantizer.shards import ShardWriter
from services.quantizer.source import STORED_DTYPES, Source
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION, read_texts
from weft import logs
from weft.artifact.manifest import Canary, LinearError, Manifest
from weft.artifact.packing import pack_int4
from weft.artifact.publish import Staging
from weft.artifact.store import Artifact, ArtifactStore

_LOGGER = logs.get_logger("quantizer")
_MAX_EVALUATION_LENGTH = 1024


@dataclass(slots=True)
class _Outcome:
    """What the blocks add up to."""

    errors: dict[str, LinearError] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    canary: Canary | None = None


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a run reads besides the weights."""

    calibration: Tensor
    evaluation: Tensor | None


@dataclass(slots=True)
class _Streams:
    """Hidden states between two blocks: of the calibration windows, the canary, the evaluated models."""

    calibration: Tensor
    canary: CanaryRecorder
    evaluation: Evaluation | None


def run(config: QuantizerConfig, draft: Manifest | None = None) -> Artifact:
    """Quantize and publish, or return what CURRENT already holds.

    `draft` is what `draft_manifest` gave, if the caller has it. Raises QuantizerError, and what weft.artifact
    raises.
    """
    started = time.time()
    draft = draft_manifest(config) if draft is None else draft
    current = None if config.force else find_current(config, draft)
    if current is not None:
        return current
    source = Source(config.source, _prepare_torch(config))
    skipped = _check_divisible(source, config)
    inputs = _read_inputs(config, source)
    with ArtifactStore(config.artifacts).stage(config.name) as staged, torch.inference_mode():
        outcome = _quantize_blocks(config, source, inputs, skipped, staged)
        return _publish(staged, source, config, draft, skipped, outcome, started)


def _prepare_torch(config: QuantizerConfig) -> torch.device:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(config.seed % (1 << 63))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantizerError(f"--device {config.device}: this torch sees no such device")
    # fp32 means fp32: the losses that are compared differ in digits that reduced precision does not have.
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _read_inputs(config: QuantizerConfig, source: Source) -> _Inputs:
    if config.sequence_length > source.max_length:
        raise QuantizerError(
            f"--sequence-length {config.sequence_length}: the model's context is {source.max_length}"
        )
    tokenizer = load_tokenizer(config.source)
    calibration_texts, _ = read_texts(config.calibration or BUNDLED_CALIBRATION)
    evaluation_texts, _ = read_texts(config.evaluation or BUNDLED_EVALUATION)
    calibration = calibration_windows(
        tokenizer, calibration_texts, config.samples, config.sequence_length, config.seed, source.vocab_size
    )
    if len(calibration) < config.samples:
        _LOGGER.warning("short calibration text", windows=len(calibration), asked=config.samples)
    evaluation = None
    if config.evaluation_tokens:
        length = min(_MAX_EVALUATION_LENGTH, source.max_length)
        evaluation = evaluation_windows(
            tokenizer, evaluation_texts, config.evaluation_tokens, length, source.vocab_size
        )
    return _Inputs(calibration, evaluation)


def _check_divisible(source: Source, config: QuantizerConfig) -> set[str]:
    skipped = indivisible_linears(source, config.group_size)
    if skipped and not config.skip_indivisible:
        shapes = {name: tuple(p.shape) for name, p in source.block(0).named_parameters()}
        for linear in source.architecture.linears:
            num_out, num_in = shapes[f"{linear}.weight"]
            if num_in % config.group_size or num_out % 8:
                raise QuantizerError(
                    f"tensor {source.full_name(0, linear)}.weight: {num_in} inputs and {num_out} outputs "
                    f"do not divide into groups of {config.group_size} and words of 8; choose another "
                    "--group-size or --skip-indivisible"
                )
    if skipped.issuperset(source.architecture.linears):
        raise QuantizerError(f"no linear of this model divides into groups of {config.group_size}")
    return skipped


def _quantize_blocks(
    config: QuantizerConfig, source: Source, inputs: _Inputs, skipped: set[str], staged: Staging
) -> _Outcome:
    outcome = _Outcome()
    writer = ShardWriter(staged)
    streams = _Streams(
        source.embed(inputs.calibration),
        CanaryRecorder(source, inputs.calibration),
        None if inputs.evaluation is None else Evaluation(source, inputs.evaluation),
    )
    with ProgressReporter(source.num_blocks + 1) as progress:
        for index in range(source.num_blocks):
            # A function of its own, so that nothing of a block outlives it.
            _quantize_block(config, source, index, skipped, streams, writer, outcome)
            progress.advance(f"block {index + 1}")
        head = source.head()
        outcome.canary = streams.canary.finish(head)
        if streams.evaluation is not None:
            outcome.quality = streams.evaluation.finish(head)
        del head
        for name in source.outer_names():
            writer.add(name, source.checkpoint.load(name))
        writer.finish()
        progress.advance("evaluation")
    return outcome


def _quantize_block(
    config: QuantizerConfig,
    source: Source,
    index: int,
    skipped: set[str],
    streams: _Streams,
    writer: ShardWriter,
    outcome: _Outcome,
) -> None:
    layer, weights = source.block(index), source.block_weights(index)
    block = BlockQuantizer(source, index, weights, streams.calibration, config.group_size, skipped).run()
    if index + 1 < source.num_blocks:
        seen = block.weights if config.propagate_error else weights
        streams.calibration = source.run_block(layer, seen, streams.calibration)
    streams.canary.advance(layer, block.weights)
    if streams.evaluation is not None:
        rounded = rounded_weights(weights, list(block.linears), config.group_size)
        for variant, variant_weights in zip(VARIANTS, (weights, rounded, block.weights), strict=True):
            streams.evaluation.advance(layer, variant, variant_weights)
    _write_block(writer, source, index, block)
    outcome.errors.update({source.full_name(index, name): error for name, error in block.errors.items()})
    outcome.choices.update({source.full_name(index, name): label for name, label in block.choices.items()})


def _write_block(writer: ShardWriter, source: Source, index: int, block: QuantizedBlock) -> None:
    for name in sorted(block.weights):
        linear = name.removesuffix(".weight")
        full_name = source.full_name(index, name)
        if name.endswith(".weight") and linear in block.linears:
            for suffix, tensor in _packed(block.linears[linear]).items():
                writer.add(f"{full_name.removesuffix('weight')}{suffix}", tensor)
        else:
            writer.add(full_name, block.weights[name].to(STORED_DTYPES[source.checkpoint.dtype(full_name)]))


def _packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The three tensors of the gemm layout: input channels along rows."""
    return {
        "qweight": pack_int4(weight.values.T.cpu()),
        "qzeros": pack_int4(weight.zeros.T.cpu()),
        "scales": weight.scales.T,
    }


def _publish(
    staged: Staging,
    source: Source,
    config: QuantizerConfig,
    draft: Manifest,
    skipped: set[str],
    outcome: _Outcome,
    started: float,
) -> Artifact:
    full_precision = [
        source.full_name(index, name)
        for index in range(source.num_blocks)
        for name in source.architecture.linears
        if name in skipped
    ]
    if full_precision:
        _LOGGER.warning("left in full precision", blocks=source.num_blocks, linears=sorted(skipped))
    write_companions(staged, companion_files(config.source))
    if "sha256:" + staged.files["tokenizer.json"].sha256 != draft.tokenizer_digest:
        raise QuantizerError(f"{config.source}: tokenizer.json changed during the run")
    staged.write("config.json", quantized_config(source.checkpoint.config, config.group_size, full_precision))
    report = build_report(
        config.name, draft.recipe, outcome.quality, outcome.errors, outcome.choices, full_precision
    )
    staged.write("report.json", report_json(report))
    staged.write("report.html", report_html(report))
    manifest = dataclasses.replace(
        draft,
        files=dict(staged.files),
        linears=outcome.errors,
        quality=outcome.quality,
        canary=outcome.canary,
    )
    version = "awq-" + manifest.digest.removeprefix("sha256:")[:12]
    return staged.publish(manifest, version, _run_document(config, started))


def _run_document(config: QuantizerConfig, started: float) -> bytes:
    """run.json: what differs from run to run, so that nothing else has to."""
    document = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "host": platform.node(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": config.device,
        "source": str(config.source),
    }
    return json.dumps(document, indent=1).encode() + b"\n"
