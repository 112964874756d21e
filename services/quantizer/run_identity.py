"""What decides the bytes of a run, as one digest: what two runs must share for one to go on where the other
was ended.

This module does not know what is kept of a run.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
import transformers
from torch import Tensor

from services.quantizer.config import QuantizerConfig
from services.quantizer.identity import draft_key
from services.quantizer.inputs import Inputs
from weft.artifact import packing
from weft.artifact.manifest import Manifest
from weft.strict_json import canonical_bytes


def run_identity(config: QuantizerConfig, draft: Manifest, inputs: Inputs) -> str:
    """sha256 in hex, of inputs, recipe, program and machine. Call it after the threads are set.

    Of the texts the token ids count: another tokenizers library may make others of them.
    Where the source lies, what the artifact is called and how many workers search decide no byte.
    """
    device = torch.device(config.device)
    document = {
        "draft": draft_key(draft),
        "token_ids": [_digest(ids) for ids in (inputs.calibration, inputs.evaluation)],
        "program": _program_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    return hashlib.sha256(canonical_bytes(document)).hexdigest()


def _digest(ids: Tensor | None) -> str:
    if ids is None:
        return ""
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def _program_digest() -> str:
    """Of the code itself: a state that another version left is not gone on from."""
    root = Path(__file__).parent
    hasher = hashlib.sha256()
    for path in [*sorted(root.rglob("*.py")), Path(packing.__file__)]:
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()
