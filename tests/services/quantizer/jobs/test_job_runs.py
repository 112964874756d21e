"""Runs as processes: the guardian and its leash; what their lines tell."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from services.quantizer.jobs import process_runner
from services.quantizer.jobs.process_runner import _GUARDIAN, ProcessRun, split_lines
from services.quantizer.jobs.progress_log import ProgressLog
from services.quantizer.jobs.runner import MAX_LINE_CHARS, Task
from services.quantizer.jobs.spec import Places

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print('ready', flush=True); time.sleep(60)"
)
OBEDIENT = "import time; print('ready', flush=True); time.sleep(60)"
WITH_CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    " print('ready', flush=True); time.sleep({seconds})"
)


@pytest.fixture
def guard():
    """guard(program, grace) -> the guardian, once the program is ready"""
    started = []

    def start(program, grace=0.3):
        command = [sys.executable, "-I", "-S", str(_GUARDIAN), str(grace), sys.executable, "-c", program]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def below(process):
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes):
    return not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.parametrize(
    ("program", "expected"), [(OBEDIENT, 143), (STUBBORN, 137)], ids=["obeys", "stubborn"]
)
def test_letting_go_of_the_leash_ends_the_run(guard, program, expected):
    process = guard(program)
    children = below(process)
    process.stdin.close()
    assert process.wait(20) == expected
    assert are_gone(children)


def test_the_whole_group_ends_with_the_run(guard):
    process = guard(WITH_CHILD.format(seconds=1))
    children = below(process)
    assert len(children) == 2
    assert process.wait(20) == 0
    assert are_gone(children)
    process = guard(WITH_CHILD.format(seconds=60))
    children = below(process)
    assert len(children) == 2
    process.stdin.close()
    assert process.wait(20) == 143
    assert are_gone(children)


def test_a_guardian_that_is_killed_takes_the_run_along(guard):
    process = guard(STUBBORN)
    children = below(process)
    process.kill()
    assert are_gone(children)


def test_signals_meant_for_the_service_do_not_end_the_run(guard):
    process = guard(OBEDIENT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.poll() is None


def test_the_exit_status_is_the_runs(guard):
    assert guard("print('ready', flush=True); raise SystemExit(3)").wait(20) == 3


async def test_a_run_gets_its_flags_and_none_of_the_services_variables(tmp_path, monkeypatch):
    (tmp_path / "services" / "quantizer").mkdir(parents=True)
    (tmp_path / "services" / "quantizer" / "__main__.py").write_text(
        "import json, os, sys\n"
        "print('/a/model/v1'); print('more')\n"
        "found = [n for n in os.environ if n.startswith('WEFT_QUANTIZER')]\n"
        "print(json.dumps([sys.argv[1:], found]), file=sys.stderr); sys.exit(3)\n"
    )
    monkeypatch.setattr(process_runner, "_IMPORT_ROOT", tmp_path)
    monkeypatch.setenv("WEFT_QUANTIZER_SAMPLES", "7")
    runner = process_runner.ProcessRunner(Places(tmp_path, tmp_path), 1.0)
    run = await runner.start(Task("job-1", 9, "cpu", {"name": "m", "propagate_error": False}, False))
    (line,) = [line async for line in run.lines()]
    arguments, variables = json.loads(line)
    assert arguments == ["run", "--name=m", "--no-propagate-error", "--fencing-token=9"]
    assert variables == []
    ended = await run.wait()
    assert (ended.code, ended.first_line) == (3, "/a/model/v1")


async def test_a_guardian_that_does_not_let_go_is_killed(monkeypatch):
    monkeypatch.setattr(process_runner, "_PATIENCE_S", 0.2)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STUBBORN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run = ProcessRun(process, 0.2)
    await run.stop()
    await run.stop()
    assert (await run.wait()).code == -signal.SIGKILL


async def test_lines_of_any_length_and_bytes_of_any_kind():
    reader = asyncio.StreamReader()
    reader.feed_data(b"one\n" + b"x" * 1_000_000 + b"\n\xff\xfe\nlast")
    reader.feed_eof()
    lines = [line async for line in split_lines(reader)]
    assert [len(line) for line in lines] == [3, MAX_LINE_CHARS, 2, 4]


def take(log, now, event, **fields):
    return log.take(json.dumps({"event": event, **fields}), now)


def test_the_pace_does_not_count_what_an_earlier_run_had_done():
    log = ProgressLog(0.0)
    take(log, 10.0, "plan", blocks=10, resumed_blocks=6)
    assert (log.report.done, log.report.total) == (6, 10)
    report = take(log, 30.0, "progress", done=8, total=11, what="block 8", seconds=9.0)
    assert report.eta_s == pytest.approx(3 * 10.0)
    assert take(log, 31.0, "publishing").is_publishing
    take(log, 32.0, "published", version="awq-1")
    assert log.version == "awq-1"


def test_lines_that_are_no_events_of_ours_do_no_harm():
    log = ProgressLog(0.0)
    for line in (
        "{", "[1]", '{"event": 5}', '{"event": "progress"}',
        '{"event": "progress", "done": -5, "total": "x"}',
        '{"event": "progress", "done": true, "total": 1e99}',
        '{"event": "published", "version": "../x"}',
        '{"event": "plan", "blocks": 99999999999999999999}', "error: it broke  ", "",
    ):  # fmt: skip
        log.take(line, 1.0)
    assert log.last_words == "it broke"
    assert log.version == ""
    assert 0 <= log.report.done <= log.report.total <= 1 << 20
