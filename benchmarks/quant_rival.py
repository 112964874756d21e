"""llm-compressor on one model: run by `benchmarks.quant` with the interpreter of a virtual environment that
has it.

    python quant_rival.py SPEC.json

SPEC holds `model` (directory), `windows` (JSON file: lists of token ids), `method` ("awq" or "gptq"),
`threads`, `out` (safetensors file for the dense weights that the quantized model means), `result` (JSON file
for seconds and versions). Imports nothing of this project: the two environments share no package.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEME: dict[str, Any] = {"targets": ["Linear"], "scheme": "W4A16_ASYM", "ignore": ["lm_head"]}


def main(spec_path: str) -> None:
    """Quantize, then write what the weights mean."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    windows = json.loads(Path(spec["windows"]).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    if not torch.accelerator.is_available():
        # It pins memory for a device that is not there, and fails.
        IntermediatesCache.pin_memory = lambda self, *_args, **_kwargs: None
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=_recipe(spec["method"]),
        dataset=dataset,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    save_file(dense_weights(model), spec["out"])
    result = {
        "quantization_seconds": seconds,
        "versions": {
            name: importlib.metadata.version(name) for name in ("llmcompressor", "torch", "transformers")
        },
    }
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


def _recipe(method: str) -> list[Any]:
    if method == "gptq":
        return [GPTQModifier(**SCHEME)]
    return [AWQModifier(duo_scaling=True), QuantizationModifier(**SCHEME)]


def dense_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters; those of quantized linears as (q - zero) * scale, with the scales and zeros found.

    Rounding what was rounded already (GPTQ) changes nothing.
    """
    dense = {name: p.detach().clone() for name, p in model.named_parameters() if not _is_of_grid(name)}
    for name, module in model.named_modules():
        scale = getattr(module, "weight_scale", None)
        if scale is None:
            continue
        weight = dense[f"{name}.weight"]
        grouped = weight.unflatten(1, (scale.shape[1], -1))
        # As compressed-tensors stores it: 4 bits with an offset of 8, zero points within -8..7.
        zero = module.weight_zero_point.float().unsqueeze(-1)
        scale = scale.float().unsqueeze(-1)
        values = (torch.round(grouped / scale + zero)).clamp(-8, 7)
        dense[f"{name}.weight"] = ((values - zero) * scale).flatten(1).contiguous()
    head = dense.pop("lm_head.weight", None)
    embedding = dense["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head, embedding):
        dense["lm_head.weight"] = head
    return dense


def _is_of_grid(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("weight_scale", "weight_zero_point", "weight_g_idx")


if __name__ == "__main__":
    main(sys.argv[1])
