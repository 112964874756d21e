"""`weft artifacts`: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from weft.artifact.manifest import Manifest
from weft.artifact.store import ArtifactStore

ZERO = "sha256:" + "0" * 64
DAY = 86_400


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path)
    quality = {"source": {"perplexity": 10.0}, "chosen": {"perplexity": 10.5, "mean_kl": 0.0125}}
    for number in (1, 2, 3):
        with store.stage("demo") as staged:
            staged.write("config.json", b"{}")
            staged.write("weights", bytes(2048 * number))
            manifest = Manifest("demo", dict(staged.files), ZERO, {}, 0, ZERO, ZERO, quality=quality)
            run = json.dumps({"started": f"2026-01-0{number}T10:00:00Z"}).encode()
            staged.publish(manifest, f"v{number}", run)
    return store


def weft(store: ArtifactStore, *words: str, status: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["artifacts", *words, "--artifacts", str(store.root)])
    assert result.exit_code == status, result.output
    return result.output.splitlines()


def rows(lines: list[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines]


def test_ls(store: ArtifactStore) -> None:
    found = rows(weft(store, "ls", "--json"))
    assert [(row["version"], row["is_current"], row["size"]) for row in found] == [
        ("v3", True, 6146),
        ("v2", False, 4098),
        ("v1", False, 2050),
    ]
    assert found[0]["mean_kl"] == 0.0125
    shown = "\n".join(weft(store, "ls", "demo"))
    for text in ("demo/v3", "current", "6.002 KiB", "2026-01-03 10:00", "10 -> 10.5", "0.0125"):
        assert text in shown
    assert "nothing published" in weft(store, "ls", "other", status=1)[0]
    assert "no such directory" in weft(ArtifactStore(Path("/nonexistent")), "ls", status=1)[0]


def test_ls_of_what_is_no_volume_of_ours_is_one_line(store: ArtifactStore) -> None:
    (store.root / "demo" / "v3" / "run.json").write_text(json.dumps({"started": "[/x] 2026"}))
    assert "[/x] 2026" in "\n".join(weft(store, "ls"))
    (store.root / "demo" / "HISTORY").unlink()
    (store.root / "demo" / "HISTORY").mkdir()
    (line,) = weft(store, "ls", status=1)
    assert line.startswith("weft: ")
    assert line.endswith("HISTORY: not a regular file")


def test_verify_names_the_file(store: ArtifactStore) -> None:
    assert weft(store, "verify") == ["demo/v1: sound", "demo/v2: sound", "demo/v3: sound"]
    path = store.root / "demo" / "v2" / "weights"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    lines = weft(store, "verify", "demo", status=1)
    assert lines[1].startswith("demo/v2: weights: expected sha256:")
    assert len(lines) == 3
    assert [row["is_sound"] for row in rows(weft(store, "verify", "--json", status=1))] == [True, False, True]
    assert weft(store, "verify", "demo", "v3") == ["demo/v3: sound"]
    assert "no version v9" in weft(store, "verify", "demo", "v9", status=1)[0]


def test_rollback(store: ArtifactStore) -> None:
    assert weft(store, "rollback", "demo") == ["demo: CURRENT is v2, was v3"]
    assert rows(weft(store, "rollback", "demo", "v1", "--json")) == [
        {"model": "demo", "from": "v2", "to": "v1"}
    ]
    (store.root / "demo" / "v3" / "weights").write_bytes(b"")
    assert weft(store, "rollback", "demo", "v3", status=1)[0].startswith("weft: weights: expected")
    assert store.current("demo") == "v1"


def test_gc(store: ArtifactStore) -> None:
    assert weft(store, "gc", "--keep", "1")[0].endswith("younger than the grace")
    then = time.time() - DAY
    for folder, _, names in os.walk(store.root):
        for name in [".", *names]:
            os.utime(os.path.join(folder, name), (then, then))
    history = store.root / "demo" / "HISTORY"
    history.write_text(history.read_text().replace("2026-11", "2025-11").replace('"time": "2', '"time": "1'))
    dry = rows(weft(store, "gc", "--keep", "2", "--grace", "12h", "--dry-run", "--json"))
    assert [(row["name"], row["is_removed"], row["is_dry_run"]) for row in dry] == [("v1", True, True)]
    assert weft(store, "gc", "demo", "--keep", "2", "--grace", "12h") == ["removed demo/v1 (2.681 KiB): old"]
    assert store.versions("demo") == ["v2", "v3"]
    weft(store, "gc", "--grace", "soon", status=2)
    weft(store, "gc", "--keep", "0", status=2)


def test_the_volume_may_come_from_a_variable(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_ARTIFACTS", str(store.root))
    assert len(CliRunner().invoke(app, ["artifacts", "ls", "--json"]).output.splitlines()) == 3
    monkeypatch.delenv("WEFT_ARTIFACTS")
    assert CliRunner().invoke(app, ["artifacts", "ls"]).exit_code == 2
