"""Tiny random checkpoints on disk, plain and in AutoAWQ's layout, for the tests of models and runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.artifact.packing import pack_int4

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
QWEN2: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}
MISTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": None,
}
QWEN3: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 24,
}
INTERNLM2: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "num_attention_heads": 6,
    "hidden_size": 96,
    "intermediate_size": 64,
    "bias": False,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
}
INTERNLM3: dict[str, Any] = {
    **LLAMA,
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "head_dim": 24,
    "qkv_bias": True,
    "bias": False,
    "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
}
PHI3: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 512,
    "sliding_window": 37,
    "pad_token_id": 0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}
GEMMA2: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("hidden_act", "tie_word_embeddings")},
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 24,
    "num_hidden_layers": 3,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 37,
}
GEMMA3: dict[str, Any] = {
    **{key: value for key, value in GEMMA2.items() if "softcapping" not in key},
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "sliding_window_pattern": 3,
    "rope_theta": 500000.0,
    "rope_local_base_freq": 1000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names of the architecture."""
    tensors = _llama_tensors(config, seed)
    if config["model_type"] == "internlm2":
        return _as_internlm2(config, tensors)
    if config["model_type"] == "phi3":
        return _as_phi3(tensors)
    return tensors


def _as_internlm2(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under InternLM2's names; rows of wqkv by kv head, one at a time."""
    kv_heads = config["num_key_value_heads"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            key, value = (tensors[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            parts = []
            for kv_head in range(kv_heads):
                parts.append(tensor.chunk(kv_heads)[kv_head])
                parts += [part[kv_head * head_dim : (kv_head + 1) * head_dim] for part in (key, value)]
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            out[name] = tensor
    return out


def _as_phi3(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with fused projections."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            others = [tensors[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
            out[name.replace("q_proj", "qkv_proj")] = torch.cat([tensor, *others])
        elif ".gate_proj." in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            out[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            out[name] = tensor
    return out


def _llama_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random tensors under Llama's names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_size = config["num_key_value_heads"] * head_dim

    def normal(*shape: int, std: float = 0.08) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=0.5)}
    tensors["model.norm.weight"] = 1 + normal(hidden)
    family = config["model_type"]
    is_gemma = family.startswith("gemma")
    if not config.get("tie_word_embeddings", is_gemma):
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, std=0.3)
    has_output_bias = config.get("attention_bias", family.startswith("internlm") and config["bias"])
    has_qkv_bias = family == "qwen2" or config.get("qkv_bias", has_output_bias)
    has_mlp_bias = config.get("mlp_bias", family == "internlm3" and config["bias"])
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        sizes = {
            "self_attn.q_proj": (heads * head_dim, hidden, has_qkv_bias),
            "self_attn.k_proj": (kv_size, hidden, has_qkv_bias),
            "self_attn.v_proj": (kv_size, hidden, has_qkv_bias),
            "self_attn.o_proj": (hidden, heads * head_dim, has_output_bias),
            "mlp.gate_proj": (width, hidden, has_mlp_bias),
            "mlp.up_proj": (width, hidden, has_mlp_bias),
            "mlp.down_proj": (hidden, width, has_mlp_bias),
        }
        for name, (rows, columns, has_bias) in sizes.items():
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns, std=0.15)
            if has_bias:
                tensors[f"{prefix}{name}.bias"] = normal(rows, std=0.3)
        if family in ("qwen3", "gemma3_text"):
            tensors[f"{prefix}self_attn.q_norm.weight"] = 1 + normal(head_dim, std=0.4)
            tensors[f"{prefix}self_attn.k_norm.weight"] = 1 + normal(head_dim, std=0.4)
        tensors[f"{prefix}input_layernorm.weight"] = 1 + normal(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = 1 + normal(hidden)
        if is_gemma:
            tensors[f"{prefix}pre_feedforward_layernorm.weight"] = 1 + normal(hidden)
            tensors[f"{prefix}post_feedforward_layernorm.weight"] = 1 + normal(hidden)
    if is_gemma:
        # Stored less the one that is added to them.
        tensors |= {name: weight - 1 for name, weight in tensors.items() if "norm" in name}
    return tensors


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> Path:
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def round_to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding of weight [out, in]: (values [in, out], zeros, scales fp16 [in / group, out])."""
    grouped = weight.t().float().unflatten(0, (-1, group))
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=2.0**-14).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (grouped / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.flatten(0, 1).to(torch.uint8), zeros.to(torch.uint8), scales


def quantize_checkpoint(source: Path, directory: Path, group: int, skip: tuple[str, ...] = ()) -> Path:
    """An AutoAWQ gemm checkpoint of `source`: decoder linears rounded, those whose name holds one of `skip`
    left.
    """
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": list(skip) or None,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        is_linear = name.endswith("_proj.weight") or ".feed_forward." in name or ".attention.w" in name
        if not (is_linear and name.endswith(".weight")) or any(part in name for part in skip):
            tensors[name] = tensor
            continue
        values, zeros, scales = round_to_int4(tensor, group)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"] = pack_int4(values), pack_int4(zeros)
        tensors[f"{stem}.scales"] = scales
    return write_checkpoint(directory, config, tensors)


def dequantize_checkpoint(source: Path, directory: Path) -> Path:
    """The plain fp32 checkpoint that an AutoAWQ one means, by unpacking nibbles one by one."""
    config = json.loads((source / "config.json").read_text())
    group = config.pop("quantization_config")["group_size"]
    stored = load_file(source / "model.safetensors")
    tensors = {
        name: tensor for name, tensor in stored.items() if not name.endswith(("qweight", "qzeros", "scales"))
    }
    for name in [name for name in stored if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        values, zeros = _nibbles(stored[name]), _nibbles(stored[f"{stem}.qzeros"])
        scales = stored[f"{stem}.scales"].float()
        weight = (values - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
        tensors[f"{stem}.weight"] = weight.t().contiguous()
    return write_checkpoint(directory, config, tensors)


def _nibbles(words: Tensor) -> Tensor:
    out = torch.empty(words.shape[0], words.shape[1] * 8)
    for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, channel::8] = ((words >> (4 * nibble)) & 15).float()
    return out
