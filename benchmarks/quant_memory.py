"""Peak host memory of the quantizer on a model of the shape of TinyLlama 1.1B, made of random weights.

Asks: does it stay under three decoder blocks, the embeddings and the activations; does it stay the same with
more blocks; and did the estimate, which is printed before work begins, hold? Prints one line per number of
blocks; `--csv` appends it to results.csv.

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

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
SHAPE = {
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
BLOCK_PARAMETERS = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048 + 2 * 2048
EMBEDDINGS_BYTES = 2 * 2 * 32000 * 2048  # both, as stored
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, in bytes: the idle interpreter with its libraries, the peak, what was said beforehand."""

    blocks: int
    idle: int
    peak: int
    estimate: int
    seconds: float

    @property
    def allowed(self) -> int:
        """Idle + three blocks in fp32 + the embeddings + the activations."""
        return self.idle + 3 * 4 * BLOCK_PARAMETERS + EMBEDDINGS_BYTES + activation_bytes()

    def line(self) -> str:
        """For people, in MiB."""
        return (
            f"blocks {self.blocks}  peak {self.peak // MIB}  idle {self.idle // MIB}  "
            f"allowed {self.allowed // MIB}  estimate {self.estimate // MIB}  seconds {self.seconds:.0f}"
        )


def activation_bytes() -> int:
    """The streams in fp32, and one batch inside of a block: see docs/quantizer.md."""
    tokens = SAMPLES * LENGTH
    streams = 4 * 2048 * (tokens + 3 * EVALUATION_TOKENS + 4 * 48)
    inside = 4 * min(tokens, 2048) * (4 * 2048 + 4 * 5632)
    return streams + inside


def make_model(directory: Path, blocks: int) -> None:
    """Write a checkpoint, one block at a time, so that making it needs little memory."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).bfloat16()

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for index in range(blocks):
        shapes = {
            "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (256, 2048),
            "self_attn.v_proj": (256, 2048), "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048), "mlp.down_proj": (2048, 5632),
        }  # fmt: skip
        block = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"{norm}.weight"] = (torch.rand(2048, generator=generator) + 0.5).bfloat16()
        save(index + 1, {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()})
    outer = {"model.embed_tokens.weight": random(32000, 2048), "lm_head.weight": random(32000, 2048)}
    save(blocks + 1, {**outer, "model.norm.weight": torch.ones(2048).bfloat16()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": blocks}))
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


def measure(folder: Path, blocks: int, *flags: str) -> Measured:
    """Make a model of so many blocks below `folder`, quantize it in a process of its own."""
    source, artifacts = folder / f"source-{blocks}", folder / f"artifacts-{blocks}"
    make_model(source, blocks)
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
    return Measured(
        blocks, idle_bytes(), document["peak_rss_bytes"], plan["memory_bytes"], document["seconds"]
    )


def main() -> None:
    """Print a line per number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("flags", nargs="*", help="more flags of the quantizer, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for blocks in options.blocks:
            print(measure(Path(folder), blocks, *options.flags).line(), flush=True)


if __name__ == "__main__":
    main()
