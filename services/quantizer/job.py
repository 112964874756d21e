"""One quantization from checkpoint to published artifact: the order of things, and nothing else.

Block by block: load, take the source and the rounded block through the evaluation, search, fold, write, go
on. Knows the parts by their interfaces; the numbers are theirs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from services.quantizer.block_writer import write_block
from services.quantizer.calibration import calibration_windows, evaluation_windows, load_tokenizer
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.identity import draft_manifest, find_current
from services.quantizer.progress import ProgressReporter
from services.quantizer.publication import Outcome, publish
from services.quantizer.quantize import BlockQuantizer, indivisible_linears
from services.quantizer.shards import ShardWriter
from services.quantizer.source import Source
from services.quantizer.streams import Streams
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION, read_texts
from weft import logs
from weft.artifact.manifest import Manifest
from weft.artifact.publish import Staging
from weft.artifact.store import Artifact, ArtifactStore

_LOGGER = logs.get_logger("quantizer")
_MAX_EVALUATION_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a run reads besides the weights."""

    calibration: Tensor
    evaluation: Tensor | None


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
        return publish(staged, source, config, draft, skipped, outcome, started)


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
) -> Outcome:
    outcome = Outcome()
    writer = ShardWriter(staged)
    streams = Streams.begin(source, inputs.calibration, inputs.evaluation)
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
    streams: Streams,
    writer: ShardWriter,
    outcome: Outcome,
) -> None:
    layer, weights = source.block(index), source.block_weights(index)
    block = BlockQuantizer(source, index, weights, streams.calibration, config.group_size, skipped).run()
    streams.advance(
        source,
        layer,
        weights,
        block,
        group_size=config.group_size,
        propagate_error=config.propagate_error,
        is_last=index + 1 == source.num_blocks,
    )
    write_block(writer, source, index, block)
    outcome.errors.update({source.full_name(index, name): error for name, error in block.errors.items()})
    outcome.choices.update({source.full_name(index, name): label for name, label in block.choices.items()})
