"""fp32 logits of random tiny models against `transformers`: whole prompts, and token by token through paged
blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.models.checkpoints import (
    GEMMA2,
    GEMMA3,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    dequantize_checkpoint,
    quantize_checkpoint,
    write_checkpoint,
)
from weft.memory import ModelShape, weight_bytes

INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "output.": "lm_head.",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.0, 1.3, 1.2, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0],
}
LONGROPE_6 = {name: value[:6] if isinstance(value, list) else value for name, value in LONGROPE.items()}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "llama without grouping": {**LLAMA, "num_key_value_heads": 4},
    "llama one kv head, odd sizes": {
        **LLAMA,
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 18,
        "intermediate_size": 77,
        "vocab_size": 51,
        "num_hidden_layers": 3,
    },
    "llama biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama linear rope": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama llama3 rope": {**LLAMA, "rope_scaling": LLAMA3_ROPE},
    "llama nested rope": {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama with a window, which it does not have": {**LLAMA, "sliding_window": 20},
    "mistral": MISTRAL,
    "mistral window 1": {**MISTRAL, "sliding_window": 1},
    "mistral window 37": {**MISTRAL, "sliding_window": 37},
    "mistral window 129, odd heads": {**MISTRAL, "sliding_window": 129, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2 window in layer 1": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 50,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3 window, biases": {
        **QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2 tied": {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "internlm2": INTERNLM2,
    "internlm2 biases, one head each": {**INTERNLM2, "bias": True, "num_key_value_heads": 6},
    "internlm3": INTERNLM3,
    "internlm3 biases": {**INTERNLM3, "bias": True, "qkv_bias": True},
    "internlm3 other biases": {**INTERNLM3, "bias": True, "qkv_bias": False, "num_key_value_heads": 1},
    "phi3": PHI3,
    "phi3 no window": {**PHI3, "sliding_window": None, "num_key_value_heads": 4},
    "phi3 partly turned": {**PHI3, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "phi3 partly turned, odd": {**PHI3, "partial_rotary_factor": 0.45, "hidden_size": 72},
    "phi3 short": {**PHI3, "rope_scaling": LONGROPE},
    "phi3 long": {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "phi3 long, partly turned": {
        **PHI3,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE_6,
    },
    "gemma2": GEMMA2,
    "gemma2 without caps": {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2 other layers": {
        **GEMMA2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_key_value_heads": 4,
        "sliding_window": 129,
        "attention_bias": True,
    },
    "gemma3": GEMMA3,
    "gemma3 nested ropes": {
        **{key: value for key, value in GEMMA3.items() if "rope" not in key},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "final_logit_softcapping": 5.0,
    },
    "gemma3 no scaling, untied": {**GEMMA3, "rope_scaling": None, "tie_word_embeddings": False},
}


def _transformers_logits(directory: Path, ids: list[int]) -> Tensor:
    transformers = pytest.importorskip("transformers")
    if json.loads((directory / "config.json").read_text())["model_type"].startswith("internlm"):
        directory = _as_llama(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0]


def _as_llama(directory: Path) -> Path:
    """An InternLM2 or 3 under Llama's names, which transformers computes without code of the checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(kv_heads, heads // kv_heads + 2, head_dim)
    parts = {"q_proj": rows[:, :-2], "k_proj": rows[:, -2], "v_proj": rows[:, -1]}
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for theirs, llamas in INTERNLM2_NAMES.items():
            name = name.replace(theirs, llamas)
        if ".wqkv." in name:
            for part, which in parts.items():
                tensors[name.replace("attention.wqkv", f"self_attn.{part}")] = tensor[which.flatten()]
        else:
            tensors[name] = tensor
    for name in [name for name in tensors if ".q_proj.weight" in name]:
        # Llama's one flag for the biases of q, k, v and o.
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = name.removesuffix("q_proj.weight") + part
            tensors.setdefault(f"{stem}.bias", torch.zeros(len(tensors[f"{stem}.weight"])))
    llama = {key: config[key] for key in LLAMA if key in config} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": head_dim,
        "attention_bias": True,
        "mlp_bias": config["model_type"] == "internlm3" and config["bias"],
    }
    return write_checkpoint(directory / "llama", llama, tensors)


def _load(directory: Path, block_size: int, **settings: Any) -> ModelRunner:
    num_blocks = 320 // block_size + 40
    config = RunnerConfig(
        source=directory,
        dtype="float32",
        block_size=block_size,
        num_blocks=num_blocks,
        is_poisoned=True,
        **settings,
    )
    return load_runner(config)


