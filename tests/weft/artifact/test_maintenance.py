"""History, fence, rollback, collection: what is remembered of switches, who may publish, what is removed."""

import fcntl
import json
import os
import time

import pytest

import weft.artifact.history as history_module
from weft.artifact.history import (
    FencedError,
    append_history,
    pass_fence,
    previous_version,
    read_fence,
    read_history,
)
from weft.artifact.maintenance import collect, collectable, list_versions, roll_back
from weft.artifact.manifest import ArtifactError, ArtifactNotFound, DigestMismatch, Manifest
from weft.artifact.publish import claim_fence
from weft.artifact.store import ArtifactStore

DAY = 86_400.0


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "artifacts")


def example_manifest(files):
    zero = "sha256:" + "0" * 64
    return Manifest("demo", dict(files), zero, {"bits": 4}, 0, zero, zero)


def publish(store, *versions):
    for version in versions:
        with store.stage("demo") as staged:
            staged.write("config.json", b"{}")
            staged.write("weights", version.encode() * 3)
            staged.publish(example_manifest(staged.files), version, b"{}")


def age(store, seconds):
    """Make every file and every line of HISTORY look older."""
    then = time.time() - seconds
    for folder, _, names in os.walk(store.root):
        for name in [*names, "."]:
            os.utime(os.path.join(folder, name), (then, then))
    path = store.root / "demo" / "HISTORY"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(then))
    path.write_text("".join(json.dumps({**line, "time": stamp}) + "\n" for line in lines))


def names(store):
    return {version.version for version in list_versions(store, "demo")}


def test_history_says_what_was_current_before(store):
    publish(store, "v1", "v2", "v3", "v3")
    switches = read_history(store.root / "demo")
    assert [(s.previous, s.version, s.how) for s in switches] == [
        (None, "v1", "publish"),
        ("v1", "v2", "publish"),
        ("v2", "v3", "publish"),
        ("v3", "v3", "publish"),
    ]
    assert previous_version(switches, "v3") == "v2"
    assert previous_version(switches, "v1") is None


def test_a_switch_that_never_came_about_and_a_torn_line_mislead_nobody(store):
    publish(store, "v1", "v2")
    directory = store.root / "demo"
    append_history(directory, "v2", "v3", "publish")  # and then the power went
    with (directory / "HISTORY").open("ab") as file:
        file.write(b'{"from": "v2", "to": "v')
    assert previous_version(read_history(directory), "v2") == "v1"
    publish(store, "v4")
    assert previous_version(read_history(directory), "v4") == "v2"
    assert roll_back(store, "demo") == ("v4", "v2")


def test_rollback_goes_to_the_previous_or_the_named_version(store):
    publish(store, "v1", "v2", "v3")
    assert roll_back(store, "demo") == ("v3", "v2")
    assert store.current("demo") == "v2"
    assert roll_back(store, "demo") == ("v2", "v3")  # what was current before
    assert roll_back(store, "demo", "v1") == ("v3", "v1")
    assert roll_back(store, "demo", "v1") == ("v1", "v1")
    assert read_history(store.root / "demo")[-1].how == "rollback"
    with pytest.raises(ArtifactNotFound):
        roll_back(store, "demo", "v9")
    with pytest.raises(ArtifactNotFound):
        roll_back(store, "demo", "../demo")


def test_rollback_verifies_first(store):
    publish(store, "v1", "v2")
    (store.root / "demo" / "v1" / "config.json").write_bytes(b"[]")
    with pytest.raises(DigestMismatch, match=r"config\.json"):
        roll_back(store, "demo")
    assert store.current("demo") == "v2"


def test_rollback_without_a_history_goes_by_run_json(store):
    publish(store, "v9", "v1")
    (store.root / "demo" / "HISTORY").unlink()
    for version, started in (("v9", "2026-01-01T00:00:00Z"), ("v1", "2026-01-02T00:00:00Z")):
        (store.root / "demo" / version / "run.json").write_text(json.dumps({"started": started}))
    assert roll_back(store, "demo") == ("v1", "v9")
    with pytest.raises(ArtifactNotFound):
        roll_back(ArtifactStore(store.root / "none"), "demo")


def test_a_clock_that_jumped_back_changes_no_order(store, monkeypatch):
    times = iter([4e9, 3e9, 2e9, 1e9])
    monkeypatch.setattr(history_module.time, "gmtime", lambda real=time.gmtime: real(next(times)))
    publish(store, "v1", "v2", "v3")
    monkeypatch.undo()
    assert [version.version for version in list_versions(store, "demo")] == ["v3", "v2", "v1"]
    assert roll_back(store, "demo")[1] == "v2"


def test_collect_keeps_the_newest_and_current(store):
    publish(store, "v1", "v2", "v3", "v4")
    roll_back(store, "demo", "v1")
    age(store, DAY)
    dry = collect(store, "demo", 2, 3600, is_dry=True)
    assert [(r.name, r.is_removed) for r in dry] == [("v3", True), ("v2", True)]
    assert names(store) == {"v1", "v2", "v3", "v4"}
    assert collect(store, "demo", 2, 3600) == dry
    assert names(store) == {"v1", "v4"}
    assert store.current("demo") == "v1"
    assert not [name for name in os.listdir(store.root / "demo") if name.startswith(".")]
    collect(store, "demo", 0, 3600)
    assert names(store) == {"v1"}


