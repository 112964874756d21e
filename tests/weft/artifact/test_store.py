"""Manifest and store: canonical bytes, path rules, digests, and a publish that is whole or absent whatever
fails.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import weft.artifact.history as history_module
import weft.artifact.publish as publish_module
from weft.artifact.manifest import (
    ArtifactError,
    ArtifactNotFound,
    Canary,
    CanaryPrompt,
    DigestMismatch,
    LinearError,
    Manifest,
    tokenizer_digest,
)
from weft.artifact.store import ArtifactStore

ROOT = Path(__file__).parents[3]
ZERO = "sha256:" + "0" * 64


def example_manifest(files, **changes):
    canary = Canary((CanaryPrompt((0, 5), (7, 9), (-0.5, -1.25), (1.5, 0.25)),))
    manifest = Manifest(
        model="demo",
        files=dict(files),
        source_digest=ZERO,
        recipe={"bits": 4},
        seed=0,
        calibration_digest=ZERO,
        tokenizer_digest=ZERO,
        linears={"model.layers.0.mlp.up_proj": LinearError(0.01, 0.005)},
        quality={"source": {"perplexity": 43.7}},
        canary=canary,
    )
    return dataclasses.replace(manifest, **changes)


def publish_example(store, version, content=b"weights"):
    with store.stage("demo") as staged:
        staged.write("config.json", b"{}")
        with staged.create("part.safetensors") as file:
            file.write(content[:3])
            file.write(content[3:])
        staged.rename("part.safetensors", "model-00001-of-00001.safetensors")
        return staged.publish(example_manifest(staged.files, seed=len(content)), version, b'{"host":"here"}')


def test_manifest_round_trip_and_digest():
    manifest = example_manifest({})
    data = manifest.to_bytes()
    assert Manifest.parse(data) == manifest
    assert manifest.digest.startswith("sha256:")
    assert Manifest.parse(data).digest == manifest.digest
    assert dataclasses.replace(manifest, seed=1).digest != manifest.digest


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 1},
        {"format_version": None},
        {"model": "../x"},
        {"model": "Demo"},
        {"files": {"../x": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"manifest.json": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"x": {"sha256": "0" * 63, "size": 1}}},
        {"files": {"x": {"sha256": "0" * 64, "size": -1}}},
        {"files": {"x": {"sha256": "0" * 64, "size": True}}},
        {"files": []},
        {"source_digest": "0" * 64},
        {"seed": "0"},
        {"linears": {"x": {"rounding": 1}}},
        {
            "canary": {
                "prompts": [{"token_ids": [1], "expected_token_ids": [], "logprobs": [], "margins": []}]
            }
        },
        {
            "canary": {
                "prompts": [{"token_ids": [-1], "expected_token_ids": [1], "logprobs": [0], "margins": [0]}]
            }
        },
        {"unknown": 1},
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(change):
    document = {**json.loads(example_manifest({}).to_bytes()), **change}
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Manifest.parse(json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def test_a_manifest_in_another_spelling_is_refused():
    document = json.loads(example_manifest({}).to_bytes())
    with pytest.raises(ArtifactError, match="canonical"):
        Manifest.parse(json.dumps(document, indent=1).encode())
    with pytest.raises(ArtifactError, match="duplicate"):
        Manifest.parse(b'{"seed":0,"seed":0}')


def test_publish_open_verify_read(tmp_path):
    store = ArtifactStore(tmp_path)
    assert store.models() == []
    published = publish_example(store, "v1")
    artifact = store.open("demo")
    assert artifact == published
    assert store.models() == ["demo"]
    assert store.current("demo") == "v1"
    store.verify(artifact)
    assert store.read(artifact, "config.json") == b"{}"
    assert "run.json" not in artifact.manifest.files
    assert (artifact.path / "run.json").exists()
    publish_example(store, "v2", b"other weights")
    assert store.current("demo") == "v2"
    assert store.open("demo", "v1").manifest.seed == 7


def test_what_does_not_exist_is_not_found(tmp_path):
    store = ArtifactStore(tmp_path)
    with pytest.raises(ArtifactNotFound):
        store.open("demo")
    publish_example(store, "v1")
    for model, version in [
        ("demo", "v9"),
        ("demo", "../v1"),
        ("demo", ".."),
        ("other", None),
        ("..", None),
        ("", None),
    ]:
        with pytest.raises(ArtifactNotFound):
            store.open(model, version)
    (tmp_path / "demo" / "half").mkdir()
    with pytest.raises(ArtifactNotFound, match="not an artifact"):
        store.open("demo", "half")
    (tmp_path / "demo" / "link").symlink_to(tmp_path / "demo" / "v1")
    with pytest.raises(ArtifactNotFound):
        store.open("demo", "link")


def test_current_must_name_a_version(tmp_path):
    store = ArtifactStore(tmp_path)
    publish_example(store, "v1")
    for line in (b"../../etc\n", b"", b"v1\nv2\n", b"x" * 300, b"\xff\n"):
        (tmp_path / "demo" / "CURRENT").write_bytes(line)
        with pytest.raises(ArtifactError):
            store.current("demo")


def test_every_change_to_a_file_is_found(tmp_path):
    store = ArtifactStore(tmp_path)
    artifact = publish_example(store, "v1")
    weights = artifact.path / "model-00001-of-00001.safetensors"

    weights.write_bytes(b"weightz")
    with pytest.raises(DigestMismatch) as caught:
        store.verify(artifact)
    assert caught.value.file == weights.name
    assert caught.value.expected != caught.value.found
    store.verify(artifact, ["config.json"])

    weights.write_bytes(b"weights and more")
    with pytest.raises(DigestMismatch, match="16 bytes"):
        store.verify(artifact)
    weights.unlink()
    with pytest.raises(DigestMismatch, match="no file"):
        store.verify(artifact)
    weights.symlink_to("/etc/hostname")
    with pytest.raises(DigestMismatch, match="link"):
        store.verify(artifact)
    weights.unlink()
    weights.write_bytes(b"weights")
    store.verify(artifact)
    (artifact.path / "extra.py").write_bytes(b"")
    with pytest.raises(DigestMismatch, match=r"extra\.py"):
        store.verify(artifact)


def test_an_artifact_under_another_name_is_refused(tmp_path):
    publish_example(ArtifactStore(tmp_path), "v1")
    (tmp_path / "demo").rename(tmp_path / "other")
    with pytest.raises(ArtifactError, match="of model demo"):
        ArtifactStore(tmp_path).open("other")


def test_equal_bytes_published_twice_are_one_version_and_a_damaged_one_is_replaced(tmp_path):
    store = ArtifactStore(tmp_path)
    artifact = publish_example(store, "v1")
    before = artifact.path.stat().st_ino
    publish_example(store, "v1")
    assert artifact.path.stat().st_ino == before
    (artifact.path / "config.json").write_bytes(b"[]")
    publish_example(store, "v1")
    store.verify(store.open("demo"))
    assert sorted(os.listdir(tmp_path / "demo")) == ["CURRENT", "HISTORY", "v1"]


def test_whole_bytes_of_another_artifact_under_the_version_are_replaced(tmp_path):
    store = ArtifactStore(tmp_path)
    wanted = publish_example(store, "v1", b"weights").manifest.digest
    other = publish_example(store, "v2", b"other weights")
    shutil.rmtree(tmp_path / "demo" / "v1")
    other.path.rename(tmp_path / "demo" / "v1")
    published = publish_example(store, "v1", b"weights")
    assert store.open("demo").manifest.digest == published.manifest.digest == wanted


def test_a_signal_while_a_damaged_version_is_replaced_puts_it_back(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)
    artifact = publish_example(store, "v1")
    (artifact.path / "config.json").write_bytes(b"[]")

    class Interrupted(FaultyOs):
        def __getattr__(self, name):
            real = getattr(os, name)

            def rename(old, new):
                self.calls += 1
                if self.calls == 4:  # a shard named, v1 found, v1 put aside; now the new one
                    raise SystemExit(143)
                real(old, new)

            return rename if name == "rename" else real

    monkeypatch.setattr(publish_module, "os", Interrupted(0))
    with pytest.raises(SystemExit):
        publish_example(store, "v1")
    assert sorted(os.listdir(tmp_path / "demo")) == ["CURRENT", "HISTORY", "v1"]


def test_staging_refuses_names_that_are_not_plain(tmp_path):
    with ArtifactStore(tmp_path).stage("demo") as staged:
        for name in ("../x", "", "a/b", ".hidden", "manifest.json", "run.json", "a\n"):
            with pytest.raises(ArtifactError):
                staged.create(name)
        with pytest.raises(ArtifactError, match="does not describe"):
            staged.publish(example_manifest({}, model="other"), "v1", b"{}")
    with pytest.raises(ArtifactNotFound):
        ArtifactStore(tmp_path).stage("../demo")


class FaultyOs:
    """Stands for `os` inside of the publisher and fails the n-th call among the ones that touch the disk."""

    FAILING = ("open", "mkdir", "makedirs", "write", "fsync", "rename", "replace")

    def __init__(self, fail_at):
        self.fail_at, self.calls, self.failed = fail_at, 0, None

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.FAILING:
            return real

        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.fail_at:
                self.failed = name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call


def test_no_space_at_any_step_leaves_the_old_version_current(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)
    publish_example(store, "v1")
    failed_steps, fail_at = set(), 0
    while True:
        fail_at += 1
        faulty = FaultyOs(fail_at)
        for module in (publish_module, history_module):
            monkeypatch.setattr(module, "os", faulty)
        with contextlib.suppress(OSError):
            publish_example(store, f"v2-{fail_at}", b"other weights")
        for module in (publish_module, history_module):
            monkeypatch.setattr(module, "os", os)
        if faulty.failed is None:
            break
        failed_steps.add(faulty.failed)
        assert store.current("demo") == "v1", f"step {fail_at}, {faulty.failed}"
        store.verify(store.open("demo"))
        hidden = [name for name in os.listdir(tmp_path / "demo") if name.startswith(".")]
        assert hidden == [], f"step {fail_at}, {faulty.failed}"
        for name in set(os.listdir(tmp_path / "demo")) - {"CURRENT", "HISTORY"}:
            store.verify(store.open("demo", name))  # a version that did appear is whole
    assert failed_steps == set(FaultyOs.FAILING)
    assert fail_at > 15
    assert store.current("demo") == f"v2-{fail_at}"


def test_no_space_for_the_first_version_leaves_no_current(tmp_path, monkeypatch):
    for fail_at in range(1, 100):
        faulty = FaultyOs(fail_at)
        monkeypatch.setattr(publish_module, "os", faulty)
        store = ArtifactStore(tmp_path / str(fail_at))
        with contextlib.suppress(OSError):
            publish_example(store, "v1")
        monkeypatch.setattr(publish_module, "os", os)
        if faulty.failed is None:
            assert store.current("demo") == "v1"
            return
        assert store.models() == []
    raise AssertionError("the publish never ended")


KILLED = """
import os, signal, sys
from pathlib import Path
import weft.artifact.publish as module
from tests_example import publish_example
from weft.artifact.store import ArtifactStore

