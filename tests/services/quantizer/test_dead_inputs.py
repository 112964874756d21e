"""Linears whose inputs are all zero, as where a producer's weights are: nothing can be wrong there, and the
run must not end.
"""

import pytest
from safetensors.torch import load_file, save_file

from services.quantizer.config import QuantizerConfig
from services.quantizer.job import run


@pytest.mark.parametrize("method", ["best", "awq"])
def test_inputs_that_are_all_zero(make_checkpoint, tmp_path, method):
    source = make_checkpoint(num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    prefix = "model.layers.0."
    silent = ["self_attn.v_proj.weight", "mlp.up_proj.weight"]
    for name in silent:
        tensors[prefix + name].zero_()
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = QuantizerConfig(
        source=source, artifacts=tmp_path / "a", name="tiny", samples=4, sequence_length=16,
        evaluation_tokens=64, group_size=32, method=method, threads=1,
    )  # fmt: skip
    artifact = run(config)
    errors = artifact.manifest.linears
    for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.down_proj"):
        assert errors[f"model.layers.{name}"].chosen == errors[f"model.layers.{name}"].rounding == 0.0
    assert errors["model.layers.1.self_attn.o_proj"].chosen > 0.0
