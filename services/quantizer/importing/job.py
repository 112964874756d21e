"""One import from quantized checkpoint to published artifact: block by block, nothing searched.

The canary runs through the imported weights, so an engine checks what it loads as with any artifact; quality
stays unknown, for the full-precision model is not there to compare with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor

from services.quantizer.calibration import calibration_windows, load_tokenizer
from services.quantizer.canary import NUM_PROMPTS, PROMPT_LENGTH, CanaryRecorder
from services.quantizer.companions import companion_files, quantized_config, write_companions
from services.quantizer.config import AWQ
from services.quantizer.errors import QuantizerError
from services.quantizer.identity import check_directory, find_same, source_digest
from services.quantizer.importing.config import ImportConfig
from services.quantizer.importing.view import PackedCheckpoint
from services.quantizer.input_files import InputFiles
from services.quantizer.packed_linear import packed
from services.quantizer.progress import ProgressReporter
from services.quantizer.publication import run_document, version_name
from services.quantizer.run_lock import RunLock
from services.quantizer.shards import ShardWriter
from services.quantizer.source import Source
from services.quantizer.sources import local_source
from services.quantizer.texts import BUNDLED_CALIBRATION, read_texts
from weft import logs
from weft.artifact.manifest import Canary, Manifest
from weft.artifact.publish import Staging
from weft.artifact.store import Artifact, ArtifactStore

_LOGGER = logs.get_logger("quantizer")


def run_import(config: ImportConfig) -> Artifact:
    """Import and publish, or return what CURRENT already holds. Raises QuantizerError (NameBusyError when
    another run of the name is at work), and what weft.artifact raises.
    """
    started = time.time()
    directory, commit = local_source(config.source, config.revision, config.hub_cache)
    config = dataclasses.replace(config, source=directory, revision=commit)
    files = InputFiles.of_directory(directory)
    draft = _draft(config)
    current = None if config.force else find_same(config.artifacts, draft)
    if current is not None:
        _LOGGER.info("up to date", model=config.name, version=current.version)
        return current
    transformers.logging.set_verbosity_error()
    checkpoint = PackedCheckpoint.open(config.source, allow_requantize=config.allow_requantize)
    source = Source(config.source, torch.device("cpu"), checkpoint)
    _check_linears(checkpoint, source)
    store = ArtifactStore(config.artifacts)
    with (
        RunLock(store.model_directory(config.name)),
        store.stage(config.name) as staged,
        torch.inference_mode(),
    ):
        canary = _write_weights(checkpoint, source, staged)
        files.check()
        draft = dataclasses.replace(draft, canary=canary)
        return _publish(staged, checkpoint, source, config, draft, started)


def _check_linears(checkpoint: PackedCheckpoint, source: Source) -> None:
    """Refuse what is packed outside of the blocks: engines have the embedding and the head in full
    precision.
    """
    inside = {name for index in range(source.num_blocks) for name in source.stored_parameters(index)}
    for linear in sorted(checkpoint.linears):
        if f"{linear}.weight" not in inside:
            raise QuantizerError(
                f"tensor {linear}.{checkpoint.key}: packed, but only linears of the blocks may be"
            )


def _draft(config: ImportConfig) -> Manifest:
    """The manifest as far as it is known beforehand. The canary's prompts are all that the bundled
    calibration text decides.
    """
    _, calibration_digest = read_texts(BUNDLED_CALIBRATION)
    check_directory(config.source)
    companions = companion_files(config.source)
    return Manifest(
        model=config.name,
        files={},
        source_digest=source_digest(config.source, companions),
        recipe=config.recipe(),
        seed=0,
        calibration_digest=calibration_digest,
        tokenizer_digest="sha256:" + hashlib.sha256(companions["tokenizer.json"]).hexdigest(),
    )


def _canary_windows(source: Source) -> Tensor:
    tokenizer = load_tokenizer(source.checkpoint.directory)
    texts, _ = read_texts(BUNDLED_CALIBRATION)
    length = min(PROMPT_LENGTH, source.max_length)
    return calibration_windows(tokenizer, texts, NUM_PROMPTS, length, 0, source.vocab_size)


def _write_weights(checkpoint: PackedCheckpoint, source: Source, staged: Staging) -> Canary:
    writer = ShardWriter(staged)
    canary = CanaryRecorder(source, _canary_windows(source))
    with ProgressReporter(source.num_blocks + 1) as progress:
        for index in range(source.num_blocks):
            canary.advance(source.block(index), source.block_weights(index))
            _write(checkpoint, writer, source.stored_parameters(index))
            progress.advance(f"block {index + 1}")
        answers = canary.finish(source.head())
        _write(checkpoint, writer, source.outer_names())
        writer.finish()
        progress.advance("head")
    return answers


def _write(checkpoint: PackedCheckpoint, writer: ShardWriter, names: Iterable[str]) -> None:
    for name in sorted(names):
        linear = name.removesuffix(".weight")
        if linear in checkpoint.linears:
            for suffix, tensor in packed(checkpoint.quantized(linear)).items():
                writer.add(f"{linear}.{suffix}", tensor)
        else:
            writer.add(name, checkpoint.load(name))


def _publish(
    staged: Staging,
    checkpoint: PackedCheckpoint,
    source: Source,
    config: ImportConfig,
    draft: Manifest,
    started: float,
) -> Artifact:
    write_companions(staged, companion_files(config.source))
    if "sha256:" + staged.files["tokenizer.json"].sha256 != draft.tokenizer_digest:
        raise QuantizerError(f"{config.source}: tokenizer.json changed during the import")
    full_precision = _full_precision(checkpoint, source)
    staged.write("config.json", quantized_config(checkpoint.config, checkpoint.group_size, full_precision))
    report = _report(checkpoint, config, full_precision)
    staged.write("report.json", json.dumps(report, indent=1, sort_keys=True).encode() + b"\n")
    if checkpoint.rounded:
        _LOGGER.warning("not exact", linears=len(checkpoint.rounded), groups=report["rounded_groups"])
    manifest = dataclasses.replace(draft, files=dict(staged.files))
    version = version_name(AWQ, manifest)
    return staged.publish(manifest, version, run_document(config.source, config.revision, "cpu", started))


def _full_precision(checkpoint: PackedCheckpoint, source: Source) -> list[str]:
    """The linears of the blocks that the source left alone."""
    return [
        name.removesuffix(".weight")
        for index in range(source.num_blocks)
        for name in sorted(source.stored_parameters(index))
        if name.endswith(".weight")
        and len(checkpoint.shape(name)) == 2
        and name.removesuffix(".weight") not in checkpoint.linears
    ]


def _report(checkpoint: PackedCheckpoint, config: ImportConfig, full_precision: list[str]) -> dict[str, Any]:
    """report.json of an import: where the numbers come from, and which are not the source's."""
    totals: dict[str, int] = {}
    for rounded in checkpoint.rounded.values():
        for reason, count in rounded.groups.items():
            totals[reason] = totals.get(reason, 0) + count
    return {
        "model": config.name,
        "recipe": config.recipe(),
        "layout": checkpoint.scheme.layout,
        "group_size": checkpoint.group_size,
        "num_linears": len(checkpoint.linears),
        "full_precision": full_precision,
        "rounded": {name: checkpoint.rounded[name].groups for name in sorted(checkpoint.rounded)},
        "rounded_groups": totals,
    }
