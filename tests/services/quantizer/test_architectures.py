"""Every architecture of the model map: a block at a time equals the whole model of `transformers`, folding
changes nothing, and an artifact means what it says under the source's names.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.quantizer.companions import quantized_config
from services.quantizer.config import COMPRESSED_TENSORS, QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.folding import fold
from services.quantizer.importing.scheme import parse_scheme
from services.quantizer.job import run
from services.quantizer.model_map import ARCHITECTURES
from services.quantizer.scales import ScaleSpace
from services.quantizer.source import Source
from tests.services.quantizer.test_job import read_gemm
from tests.services.quantizer.tiny_models import TINY, tiny_config, whole_logits, write_tiny
from weft.artifact import checkpoint
from weft.artifact.checkpoint import CheckpointError
from weft.artifact.store import ArtifactStore

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
    """Scales [in] of a group, alike wherever one row of the producer feeds several; and of its rows."""
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


@pytest.fixture(scope="module", params=TINY)
def published(request, tmp_path_factory):
    """(config.json, source, artifact) of a run of seconds, in the source's 16 bits."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    source = write_tiny(tmp_path / "source", request.param, torch.bfloat16)
    config = QuantizerConfig(
        source=source,
        artifacts=tmp_path / "artifacts",
        name="tiny",
        samples=4,
        sequence_length=48,
        evaluation_tokens=0,
        group_size=32,
        threads=1,
    )
    return tiny_config(request.param), source, run(config)


def test_an_artifact_has_the_sources_names_and_means_what_its_canary_says(published):
    config, source, artifact = published
    ArtifactStore(artifact.path.parents[1]).verify(artifact)
    weights, others = read_gemm(artifact.path)
    stored = load_file(source / "model.safetensors")
    assert weights.keys() | others.keys() == stored.keys()
    assert {name.removesuffix(".weight") for name in weights} == artifact.manifest.linears.keys()
    matrices = {n for n, t in stored.items() if t.dim() == 2 and "layers" in n}
    assert weights.keys() == matrices
    assert all(weights[name].shape == stored[name].shape for name in weights)
    assert all(tensor.dtype == torch.bfloat16 for tensor in others.values())
    assert all(0 < error.chosen <= error.rounding < 0.1 for error in artifact.manifest.linears.values())
    for prompt in artifact.manifest.canary.prompts:
        token_ids = torch.tensor([prompt.token_ids])
        logprobs = whole_logits(config, {**weights, **others}, token_ids)[0].log_softmax(-1)
        expected = torch.tensor(prompt.expected_token_ids).unsqueeze(1)
        found = logprobs.gather(-1, expected).squeeze(1)
        assert torch.allclose(found, torch.tensor(prompt.logprobs), atol=1e-3)
    # Four bits cost a random model a lot; another model altogether would be 1.4 away.
    plain = whole_logits(config, stored, token_ids)[0]
    ours = whole_logits(config, {**weights, **others}, token_ids)[0]
    assert (ours - plain).norm() <= 0.6 * plain.norm()


def test_what_an_artifact_says_of_itself_names_no_code(published):
    config, source, artifact = published
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((artifact.path / name).read_text())
        assert ("auto_map" in json.loads((source / name).read_text())) == ("auto_map" in config)
    kept = json.loads((artifact.path / "config.json").read_text())
    del kept["quantization_config"]
    assert kept == {key: value for key, value in config.items() if key != "auto_map"}


@pytest.mark.parametrize("name", ["InternLM2", "Phi3"])
def test_the_head_is_left_out_of_what_is_packed_by_its_own_name(name):
    document = json.loads(quantized_config(tiny_config(name), 32, ["x"], COMPRESSED_TENSORS))
    head = {"InternLM2": "output", "Phi3": "lm_head"}[name]
    assert document["quantization_config"]["ignore"] == [head, "x"]
    assert parse_scheme(document, Path("config.json")).full_precision == ("x",)


