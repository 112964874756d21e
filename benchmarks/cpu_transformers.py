"""transformers' side of the comparison on a CPU: LlamaForCausalLM in bf16, called as its `generate` calls it.

Batches are of equal lengths, so nothing is padded. The arg-max over all logits is inside of what is timed.
Knows nothing of the other systems.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from benchmarks.cpu_shape import CLOCKS, Dimensions, Workload


class System:
    """A loaded model and, once filled, the K and V of every prompt, from which each run's cache is made."""

    def __init__(
        self, folder: Path, dimensions: Dimensions, workload: Workload, threads: int, settings: dict[str, Any]
    ) -> None:
        self._now = CLOCKS[settings.get("clock", "wall")]
        torch.set_num_threads(threads)
        self._context_length, self._cache_length = workload.context, workload.tokens_each
        self._cache_kind = str(settings.get("cache", "dynamic"))
        self._model = LlamaForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            for parameter in self._model.parameters():
                # Out of the mapped file, into memory of its own.
                parameter.data = parameter.data.clone()
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._prompts: list[list[int]] = []

    @torch.inference_mode()
    def fill(self, prompts: list[list[int]]) -> None:
        """K and V of the first `context` tokens of each prompt."""
        self._prompts = prompts
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for prompt in prompts:
            cache = DynamicCache()
            self._compute([prompt[: self._context_length]], cache)
            parts.append([(layer.keys, layer.values) for layer in cache.layers])
        self._layers = [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*parts, strict=True)
        ]

    @torch.inference_mode()
    def logits_after(self, batch: int) -> np.ndarray:
        """[batch, vocab] behind the last token of the first prompts, computed together."""
        last = [[prompt[-1]] for prompt in self._prompts[:batch]]
        return self._compute(last, self._cache(batch)).float().numpy()

    @torch.inference_mode()
    def prefill_logits(self, prompt: list[int]) -> np.ndarray:
        """[vocab] behind a whole prompt."""
        return self._compute([prompt], DynamicCache())[0].float().numpy()

    @torch.inference_mode()
    def decode(self, batch: int, warm_steps: int, steps: int) -> float:
        """Seconds of `steps` steps, each of one token for each of `batch` sequences."""
        cache = self._cache(batch)
        tokens, began = [[prompt[-1]] for prompt in self._prompts[:batch]], 0.0
        for number in range(warm_steps + steps):
            if number == warm_steps:
                began = self._now()
            tokens = self._compute(tokens, cache).argmax(-1, keepdim=True).tolist()
        return self._now() - began

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        began = self._now()
        self._compute([prompt], DynamicCache()).argmax(-1).tolist()
        return self._now() - began

    def facts(self) -> dict[str, Any]:
        """Versions and settings; bytes of weights, and of those a decode step of one row reads."""
        total = sum(parameter.nbytes for parameter in self._model.parameters())
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "python": platform.python_version(),
            "weights": "bfloat16",
            "kv_cache": f"bfloat16, {self._cache_kind}",
            "attention": self._model.config._attn_implementation,
            "weight_bytes": total,
            "token_bytes": total - self._model.get_input_embeddings().weight.nbytes,
        }

    def _cache(self, batch: int) -> DynamicCache | StaticCache:
        if self._cache_kind == "static":
            cache = StaticCache(config=self._model.config, max_cache_len=self._cache_length)
        else:
            cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys[:batch].clone(), values[:batch].clone(), index)
        return cache

    def _compute(self, rows: list[list[int]], cache: DynamicCache | StaticCache) -> Tensor:
        """Logits [rows, vocab] behind the last token of each row."""
        output = self._model(torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]
