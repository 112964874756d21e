"""The plain checkpoint of the comparison as a GGUF file in Q4_0, for llama.cpp.

    RIVAL_PYTHON benchmarks/cpu_gguf.py FOLDER

Writes fp16 tensors with the `gguf` package, then has llama.cpp's own quantizer make Q4_0 of them, so that it
chooses the type of every tensor as `llama-quantize` does. Runs in llama.cpp's environment, without torch.
The file has no vocabulary: tokens go in and out as ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_bfloat16(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a safetensors file of bf16 as fp32, by name. The format: 8 bytes of length, a JSON header
    with offsets, the data.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(data[:8].view("<u8")[0])
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, BF16 expected")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        halves = data[begin:end].view("<u2").astype(np.uint32) << 16
        yield name, halves.view(np.float32).reshape(entry["shape"])


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of q or k in llama.cpp's order: it rotates neighbouring channels of a head together, where the
    checkpoint pairs those half a head apart.
    """
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """Of a tensor, by its name in the checkpoint."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_float16(folder: Path, target: Path) -> None:
    """`folder`, a Llama's plain checkpoint, as GGUF in fp16."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=False)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    for name, weight in read_bfloat16(folder / "model.safetensors"):
        stored = weight
        if name.endswith("q_proj.weight"):
            stored = interleaved(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            stored = interleaved(weight, config["num_key_value_heads"])
        # One-dimensional tensors stay fp32, as llama.cpp wants its norms.
        writer.add_tensor(gguf_name(name), stored if stored.ndim == 1 else stored.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path) -> None:
    """llama.cpp's own Q4_0 of a GGUF file. Raises RuntimeError when it refuses."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize ended with {status}")


def prepare(folder: Path) -> Path:
    """`folder`/q4_0.gguf from `folder`/plain, unless it is there."""
    target = folder / "q4_0.gguf"
    if not target.exists():
        wide, partial = folder / "f16.gguf", folder / "q4_0.gguf.partial"
        write_float16(folder / "plain", wide)
        quantize(wide, partial)
        wide.unlink()
        partial.rename(target)
    return target


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
