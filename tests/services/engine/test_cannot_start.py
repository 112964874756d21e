"""An engine that cannot start says why in one line and exits with 1."""

from __future__ import annotations

import hashlib
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.services.engine.process import ROOT, EngineProcess
from weft.artifact.manifest import FileEntry, Manifest


def copy_of_demo(directory: Path) -> Path:
    target = directory / "source"
    shutil.copytree(ROOT / "models" / "demo", target)
    return target


def broken_artifact(directory: Path) -> Path:
    """An artifact whose config.json is not what its manifest says."""
    version = directory / "demo" / "v1"
    version.parent.mkdir()
    shutil.copytree(ROOT / "models" / "demo", version)
    files = {
        path.name: FileEntry(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in version.iterdir()
        if path.is_file()
    }
    digest = "sha256:" + "0" * 64
    manifest = Manifest("demo", files, digest, {}, 0, digest, digest)
    (version / "manifest.json").write_bytes(manifest.to_bytes())
    (version.parent / "CURRENT").write_text("v1\n")
    config = version / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForCausalLX"))
    return directory


def cannot_start(process: EngineProcess) -> dict[str, Any]:
    assert process.end(60) == 1
    assert not any("Traceback" in line or "stack" in line for line in process.lines)
    assert "serving" not in [event["event"] for event in process.events]
    return process.event("cannot start")


def test_a_digest_that_differs_is_named(engine, tmp_path):
    event = cannot_start(engine("--artifacts", broken_artifact(tmp_path), "--model", "demo"))
    assert event["status"] == "DATA_LOSS"
    assert event["file"] == "config.json"
    assert event["expected"] != event["found"]


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "pickle", "unknown", "no-version"])
def test_a_model_that_cannot_be_served_is_one_clear_line(engine, tmp_path, how):
    flags: tuple[object, ...]
    if how == "no-version":
        flags = ("--artifacts", tmp_path, "--model", "demo")
    elif how == "missing":
        flags = ("--source", tmp_path / "nowhere")
    else:
        source = copy_of_demo(tmp_path)
        (weights,) = source.glob("*.safetensors")
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif how == "empty":
            weights.write_bytes(b"")
        elif how == "pickle":
            weights.rename(source / "pytorch_model.bin")
        else:
            config = source / "config.json"
            config.write_text(config.read_text().replace("LlamaForCausalLM", "Mystery"))
        flags = ("--source", source)
    assert len(cannot_start(engine(*flags))["reason"]) > 10


def test_taken_ports_and_bad_key_files(engine, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in cannot_start(engine("--listen", address, mood="ok"))["reason"]
        assert "in use" in cannot_start(engine("--metrics", address, mood="ok"))["reason"]
    assert "nope" in cannot_start(engine("--api-key-file", tmp_path / "nope", mood="ok"))["reason"]
    assert "config.json" in cannot_start(engine(mood="unloadable"))["reason"]
