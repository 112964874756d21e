"""What the quantizer writes, read by three: the engine, `transformers`, and a reader of fifteen lines. The
logits agree, whichever format the file has.
"""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from services.engine.core.batch import Chunk  # noqa: E402
from services.engine.core.sequence import SamplingParams, Sequence  # noqa: E402
from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.inputs import make_inputs  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402
from services.quantizer.config import QuantizerConfig  # noqa: E402
from services.quantizer.job import run  # noqa: E402

IDS = list(range(5, 69))


def engine_logits(**source):
    """fp32 logits [tokens, vocabulary] of IDS by the engine."""
    runner = load_runner(
        RunnerConfig(**source, dtype="float32", num_blocks=8, max_model_len=128, num_threads=1)
    )
    sequence = Sequence("all", IDS, SamplingParams(max_tokens=1), block_table=[0])
    inputs = make_inputs([Chunk(sequence, 0, len(IDS), False)], 128, runner.cache.scratch_block, 16)
    with torch.inference_mode():
        return runner.model.forward(
            inputs.token_ids, inputs.metadata, runner.cache.layers, torch.arange(len(IDS))
        ).clone()


def dequantize_gemm(directory):
    """Every tensor of an AutoAWQ gemm checkpoint in fp32, from the format's description alone."""
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors.update({name: t.float() if t.is_floating_point() else t.numpy().view(np.uint32)
                        for name, t in safetensors.load_file(shard).items()})  # fmt: skip
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7]).argsort()

    def unpack(words):
        return ((words[..., None] >> (4 * order).astype(np.uint32)) & 15).reshape(len(words), -1)

    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        values, zeros = unpack(tensors.pop(f"{name}.qweight")), unpack(tensors.pop(f"{name}.qzeros"))
        scales = tensors.pop(f"{name}.scales").numpy()
        size = len(values) // len(zeros)
        weight = (values.astype(np.float32) - zeros.repeat(size, 0)) * scales.repeat(size, 0)
        tensors[f"{name}.weight"] = torch.from_numpy(weight.T.copy())
    return tensors


def transformers_logits(directory, tensors=None):
    """fp32 logits by the library: of the checkpoint as it lies there, or of these tensors in its place."""
    with torch.inference_mode():
        if tensors is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        else:
            config = json.loads((directory / "config.json").read_text())
            del config["quantization_config"]
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config), dtype=torch.float32
            )
            missing = model.load_state_dict(tensors, strict=False).missing_keys
            assert missing == ["lm_head.weight"] * config["tie_word_embeddings"]
            model.tie_weights()
        return model.eval()(torch.tensor([IDS])).logits[0]


@pytest.fixture
def make_artifact(tmp_path):
    """make_artifact(source, format) -> the artifact of a run of seconds."""

    def make(source, name):
        return run(
            QuantizerConfig(
                source=source, artifacts=tmp_path / "artifacts", name=name, format=name, samples=2,
                sequence_length=64, evaluation_tokens=0, group_size=32, threads=1,
            )
        )  # fmt: skip

    return make


@pytest.mark.parametrize(("family", "is_tied"), [("Llama", True), ("Qwen2", False)])
def test_four_readers_of_two_formats_agree(make_checkpoint, make_artifact, family, is_tied):
    pytest.importorskip("compressed_tensors")
    source = make_checkpoint(family, tie_word_embeddings=is_tied)
    awq, other = make_artifact(source, "awq"), make_artifact(source, "compressed-tensors")
    tensors = dequantize_gemm(awq.path)
    expected = transformers_logits(awq.path, tensors)
    engine = engine_logits(source=awq.path)
    torch.testing.assert_close(engine, expected, atol=2e-4, rtol=2e-4)
    # Both files hold the same integers, so the engine gives the same bits; as an artifact, with its canary.
    assert torch.equal(engine_logits(artifacts=other.path.parents[1], model="compressed-tensors"), engine)
    # The library multiplies (q - zero) * scale in fp16: its weights are ours rounded to fp16.
    rounded = {n: t.half().float() if n.endswith("proj.weight") else t for n, t in tensors.items()}
    found = transformers_logits(other.path)
    torch.testing.assert_close(found, transformers_logits(awq.path, rounded), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert awq.version.startswith("awq-")
    assert other.version.startswith("ct-")


def test_what_compressed_tensors_itself_reads_are_our_integers(make_checkpoint, make_artifact):
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    source = make_checkpoint()
    awq, other = make_artifact(source, "awq"), make_artifact(source, "compressed-tensors")
    (stored,) = (safetensors.load_file(file) for file in other.path.glob("*.safetensors"))
    dense = dequantize_gemm(awq.path)
    for name in [n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")]:
        shape, scales = stored[f"{name}.weight_shape"], stored[f"{name}.weight_scale"].float()
        values = package.unpack_from_int32(stored[f"{name}.weight_packed"], 4, shape)
        zeros = package.unpack_from_int32(stored[f"{name}.weight_zero_point"], 4, scales.shape, packed_dim=0)
        weight = (values.view(*scales.shape, -1) - zeros[..., None]) * scales[..., None]
        assert torch.equal(weight.flatten(1), dense[f"{name}.weight"]), name


def test_what_is_left_out_is_named_in_either_format(make_checkpoint, tmp_path):
    source = make_checkpoint(intermediate_size=144)
    for name, key in (("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        artifact = run(
            QuantizerConfig(
                source=source, artifacts=tmp_path, name=name, format=name, samples=2, sequence_length=64,
                evaluation_tokens=0, group_size=32, threads=1, skip_indivisible=True,
            )
        )  # fmt: skip
        config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
        down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert [n for n in config[key] if n.endswith("down_proj")] == down
        engine_logits(source=artifact.path)
