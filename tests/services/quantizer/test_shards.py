"""Shards: whatever their number, the whole is a checkpoint that others read."""

import json

import pytest
import torch
from safetensors import safe_open

from services.quantizer.shards import ShardWriter
from weft.artifact.checkpoint import Checkpoint
from weft.artifact.store import ArtifactStore

TENSORS = {
    "model.a.qweight": torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4),
    "model.a.scales": torch.linspace(0.1, 1, 5).half().reshape(5, 1),
    "model.b": torch.linspace(-1, 1, 7).bfloat16(),
    "model.c": torch.linspace(-1, 1, 6).reshape(2, 3).T,  # not contiguous
    "model.d": torch.tensor(3.0),
    "model.e": torch.empty(0, 4),
}


@pytest.mark.parametrize(("max_size", "num_shards"), [(1, 6), (40, 3), (1 << 30, 1)])
def test_shards_are_read_back(tmp_path, max_size, num_shards):
    with ArtifactStore(tmp_path).stage("demo") as staged:
        writer = ShardWriter(staged, max_size)
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.finish()
        names = sorted(path.name for path in staged.path.glob("*.safetensors"))
        assert names == [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]
        assert set(staged.files) == {*names, "model.safetensors.index.json"}
        index = json.loads((staged.path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        (staged.path / "config.json").write_text("{}")
        checkpoint = Checkpoint.open(staged.path)
        assert checkpoint.names == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(checkpoint.load(name), tensor), name
            with safe_open(staged.path / index["weight_map"][name], "pt") as file:
                assert torch.equal(file.get_tensor(name), tensor), name
