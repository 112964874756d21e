"""The end of a run: report, manifest, and the artifact made visible.

Knows what is written beside the weights; the numbers come with the outcome.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from services.quantizer.companions import companion_files, quantized_config, write_companions
from services.quantizer.config import AWQ, COMPRESSED_TENSORS, QuantizerConfig
from services.quantizer.errors import GateMissed, QuantizerError
from services.quantizer.gate import Miss, explain, misses
from services.quantizer.host_memory import peak_bytes
from services.quantizer.rejection import keep_rejected, remove_rejected
from services.quantizer.report import build_report, measure_sizes, report_json
from services.quantizer.report_page import report_html
from services.quantizer.source import Source
from weft import logs
from weft.artifact.manifest import Canary, LinearError, Manifest
from weft.artifact.publish import Staging
from weft.artifact.store import Artifact

_LOGGER = logs.get_logger("quantizer")
_VERSION_PREFIXES = {AWQ: "awq", COMPRESSED_TENSORS: "ct"}


@dataclass(slots=True)
class Outcome:
    """What the blocks add up to.

    Attributes:
        errors, records: of every quantized linear, by its full name; a record is what the report tells of it.
        choices: per scale group, the candidate taken.
        texts: where calibration and evaluation came from.
    """

    texts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, LinearError] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    canary: Canary | None = None


def publish(
    staged: Staging,
    source: Source,
    config: QuantizerConfig,
    draft: Manifest,
    skipped: set[str],
    outcome: Outcome,
    started: float,
) -> Artifact:
    """Write what is still missing from `staged`, then publish it. `started` is a wall-clock time.

    Raises GateMissed when the quality is below what `config` asks for; the report is kept then.
    """
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
    staged.write(
        "config.json",
        quantized_config(source.checkpoint.config, config.group_size, full_precision, config.format),
    )
    missed = misses(config, outcome.quality)
    report = build_report(
        config.name,
        draft.recipe,
        outcome.quality,
        outcome.errors,
        outcome.choices,
        full_precision,
        records=outcome.records,
        texts=outcome.texts,
        sizes=measure_sizes(source, staged.files, config.group_size),
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
    version = version_name(config.format, manifest)
    if missed:
        raise _rejection(config, version, report, missed)
    artifact = staged.publish(
        manifest,
        version,
        run_document(config.source, config.revision, config.device, started),
        fencing_token=config.fencing_token,
    )
    remove_rejected(config.artifacts / config.name, version)
    return artifact


def _rejection(
    config: QuantizerConfig, version: str, report: dict[str, Any], missed: list[Miss]
) -> GateMissed:
    """Keeps the report of what is not published, and says where. Published bytes never tell of a bound: the
    gate is no part of what an artifact is.
    """
    told = {**report, "missed": [f"{miss.text} ({miss.flag})" for miss in missed]}
    pages = {"report.json": report_json(told), "report.html": report_html(told)}
    where = keep_rejected(config.artifacts / config.name, version, pages)
    return GateMissed(explain(missed, where / "report.html"))


def version_name(file_format: str, manifest: Manifest) -> str:
    """What an artifact is called in its model's directory: its format and the beginning of its digest."""
    return f"{_VERSION_PREFIXES[file_format]}-" + manifest.digest.removeprefix("sha256:")[:12]


def run_document(source: Path, revision: str | None, device: str, started: float) -> bytes:
    """run.json: what differs from run to run, so that nothing else has to. `revision` is the commit of a hub
    model, `started` a wall-clock time.
    """
    document = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(max(0.0, time.time() - started), 2),
        "peak_rss_bytes": peak_bytes(),
        "host": platform.node(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device,
        "source": str(source),
        "revision": revision,
    }
    return json.dumps(document, indent=1).encode() + b"\n"
