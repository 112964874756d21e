"""Every architecture of the model map: a block at a time equals the whole model of `transformers`, folding
changes nothing, and an artifact means what it says under the source's names.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from services.quantizer.errors import QuantizerError
from services.quantizer.folding import fold
from services.quantizer.model_map import ARCHITECTURES
from services.quantizer.source import Source
from tests.services.quantizer.tiny_models import TINY, tiny_config, whole_logits, write_tiny

CPU = torch.device("cpu")
VARIANTS = [
    *((name, {}) for name in TINY),
    ("Mistral", {"sliding_window": None}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    ("InternLM2", {"bias": True, "num_key_value_heads": 1}),
    ("InternLM2", {"num_key_value_heads": 6}),
    ("Phi3", {"sliding_window": 12, "partial_rotary_factor": 1.0, "rope_scaling": None}),
    ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 4096}),
    ("Gemma3", {"final_logit_softcapping": 30.0, "attention_bias": True}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join([v[0], *v[1]]))
def tiny(request, tmp_path):
    name, changes = request.param
    return write_tiny(tmp_path / "source", name, **changes)


def random_ids(length=40):
    return torch.randint(0, 4096, (2, length), generator=torch.Generator().manual_seed(0))


def streamed_logits(source, token_ids, transform=lambda _index, weights: weights):
    hidden = source.embed(token_ids)
    for index in range(source.num_blocks):
        weights = transform(index, source.block_weights(index))
        hidden = source.run_block(source.block(index), weights, hidden)
    return source.head().logits(hidden)


def test_every_architecture_is_tested():
    assert {f"{name}ForCausalLM" for name in TINY} | {"LlamaForCausalLM"} == set(ARCHITECTURES)


@torch.inference_mode()
def test_blocks_one_at_a_time_equal_the_whole_model(tiny):
    config = json.loads((tiny / "config.json").read_text())
    source, tensors = Source(tiny, CPU), load_file(tiny / "model.safetensors")
    for length in (40, 10):  # beyond the windows and longrope's first context, and within
        ours = streamed_logits(source, random_ids(length))
        theirs = whole_logits(config, tensors, random_ids(length))
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert set(source.outer_names()).union(
        *(source.stored_parameters(index) for index in range(source.num_blocks))
    ) == set(tensors)


def random_scales(source, weights, group, generator):
    """Scales [in] of a group, alike wherever one row of the producer feeds several inputs; of its rows, too."""
    num_in = weights[f"{group.linears[0]}.weight"].shape[1]
    repeats = source.num_repeats if group.is_value else 1
    per_row = torch.randn(num_in // repeats, generator=generator).mul(0.7).exp()
    heads = per_row.view(-1, 1, source.head_size) if group.is_value else per_row.view(-1, 1, 1)
    return heads.expand(-1, repeats, -1).reshape(-1), per_row


@torch.inference_mode()
def test_folding_leaves_a_block_equal(tiny):
    source = Source(tiny, CPU)
    groups = source.architecture.groups
    generator = torch.Generator().manual_seed(3)
    weights = source.block_weights(1)
    hidden = torch.randn(2, 40, source.hidden_size, generator=generator)
    plain = source.run_block(source.block(1), weights, hidden)
    drawn = [random_scales(source, weights, group, generator) for group in groups]
    identity = [tuple(torch.ones_like(scales) for scales in pair) for pair in drawn]
    for chosen in (*([i] for i in range(len(groups))), range(len(groups))):
        scales = [drawn[i] if i in chosen else identity[i] for i in range(len(groups))]
        folding = fold(
            weights,
            source.architecture.linears,
            [(group, *pair) for group, pair in zip(groups, scales, strict=True)],
            lambda _name, value: value,
        )
        folded = folding.full_precision()
        changed = {
            name.rpartition(".")[0] for name in weights if not torch.equal(folded[name], weights[name])
        }
        for group in (groups[i] for i in chosen):
            assert {group.previous, *group.linears} <= changed
        assert not any("norm" in name for name in changed - {g.previous for g in groups})
        after = source.run_block(source.block(1), folded, hidden)
        assert (after - plain).abs().max() <= 1e-4 * (plain - hidden).abs().max(), chosen
