"""The checkpoint reader against honest files of the format's own library, and against hostile ones."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch

from weft.artifact.checkpoint import Checkpoint, CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
VALID = {"a": ENTRY}


def raw_safetensors(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def checkpoint_directory(path, weights=None, config=b"{}"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(config)
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def test_reads_what_the_library_writes(tmp_path):
    checkpoint_directory(tmp_path)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "f32": torch.randn(2, 2, 2),
        "i32": torch.arange(4, dtype=torch.int32),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.load(name), tensor)
        assert checkpoint.load(name).dtype == tensor.dtype
    assert checkpoint.dtype("bf16") == "BF16"


def test_a_loaded_tensor_survives_the_file(tmp_path):
    checkpoint_directory(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    tensor = Checkpoint.open(tmp_path).load("a")
    os.truncate(tmp_path / "model.safetensors", 10)
    assert tensor.sum() == 1000


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of length 0": struct.pack("<Q", 0),
    "header of 2^63 bytes": raw_safetensors(VALID, length=2**63),
    "header of 100 MB": raw_safetensors(VALID, length=100_000_001),
    "header longer than the file": raw_safetensors(VALID, b"", 5000),
    "header cut": raw_safetensors(b'{"a":'),
    "header not UTF-8": raw_safetensors(b'{"\xff":1}'),
    "header an array": raw_safetensors(b"[]"),
    "leading space": raw_safetensors(b" " + json.dumps(VALID).encode()),
    "byte order mark": raw_safetensors(b"\xef\xbb\xbf" + json.dumps(VALID).encode()),
    "trailing junk": raw_safetensors(json.dumps(VALID).encode() + b"x"),
    "two objects": raw_safetensors(json.dumps(VALID).encode() + b"{}"),
    "duplicate name": raw_safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "duplicate key in entry": raw_safetensors(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "data truncated": raw_safetensors(VALID, b"\0" * 4),
    "bytes too many": raw_safetensors(VALID, b"\0" * 16),
    "overlap": raw_safetensors({**VALID, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12),
    "hole": raw_safetensors({**VALID, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20),
    "begin after end": raw_safetensors({"a": {**ENTRY, "data_offsets": [8, 0]}}),
    "negative offset": raw_safetensors({"a": {**ENTRY, "data_offsets": [-8, 0]}}),
    "shape disagrees": raw_safetensors({"a": {**ENTRY, "shape": [3]}}),
    "shape overflows": raw_safetensors({"a": {**ENTRY, "shape": [2**62, 4]}}),
    "huge empty shape": raw_safetensors({"a": {**ENTRY, "shape": [2**62, 0], "data_offsets": [0, 0]}}, b""),
    "negative shape": raw_safetensors({"a": {**ENTRY, "shape": [-2]}}),
    "float shape": raw_safetensors({"a": {**ENTRY, "shape": [2.0]}}),
    "boolean shape": raw_safetensors(
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "rank 9": raw_safetensors({"a": {**ENTRY, "shape": [2, 1, 1, 1, 1, 1, 1, 1, 1]}}),
    "unknown dtype": raw_safetensors({"a": {**ENTRY, "dtype": "Q4"}}),
    "dtype a list": raw_safetensors({"a": {**ENTRY, "dtype": ["F32"]}}),
    "entry a number": raw_safetensors({"a": 5}),
    "entry with more": raw_safetensors({"a": {**ENTRY, "x": 1}}),
    "metadata not strings": raw_safetensors({"__metadata__": {"x": 1}, **VALID}),
    "metadata of 50 MB": raw_safetensors({"__metadata__": {"x": "a" * 50_000_000}, **VALID}),
    "name a path": raw_safetensors({"../../etc/passwd": ENTRY}),
    "name with dots": raw_safetensors({"a..b": ENTRY}),
    "name with NUL": raw_safetensors({"a\0b": ENTRY}),
    "name with newline": raw_safetensors({"a\n": ENTRY}),
    "name empty": raw_safetensors({"": ENTRY}),
    "name of 257": raw_safetensors({"a" * 257: ENTRY}),
    "300000 tensors": raw_safetensors(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}, b""
    ),
    "depth 100000": raw_safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "pickle": b"\x80\x02}q\x00." + b"\0" * 100,
    "GGUF": b"GGUF" + b"\0" * 100,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_refused_by_name(tmp_path, case):
    checkpoint_directory(tmp_path, HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_padded_header_is_fine(tmp_path):
    checkpoint_directory(tmp_path, raw_safetensors(json.dumps(VALID).encode() + b"   "))
    assert Checkpoint.open(tmp_path).load("a").tolist() == [0.0, 0.0]


HOSTILE_CONFIGS = {
    "not JSON": b"{",
    "array": b"[]",
    "duplicate key": b'{"a":1,"a":2}',
    "nested duplicate": b'{"a":{"b":1,"b":1}}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"rope_theta":NaN}',
    "overflow": b'{"rope_theta":1e999}',
    "long integer": b'{"a":' + b"1" * 5000 + b"}",
    "depth": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5 MB": b'{"a":"' + b"x" * 5_000_000 + b'"}',
    "latin-1": b'{"a":"\xe9"}',
    "auto_map": b'{"auto_map":{"AutoModel":"modeling.Model"}}',
    "trust_remote_code": b'{"trust_remote_code":true}',
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_hostile_configurations_are_refused(tmp_path, case):
    checkpoint_directory(tmp_path, raw_safetensors(VALID), HOSTILE_CONFIGS[case])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        Checkpoint.open(tmp_path)
    checkpoint_directory(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_only_regular_files_are_read(tmp_path, kind, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(raw_safetensors(VALID) if name == "model.safetensors" else b"{}")
    checkpoint_directory(tmp_path / "model", raw_safetensors(VALID))
    target = tmp_path / "model" / name
    target.unlink()
    if kind == "link":
        target.symlink_to(elsewhere)
    elif kind == "directory":
        target.mkdir()
    else:
        os.mkfifo(target)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint.open(tmp_path / "model")


def two_shards(path, weight_map=None):
    checkpoint_directory(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file({"b": torch.zeros(3)}, path / "model-00002-of-00002.safetensors")
    default = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": default if weight_map is None else weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_are_read_through_the_index(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    assert checkpoint.names == {"a", "b"}
    assert checkpoint.load("b").tolist() == [0, 0, 0]
    assert [path.name for path in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        [],
        {"a": "../model-00001-of-00002.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/x.safetensors"},
        {"a": "a..b.safetensors"},
        {"a": "pytorch_model.bin"},
        {"a": 5},
        {"a": "model-00009-of-00002.safetensors"},
        {"a": "model-00002-of-00002.safetensors"},
        {"a": "model-00001-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"},
    ],
)
def test_a_lying_index_is_refused(tmp_path, weight_map):
    with pytest.raises(CheckpointError):
        Checkpoint.open(two_shards(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    two_shards(tmp_path)
    safetensors.torch.save_file(
        {"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match="tensor a is also in"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("change", ["shrink", "grow", "replace", "remove"])
def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path, change):
    checkpoint_directory(tmp_path, raw_safetensors(VALID))
    path = tmp_path / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path)
    if change == "shrink":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "grow":
        os.truncate(path, path.stat().st_size + 1)
    elif change == "replace":
        other = tmp_path / "other"
        other.write_bytes(raw_safetensors(VALID, b"\1" * 8))
        other.rename(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="tensor a"):
        checkpoint.load("a")


def test_an_unknown_tensor_is_a_checkpoint_error(tmp_path):
    checkpoint_directory(tmp_path, raw_safetensors(VALID))
    with pytest.raises(CheckpointError, match="no tensor b"):
        Checkpoint.open(tmp_path).load("b")