class Killer:
    calls = 0
    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("write", "fsync", "rename", "replace", "mkdir"):
            return real
        def call(*a, **k):
            Killer.calls += 1
            if Killer.calls == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        return call

module.os = Killer()
publish_example(ArtifactStore(Path(sys.argv[1])), "v2", b"other weights")
"""


def test_a_kill_at_any_step_leaves_a_whole_artifact_and_the_next_publish_tidies_up(tmp_path):
    store = ArtifactStore(tmp_path / "artifacts")
    publish_example(store, "v1")
    (tmp_path / "tests_example.py").write_text(Path(__file__).read_text())
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    seen = set()
    for step in (1, 2, 4, 7, 10, 12, 13, 15, 17, 18):
        command = [sys.executable, str(tmp_path / "killed.py"), str(store.root), str(step)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        artifact = store.open("demo")
        store.verify(artifact)
        seen.add((done.returncode, artifact.version))
        if artifact.version == "v2":
            break
        assert artifact.version == "v1"
    assert (-signal.SIGKILL, "v1") in seen
    publish_example(store, "v3", b"third")
    assert [name for name in os.listdir(store.root / "demo") if name.startswith(".")] == []


def test_a_publisher_at_work_is_not_taken_for_an_abandoned_one(tmp_path):
    store = ArtifactStore(tmp_path)
    with store.stage("demo") as first:
        first.write("config.json", b"{}")
        publish_example(store, "v1")
        assert (first.path / "config.json").exists()
        first.publish(example_manifest(first.files), "v2", b"{}")
    assert store.current("demo") == "v2"


def test_tokenizer_digest(tmp_path):
    with pytest.raises(ArtifactNotFound):
        tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"")
    assert (
        tokenizer_digest(tmp_path)
        == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_store_and_manifest_need_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['safetensors'] = None;"
        "import weft.artifact.store, weft.artifact.publish, weft.artifact.manifest"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
