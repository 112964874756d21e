"""A small random checkpoint of every architecture that can be quantized, with config.json as real ones have
it, and the whole model that `transformers` makes of it.

InternLM2 has no class there: its tensors are renamed into Llama's by code that shares nothing with the
product.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

DEMO = Path(__file__).parents[3] / "models" / "demo"

_COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_REMOTE_CODE = {
    "auto_map": {"AutoConfig": "configuration_odd.OddConfig", "AutoModel": "modeling_odd.OddModel"}
}
_GEMMA = {
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "attention_bias": False,
}
_SHORT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.1]
_LONG = [1.0, 1.5, 4.0, 9.0, 16.0, 20.0]

TINY: dict[str, dict[str, Any]] = {
    "Mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 12},
    "Qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "Qwen3": {"model_type": "qwen3", "head_dim": 32, "attention_bias": False, "tie_word_embeddings": True},
    "InternLM2": {
        "model_type": "internlm2",
        "bias": False,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "attn_implementation": "eager",
        **_REMOTE_CODE,
    },
    "InternLM3": {
        "model_type": "internlm3",
        "head_dim": 32,
        "qkv_bias": True,
        "bias": True,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        **_REMOTE_CODE,
    },
    "Phi3": {
        "model_type": "phi3",
        "sliding_window": 64,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        "attention_bias": False,
        **_REMOTE_CODE,
    },
    "Gemma2": {
        "model_type": "gemma2",
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 2.0,
        **_GEMMA,
    },
    "Gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        **_GEMMA,
    },
}
"""config.json of each, without what they share. Windows are shorter than the tests' texts."""

_INTERNLM2_NAMES = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {**_COMMON, **TINY[name], "architectures": [f"{name}ForCausalLM"], **changes}


def write_tiny(directory: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint with random weights and the demo model's tokenizer."""
    config = tiny_config(name, **changes)
    torch.manual_seed(7)
    model = _empty_model(config)
    is_gemma = name.startswith("Gemma")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.2, 2.0)
                if is_gemma:  # what multiplies is 1 + weight
                    parameter.sub_(1.0)
            else:
                parameter.normal_(std=0.15)
    tensors = {key: value.to(dtype) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    if name == "InternLM2":
        tensors = _to_internlm2(tensors, config)
    directory.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, directory / file)
    if "auto_map" in config:
        path = directory / "tokenizer_config.json"
        document = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["odd.OddTokenizer", None]}}
        path.write_text(json.dumps(document))
    return directory


@torch.inference_mode()
def whole_logits(config: dict[str, Any], tensors: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    """fp32 logits [windows, length, vocabulary] of the whole model that `transformers` makes of `tensors`,
    under their names in the checkpoint.
    """
    model = _empty_model(config).eval()
    tensors = {key: value.float() for key, value in tensors.items()}
    if config["model_type"] == "internlm2":
        tensors = _from_internlm2(tensors, config)
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    logits: Tensor = model(token_ids).logits
    return logits


def _empty_model(config: dict[str, Any]) -> Any:
    values = copy.deepcopy(config)  # the classes write into it
    for key in ("auto_map", "attn_implementation"):
        values.pop(key, None)
    if config["model_type"] == "internlm2":
        values.update(model_type="llama", attention_bias=values.pop("bias"), rope_scaling=None)
    built = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(built)
    return model.float()


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Key-value heads, query heads for each, channels of a head."""
    kv_heads = config["num_key_value_heads"]
    size = config["hidden_size"] // config["num_attention_heads"]
    return kv_heads, config["num_attention_heads"] // kv_heads, size


def _to_internlm2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    kv_heads, repeats, size = _heads(config)
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, llama in _INTERNLM2_NAMES.items():
            name = name.replace(llama, theirs)
        renamed[name] = tensor
    for name in [n for n in renamed if ".q_proj." in n]:
        q, k, v = (renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
        rows = []
        for head in range(kv_heads):
            rows += [q[head * repeats * size : (head + 1) * repeats * size]]
            rows += [k[head * size : (head + 1) * size], v[head * size : (head + 1) * size]]
        renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
    return renamed


def _from_internlm2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    kv_heads, repeats, size = _heads(config)
    renamed = {}
    for name, tensor in tensors.items():
        if "attention.wqkv" in name:
            by_head = tensor.view(kv_heads, repeats + 2, size, *tensor.shape[1:])
            parts = {"q": by_head[:, :repeats], "k": by_head[:, repeats], "v": by_head[:, repeats + 1]}
            for part, rows in parts.items():
                key = name.replace("attention.wqkv", f"self_attn.{part}_proj")
                renamed[key] = rows.reshape(-1, *tensor.shape[1:])
            continue
        for theirs, llama in _INTERNLM2_NAMES.items():
            name = name.replace(theirs, llama)
        renamed[name] = tensor
    return renamed