def _sequence(ids: list[int], blocks: list[int]) -> Sequence:
    sequence = Sequence(key="t", prompt_token_ids=ids, params=SamplingParams(max_tokens=1, temperature=0.0))
    sequence.block_table = blocks
    return sequence


def _by_token(runner: ModelRunner, ids: list[int], first: int) -> Tensor:
    """Logits of positions first - 1 and on: a prefill of `first` tokens in two chunks, then single tokens."""
    count = -(-len(ids) // runner.info.block_size)
    sequence = _sequence(ids, list(range(runner.info.num_blocks))[::-3][:count])
    runner.forward([Chunk(sequence, 0, first // 2, False)])
    rows = [runner.forward([Chunk(sequence, first // 2, first - first // 2, True)])]
    rows += [runner.forward([Chunk(sequence, position, 1, True)]) for position in range(first, len(ids))]
    return torch.cat(rows)


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", VARIANTS[name])
    ids = torch.randint(
        VARIANTS[name]["vocab_size"], (150,), generator=torch.Generator().manual_seed(5)
    ).tolist()
    expected = _transformers_logits(directory, ids)
    runner = _load(directory, 16)
    count = -(-len(ids) // 16)
    for stop in (1, 2, 33, 150):
        last = runner.forward([Chunk(_sequence(ids[:stop], list(range(3, 3 + count))), 0, stop, True)])
        _assert_close(last[0], expected[stop - 1])
    _assert_close(_by_token(runner, ids, 120), expected[119:])
    assert runner.info.is_deterministic


EACH = [LLAMA, MISTRAL, QWEN2, QWEN3, INTERNLM2, INTERNLM3, PHI3, GEMMA2, GEMMA3]


@pytest.mark.parametrize("config", EACH, ids=lambda config: config["model_type"])
def test_weights_take_what_the_plan_says(config: dict[str, Any], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", config)
    planned = weight_bytes(ModelShape.from_file(directory), 32)
    assert _load(directory, 16).info.weight_bytes == planned


@pytest.mark.parametrize(
    ("base", "skip"),
    [
        *((base, skip) for base in (LLAMA, QWEN2) for skip in ((), ("v_proj",), ("mlp",))),
        (INTERNLM2, ()),
        (INTERNLM2, ("feed_forward",)),
        (INTERNLM3, ()),
        (PHI3, ()),
        (PHI3 | {"partial_rotary_factor": 0.75}, ("gate_up",)),
        (GEMMA2, ()),
        (GEMMA3, ("q_proj",)),
    ],
)
def test_an_autoawq_checkpoint_is_what_its_nibbles_say(
    base: dict[str, Any], skip: tuple[str, ...], tmp_path: Path
) -> None:
    plain = write_checkpoint(tmp_path / "plain", base)
    packed = quantize_checkpoint(plain, tmp_path / "packed", 32, skip)
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    expected = _transformers_logits(dequantize_checkpoint(packed, tmp_path / "meant"), ids)
    runner = _load(packed, 32)
    _assert_close(_by_token(runner, ids, 20), expected[19:])
    is_packed = not {"mlp", "feed_forward"} & set(skip)
    assert ("int4-dequantize" in runner.info.kernel_paths["down"]) == is_packed


@pytest.mark.parametrize(
    "name",
    [
        "llama llama3 rope",
        "mistral window 37",
        "qwen3 window, biases",
        "phi3",
        "phi3 long, partly turned",
        "gemma2",
        "gemma2 other layers",
        "gemma3",
        "gemma3 nested ropes",
    ],
)
def test_what_transformers_saves_is_served(name: str, tmp_path: Path) -> None:
    """It writes config.json in its own way: every field, rotary ones nested."""
    transformers = pytest.importorskip("transformers")
    written = write_checkpoint(tmp_path / "written", VARIANTS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(97, (60,), generator=torch.Generator().manual_seed(8)).tolist()
    # Long enough that transformers takes the long factors, as the engine does for its whole context.
    ids = ids * 2 if "long" in name else ids
    expected = _transformers_logits(tmp_path / "saved", ids)
    _assert_close(_by_token(_load(tmp_path / "saved", 16), ids, 30), expected[29:])


def test_stored_half_precision_is_served_in_float32(tmp_path: Path) -> None:
    from tests.services.engine.models.checkpoints import tensors_of

    halves = {name: tensor.half() for name, tensor in tensors_of(LLAMA).items()}
    directory = write_checkpoint(tmp_path / "model", {**LLAMA, "torch_dtype": "float16"}, halves)
    ids = [3, 14, 15, 9, 26]
    _assert_close(_by_token(_load(directory, 16), ids, 2), _transformers_logits(directory, ids)[1:])
