"""Shards: whatever their number, the whole is a checkpoint that others read."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open

from services.quantizer.errors import QuantizerError
from services.quantizer.shards import ShardWriter
from services.quantizer.tensor_file import StoredTensor, TensorFile, write_tensors
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


def test_stored_tensors_are_in_memory_one_at_a_time(tmp_path):
    alive, loaded = [], []

    def stored(name, tensor):
        def load():
            assert not [other for other, reference in alive if reference() is not None]
            copy = tensor.clone()
            alive.append((name, weakref.ref(copy)))
            loaded.append(name)
            return copy

        return StoredTensor(tensor.dtype, tuple(tensor.shape), load)

    with ArtifactStore(tmp_path).stage("demo") as staged:
        writer = ShardWriter(staged, 1 << 30)
        for name, tensor in TENSORS.items():
            writer.add_stored(name, stored(name, tensor))
        assert not loaded
        writer.finish()
    assert sorted(loaded) == sorted(TENSORS)


def test_a_tensor_file_gives_back_what_went_in_aligned(tmp_path):
    path = tmp_path / "kept.safetensors"
    with path.open("wb") as file:
        size = write_tensors(file.write, {name: StoredTensor.of(t) for name, t in TENSORS.items()})
    assert size == sum(tensor.nbytes for tensor in TENSORS.values())
    kept = TensorFile(path)
    assert kept.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = kept.load(name)
        assert torch.equal(found, tensor)
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
        assert kept.stored(name).nbytes == tensor.nbytes
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(QuantizerError, match=r"kept\.safetensors"):
        TensorFile(path)


def test_a_tensor_that_is_not_what_was_announced_is_not_written():
    lying = StoredTensor(torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(ValueError, match="not what was announced"):
        write_tensors(lambda data: None, {"a": lying})
