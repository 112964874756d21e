"""A run that is ended anywhere and started again publishes the bytes of a run that was not.

Two ways to end it: in this process, at each step that touches the disk (no clean-up runs after it, as if the
machine had died); and as a process of its own, with SIGKILL.
"""

import contextlib
import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import services.quantizer.job as job_module
import services.quantizer.run_lock as lock_module
import services.quantizer.workspace as workspace_module
import weft.artifact.history as history_module
import weft.artifact.publish as publish_module
from services.quantizer.__main__ import main
from services.quantizer.config import QuantizerConfig
from services.quantizer.grid import round_to_nearest
from services.quantizer.job import run
from services.quantizer.quantize import QuantizedBlock
from weft.artifact.manifest import LinearError
from weft.artifact.store import ArtifactStore

ROOT = Path(__file__).parents[3]
WORDS = ("the", "weft", "is", "a", "thread", "carried", "across", "warp", "many", "streams", "in", "one")
STEPS = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "ftruncate")
DISK_MODULES = (workspace_module, publish_module, history_module, lock_module)


class Crash(BaseException):
    """The machine is gone."""


class DyingOs:
    """Stands for `os`: the n-th step raises, and so does every step after it. A write tears in the middle."""

    def __init__(self, die_at=-1):
        self.die_at, self.steps, self.is_dead = die_at, [], False
        self.descriptors = set()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments, **options):
            if name == "open" and not arguments[1] & os.O_CREAT:
                return self.opened(real(*arguments, **options))
            if self.is_dead:
                raise Crash
            self.steps.append(name)
            if len(self.steps) - 1 == self.die_at:
                self.is_dead = True
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            result = real(*arguments, **options)
            return self.opened(result) if name == "open" else result

        return step

    def opened(self, descriptor):
        self.descriptors.add(descriptor)
        return descriptor

    def close(self, descriptor):
        self.descriptors.discard(descriptor)
        os.close(descriptor)

    def bury(self):
        """What the kernel does with a process that is gone: its locks go with its descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    def rmtree(self, path, ignore_errors=False):
        if self.is_dead:
            raise Crash
        shutil.rmtree(path, ignore_errors=ignore_errors)


class QuickQuantizer:
    """In the place of the search: rounding that depends on everything that the search depends on."""

    calls = 0

    def __init__(self, source, index, weights, hidden, *_others, **_options):
        self._source, self._weights = source, weights
        self._factor = 1.0 + 0.01 * float(hidden.double().abs().mean().tanh())

    def run(self):
        type(self).calls += 1
        names = self._source.architecture.linears
        linears = {n: round_to_nearest(self._weights[f"{n}.weight"] * self._factor, 32) for n in names}
        weights = {**self._weights, **{f"{n}.weight": linears[n].dequantize() for n in names}}
        errors = {n: LinearError(0.25, self._factor / 8) for n in names}
        return QuantizedBlock(weights, linears, errors, dict.fromkeys(names, f"x {self._factor}"))


@pytest.fixture
def configure(make_checkpoint, tmp_path):
    """configure(folder) -> the configuration of a run of a three-block model into a store of its own."""
    source = make_checkpoint(num_hidden_layers=3)
    draw, texts = random.Random(3), []
    for name in ("calibration", "evaluation"):
        texts.append(tmp_path / f"{name}.txt")
        words = draw.choices(WORDS, k=600)
        texts[-1].write_text(" ".join(words))

    def config(folder, **changes):
        values = {
            "samples": 2, "sequence_length": 32, "evaluation_tokens": 64, "group_size": 32, "threads": 1,
            "calibration": texts[:1], "evaluation": texts[1:],
        }  # fmt: skip
        artifacts = tmp_path / folder
        return QuantizerConfig(source=source, artifacts=artifacts, name="tiny", **{**values, **changes})

    return config


@pytest.fixture
def quick_search(monkeypatch):
    monkeypatch.setattr(job_module, "BlockQuantizer", QuickQuantizer)
    monkeypatch.setattr(QuickQuantizer, "calls", 0)
    return QuickQuantizer


def dying(monkeypatch, die_at=-1, kind=DyingOs):
    faulty = kind(die_at)
    for module in DISK_MODULES:
        monkeypatch.setattr(module, "os", faulty)
        if hasattr(module, "shutil"):
            monkeypatch.setattr(module, "shutil", faulty)
    return faulty


def num_kept(artifacts):
    journals = list((artifacts / "tiny").glob(".work-*/journal.json"))
    assert len(journals) <= 1
    return len(json.loads(journals[0].read_text())["blocks"]) if journals else 0


def check_published(config, digest):
    store = ArtifactStore(config.artifacts)
    artifact = store.open("tiny")
    store.verify(artifact)
    assert artifact.manifest.digest == digest
    assert not [n for n in os.listdir(artifact.path.parent) if n.startswith((".work", ".staging", ".run"))]


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_step_changes_no_byte(configure, quick_search, monkeypatch, stride):
    counting = dying(monkeypatch)
    reference = run(configure("reference")).manifest.digest
    steps = counting.steps
    assert quick_search.calls == 3
    # Each open, sync and rename; of the many writes in a row every ninth.
    points = [n for n, name in enumerate(steps) if name != "write" or n % 9 == 0]
    assert len(points) > 60
    seen_kept = set()
    for point in points[::stride]:
        config = configure(f"crash-{point}")
        faulty = dying(monkeypatch, point)
        with pytest.raises(Crash):
            run(config)
        assert faulty.is_dead
        faulty.bury()
        dying(monkeypatch)
        is_published = (config.artifacts / "tiny" / "CURRENT").exists()
        kept = num_kept(config.artifacts)
        seen_kept.add(kept)
        before = quick_search.calls
        assert run(config).manifest.digest == reference
        if not is_published:
            assert quick_search.calls - before == 3 - kept  # nothing that was finished is searched again
            check_published(config, reference)
        shutil.rmtree(config.artifacts)
    assert seen_kept == {0, 1, 2, 3}


class FullDisk(DyingOs):
    """One step finds no space; whatever comes after it, such as removing what was begun, works."""

    def __getattr__(self, name):
        real = super().__getattr__(name)

        def step(*arguments, **options):
            try:
                return real(*arguments, **options)
            except Crash:
                self.is_dead, self.die_at = False, -1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None

        return step if name in ("write", "fsync", "rename", "replace", "mkdir") else real


def test_a_full_disk_keeps_what_was_finished(configure, quick_search, monkeypatch):
    counting = dying(monkeypatch)
    reference = run(configure("reference")).manifest.digest
    points = [n for n, name in enumerate(counting.steps) if name in ("write", "fsync", "rename", "replace")]
    for point in points[7::23]:
        config = configure(f"full-{point}")
        faulty = dying(monkeypatch, point, FullDisk)
        with pytest.raises(OSError, match="No space"):
            run(config)
        assert faulty.die_at == -1
        dying(monkeypatch)
        assert not (config.artifacts / "tiny" / "CURRENT").exists()
        left = os.listdir(config.artifacts / "tiny")
        assert all(name.startswith(".work-") for name in left)
        kept = num_kept(config.artifacts)
        assert bool(kept) == bool(left)
        before = quick_search.calls
        assert run(config).manifest.digest == reference
        assert quick_search.calls - before == 3 - kept


def test_every_part_of_a_state_is_needed_to_be_sound(configure, quick_search, monkeypatch):
    """What is damaged between the two runs is noticed and done again."""
    counting = dying(monkeypatch)
    reference = run(configure("reference")).manifest.digest
    names = {"block-00002.safetensors": 1, "streams-00002.safetensors": 1, "block-00001.json": 0}
    syncs = [n for n, name in enumerate(counting.steps) if name == "replace"]
    for name, expected in names.items():
        config = configure(name)
        faulty = dying(monkeypatch, syncs[1] + 1)  # the journal of the second block is in place
        with pytest.raises(Crash):
            run(config)
        faulty.bury()
        dying(monkeypatch)
        (path,) = (config.artifacts / "tiny").glob(f".work-*/{name}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        before = quick_search.calls
        assert run(config).manifest.digest == reference
        assert quick_search.calls - before == 3 - expected


def test_another_recipe_goes_on_from_nothing_and_cleans_up(configure, quick_search, monkeypatch):
    config = configure("a")
    faulty = dying(monkeypatch, 40)
    with pytest.raises(Crash):
        run(config)
    faulty.bury()
    dying(monkeypatch)
    (old,) = (config.artifacts / "tiny").glob(".work-*")
    other = run(configure("a", seed=1))
    assert not old.exists()
    assert other.manifest.digest == run(configure("b", seed=1)).manifest.digest


def test_no_resume_starts_over(configure, quick_search, monkeypatch):
    counting = dying(monkeypatch)
    reference = run(configure("reference")).manifest.digest
    faulty = dying(monkeypatch, len(counting.steps) - 20)
    with pytest.raises(Crash):
        run(configure("a"))
    faulty.bury()
    dying(monkeypatch)
    before = quick_search.calls
    assert run(configure("a", resume=False)).manifest.digest == reference
    assert quick_search.calls - before == 3


def flags_of(config):
    pairs = {
        "source": config.source, "artifacts": config.artifacts, "name": config.name,
        "calibration": config.calibration[0], "evaluation": config.evaluation[0], "samples": config.samples,
        "sequence-length": config.sequence_length, "evaluation-tokens": config.evaluation_tokens,
        "group-size": config.group_size, "threads": config.threads,
    }  # fmt: skip
    return ["run", *(word for name, value in pairs.items() for word in (f"--{name}", str(value)))]


class Child:
    """A run in a process of its own: forked, so that torch is imported already, or started as a user does."""

    def __init__(self, config, is_forked):
        ours, theirs = os.pipe()
        if is_forked:
            self.pid = os.fork()
            if not self.pid:
                os.dup2(theirs, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                status = 99
                try:
                    status = main(flags_of(config))
                finally:
                    os._exit(status)
        else:
            command = [sys.executable, "-m", "services.quantizer", *flags_of(config)]
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
            self.pid = self._process.pid
        os.close(theirs)
        self._errors = os.fdopen(ours, "rb", buffering=0)
        self.text = b""

    def wait(self, seconds=None, events=None):
        """Until so many seconds or so many lines of events have passed, or the end."""
        until = time.monotonic() + (120 if seconds is None else seconds)
        while events is None or self.text.count(b'"event": "p') < events:
            ready, _, _ = select.select([self._errors], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            data = self._errors.read(1 << 16)
            if not data:
                return
            self.text += data

    def end(self, signal_number=signal.SIGKILL):
        """Signal it; how it ended, as the exit status or minus the signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)
        return self.join()

    def join(self):
        _, status = os.waitpid(self.pid, 0)
        self._errors.close()
        return os.waitstatus_to_exitcode(status)