def test_collect_spares_the_young_and_the_used(store):
    publish(store, "v1", "v2", "v3")
    assert {(r.name, r.why) for r in collect(store, "demo", 1, 3600)} == {
        ("v1", "younger than the grace"),
        ("v2", "younger than the grace"),
    }
    age(store, -DAY)  # a clock that was ahead
    assert not any(r.is_removed for r in collect(store, "demo", 1, 3600))
    age(store, DAY)
    descriptor, other = store.hold("demo", "v1"), store.hold("demo", "v1")
    assert None not in (descriptor, other), "readers share"
    os.close(other)
    assert store.hold("demo", "v9") is None
    assert [(r.name, r.why) for r in collect(store, "demo", 1, 3600)] == [("v2", "old"), ("v1", "in use")]
    os.close(descriptor)
    collect(store, "demo", 1, 3600)
    assert names(store) == {"v3"}


def test_collect_removes_what_crashed_writers_left(store):
    publish(store, "v1")
    directory = store.root / "demo"
    used, abandoned, old, young = (
        directory / name
        for name in (".staging-" + "0" * 16, ".staging-" + "1" * 16, ".work-" + "2" * 16, ".work-" + "3" * 16)
    )
    for path in (used, abandoned, old, young):
        path.mkdir()
        (path / "part").write_bytes(b"12345")
    then = time.time() - DAY
    for path in (old / "part", old):
        os.utime(path, (then, then))
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = {r.name: (r.why, r.size) for r in collect(store, "demo", 1, 3600)}
    os.close(descriptor)
    assert found == {
        used.name: ("in use", 5),
        abandoned.name: ("abandoned", 5),
        old.name: ("abandoned", 5),
        young.name: ("younger than the grace", 5),
    }
    assert used.exists()
    assert young.exists()
    assert not old.exists()
    assert not abandoned.exists()


def test_a_worker_that_lost_its_lease_does_not_publish(store):
    with store.stage("demo") as stale:
        stale.write("config.json", b"{}")
        claim_fence(store, "demo", 7)
        claim_fence(store, "demo", 7)
        with pytest.raises(FencedError, match="token 6, but 7 has been here"):
            claim_fence(store, "demo", 6)
        with pytest.raises(FencedError):
            stale.publish(example_manifest(stale.files), "v1", b"{}", fencing_token=6)
    assert store.versions("demo") == []
    with store.stage("demo") as staged:
        staged.write("config.json", b"{}")
        staged.publish(example_manifest(staged.files), "v2", b"{}", fencing_token=8)
    assert read_fence(store.root / "demo") == 8
    assert store.current("demo") == "v2"


@pytest.mark.parametrize("content", ["", "x", "-1", "1" * 80, str(1 << 62)])
def test_a_fence_that_cannot_be_read_keeps_everybody_out(store, content):
    publish(store, "v1")
    (store.root / "demo" / ".fence").write_text(content)
    with pytest.raises(ArtifactError, match="fence"):
        pass_fence(store.root / "demo", 1 << 62)


def test_listing_tells_what_is_broken(store):
    publish(store, "v1", "v2")
    (store.root / "demo" / "v1" / "manifest.json").write_text("{}")
    (store.root / "demo" / "rejected").mkdir()
    listed = list_versions(store, "demo")
    assert [(v.version, v.is_current, bool(v.problem)) for v in listed] == [
        ("v2", True, False),
        ("v1", False, True),
    ]
    assert listed[0].size == len(b"v2v2v2") + 2
    assert list_versions(store, "nothing") == []


def test_collect_takes_what_a_model_left_that_was_never_published(store):
    publish(store, "v1")
    work = store.root / "first" / (".work-" + "0" * 16)
    version = store.root / "first" / "v0"
    for path in (work, version, store.root / "other"):
        path.mkdir(parents=True)
    (version / "manifest.json").write_text("{}")
    assert collectable(store) == ["demo", "first"]
    os.utime(work, (1, 1))
    assert [(r.name, r.why) for r in collect(store, "first", 1, 60)] == [(work.name, "abandoned")]
    assert os.listdir(store.root / "first") == ["v0"]
    with pytest.raises(ArtifactNotFound):
        collect(store, "none", 1, 60)


def test_collect_does_not_take_the_lock_of_a_run_that_has_just_begun(store, monkeypatch):
    publish(store, "v1")
    path = store.root / "demo" / ".run.lock"
    work = store.root / "demo" / (".work-" + "0" * 16)
    work.mkdir()
    os.utime(work, (1, 1))
    real = os.open

    def open_and_change(name, *arguments):
        descriptor = real(name, *arguments)
        if name == path:
            path.unlink()
            os.close(real(path, os.O_CREAT | os.O_EXCL, 0o644))
        return descriptor

    monkeypatch.setattr(os, "open", open_and_change)
    assert [(r.name, r.why) for r in collect(store, "demo", 1, 60)] == [(work.name, "in use")]
    assert path.exists()


def test_collect_leaves_the_state_of_a_run_at_work(store):
    publish(store, "v1")
    work = store.root / "demo" / (".work-" + "0" * 16)
    work.mkdir()
    os.utime(work, (1, 1))
    lock = (store.root / "demo" / ".run.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert [(r.name, r.why) for r in collect(store, "demo", 1, 60)] == [(work.name, "in use")]
    lock.close()
    assert [(r.name, r.why) for r in collect(store, "demo", 1, 60)] == [(work.name, "abandoned")]
    assert sorted(os.listdir(store.root / "demo")) == ["CURRENT", "HISTORY", "v1"]
