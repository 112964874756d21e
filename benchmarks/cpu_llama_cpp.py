"""llama.cpp's side of the comparison on a CPU, through the low-level calls of llama-cpp-python.

Every sequence has a stream of the cache of its own (`kv_unified` off); a decode step is one `llama_decode`
over one token of each, a prefill is one over the whole prompt, in one micro-batch. The arg-max over all
logits is taken in numpy and is inside of what is timed. Runs in an environment of its own; knows nothing of
the other systems.
"""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.cpu_shape import CLOCKS, Dimensions, Workload

_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


class System:
    """A loaded model with a context of `max_batch` + 1 sequences; the last one is for prefills."""

    def __init__(
        self, folder: Path, dimensions: Dimensions, workload: Workload, threads: int, settings: dict[str, Any]
    ) -> None:
        self._now = CLOCKS[settings.get("clock", "wall")]
        self._context_length = workload.context
        self._prefill_row = workload.max_batch
        self._vocab_size = dimensions.vocab_size
        self._file = folder / "q4_0.gguf"
        self._log: list[str] = []
        self._callback = llama_cpp.llama_log_callback(self._note)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(self._file).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError("llama.cpp did not load the model:\n" + "".join(self._log[-20:]))
        longest = max(workload.prefill, workload.tokens_each)
        self._flash = str(settings.get("flash_attention", "auto"))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = workload.max_batch + 1
        params.n_ctx = params.n_seq_max * -(-longest // 256) * 256
        params.n_batch = params.n_ubatch = max(workload.prefill, workload.max_batch)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.flash_attn_type = _FLASH_ATTENTION[self._flash]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context:\n" + "".join(self._log[-20:]))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._prompts: list[list[int]] = []

    def fill(self, prompts: list[list[int]]) -> None:
        """K and V of the first `context` tokens of each prompt."""
        self._prompts = prompts
        for row, prompt in enumerate(prompts):
            self._compute(
                [(token, at, row, False) for at, token in enumerate(prompt[: self._context_length])]
            )

    def logits_after(self, batch: int) -> np.ndarray:
        """[batch, vocab] behind the last token of the first prompts, computed together."""
        self._rewind(batch)
        self._step([prompt[-1] for prompt in self._prompts[:batch]], self._context_length)
        return np.stack([self._logits(row) for row in range(batch)])

    def prefill_logits(self, prompt: list[int]) -> np.ndarray:
        """[vocab] behind a whole prompt."""
        self.prefill(prompt)
        return self._logits(len(prompt) - 1).copy()

    def decode(self, batch: int, warm_steps: int, steps: int) -> float:
        """Seconds of `steps` steps, each of one token for each of `batch` sequences."""
        self._rewind(batch)
        tokens, began = [prompt[-1] for prompt in self._prompts[:batch]], 0.0
        for number in range(warm_steps + steps):
            if number == warm_steps:
                began = self._now()
            self._step(tokens, self._context_length + number)
            tokens = [int(self._logits(row).argmax()) for row in range(batch)]
        return self._now() - began

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        llama_cpp.llama_memory_seq_rm(self._memory, self._prefill_row, -1, -1)
        began = self._now()
        last = len(prompt) - 1
        self._compute([(token, at, self._prefill_row, at == last) for at, token in enumerate(prompt)])
        int(self._logits(last).argmax())
        return self._now() - began

    def facts(self) -> dict[str, Any]:
        """Versions and settings; bytes of weights, and of those a decode step of one row reads."""
        from gguf import GGUFReader

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(self._file).tensors}
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(self._file).tensors}
        return {
            "version": f"llama-cpp-python {version('llama-cpp-python')}",
            "python": platform.python_version(),
            "weights": f"Q4_0, output head {types['output.weight']}, embedding {types['token_embd.weight']}",
            "flash_attention": self._flash_chosen(),
            "kv_cache": "f16",
            "build": llama_cpp.llama_print_system_info().decode().strip(),
            "weight_bytes": int(llama_cpp.llama_model_size(self._model)),
            "token_bytes": sum(size for name, size in sizes.items() if name != "token_embd.weight"),
        }

    def _flash_chosen(self) -> str:
        """What was asked for, and with "auto" what came of it, as the log tells."""
        said = [line.strip() for line in self._log if "lash" in line and "ttention" in line]
        return self._flash if self._flash != "auto" or not said else f"auto ({said[-1].split(': ')[-1]})"

    def _note(self, level: int, text: bytes, data: object) -> None:
        self._log.append(text.decode(errors="replace"))

    def _rewind(self, batch: int) -> None:
        for row in range(batch):
            llama_cpp.llama_memory_seq_rm(self._memory, row, self._context_length, -1)

    def _step(self, tokens: list[int], position: int) -> None:
        self._compute([(token, position, row, True) for row, token in enumerate(tokens)])

    def _compute(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode over (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, row, is_wanted) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = is_wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