def kill_until(configure, num_kills, is_forked, seed):
    """Chains of runs, each killed at random points, by time or by its events, until one gets through."""
    draw = random.Random(seed)
    begun = time.monotonic()
    reference = Child(configure("reference"), is_forked)
    reference.wait()
    assert reference.join() == 0, reference.text
    duration = time.monotonic() - begun
    store = ArtifactStore(configure("reference").artifacts)
    digest = store.open("tiny").manifest.digest
    kills = chains = 0
    while kills < num_kills:
        chains += 1
        config = configure(f"chain-{chains}")
        while True:
            child = Child(config, is_forked)
            if kills < num_kills:
                by_event = draw.random() < 0.5
                child.wait(
                    seconds=None if by_event else draw.uniform(0, duration),
                    events=draw.randint(1, 6) if by_event else None,
                )
                time.sleep(draw.uniform(0, 0.05))
                status = child.end()
            else:
                child.wait()
                status = child.join()
            if status == 0:
                break
            assert status == -signal.SIGKILL, child.text
            kills += 1
        check_published(config, digest)
    return chains


def test_killed_processes_go_on(configure):
    kill_until(configure, num_kills=4, is_forked=True, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills(configure):
    chains = kill_until(configure, num_kills=20, is_forked=False, seed=2)
    assert chains < 20  # some runs were killed more than once


def test_two_runs_for_one_name(configure):
    config = configure("a")
    first = Child(config, is_forked=True)
    first.wait(events=1)
    second = Child(config, is_forked=True)
    begun = time.monotonic()
    second.wait()
    assert second.join() == 4
    assert time.monotonic() - begun < 10
    line = second.text.decode().splitlines()[-1]
    assert line.startswith(f"error: another run of tiny is at work (process {first.pid} on ")
    first.wait()
    assert first.join() == 0
    ArtifactStore(config.artifacts).verify(ArtifactStore(config.artifacts).open("tiny"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_one_line_and_goes_on(configure, number):
    config = configure("a")
    child = Child(config, is_forked=True)
    child.wait(events=2)  # the plan, and the first block
    assert child.end(number) == 128 + number
    lines = child.text.decode().splitlines()
    again = Child(config, is_forked=True)
    again.wait()
    assert again.join() == 0, again.text
    events = [json.loads(line) for line in again.text.decode().splitlines()]
    plan = next(event for event in events if event["event"] == "plan")
    assert 1 <= plan["resumed_blocks"] <= 3
    assert plan["blocks"] == 3
    assert "Traceback" not in "".join(lines)
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == list(range(plan["resumed_blocks"] + 1, 5))
    assert [e["event"] for e in events][-2:] == ["publishing", "published"]
