"""The size formulas against figures that are known from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.memory import (
    DEVICES,
    GB,
    GIB,
    MIB,
    PRESETS,
    ModelShape,
    ShapeError,
    kv_bytes_per_token,
    nominal_weight_bytes,
    plan,
    rows_until_compute_bound,
    weight_bytes,
)

LLAMA_7B, LLAMA_70B = PRESETS["llama-7b"], PRESETS["llama-70b"]
A100 = DEVICES["a100-80"]


def kv_gib(shape: ModelShape, kv_dtype: str, context: int, batch: int = 8) -> float:
    per_token = kv_bytes_per_token(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, kv_dtype, with_scales=False
    )
    return per_token * context * batch / GIB


@pytest.mark.parametrize(
    ("shape", "fp16_gb", "int4_gb"), [(LLAMA_7B, 14.0, 3.5), (LLAMA_70B, 140.0, 35.0)], ids=["7b", "70b"]
)
def test_weights_as_quoted(shape: ModelShape, fp16_gb: float, int4_gb: float) -> None:
    assert nominal_weight_bytes(shape, 16) / GB == fp16_gb
    assert nominal_weight_bytes(shape, 4) / GB == int4_gb


@pytest.mark.parametrize(
    ("shape", "kv_dtype", "gib"),
    [
        (LLAMA_7B, "auto", (8, 32, 128)),
        (LLAMA_7B, "int8", (4, 16, 64)),
        (LLAMA_70B, "auto", (5, 20, 80)),
        (LLAMA_70B, "int8", (2.5, 10, 40)),
    ],
    ids=["7b-fp16", "7b-int8", "70b-fp16", "70b-int8"],
)
def test_kv_cache_at_batch_8(shape: ModelShape, kv_dtype: str, gib: tuple[float, ...]) -> None:
    assert tuple(kv_gib(shape, kv_dtype, tokens * 1024) for tokens in (2, 8, 32)) == gib


def test_a_block_is_64_mib_and_a_2k_sequence_1_gib() -> None:
    result = plan(LLAMA_7B, device=A100)
    assert result.block_bytes == 64 * MIB
    assert result.kv_bytes_per_sequence == GIB


def test_parameters_are_those_of_the_published_checkpoints() -> None:
    assert LLAMA_7B.num_parameters == 6_738_415_616
    assert LLAMA_70B.num_parameters == 68_976_648_192


def test_stored_weights_count_scales_and_leave_embeddings_alone() -> None:
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = 2 * 32000 * 4096 + 65 * 4096
    assert weight_bytes(LLAMA_7B, 16) == 2 * 6_738_415_616
    # 128 weights: 64 bytes of nibbles, 2 of scale, half a byte of zero point.
    assert weight_bytes(LLAMA_7B, 4) == linears * 133 // 256 + 2 * rest
    assert weight_bytes(LLAMA_7B, 4, 32) > weight_bytes(LLAMA_7B, 4, 64) > weight_bytes(LLAMA_7B, 4, 128)


def test_quantized_kv_adds_a_scale_and_a_minimum_per_token_and_head() -> None:
    bare = kv_bytes_per_token(32, 32, 128, "int8", with_scales=False)
    assert kv_bytes_per_token(32, 32, 128, "int8") - bare == 2 * 32 * 32 * 4
    assert kv_bytes_per_token(32, 32, 128, "int4") == 2 * 32 * 32 * (64 + 4)
    assert kv_bytes_per_token(32, 32, 128, "fp8") == kv_bytes_per_token(32, 32, 128, "int8")


def test_an_odd_head_does_not_fill_bytes_with_4_bits() -> None:
    with pytest.raises(ShapeError, match="int4 K and V need an even head_dim, found 63"):
        kv_bytes_per_token(1, 1, 63, "int4")
    assert kv_bytes_per_token(1, 1, 63, "int8") == 2 * (63 + 4)


def test_decoding_on_an_a100_turns_compute_bound_near_batch_128() -> None:
    assert 128 <= rows_until_compute_bound(A100, 16) <= 156
    assert rows_until_compute_bound(A100, 4) == pytest.approx(rows_until_compute_bound(A100, 16) / 4)
    assert rows_until_compute_bound(DEVICES["h100"]) > rows_until_compute_bound(DEVICES["h200"]) > 200


def test_blocks_that_fit_fill_the_memory_and_no_more() -> None:
    result = plan(LLAMA_7B, device=A100, weight_bits=4, context=2048, batch=8)
    room = result.device_memory * 0.9 - result.weight_bytes
    assert 0 <= room - (result.num_blocks + 1) * result.block_bytes < result.block_bytes
    assert result.num_sequences == result.num_blocks // 16
    assert result.fits


def test_what_does_not_fit_has_no_blocks() -> None:
    result = plan(LLAMA_70B, device=A100, weight_bits=16)
    assert (result.num_blocks, result.num_sequences, result.fits) == (0, 0, False)


def test_a_sequence_takes_whole_blocks() -> None:
    result = plan(LLAMA_7B, device=A100, block_size=128, context=129)
    assert result.kv_bytes_per_sequence == 2 * 64 * MIB


def test_shape_from_the_demo_model(demo_model: Path) -> None:
    shape = ModelShape.from_file(demo_model)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.has_tied_embeddings) == (
        6,
        2,
        64,
        True,
    )
    # The checkpoint is bf16: two bytes a parameter and a header.
    size = (demo_model / "model.safetensors").stat().st_size
    assert 0 < size - 2 * shape.num_parameters < 16_384


def test_defaults_of_a_config_are_those_of_the_field() -> None:
    config = {
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 100,
    }
    shape = ModelShape.from_config(config | {"model_type": "qwen2"}, "x")
    assert (shape.num_kv_heads, shape.head_dim, shape.has_qkv_bias, shape.has_tied_embeddings) == (
        3,
        32,
        True,
        False,
    )


def _config(model_type: str, sizes: tuple[int, ...], **more: object) -> dict[str, object]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size")
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), **more}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (_config("gemma2", (3584, 14336, 42, 16, 8, 256000)), 9_241_705_984),
        (_config("gemma2", (2304, 9216, 26, 8, 4, 256000)), 2_614_341_888),
        (_config("gemma3_text", (1152, 6912, 26, 4, 1, 262144)), 999_885_952),
        (_config("phi3", (3072, 8192, 32, 32, 32, 32064)), 3_821_079_552),
        (_config("phi3", (3072, 8192, 32, 24, 8, 200064), tie_word_embeddings=True), 3_836_021_760),
        (_config("internlm2", (4096, 14336, 32, 32, 8, 92544), bias=False), 7_737_708_544),
        (_config("internlm3", (4096, 10240, 48, 32, 2, 128512), head_dim=128), 8_804_241_408),
    ],
    ids=[
        "gemma-2-9b",
        "gemma-2-2b",
        "gemma-3-1b",
        "phi-3-mini",
        "phi-4-mini",
        "internlm2.5-7b",
        "internlm3-8b",
    ],
)
def test_parameters_of_published_models(config: dict[str, object], parameters: int) -> None:
    assert ModelShape.from_config(config, "x").num_parameters == parameters


def test_bias_has_a_field_of_its_own_in_each_family() -> None:
    sizes = (64, 96, 2, 4, 2, 97)
    for family, field, default in (
        ("internlm2", "bias", True),
        ("internlm3", "qkv_bias", False),
        ("llama", "attention_bias", False),
    ):
        for value in (True, False):
            shape = ModelShape.from_config(_config(family, sizes, **{field: value}), "x")
            assert shape.has_qkv_bias is value
        assert ModelShape.from_config(_config(family, sizes), "x").has_qkv_bias is default


@pytest.mark.parametrize("value", [None, 0, -1, "4096", 1.5, True, 10**400])
def test_a_bad_config_names_the_key(value: object, tmp_path: Path) -> None:
    config = {
        "hidden_size": value,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ShapeError, match="hidden_size"):
        ModelShape.from_file(path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000], ids=len)
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ShapeError, match="JSON"):
        ModelShape.from_file(tmp_path)
