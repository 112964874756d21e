"""What runs in the process of a Ray worker: one task at a time, under the settings of the run.

This module does not know what a task computes, nor who sends it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from services.quantizer.errors import QuantizerError
from services.quantizer.parcels import Buffer, as_array, as_tensor, pack, unpack
from weft import __version__


@dataclass(frozen=True, slots=True)
class Facts:
    """All that may decide the bits of a result, apart from the task."""

    weft: str
    code: str
    torch: str
    transformers: str
    cpu_capability: str
    threads: int
    device: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task came to: `content` and `buffers` of a parcel, or the error that it raised."""

    content: Any
    buffers: list[Buffer]
    error: Exception | None = None


class Worker:
    """Made once in each worker process."""

    def __init__(self, threads: int, device: str) -> None:
        """`device` "cpu" or "cuda": the one that Ray gave to this worker."""
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        transformers.logging.set_verbosity_error()
        self._device = torch.device(device)

    def facts(self) -> tuple[str, int, Facts]:
        """The machine's name, this process's id, and what decides bits here."""
        return platform.node(), os.getpid(), facts_here(self._device)

    def run(self, function: Callable[[Any], Any], content: Any, *arrays: Buffer) -> Answer:
        """Apply `function` to a parcel. Raises nothing that the function raises."""
        buffers = [as_tensor(array) for array in arrays]
        versions = [buffer._version for buffer in buffers]
        try:
            task = unpack(content, buffers, self._device)
            with torch.inference_mode():
                result, spans = pack(function(task))
                answer = Answer(result, [as_array(span.data) for span in spans])
        except Exception as error:
            return Answer(None, [], _portable(error))
        if versions != [buffer._version for buffer in buffers]:
            # The memory is shared with other tasks: what they make of it now is anyone's guess.
            return Answer(None, [], RuntimeError(f"{function.__name__} writes to the tensors of its task"))
        return answer


def facts_here(device: torch.device) -> Facts:
    """Of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Facts(
        __version__,
        _code_digest(),
        torch.__version__,
        transformers.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        name,
    )


def _code_digest() -> str:
    """Of the quantizer's own modules: two checkouts of one version may differ."""
    hasher = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


def _portable(error: Exception) -> Exception:
    """`error` without its traceback if a copy of it can be made elsewhere, else what it says."""
    try:
        twin = copy.copy(error)
    except Exception:
        return QuantizerError(f"{type(error).__name__}: {error}")
    return twin if type(twin) is type(error) and str(twin) == str(error) else QuantizerError(str(error))
