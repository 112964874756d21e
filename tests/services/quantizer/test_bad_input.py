"""Sources that are not what they should be: one line that names the file or the tensor, nothing published.

What single files and headers may be is tested where they are read (tests/weft/artifact); here it is seen
through the whole command.
"""

import dataclasses
import json
import os
import shutil
import socket
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.quantizer.__main__ import main
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.job import run
from services.quantizer.source import Source
from weft.artifact.checkpoint import Checkpoint, CheckpointError
from weft.artifact.store import ArtifactStore

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def attempt(make_checkpoint, tmp_path, capfd):
    """attempt(change) -> (status, the last line) of a run on a one-block checkpoint after `change`."""

    def run_on(change):
        source = make_checkpoint(num_hidden_layers=1)
        change(source)
        flags = [
            "--samples",
            "2",
            "--sequence-length",
            "64",
            "--evaluation-tokens",
            "0",
            "--group-size",
            "32",
        ]
        base = ["run", "--source", str(source), "--artifacts", str(tmp_path / "a"), "--name", "tiny"]
        status = main([*base, *flags, "--threads", "1"])
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        return status, errors.splitlines()[-1]

    return run_on


def shard(directory, parts=2):
    """Spread the single file over shards, with an index."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number in range(parts):
        name = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        own = {key: tensors[key] for key in names[number::parts]}
        save_file(own, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, name))
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


def edit_index(change):
    def edit(directory):
        shard(directory)
        document = json.loads((directory / INDEX).read_text())
        change(document["weight_map"])
        (directory / INDEX).write_text(json.dumps(document))

    return edit


def repeat_in_the_second(directory):
    shard(directory)
    first = load_file(directory / "model-00001-of-00002.safetensors")
    second = load_file(directory / "model-00002-of-00002.safetensors")
    save_file({**second, **dict([next(iter(first.items()))])}, directory / "model-00002-of-00002.safetensors")


def rewrite_header(change):
    """Replace the JSON of the header by `change` of its text."""

    def rewrite(directory):
        data = (directory / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + length].decode().rstrip()).encode()
        (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return rewrite


def overlapping(header):
    document = json.loads(header)
    names = sorted((n for n in document if "proj" in n), key=lambda n: document[n]["data_offsets"])
    begin, end = document[names[1]]["data_offsets"]
    document[names[1]]["data_offsets"] = [begin - 64, end - 64]
    return json.dumps(document)


def twice(header):
    document = json.loads(header)
    name = "model.norm.weight"
    return header[:-1] + f',"{name}":{json.dumps(document[name])}}}'


def replaced_by(make):
    def replace(directory):
        os.unlink(directory / WEIGHTS)
        make(directory / WEIGHTS)

    return replace


def bind_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_out(directory):
    shutil.move(directory / WEIGHTS, directory.parent / "elsewhere.safetensors")
    (directory / WEIGHTS).symlink_to(directory.parent / "elsewhere.safetensors")


def add_token(number):
    def add(directory):
        path = directory / "tokenizer.json"
        document = json.loads(path.read_text())
        token = {
            "id": number, "content": "<|late|>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }  # fmt: skip
        document["added_tokens"].append(token)
        path.write_text(json.dumps(document))

    return add


SOURCES = {
    "an index that leaves": (edit_index(lambda m: m.update({"model.norm.weight": "../x"})), "'../x'"),
    "an index with a path": (
        edit_index(lambda m: m.update({"model.norm.weight": "/etc/passwd"})),
        "'/etc/passwd', not a shard's name",
    ),
    "an index that lies": (
        edit_index(lambda m: m.update({"lm_head.weight": m["model.norm.weight"]})),
        "tensor lm_head.weight is missing",
    ),
    "a shard that is missing": (
        edit_index(lambda m: m.update({"x.weight": "model-00003-of-00003.safetensors"})),
        "model-00003-of-00003.safetensors: missing",
    ),
    "a tensor in two shards": (repeat_in_the_second, "is also in model-00001-of-00002.safetensors"),
    "a tensor twice in a header": (rewrite_header(twice), "duplicate key 'model.norm.weight'"),
    "tensors that overlap": (rewrite_header(overlapping), "overlaps another tensor"),
    "a pipe": (replaced_by(os.mkfifo), "not a regular file"),
    "a socket": (replaced_by(bind_socket), WEIGHTS),
    "a directory": (replaced_by(os.mkdir), WEIGHTS),
    "a device": (replaced_by(lambda path: path.symlink_to("/dev/zero")), "a symbolic link out of"),
    "a link out of the source": (link_out, "a symbolic link out of its directory"),
    "a tokenizer of a larger model": (add_token(4096), "4097 token ids, but the embedding has 4096 rows"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_bad_source_ends_with_one_line(attempt, tmp_path, case):
    change, expected = SOURCES[case]
    status, line = attempt(change)
    assert status == 1
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "a" / "tiny" / "CURRENT").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.v_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"],
)
def test_values_that_are_not_finite_are_named(make_checkpoint, name, value):
    directory = make_checkpoint(num_hidden_layers=1, tie_word_embeddings=False)
    tensors = load_file(directory / WEIGHTS)
    tensors[name].view(-1)[-3] = value
    save_file(tensors, directory / WEIGHTS)
    source = Source(directory, torch.device("cpu"))
    with pytest.raises(QuantizerError, match=f"^tensor {name} holds values that are not finite"):
        source.head() if name == "lm_head.weight" else source.block_weights(0)


@pytest.fixture
def quick(tmp_path):
    """quick(source, **changes) -> the configuration of a run of seconds."""

    def configure(source, **changes):
        values = {
            "samples": 2,
            "sequence_length": 64,
            "evaluation_tokens": 128,
            "group_size": 32,
        }
        artifacts = tmp_path / "artifacts"
        return QuantizerConfig(
            source=source, artifacts=artifacts, name="tiny", threads=1, **{**values, **changes}
        )

    return configure


def test_rows_that_no_token_uses_are_padding(make_checkpoint, quick):
    artifact = run(quick(make_checkpoint(num_hidden_layers=1, vocab_size=4160)))
    with (artifact.path / "config.json").open() as file:
        assert json.load(file)["vocab_size"] == 4160


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shards_make_no_difference(make_checkpoint, quick, tmp_path, dtype):
    source = make_checkpoint("Qwen2", dtype, num_hidden_layers=1)
    whole = run(quick(source))
    parts = tmp_path / "parts"
    shutil.copytree(source, parts)
    shard(parts, 3)
    sharded = run(dataclasses.replace(quick(parts), artifacts=tmp_path / "again"))
    name = "model-00001-of-00001.safetensors"
    assert (sharded.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert sharded.manifest.canary == whole.manifest.canary
    assert sharded.manifest.source_digest != whole.manifest.source_digest


def append_byte(path):
    with path.open("ab") as file:
        file.write(b"\n")


def replace_by_a_copy(path):
    shutil.copy2(path, path.with_suffix(".copy"))  # equal bytes, size and time; another file
    os.replace(path.with_suffix(".copy"), path)


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def create(path):
    path.write_text("{{ messages }}")


CHANGES = {
    "weights replaced": (WEIGHTS, replace_by_a_copy),
    "weights touched": (WEIGHTS, touch),
    "configuration grown": ("config.json", append_byte),
    "generation configuration gone": ("generation_config.json", os.unlink),
    "a template that was not there": ("chat_template.jinja", create),
    "an index beside the file": (INDEX, create),
}


@pytest.mark.parametrize("moment", ["before it is opened", "while blocks are searched"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_source_that_changes_is_noticed(make_checkpoint, quick, monkeypatch, case, moment):
    """From the first look on: the digests in a manifest are of what was read."""
    source = make_checkpoint(num_hidden_layers=1)
    name, change = CHANGES[case]
    import services.quantizer.job as job

    owner, method = (job, "Source") if moment == "before it is opened" else (job, "write_block")
    real = getattr(owner, method)

    def meddle(*arguments, **options):
        change(source / name)
        monkeypatch.setattr(owner, method, real)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, method, meddle)
    config = quick(source, evaluation_tokens=0)
    with pytest.raises((QuantizerError, CheckpointError), match=rf"{name}: changed (during|since|while)"):
        run(config)
    assert not (config.artifacts / "tiny" / "CURRENT").exists()


def test_a_calibration_text_that_changes_is_noticed(make_checkpoint, quick, monkeypatch, tmp_path):
    import services.quantizer.job as job

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(2000)))
    real = job.read_inputs

    def meddle(*arguments):
        append_byte(text)
        return real(*arguments)

    monkeypatch.setattr(job, "read_inputs", meddle)
    with pytest.raises(QuantizerError, match=r"text\.txt: changed during the run"):
        run(quick(make_checkpoint(num_hidden_layers=1), calibration=(text,)))


def test_a_file_that_changes_while_it_is_read_is_noticed(make_checkpoint, monkeypatch):
    import weft.artifact.checkpoint as module

    directory = make_checkpoint(num_hidden_layers=1)
    checkpoint = Checkpoint.open(directory)
    real = module.read_exactly

    def meddle(*arguments):
        real(*arguments)
        append_byte(directory / WEIGHTS)

    monkeypatch.setattr(module, "read_exactly", meddle)
    with pytest.raises(CheckpointError, match=r"changed while it was read \(tensor model\.norm\.weight\)"):
        checkpoint.load("model.norm.weight")


def test_a_clock_that_jumps_decides_nothing(make_checkpoint, quick, monkeypatch):
    source = make_checkpoint(num_hidden_layers=1)
    first = run(quick(source))
    now = [4e9]

    def backwards():
        now[0] -= 86400.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    second = run(quick(source, force=True))
    assert second.manifest.digest == first.manifest.digest
    other = run(quick(source, seed=5))
    ArtifactStore(other.path.parents[1]).verify(other)
    assert json.loads((other.path / "run.json").read_text())["seconds"] >= 0
