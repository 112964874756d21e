"""Peak host memory of the quantizer on a model of the shape of TinyLlama 1.1B, made of random weights.

Asks: does it stay under three decoder blocks, the embeddings and the activations; does it stay the same with
more blocks; and did the estimate, which is printed before work begins, hold? Prints one line per number of
blocks. `--shrink 4` takes a quarter of every width: seconds instead of minutes.

    python -m benchmarks.quant_memory --blocks 2 4
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SAMPLES, LENGTH, EVALUATION_TOKENS = 4, 256, 1024
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's, or one with every width divided by `shrink`."""

    shrink: int

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return SHAPE["hidden_size"] // self.shrink

    @property
    def inner(self) -> int:
        """Width inside of the MLP."""
        return SHAPE["intermediate_size"] // self.shrink

    def weights(self) -> dict[str, tuple[int, int]]:
        """Linears of a block, (out, in)."""
        hidden, inner = self.hidden, self.inner
        kv = hidden * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
        return {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip

    def target(self) -> int:
        """Three blocks in fp32, the embeddings as stored, the activations: the streams in fp32 and one batch
        inside of a block. Bytes.
        """
        block = sum(num_out * num_in for num_out, num_in in self.weights().values()) + 2 * self.hidden
        embeddings = 2 * 2 * SHAPE["vocab_size"] * self.hidden
        tokens = SAMPLES * LENGTH
        streams = 4 * self.hidden * (2 * tokens + 3 * EVALUATION_TOKENS + 4 * 48)
        inside = 4 * min(tokens, 2048) * 4 * (self.hidden + self.inner)
        return 3 * 4 * block + embeddings + streams + inside


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, in bytes: the idle interpreter with its libraries, the peak, what was said beforehand."""

    shape: Shape
    blocks: int
    idle: int
    peak: int
    estimate: int
    seconds: float

    def line(self) -> str:
        """For people, in MiB. The target is idle + three blocks + embeddings + activations; the Gram matrix
        of the widest input is not in it.
        """
        target = self.idle + self.shape.target()
        return (
            f"blocks {self.blocks}  peak {self.peak // MIB}  estimate {self.estimate // MIB}  "
            f"target {target // MIB}  idle {self.idle // MIB}  "
            f"one Gram matrix {4 * self.shape.inner**2 // MIB}  seconds {self.seconds:.0f}"
        )


def make_model(directory: Path, blocks: int, shape: Shape) -> None:
    """Write a checkpoint, one block at a time, so that making it needs little memory."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(11)

    def random(*size: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * std).bfloat16()

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    hidden = shape.hidden
    for index in range(blocks):
        block = {f"{name}.weight": random(*size) for name, size in shape.weights().items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"{norm}.weight"] = (torch.rand(hidden, generator=generator) + 0.5).bfloat16()
        save(index + 1, {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()})
    vocabulary = SHAPE["vocab_size"]
    outer = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "lm_head.weight": random(vocabulary, hidden),
    }
    save(blocks + 1, {**outer, "model.norm.weight": torch.ones(hidden).bfloat16()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    widths = {"hidden_size": hidden, "intermediate_size": shape.inner, "num_hidden_layers": blocks}
    (directory / "config.json").write_text(json.dumps({**SHAPE, **widths}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory / name)


def idle_bytes() -> int:
    """Of an interpreter that has imported what the quantizer imports."""
    script = (
        "import services.quantizer.job, transformers.models.llama.modeling_llama;"
        "from services.quantizer.host_memory import peak_bytes; print(peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def measure(folder: Path, blocks: int, shape: Shape, *flags: str) -> Measured:
    """Make a model of so many blocks below `folder`, quantize it in a process of its own."""
    source, artifacts = folder / f"source-{blocks}", folder / f"artifacts-{blocks}"
    make_model(source, blocks, shape)
    command = [
        sys.executable, "-m", "services.quantizer", "run", "--source", str(source), "--threads", "1",
        "--artifacts", str(artifacts), "--name", "shape", "--samples", str(SAMPLES),
        "--sequence-length", str(LENGTH), "--evaluation-tokens", str(EVALUATION_TOKENS), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    plan = next(event for event in events if event["event"] == "plan")
    document = json.loads((Path(done.stdout.splitlines()[0]) / "run.json").read_text())
    shutil.rmtree(source)
    shutil.rmtree(artifacts)
    peak, seconds = document["peak_rss_bytes"], document["seconds"]
    return Measured(shape, blocks, idle_bytes(), peak, plan["memory_bytes"], seconds)


def main() -> None:
    """Print a line per number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths: 1, 2, 4 or 8")
    parser.add_argument("flags", nargs="*", help="more flags of the quantizer, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for blocks in options.blocks:
            print(measure(Path(folder), blocks, Shape(options.shrink), *options.flags).line(), flush=True)


if __name__ == "__main__":
    main()
