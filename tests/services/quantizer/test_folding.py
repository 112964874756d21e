"""Folding changes no function, per architecture: zero and tiny norm weights, grouped heads, biases."""

import pytest
import torch

from services.quantizer.block_scales import BlockScales
from services.quantizer.source import Source
from services.quantizer.statistics import BlockInputs

CASES = [
    ("Llama", torch.float32, {}),
    ("Llama", torch.bfloat16, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    ("Llama", torch.float16, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("Qwen2", torch.float32, {}),
    ("Qwen2", torch.bfloat16, {"tie_word_embeddings": False}),
]


def input_means(source, index, weights, hidden):
    groups = source.architecture.groups
    collected = BlockInputs(source, index, weights, hidden, None, groups).collect(groups, weights)
    return {name: statistics.mean_abs for name, statistics in collected.items()}


def streamed_logits(source, token_ids, transform):
    hidden = source.embed(token_ids)
    for index in range(source.num_blocks):
        weights = transform(index, source.block_weights(index), hidden)
        hidden = source.run_block(source.block(index), weights, hidden)
    return source.head().logits(hidden)


@pytest.mark.parametrize(("family", "dtype", "changes"), CASES)
@torch.inference_mode()
def test_blocks_one_at_a_time_equal_the_whole_model(
    make_checkpoint, transformers_logits, family, dtype, changes
):
    directory = make_checkpoint(family, dtype, **changes)
    token_ids = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    ours = streamed_logits(Source(directory, torch.device("cpu")), token_ids, lambda _i, weights, _h: weights)
    theirs = transformers_logits(directory, token_ids)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("family", "dtype", "changes"), CASES)
@pytest.mark.parametrize(("method", "ratio"), [("duo", 0.5), ("x-only", 1.0)])
@torch.inference_mode()
def test_folding_alone_leaves_the_logits_equal(make_checkpoint, family, dtype, changes, method, ratio):
    source = Source(make_checkpoint(family, dtype, **changes), torch.device("cpu"))
    token_ids = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    spread = []

    def folded(index, weights, hidden):
        scales = BlockScales(source, index, weights, source.architecture.groups, 32)
        means = input_means(source, index, weights, hidden)
        chosen = {}
        for group in source.architecture.groups:
            candidate = scales.space(group, means[group.linears[0]]).make(method, ratio)
            spread.append(float(candidate.scales.max() / candidate.scales.min()))
            chosen[group.linears[0]] = candidate
            if group.previous.endswith("norm"):
                assert candidate.scales[3] == 1.0  # a channel of norm weight 0 keeps its scale
                assert candidate.scales[5] != 1.0
        folding = scales.folding(chosen)
        changed = folding.full_precision()
        assert not torch.equal(changed["self_attn.v_proj.weight"], weights["self_attn.v_proj.weight"])
        if "self_attn.v_proj.bias" in weights:
            assert not torch.equal(changed["self_attn.v_proj.bias"], weights["self_attn.v_proj.bias"])
            assert torch.equal(changed["self_attn.q_proj.bias"], weights["self_attn.q_proj.bias"])
        return changed

    plain = streamed_logits(source, token_ids, lambda _i, weights, _h: weights)
    changed = streamed_logits(source, token_ids, folded)
    assert min(spread) > 1.2
    assert (changed - plain).abs().max() <= 1e-4 * plain.abs().max()


@torch.inference_mode()
def test_grouped_heads_share_the_mean_of_their_scales(make_checkpoint):
    source = Source(make_checkpoint("Llama", torch.float32), torch.device("cpu"))
    token_ids = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    groups = source.architecture.groups
    group = groups[1]
    means = input_means(source, 0, source.block_weights(0), source.embed(token_ids))
    space = BlockScales(source, 0, source.block_weights(0), groups, 32).space(group, means[group.linears[0]])
    scales = space.make("x-only", 1.0).scales.view(2, 2, 16)  # kv heads, repeats, head size
    assert torch.equal(scales[:, 0], scales[:, 1])
    raw = space.x_mean.view(2, 2, 16).mean(1)
    ratio = scales[:, 0] / raw
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5)
    assert torch.equal(space.producer_scales(scales.reshape(-1)), scales[:, 0].reshape(-1))
