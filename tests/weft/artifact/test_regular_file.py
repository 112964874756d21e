"""Links: those of the hub's cache are read, all others are refused with what to do about it."""

import shutil

import pytest
import safetensors.torch
import torch

from weft.artifact.checkpoint import Checkpoint
from weft.artifact.manifest import tokenizer_digest
from weft.artifact.regular_file import FileRefusedError, read_regular

REVISION = "0" * 40
CONTENTS = {"config.json": b"{}", "tokenizer.json": b'{"version": "1.0"}'}


@pytest.fixture
def snapshot(tmp_path):
    """A model as the hub's client lays it out: blobs by digest, a snapshot of links to them."""
    blobs = tmp_path / "models--someone--model" / "blobs"
    directory = blobs.parent / "snapshots" / REVISION
    directory.mkdir(parents=True)
    blobs.mkdir()
    safetensors.torch.save_file({"a": torch.arange(6.0)}, blobs / ("a" * 64))
    (directory / "model.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
    for number, (name, data) in enumerate(CONTENTS.items()):
        digest = str(number) * 40
        (blobs / digest).write_bytes(data)
        (directory / name).symlink_to(f"../../blobs/{digest}")
    return directory


def test_a_snapshot_of_the_hubs_cache_is_read_as_it_lies(snapshot, tmp_path, monkeypatch):
    assert torch.equal(Checkpoint.open(snapshot).load("a"), torch.arange(6.0))
    copied = tmp_path / "copied"
    shutil.copytree(snapshot, copied)
    assert tokenizer_digest(snapshot) == tokenizer_digest(copied)
    alias = tmp_path / "alias"
    alias.symlink_to(snapshot)
    assert read_regular(alias / "tokenizer.json", 100) == CONTENTS["tokenizer.json"]
    monkeypatch.chdir(snapshot)
    assert Checkpoint.open(".").names == {"a"}


def replace_link(snapshot, target):
    link = snapshot / "config.json"
    link.unlink()
    link.symlink_to(target)


def outside(snapshot):
    (snapshot.parents[2] / "secret").write_bytes(b"{}")
    replace_link(snapshot, "../../../secret")


def absolute(snapshot):
    replace_link(snapshot, snapshot.parents[1] / "blobs" / ("0" * 40))


def no_digest(snapshot):
    (snapshot.parents[1] / "blobs" / "config").write_bytes(b"{}")
    replace_link(snapshot, "../../blobs/config")


def blob_a_link(snapshot):
    blob = snapshot.parents[1] / "blobs" / ("0" * 40)
    (blob.parent / "other").write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to("other")


def blobs_a_link(snapshot):
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(blobs.parent / "elsewhere")
    blobs.symlink_to("elsewhere")


def no_snapshot(snapshot):
    snapshot.parent.rename(snapshot.parents[1] / "versions")


@pytest.mark.parametrize("change", [outside, absolute, no_digest, blob_a_link, blobs_a_link, no_snapshot])
def test_every_other_link_is_refused_with_the_way_out(snapshot, change):
    change(snapshot)
    directory = snapshot if snapshot.exists() else snapshot.parents[1] / "versions" / REVISION
    with pytest.raises(FileRefusedError, match=f"symbolic link .* cp -rL {directory} "):
        read_regular(directory / "config.json", 100)


def test_a_blob_that_was_not_fetched_is_a_missing_file(snapshot):
    (snapshot.parents[1] / "blobs" / ("0" * 40)).unlink()
    with pytest.raises(FileNotFoundError):
        read_regular(snapshot / "config.json", 100)
