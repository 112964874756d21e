"""What an import refuses, in one line that names the tensor or the field; and what it takes when told to."""

import json

import pytest
import torch

from services.quantizer.__main__ import main
from services.quantizer.run_lock import RunLock
from services.quantizer.shards import ShardWriter
from weft.artifact.store import ArtifactStore


@pytest.fixture
def attempt(tmp_path, capfd):
    """attempt(directory, *flags) -> (exit status, last line of stderr, artifact or None)."""

    def call(directory, *flags):
        root = tmp_path / "artifacts"
        words = ["import", "--source", str(directory), "--artifacts", str(root), "--name", "tiny", *flags]
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
        lines = [line for line in capfd.readouterr().err.splitlines() if line]
        assert "Traceback" not in "".join(lines)
        artifact = ArtifactStore(root).open("tiny") if status == 0 else None
        if status:
            assert not list(root.glob("tiny/*"))
        return status, lines[-1] if lines else "", artifact

    return call


FIRST = "model.layers.0.self_attn.q_proj"


def put(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if name in tensors else value(None)

    return change


def spoil(name, position, value):
    def change(tensors):
        tensors[name] = tensors[name].clone().float() if tensors[name].is_floating_point() else tensors[name]
        tensors[name].view(-1)[position] = value

    return change


def remove(name):
    return lambda tensors: tensors.pop(name)


BAD_TENSORS = {
    "gemm qzeros missing": ("gemm", remove(f"{FIRST}.qzeros"), f"{FIRST}.qzeros: missing"),
    "gemm scales missing": ("gemm", remove(f"{FIRST}.scales"), f"{FIRST}.scales: missing"),
    "gemm scales of integers": ("gemm", put(f"{FIRST}.scales", lambda t: t.int()), "dtype I32"),
    "gemm floats for words": ("gemm", put(f"{FIRST}.qweight", lambda t: t.float()), "qweight: dtype"),
    "gemm words of 64 bits": ("gemm", put(f"{FIRST}.qweight", lambda t: t.long()), f"{FIRST}.qweight: dtype"),
    "gemm one row short": ("gemm", put(f"{FIRST}.qweight", lambda t: t[:-1]), f"{FIRST}"),
    "gemm three dimensions": ("gemm", put(f"{FIRST}.qweight", lambda t: t[None]), "two dimensions"),
    "gemm no rows": ("gemm", put(f"{FIRST}.qweight", lambda t: t[:0]), "two dimensions"),
    "gemm another group size": ("gemm", put(f"{FIRST}.scales", lambda t: t[:1]), f"{FIRST}.scales: shape"),
    "gemm transposed": ("gemm", put(f"{FIRST}.qzeros", lambda t: t.T.contiguous()), f"{FIRST}.qzeros: shape"),
    "gemm scale zero": ("gemm", spoil(f"{FIRST}.scales", 3, 0.0), f"{FIRST}.scales: holds 0"),
    "gemm scale negative": ("gemm", spoil(f"{FIRST}.scales", 3, -1.0), f"{FIRST}.scales: holds -1"),
    "gemm scale nan": ("gemm", spoil(f"{FIRST}.scales", 3, float("nan")), f"{FIRST}.scales: holds values"),
    "gemm scale subnormal": ("gemm", spoil(f"{FIRST}.scales", 3, 1e-6), "1 of 128 groups have a scale below"),
    "gemm weight twice": ("gemm", put(f"{FIRST}.weight", lambda _: torch.ones(64, 64)), "is also there as"),
    "head packed": (
        "gemm", put("lm_head.qweight", lambda _: torch.zeros(64, 512).int()), "lm_head.qweight: packed",
    ),
    "a linear that the model lacks": (
        "gemm", put("model.layers.0.mlp.extra.qweight", lambda _: torch.zeros(64, 8).int()), "mlp.extra",
    ),
    "bias that the model lacks": (
        "gptq", put(f"{FIRST}.bias", lambda _: torch.ones(64).half()), f"{FIRST}.bias: not a part of",
    ),
    "gemv narrow": ("gemv", put(f"{FIRST}.qzeros", lambda t: t[:, :0]), f"{FIRST}.qzeros"),
    "gemv no zeros": ("gemv", remove(f"{FIRST}.qzeros"), f"{FIRST}.qzeros"),
    "gptq g_idx short": ("gptq", put(f"{FIRST}.g_idx", lambda t: t[:-1]), f"{FIRST}.g_idx: shape"),
    "gptq g_idx negative": ("gptq", spoil(f"{FIRST}.g_idx", 0, -1), f"{FIRST}.g_idx: holds a group"),
    "gptq g_idx beyond": ("gptq", spoil(f"{FIRST}.g_idx", 0, 2), f"{FIRST}.g_idx: holds a group"),
    "gptq g_idx of floats": ("gptq", put(f"{FIRST}.g_idx", lambda t: t.float()), f"{FIRST}.g_idx: dtype"),
    "pack-quantized shape lies": (
        "pack-quantized", put(f"{FIRST}.weight_shape", lambda t: t + 1), f"{FIRST}.weight_shape: [65, 65]",
    ),
    "pack-quantized no shape": (
        "pack-quantized", remove(f"{FIRST}.weight_shape"), f"{FIRST}.weight_shape: missing",
    ),
    "pack-quantized no zeros": (
        "pack-quantized", remove(f"{FIRST}.weight_zero_point"), f"{FIRST}.weight_zero_point: missing",
    ),
    "pack-quantized zeros where there are none": (
        "pack-quantized symmetric", put(f"{FIRST}.weight_zero_point", lambda _: torch.zeros(8, 2).int()),
        f"{FIRST}.weight_zero_point: zero points, though",
    ),
    "pack-quantized groups that do not divide": (
        "pack-quantized", put(f"{FIRST}.weight_scale", lambda t: torch.ones(64, 3).half()),
        f"{FIRST}.weight_scale: shape [64, 3]",
    ),
    "pack-quantized no scale": (
        "pack-quantized", remove(f"{FIRST}.weight_scale"), f"{FIRST}.weight_scale: missing",
    ),
    "pack-quantized no dimension": (
        "pack-quantized", put(f"{FIRST}.weight_scale", lambda t: t[:, :0]), f"{FIRST}.weight_scale: shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_refused(make_quantized, attempt, case):
    name, change, words = BAD_TENSORS[case]
    directory, _ = make_quantized(name, change_tensors=change)
    status, line, _ = attempt(directory)
    assert status == 1
    assert words in line


ACT_ORDER = {
    "gptq": lambda document: document["quantization_config"].update(desc_act=True),
    "pack-quantized": lambda document: document["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ].update(actorder="group"),
}


@pytest.mark.parametrize("name", ACT_ORDER)
def test_act_order_without_the_order_is_refused(make_quantized, attempt, name):
    change = remove(f"{FIRST}.g_idx") if name == "gptq" else (lambda tensors: None)
    directory, _ = make_quantized(name, change_tensors=change, change_config=ACT_ORDER[name])
    status, line, _ = attempt(directory)
    assert status == 1
    assert "g_idx: missing, though config.json says act-order" in line


def setting(**changes):
    return lambda document: document["quantization_config"].update(changes)


def weights(**changes):
    def change(document):
        document["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return change


def group(**changes):
    def change(document):
        document["quantization_config"]["config_groups"]["group_0"].update(changes)

    return change


BAD_CONFIGS = {
    "in a file of its own": ("gemm", lambda d: d.pop("quantization_config"), "older tools kept it"),
    "a string": ("gemm", lambda d: d.update(quantization_config="awq"), "nothing to import"),
    "fp8": ("gemm", setting(quant_method="fp8"), "quant_method is 'fp8'"),
    "no method": ("gemm", setting(quant_method=None), "quant_method is 'None'"),
    "a method that is a list": ("gemm", setting(quant_method=["awq"]), "quant_method"),
    "8 bits": ("gemm", setting(bits=8), "bits is '8'"),
    "4.0 bits": ("gemm", setting(bits=4.0), "bits is '4.0'"),
    "gemv_fast": ("gemm", setting(version="gemv_fast"), "version is 'gemv_fast'"),
    "a version that is a number": ("gemm", setting(version=5), "version is '5'"),
    "no zero points": ("gemm", setting(zero_point=False), "zero_point is 'False'"),
    "group size 0": ("gemm", setting(group_size=0), "group_size is '0'"),
    "group size a string": ("gemm", setting(group_size="32"), "group_size is '32'"),
    "group size of another model": ("gemm", setting(group_size=48), "do not divide into groups of 48"),
    "groups of 16": ("gemm", setting(group_size=16), "groups of 16 inputs"),
    "3 bits": ("gptq", setting(bits=3), "bits is '3'"),
    "marlin": ("gptq", setting(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    "8 bits for some": ("gptq", setting(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic['+:.*down.*'].bits"),
    "int-quantized": ("pack-quantized", setting(format="int-quantized"), "format is 'int-quantized'"),
    "no groups": ("pack-quantized", setting(config_groups={}), "config_groups is '{}'"),
    "a group that is a list": ("pack-quantized", setting(config_groups={"a": []}), "config_groups.a"),
    "8-bit weights": ("pack-quantized", weights(num_bits=8), "num_bits is '8'"),
    "float weights": ("pack-quantized", weights(type="float"), "type is 'float'"),
    "one scale per tensor": ("pack-quantized", weights(strategy="tensor"), "strategy is 'tensor'"),
    "activations": ("pack-quantized", group(input_activations={"num_bits": 8}), "input_activations"),
    "weights missing": ("pack-quantized", group(weights=None), "weights is 'None'"),
    "kv cache": ("pack-quantized", setting(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "another architecture": ("gemm", lambda d: d.update(architectures=["X"]), "architecture X is not"),
    "another layout than told": ("pack-quantized", lambda d: d.update(quantization_config={
        "quant_method": "gptq", "bits": 4, "group_size": 32}), "no tensor is named *.qweight"),
    "other shapes": ("gptq", lambda d: d.update(intermediate_size=256), "the configuration wants"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_that_are_refused(make_quantized, attempt, case):
    name, change, words = BAD_CONFIGS[case]
    directory, _ = make_quantized(name, change_config=change)
    status, line, _ = attempt(directory)
    assert status == 1
    assert words in line


def zeros_of_16(tensors):
    """In gptq, which adds 1, a stored 15: here in all groups of the last eight outputs."""
    tensors[f"{FIRST}.qzeros"][:, -1] = -1


def test_a_zero_point_of_16_needs_leave(make_quantized, attempt, read_artifact):
    directory, expected = make_quantized("gptq", change_tensors=zeros_of_16)
    is_odd = (expected[FIRST].values[-8:].view(8, 2, 32) == 0).any(-1)
    status, line, _ = attempt(directory)
    assert status == 1
    assert f"tensor {FIRST}.qweight: {int(is_odd.sum())} of 128 groups have a zero point of 16" in line
    status, _, artifact = attempt(directory, "--allow-requantize")
    assert status == 0
    report = json.loads((artifact.path / "report.json").read_text())
    assert report["rounded"] == {FIRST: {"a zero point of 16": int(is_odd.sum())}}
    found, _ = read_artifact(artifact.path)
    for name in expected:
        if name != FIRST:
            assert torch.equal(found[name].values, expected[name].values)
    meant = (expected[FIRST].values[-8:].view(8, 2, 32).float() - 16) * expected[FIRST].scales[-8:, :, None]
    error = (found[FIRST].dequantize()[-8:].view(8, 2, 32) - meant).abs().amax(-1)
    assert float(error[~is_odd].sum()) == 0
    assert bool((error <= found[FIRST].scales[-8:].float() * 0.51).all())


def act_order(tensors):
    for name in [n for n in tensors if n.endswith("down_proj.g_idx")]:
        tensors[name] = tensors[name][torch.randperm(128, generator=torch.Generator().manual_seed(3))]


def test_act_order_needs_leave(make_quantized, attempt):
    directory, _ = make_quantized("gptq", change_tensors=act_order)
    status, line, _ = attempt(directory)
    assert status == 1
    assert "tensor model.layers.0.mlp.down_proj.g_idx: act-order" in line
    assert "--allow-requantize" in line
    status, _, artifact = attempt(directory, "--allow-requantize")
    assert status == 0
    report = json.loads((artifact.path / "report.json").read_text())
    assert set(report["rounded"]) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_wrong_usage(attempt, tmp_path):
    status, line, _ = attempt(tmp_path, "--nonsense", "1")
    assert status == 2
    assert "--nonsense" in line
    status, line, _ = attempt(tmp_path)
    assert status == 1
    assert "config.json: missing" in line
    status, line, _ = attempt("org/name")
    assert status == 1
    assert "--revision" in line


def test_a_plain_checkpoint_is_for_run(make_checkpoint, attempt):
    status, line, _ = attempt(make_checkpoint())
    assert status == 1
    assert "no quantization_config, so there is nothing to import; use run" in line


def test_run_points_to_import(make_quantized, tmp_path, capfd):
    directory, _ = make_quantized("gemm")
    status = main(["run", "--source", str(directory), "--artifacts", str(tmp_path / "a"), "--name", "tiny"])
    assert status == 1
    assert "quantized already; `import` takes it as it is" in capfd.readouterr().err


def test_one_at_a_time_for_a_name(make_quantized, attempt, tmp_path):
    directory, _ = make_quantized("gemm")
    with RunLock(tmp_path / "artifacts" / "tiny"):
        words = [
            "import",
            "--source",
            str(directory),
            "--artifacts",
            str(tmp_path / "artifacts"),
            "--name",
            "tiny",
        ]
        assert main([*words, "--artifacts", str(tmp_path / "artifacts")]) == 4
    assert attempt(directory)[0] == 0


def test_a_source_that_changes_is_noticed(make_quantized, attempt, monkeypatch):
    directory, _ = make_quantized("gemm")
    finish = ShardWriter.finish

    def change(writer):
        (directory / "generation_config.json").write_text("{}")
        finish(writer)

    monkeypatch.setattr(ShardWriter, "finish", change)
    status, line, _ = attempt(directory)
    assert status == 1
    assert "generation_config.json: changed" in line
