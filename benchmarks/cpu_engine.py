"""Weft's side of the comparison on a CPU: the engine as `services.engine serve` puts it together, without its
transport.

The configuration, the loader, the runner, the block manager and the scheduler are the product's; a timed
step is `EngineCore.step`: schedule, forward, sample, report. Prompts that came before are found in the
prefix cache, so each run starts with its context computed. Knows nothing of the other systems.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cpu_shape import CLOCKS, Dimensions, Workload
from services.engine.application import load_model, make_core
from services.engine.config import load
from services.engine.core.events import StepReport
from services.engine.core.sequence import SamplingParams, Sequence

_SPARE_BLOCKS = 64
"""For what earlier runs leave in the prefix cache."""


class System:
    """A core and its runner."""

    def __init__(
        self, folder: Path, dimensions: Dimensions, workload: Workload, threads: int, settings: dict[str, Any]
    ) -> None:
        self._now = CLOCKS[settings.get("clock", "wall")]
        each = -(-max(workload.tokens_each, workload.prefill) // 128)
        flags = ["--source", str(folder / "awq"), "--dtype", str(settings.get("dtype", "bfloat16"))]
        flags += [
            "--threads",
            str(threads),
            "--num-blocks",
            str(2 * workload.max_batch * each + _SPARE_BLOCKS),
        ]
        flags += ["--prefill-chunk", str(workload.prefill), "--cache-dir", str(folder / "engine-cache")]
        config = load(flags)
        runner, info = load_model(config)
        # Its own forward is kept for the check of logits, which are the runner's and not the core's.
        self.runner: Any = runner
        self._info = info
        self.core = make_core(config, runner, info)
        self._number = 0
        self._prompts: list[list[int]] = []

    def fill(self, prompts: list[list[int]]) -> None:
        """K and V of each prompt's full blocks, left in the prefix cache."""
        self._prompts = prompts
        for prompt in prompts:
            self._add(prompt, 1)
            self._finish()

    def logits_after(self, batch: int) -> np.ndarray:
        """[batch, vocab] behind the last token of the first prompts, computed together."""
        for prompt in self._prompts[:batch]:
            self._add(prompt, 1)
        return self._capture(batch).numpy()

    def prefill_logits(self, prompt: list[int]) -> np.ndarray:
        """[vocab] behind a whole prompt."""
        self._add(prompt, 1)
        return self._capture(len(prompt))[0].numpy()

    def decode(self, batch: int, warm_steps: int, steps: int) -> float:
        """Seconds of `steps` steps, each of one token for each of `batch` sequences."""
        for prompt in self._prompts[:batch]:
            self._add(prompt, warm_steps + steps + 1)
        for _ in range(warm_steps):
            self._step(batch)
        began = self._now()
        for _ in range(steps):
            self._step(batch)
        seconds = self._now() - began
        self._finish()
        return seconds

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        began = self._now()
        self._add(prompt, 1)
        self._step(len(prompt))
        return self._now() - began

    def facts(self) -> dict[str, Any]:
        """Versions and settings; bytes of weights, and of those a decode step of one row reads."""
        info, model = self._info, self.runner.model
        return {
            "version": f"torch {torch.__version__}",
            "python": platform.python_version(),
            "weights": "int4, group 128; " + ", ".join(f"{k} {v}" for k, v in info.kernel_paths.items()),
            "kv_cache": info.kv_dtype,
            "crossover_rows": info.crossover_rows,
            "weight_bytes": info.weight_bytes,
            "token_bytes": info.weight_bytes - model.embedding.nbytes,
        }

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        self._number += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.core.add(Sequence(key=self._number, prompt_token_ids=list(prompt), params=params))

    def _step(self, num_tokens: int) -> StepReport:
        """One step that computes exactly so many tokens. Raises RuntimeError otherwise: then it is not what
        the other systems compute.
        """
        report = self.core.step()
        if report.num_batched_tokens != num_tokens:
            raise RuntimeError(f"the step computed {report.num_batched_tokens} tokens, expected {num_tokens}")
        return report

    def _finish(self) -> None:
        while self.core.has_work():
            self.core.step()

    def _capture(self, num_tokens: int) -> Tensor:
        """The logits of the next step, which computes so many tokens and ends what is live."""
        kept: list[Tensor] = []
        forward = self.runner.forward

        def keeping(chunks: Any) -> Tensor:
            logits = forward(chunks)
            kept.append(logits.clone())
            return logits

        self.runner.forward = keeping
        try:
            self._step(num_tokens)
        finally:
            del self.runner.forward
        self._finish()
        return kept[0].float()
