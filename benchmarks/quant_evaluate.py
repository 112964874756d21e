"""How far quantized weights take a model from its source: one evaluator for every quantizer.

    python -m benchmarks.quant_evaluate SPEC.json

SPEC holds `model` (source directory), `weights` (variant -> safetensors file of dense weights, or an
artifact's directory), `windows` (JSON file: lists of token ids of held-out text), `threads`, `result`. Runs
transformers in fp32. Artifacts are read by the few lines below, not by this project's own reader. Knows
nothing of how the weights were found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the gemm layout keeps output channel j of eight
_NUM_RESAMPLES = 10_000


def main(spec_path: str) -> None:
    """Evaluate all variants against the source."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    windows = torch.tensor(json.loads(Path(spec["windows"]).read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    source = _log_probabilities(model, windows)
    results = {"source": _summary(source, source, windows)}
    for variant, place in spec["weights"].items():
        _load(model, Path(place))
        results[variant] = _summary(source, _log_probabilities(model, windows), windows)
    Path(spec["result"]).write_text(json.dumps(results), encoding="utf-8")


def _log_probabilities(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """Per window fp32 [length - 1, vocabulary]."""
    with torch.inference_mode():
        return [torch.log_softmax(model(w.unsqueeze(0)).logits[0, :-1].float(), -1) for w in windows]


def _summary(source: list[torch.Tensor], found: list[torch.Tensor], windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity, mean KL(source || found) in nats and top-1 agreement, with 95% intervals from resampling
    windows (percentile bootstrap).
    """
    rows = []
    for p, q, ids in zip(source, found, windows, strict=True):
        likelihood = -q.gather(-1, ids[1:, None]).mean(dtype=torch.float64)
        divergence = (p.exp() * (p - q)).sum(-1).mean(dtype=torch.float64)
        agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
        rows.append((float(likelihood), float(divergence), float(agreement)))
    values = np.array(rows)
    picks = np.random.default_rng(0).integers(0, len(values), (_NUM_RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5), axis=0)
    mean = values.mean(0)
    return {
        "perplexity": (np.exp(mean[0]), np.exp(low[0]), np.exp(high[0])),
        "mean_kl": (mean[1], low[1], high[1]),
        "top1_agreement": (mean[2], low[2], high[2]),
        "window_kl": values[:, 1].tolist(),
    }


def _load(model: Any, place: Path) -> None:
    dense = load_file(place) if place.is_file() else dense_artifact(place)
    missing, unexpected = model.load_state_dict(dense, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"{place}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def dense_artifact(directory: Path) -> dict[str, torch.Tensor]:
    """fp32 weights [out, in] of an AutoAWQ gemm checkpoint."""
    stored: dict[str, np.ndarray] = {}
    dense: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.rsplit(".", 1)[-1] in ("qweight", "qzeros", "scales"):
                stored[name] = tensor.numpy()
            else:
                dense[name] = tensor.float()
    for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
        values, zeros = (_unpack(stored[f"{name}.{part}"]) for part in ("qweight", "qzeros"))
        scales = stored[f"{name}.scales"].astype(np.float32)
        size = values.shape[0] // zeros.shape[0]
        weight = (values - zeros.repeat(size, 0)) * scales.repeat(size, 0)
        dense[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float32).T.copy())
    return dense


def _unpack(words: np.ndarray) -> np.ndarray:
    """int32 [rows, out / 8] -> float32 [rows, out]."""
    shifts = np.array([4 * i for i in _NIBBLES])
    return ((words.view(np.uint32)[:, :, None] >> shifts) & 15).reshape(len(words), -1).astype(np.float32)


if __name__ == "__main__":
    main(sys.argv[1])
