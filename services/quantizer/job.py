"""One quantization from checkpoint to published artifact: the order of things, and nothing else.

Block by block: load, search, keep what came of it, take all streams through, go on. What is kept lets a run
that was ended at any moment go on from its last finished block (workspace.py). Knows the parts by their
interfaces; the numbers are theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from services.quantizer.block_driver import BlocksAhead
from services.quantizer.block_writer import joined_errors, write_block
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.estimate import Workload, check_fits, plan_text
from services.quantizer.identity import draft_key, draft_manifest, find_current
from services.quantizer.input_files import InputFiles
from services.quantizer.inputs import Inputs, read_inputs
from services.quantizer.progress import ProgressReporter
from services.quantizer.publication import Outcome, publish
from services.quantizer.quantize import BlockQuantizer, QuantizedBlock, indivisible_linears
from services.quantizer.run_identity import run_identity
from services.quantizer.run_lock import RunLock
from services.quantizer.shards import ShardWriter
from services.quantizer.source import STORED_DTYPES, Source
from services.quantizer.streams import Streams
from services.quantizer.tensor_file import StoredTensor, TensorFile, write_tensors
from services.quantizer.workers import WorkerPool, num_threads, open_pool
from services.quantizer.workspace import KeptFile, Workspace, remove_others
from weft.artifact.manifest import LinearError, Manifest
from weft.artifact.publish import Staging
from weft.artifact.store import Artifact, ArtifactStore


@dataclass(frozen=True, slots=True)
class _Job:
    """What the steps of one run share."""

    config: QuantizerConfig
    source: Source
    inputs: Inputs
    skipped: set[str]
    workspace: Workspace
    pool: WorkerPool


def run(config: QuantizerConfig, draft: Manifest | None = None, files: InputFiles | None = None) -> Artifact:
    """Quantize and publish, or return what CURRENT already holds.

    `draft` is what `draft_manifest` gave, if the caller has it, and `files` are as they were before. Raises
    QuantizerError (NameBusyError when another run of the name is at work), and what weft.artifact raises.
    """
    started = time.time()
    files = InputFiles.of(config) if files is None else files
    draft = draft_manifest(config) if draft is None else draft
    current = None if config.force else find_current(config, draft)
    if current is not None:
        return current
    source = Source(config.source, _prepare_torch(config))
    skipped = _check_divisible(source, config)
    inputs = read_inputs(config, source)
    files.check()
    store = ArtifactStore(config.artifacts)
    parent = store.model_directory(config.name)
    with RunLock(parent), _workspace(parent, config, draft, inputs) as workspace:
        current = None if config.force else find_current(config, draft)
        if current is not None:  # whoever held the lock before has just published it
            workspace.remove()
            return current
        remove_others(parent, workspace.path)
        with torch.inference_mode(), ProgressReporter(source.num_blocks + 1) as progress:
            with open_pool(config.workers, source.device) as pool:
                job = _Job(config, source, inputs, skipped, workspace, pool)
                outcome = _quantize_blocks(job, progress)
            with store.stage(config.name) as staged:
                _assemble(job, staged)
                files.check()  # nothing was published yet, so the digests are of what was read
                progress.publishing()
                artifact = publish(staged, source, config, draft, skipped, outcome, started)
            progress.published(artifact.version)
        workspace.remove()
        return artifact


def _workspace(parent: Path, config: QuantizerConfig, draft: Manifest, inputs: Inputs) -> Workspace:
    return Workspace(parent, draft_key(draft), run_identity(config, draft, inputs))


def _prepare_torch(config: QuantizerConfig) -> torch.device:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(config.seed % (1 << 63))
    torch.set_num_threads(num_threads(config.threads, config.workers))
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantizerError(f"--device {config.device}: this torch sees no such device")
    # fp32 means fp32: the losses that are compared differ in digits that reduced precision does not have.
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


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


def _quantize_blocks(job: _Job, progress: ProgressReporter) -> Outcome:
    source, inputs, workspace = job.source, job.inputs, job.workspace
    if not job.config.resume:
        workspace.start_over()
    done = workspace.resume()
    workload = Workload.of(
        source,
        inputs,
        job.skipped,
        has_exact=job.config.has_exact_stream,
        is_ahead=not job.config.propagate_error,
    )
    found, available = check_fits(workload, job.config, source.device)
    progress.plan(
        plan_text(found, available, source.num_blocks, done),
        blocks=source.num_blocks,
        resumed_blocks=done,
        memory=found.host_bytes,
        available=available,
    )
    if done:
        kept = TensorFile(workspace.streams_path())
        tensors = {name: kept.load(name) for name in kept.names}
        streams = Streams.restore(
            source,
            inputs.calibration,
            inputs.evaluation,
            tensors,
            has_exact=job.config.has_exact_stream,
        )
        del tensors
    else:
        streams = Streams.begin(
            source, inputs.calibration, inputs.evaluation, has_exact=job.config.has_exact_stream
        )
    blocks = _blocks(job, done, streams)
    for index in range(done, source.num_blocks):
        # A function of its own, so that nothing of a block outlives it.
        _quantize_block(job, index, streams, blocks)
        progress.advance(f"block {index + 1}")
    outcome = Outcome(texts=inputs.description)
    for index in range(source.num_blocks):
        _add_record(outcome, source, index, workspace.record(index + 1))
    head = source.head()
    outcome.canary = streams.canary.finish(head)
    if streams.evaluation is not None:
        outcome.quality = streams.evaluation.finish(head)
    progress.advance("evaluation")
    return outcome


def _blocks(job: _Job, first: int, streams: Streams) -> Iterator[tuple[QuantizedBlock, Tensor]] | None:
    """Whole blocks on the workers, where no block waits for the one before it."""
    if job.config.propagate_error:
        return None
    group_size, skipped = job.config.group_size, job.skipped
    return iter(
        BlocksAhead(
            job.pool,
            job.source,
            streams.calibration,
            first=first,
            group_size=group_size,
            skipped=skipped,
            method=job.config.method,
        )
    )


def _quantize_block(
    job: _Job, index: int, streams: Streams, blocks: Iterator[tuple[QuantizedBlock, Tensor]] | None
) -> None:
    config, source = job.config, job.source
    is_last = index + 1 == source.num_blocks
    block, behind = (None, None) if blocks is None else next(blocks)
    layer, weights = source.block(index), source.block_weights(index)
    if block is None:
        block = BlockQuantizer(
            source,
            index,
            weights,
            streams.calibration,
            config.group_size,
            job.skipped,
            method=config.method,
            exact=streams.exact,
            pool=job.pool,
            is_last=is_last,
        ).run()
    kept, record = _keep_tensors(job, index, block)
    quantized, linears, has_left = block.weights, list(block.linears), block.has_left
    del block  # the integers
    streams.advance(
        source,
        layer,
        weights,
        quantized,
        linears,
        group_size=config.group_size,
        behind=behind,
        has_left=has_left,
        is_last=is_last,
    )
    del weights, quantized
    behind = {name: StoredTensor.of(tensor) for name, tensor in streams.tensors().items()}
    job.workspace.finish_block(kept, record, lambda write: write_tensors(write, behind))


def _keep_tensors(job: _Job, index: int, block: QuantizedBlock) -> tuple[KeptFile, bytes]:
    stored = _StoredBlock()
    write_block(stored, job.source, index, block, job.config.format)
    kept = job.workspace.write_tensors(lambda write: write_tensors(write, stored.tensors))
    return kept, _record(block, stored)


class _StoredBlock:
    """A block's tensors in the order in which shards take them."""

    def __init__(self) -> None:
        self.tensors: dict[str, StoredTensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """See TensorWriter."""
        self.tensors[name] = StoredTensor.of(tensor.detach().cpu().contiguous())


def _record(block: QuantizedBlock, stored: _StoredBlock) -> bytes:
    """What is kept of a block besides its tensors. Numbers come back from JSON as they went in."""
    document = {
        "tensors": list(stored.tensors),
        "errors": {name: [error.rounding, error.chosen] for name, error in block.errors.items()},
        "choices": block.choices,
        # Blocks of a search that tells less have none.
        "records": getattr(block, "records", {}),
    }
    return json.dumps(document).encode()


def _add_record(outcome: Outcome, source: Source, index: int, record: bytes) -> None:
    document = json.loads(record)
    errors = {name: LinearError(*pair) for name, pair in document["errors"].items()}
    outcome.errors.update(joined_errors(source, index, errors))
    for name, label in document["choices"].items():
        outcome.choices[source.full_name(index, name)] = label
    stored = {name: source.full_name(index, name) for name in document["records"]}
    for name, told in document["records"].items():
        # Linears that one stored tensor holds are told apart by their own names.
        is_shared = list(stored.values()).count(stored[name]) > 1
        outcome.records[f"{stored[name]} ({name})" if is_shared else stored[name]] = told


def _assemble(job: _Job, staged: Staging) -> None:
    """The kept blocks and what is around them as shards. Every file gets its digest from what is read here;
    that the blocks are the ones that were written was checked when the run began or is its own doing.
    """
    writer = ShardWriter(staged)
    for number in range(1, job.source.num_blocks + 1):
        file = TensorFile(job.workspace.tensors_path(number))
        for name in json.loads(job.workspace.record(number))["tensors"]:
            writer.add_stored(name, file.stored(name))
    for name in job.source.outer_names():
        writer.add_stored(name, _outer(job.source, name))
    writer.finish()


def _outer(source: Source, name: str) -> StoredTensor:
    dtype = STORED_DTYPES[source.checkpoint.dtype(name)]
    return StoredTensor(dtype, source.checkpoint.shape(name), lambda: source.checkpoint.load(name))
