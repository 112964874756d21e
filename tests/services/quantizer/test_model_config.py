"""config.json of real checkpoints: accepted, and of the size that their makers publish."""

import math
from pathlib import Path

import pytest
import torch

from services.quantizer.model_config import build_config, find_architecture
from services.quantizer.positions import Positions

_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "num_hidden_layers": 26,
}
_LONG = [1.0 + 0.5 * i for i in range(48)]
REAL = {
    "Mistral-7B-v0.1": (_MISTRAL, 7_241_732_096),
    "Qwen3-8B": (
        {
            **_MISTRAL,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        8_190_735_360,
    ),
    "internlm2_5-7b-chat": (
        {
            **{key: value for key, value in _MISTRAL.items() if key != "sliding_window"},
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "attn_implementation": "eager",
            "bias": False,
            "pretraining_tp": 1,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": 1000000,
            "vocab_size": 92544,
        },
        7_737_708_544,
    ),
    "internlm3-8b-instruct": (
        {
            **{key: value for key, value in _MISTRAL.items() if key != "sliding_window"},
            "architectures": ["InternLM3ForCausalLM"],
            "model_type": "internlm3",
            "bias": False,
            "qkv_bias": False,
            "head_dim": 128,
            "intermediate_size": 10240,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
            "vocab_size": 128512,
        },
        8_804_241_408,
    ),
    "Phi-3-mini-128k-instruct": (
        {
            **_MISTRAL,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": _LONG, "long_factor": _LONG},
            "sliding_window": 262144,
            "pad_token_id": 32000,
        },
        3_821_079_552,
    ),
    "Phi-4-mini-instruct": (
        {
            **_MISTRAL,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 200064,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": _LONG, "long_factor": _LONG},
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "pad_token_id": 199999,
        },
        3_836_021_760,
    ),
    "gemma-2-2b": (
        {
            **_GEMMA,
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "gemma-3-1b-it": (
        {
            **_GEMMA,
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        999_885_952,
    ),
}
WINDOWS = {
    "Mistral-7B-v0.1": [4096] * 32,
    "Phi-3-mini-128k-instruct": [262144] * 32,
    "Phi-4-mini-instruct": [262144] * 32,
    "gemma-2-2b": [4096, None] * 13,
    "gemma-3-1b-it": ([512] * 5 + [None]) * 4 + [512] * 2,
}


@pytest.fixture(params=REAL)
def real(request):
    """(name, architecture, configuration, its layer on the meta device, the module, parameters published)"""
    document, published = REAL[request.param]
    where = Path(request.param, "config.json")
    architecture = find_architecture(document, where)
    config = build_config(architecture, document, where)
    module = __import__(f"{architecture.module}.modeling_{architecture.family}", fromlist=["_"])
    with torch.device("meta"):
        layer = getattr(module, architecture.layer_class)(config, 0)
    return request.param, architecture, config, layer, module, published


def test_a_model_has_as_many_parameters_as_its_makers_say(real):
    _, _, config, layer, _, published = real
    block = sum(math.prod(p.shape) for p in layer.parameters())
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert config.num_hidden_layers * block + embeddings + config.hidden_size == published


def test_windows_and_angles_are_made_for_every_layer(real):
    name, architecture, config, _, module, _ = real
    positions = Positions(architecture, config, getattr(module, architecture.rotary_class)(config))
    layers = range(config.num_hidden_layers)
    assert [positions.window(i) for i in layers] == WINDOWS.get(name, [None] * len(layers))
    batch = torch.zeros(1, 8, config.hidden_size)
    for index in (0, config.num_hidden_layers - 1):
        arguments = positions.arguments(index, batch)
        assert (arguments["attention_mask"] is None) == (architecture.attention == "sdpa")
        cos, _ = arguments["position_embeddings"]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert cos.shape[-1] == head * config.rope_parameters.get("partial_rotary_factor", 1)


@pytest.mark.parametrize(
    "fields", [{"qkv_bias": True, "bias": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_biases_by_either_pair_of_names(fields):
    document = {**REAL["internlm3-8b-instruct"][0]}
    for name in ("qkv_bias", "bias"):
        del document[name]
    where = Path("config.json")
    architecture = find_architecture(document, where)
    assert not build_config(architecture, document, where).attention_bias
    config = build_config(architecture, {**document, **fields}, where)
    assert config.attention_bias
    assert config.mlp_bias
