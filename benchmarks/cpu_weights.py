"""One set of random weights for all systems on a CPU, and the logits that they should give.

    python -m benchmarks.cpu_weights SPEC.json

Writes a plain bf16 checkpoint (`plain`), the same weights in AutoAWQ's 4-bit format (`awq`), and
`reference.npz`: logits computed by transformers in fp32. Each linear's weights lie on a grid that int4 in
groups of 128 holds exactly, and so do GGUF's Q4_0 and bf16: -8 .. 7 or -7 .. 8 times a scale of four
significant bits, with a -8, or 8, in every block of 32 (from which Q4_0 takes its scale). So systems may
differ in how they round activations, and the output head where it is kept in another type. Knows no system
that is timed.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.cpu_shape import Dimensions, Workload, from_spec, tensor_names
from weft.artifact.packing import pack_int4

Q4_0_BLOCK = 32


class GridWeight(NamedTuple):
    """A weight [out, in] that is (number - zero) * scale: numbers uint8 of 0 .. 15 [out, in], zeros uint8 and
    scales fp32 [out, in / group].
    """

    numbers: Tensor
    zeros: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """In bf16, exactly."""
        grouped = self.numbers.unflatten(1, (self.scales.shape[1], -1)).float()
        return ((grouped - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)).flatten(1).bfloat16()

    def awq(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """In AutoAWQ's layout."""
        yield f"{name}.qweight", pack_int4(self.numbers.t().contiguous())
        yield f"{name}.qzeros", pack_int4(self.zeros.t().contiguous())
        yield f"{name}.scales", self.scales.t().half().contiguous()


def grid_weight(shape: tuple[int, int], size: float, group: int, generator: torch.Generator) -> GridWeight:
    """Random, with a mean of zero and a standard deviation of about `size`."""
    rows, columns = shape
    drawn = torch.randint(1, 16, (rows, columns // Q4_0_BLOCK, Q4_0_BLOCK), generator=generator)
    where = torch.randint(0, Q4_0_BLOCK, (rows, columns // Q4_0_BLOCK, 1), generator=generator)
    numbers = drawn.to(torch.uint8).scatter_(2, where, 0).view(rows, columns // group, group)
    # Half of the groups are turned round. Otherwise the many -8 would give every output the same sign, the
    # layers would add it up, and logits would say little but that.
    is_turned = torch.randint(0, 2, (rows, columns // group, 1), generator=generator).bool()
    numbers = torch.where(is_turned, 15 - numbers, numbers)
    zeros = torch.where(is_turned, 7, 8).to(torch.uint8).squeeze(-1)
    power = 2.0 ** math.floor(math.log2(size / 4.5))
    eighths = torch.randint(0, 8, (rows, columns // group), generator=generator)
    return GridWeight(numbers.view(rows, columns), zeros, power * (1 + eighths / 8))


def write_checkpoints(folder: Path, dimensions: Dimensions) -> None:
    """`folder`/plain and `folder`/awq."""
    plain: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}
    for index, (name, shape) in enumerate(tensor_names(dimensions)):
        generator = torch.Generator().manual_seed(index)
        if len(shape) == 1:
            plain[name] = (1 + torch.randint(-4, 5, shape, generator=generator) / 16).bfloat16()
            packed[name] = plain[name]
            continue
        size = 1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
        weight = grid_weight((shape[0], shape[1]), size, dimensions.group_size, generator)
        plain[name] = weight.dense()
        if name.endswith("proj.weight"):
            packed.update(weight.awq(name.removesuffix(".weight")))
        else:
            packed[name] = plain[name]
    for kind, tensors in (("plain", plain), ("awq", packed)):
        directory = folder / kind
        directory.mkdir(parents=True)
        config = dimensions.config(is_quantized=kind == "awq")
        (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def reference_logits(folder: Path, dimensions: Dimensions, workload: Workload) -> dict[str, np.ndarray]:
    """fp32 logits behind the last token of each prompt: `decode` [max_batch, vocab], `prefill` [vocab]."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()

    def last(prompts: list[list[int]]) -> Tensor:
        return model(torch.tensor(prompts), use_cache=False, logits_to_keep=1).logits[:, -1]

    decode = last(workload.prompts(dimensions.vocab_size))
    prefill = last([workload.prefill_prompt(dimensions.vocab_size, 0)])[0]
    return {"decode": decode.numpy(), "prefill": prefill.numpy()}


def prepare(folder: Path, dimensions: Dimensions, workload: Workload) -> None:
    """Everything into `folder`, which appears only when all of it is there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoints(partial, dimensions)
    np.savez(partial / "reference.npz", **reference_logits(partial, dimensions, workload))
    partial.rename(folder)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    prepare(Path(spec["folder"]), *from_spec(spec))


if __name__ == "__main__":
    main()