REFUSED = {
    "experts": ("Qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not supported"),
    "pictures": (
        "Gemma3",
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        "Gemma3ForConditionalGeneration is not supported",
    ),
    "code of an unknown architecture": (
        "InternLM2",
        {"architectures": ["InternLM4ForCausalLM"]},
        "auto_map asks to run code",
    ),
    "rope": ("Qwen3", {"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling of type spiral"),
    "mrope": ("Qwen3", {"rope_scaling": {"type": "mrope"}}, "rope_scaling of type mrope"),
    "rope of a layer type": (
        "Gemma3",
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "spiral"}}},
        "rope_parameters of type spiral",
    ),
    "rope that is no object": ("Mistral", {"rope_scaling": "dynamic"}, "rope_scaling is dynamic; an object"),
    "longrope of another length": (
        "Phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "not usable",
    ),
    "an endless context": ("Phi3", {"original_max_position_embeddings": 10**30}, "expected an integer"),
    "more than a head turns": ("InternLM2", {"partial_rotary_factor": 1.5}, "not usable"),
    "both directions": ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "a cap that is not computed": ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "a cap of nothing": ("Gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
    "no scale": ("Gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
    "a window of nothing": ("Mistral", {"sliding_window": 0}, "sliding_window is 0"),
    "unknown layers": (
        "Qwen3",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layer_types must name 2 layers",
    ),
    "too few layer types": ("Qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
    "alternating windows": (
        "Mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is not supported for this architecture",
    ),
    "biases apart": ("InternLM3", {"qkv_bias": True, "bias": False}, "qkv_bias and bias differ"),
    "a bias of words": ("InternLM2", {"bias": "yes"}, "bias is yes; true or false"),
    "biases that are not there": ("InternLM2", {"bias": True}, "no tensor model.layers.0.attention"),
    "other rows": ("InternLM2", {"num_key_value_heads": 6}, "attention.wqkv.weight: shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_table_does_not_cover_is_refused_by_name(tmp_path, case):
    name, changes, expected = REFUSED[case]
    source = write_tiny(tmp_path / "source", name)
    (source / "config.json").write_text(json.dumps(tiny_config(name, **changes)))
    with pytest.raises((QuantizerError, CheckpointError), match=expected) as caught:
        Source(source, CPU)
    assert "\n" not in str(caught.value)


HOSTILE = (
    None, -1, 0, 1.5, True, 10**30, 1e300, "x", "", [], ["x"], [[]], {}, {"rope_type": "linear"},
    {"rope_type": "yarn", "factor": "x"}, {"type": "llama3", "factor": 8.0}, {"full_attention": 5},
)  # fmt: skip
OPTIONAL_FIELDS = (
    "rope_parameters", "layer_types", "torch_dtype", "partial_rotary_factor", "num_labels", "id2label",
    "attention_dropout", "attention_bias", "mlp_bias",
)  # fmt: skip


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_a_hostile_field_is_refused_in_one_line_or_harmless(tmp_path, name):
    source = write_tiny(tmp_path / "source", name)
    fields = [*tiny_config(name), *OPTIONAL_FIELDS]
    rng = random.Random(name)
    for field, value in [(rng.choice(fields), rng.choice(HOSTILE)) for _ in range(15)]:
        (source / "config.json").write_text(json.dumps(tiny_config(name, **{field: value})))
        try:
            opened = Source(source, CPU)
        except (QuantizerError, CheckpointError) as refusal:
            lines = str(refusal).splitlines()
            assert len(lines) == 1
        else:
            opened.run_block(opened.block(0), opened.block_weights(0), torch.zeros(1, 4, opened.hidden_size))


def test_a_name_is_not_made_up_for_every_label(tmp_path):
    source = write_tiny(tmp_path / "source", "Mistral")
    (source / "config.json").write_text(json.dumps(tiny_config("Mistral", num_labels=10**12)))
    Source(source, CPU)


def test_eager_attention_counts_its_scores(tmp_path):
    """Six heads; sixteen windows of 64 tokens, but a longer one alone."""
    eager = Source(write_tiny(tmp_path / "eager", "Gemma2"), CPU)
    assert eager.score_bytes(64) == 3 * 4 * 16 * 6 * 64 * 64
    assert eager.score_bytes(2048) == 3 * 4 * 6 * 2048 * 2048
    assert [len(batch) for _, batch, _ in eager.batches(torch.zeros(20, 64, 96), 0)] == [16, 4]
    assert Source(write_tiny(tmp_path / "other", "Qwen3"), CPU).score_bytes(2048) == 0


def test_code_that_is_not_run_is_told(tmp_path, monkeypatch):
    told = []

    class Logger:
        def info(self, event, **fields):
            told.append((event, fields))

    monkeypatch.setattr(checkpoint, "_LOGGER", Logger())
    Source(write_tiny(tmp_path / "source", "Phi3"), CPU)
    Source(write_tiny(tmp_path / "plain", "Mistral"), CPU)
    ((event, fields),) = told
    assert "not run" in event
    assert fields["architectures"] == ["Phi3ForCausalLM"]


@pytest.mark.parametrize("name", ["Gemma2", "Qwen3"])
def test_what_a_norm_stores_is_divided_exactly(tmp_path, name):
    """1 + weight, where the norm adds 1, divided by scales that are made for it."""
    source = Source(write_tiny(tmp_path / "source", name, torch.bfloat16), CPU)
    weights, group = source.block_weights(0), source.architecture.groups[0]
    offset = 1.0 if name == "Gemma2" else 0.0
    norm = weights[f"{group.previous}.weight"]
    space = ScaleSpace(
        x_mean=torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.05,
        w_mean=torch.ones(96),
        num_repeats=1,
        head_size=1,
        producer=norm,
        dtype=torch.bfloat16,
        is_norm=True,
        offset=group.norm_offset,
    )
    scales = space.make("x-only", 1.0).scales
    assert scales.max() / scales.min() > 5
    folding = fold(
        weights,
        source.architecture.linears,
        [(group, scales, scales)],
        lambda _name, value: value.to(torch.bfloat16).float(),
    )
    divided = folding.parameters[f"{group.previous}.weight"]
    assert torch.allclose((divided + offset) * scales, norm + offset, rtol=1e-6, atol=0)
