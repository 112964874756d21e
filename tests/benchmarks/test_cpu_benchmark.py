"""`make bench-cpu`: the tiny model through all of it, with this engine and stand-ins for the rivals."""

import csv
import io
import json
import statistics
import sys

import numpy as np
import pytest

from benchmarks import cpu, results
from benchmarks.cpu_process import Beside, Worker, WorkerFailed
from benchmarks.cpu_report import (
    LINES,
    OWN,
    Outcome,
    judged_lines,
    ratio,
    ratios,
    result_rows,
    roofline,
    table,
)
from benchmarks.cpu_shape import QUICK, TINY, folder_name
from benchmarks.cpu_weights import prepare

STAND_IN = "tests.benchmarks.cpu_stand_in"
BANDWIDTH = {"read": 1e10, "copy": 1e10}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the tiny model's weights and reference."""
    folder = tmp_path_factory.mktemp("bench-cpu") / folder_name(TINY, QUICK)
    prepare(folder, TINY, QUICK)
    return folder


def make_bench(folder, out, kinds, runs=2):
    """This engine, and stand-ins of these kinds by the name of what they stand for."""
    names = list(dict.fromkeys([OWN, *kinds]))
    return cpu.Bench(
        TINY,
        QUICK,
        1,
        runs,
        dict.fromkeys(names, sys.executable),
        folder,
        out,
        {OWN: {"clock": "wall"}, **{name: {"kind": kind} for name, kind in kinds.items()}},
        dict.fromkeys(kinds, STAND_IN),
    )


@pytest.mark.timeout(900)
def test_the_whole_of_it_with_one_right_rival_and_one_wrong_one(prepared, tmp_path, capsys):
    # llama.cpp would have a GGUF file made.
    (prepared / "q4_0.gguf").touch()
    bench = make_bench(prepared, tmp_path, {"llama.cpp": "right", "transformers": "wrong"})
    outcomes, beside = bench.measure()
    own, right, wrong = outcomes
    assert [own.name, right.name, wrong.name] == [OWN, "llama.cpp", "transformers"]

    assert wrong.failure is not None
    assert wrong.failure.startswith("wrong logits: error decode 1")
    assert wrong.rates == {}
    assert wrong.errors["decode 4"] > 0.5
    assert wrong.errors["prefill 160"] == 0.0

    assert right.errors == dict.fromkeys(QUICK.cases, 0.0)
    # Half a second a step, two a prefill.
    assert right.rates == {"decode 1": [2.0, 2.0], "decode 4": [8.0, 8.0], "prefill 160": [80.0, 80.0]}

    assert own.failure is None
    assert set(own.errors) == set(own.rates) == set(QUICK.cases)
    # bf16 rounds, so it is not the fp32 reference; 4-bit weights are the same ones, so it is near.
    assert all(0.0005 < error < 0.03 for error in own.errors.values())
    assert all(len(rates) == 2 and min(rates) > 0 for rates in own.rates.values())
    assert own.facts["weight_bytes"] > 2 * TINY.vocab_size * TINY.hidden_size * 2
    assert own.facts["resident_bytes"] > own.facts["weight_bytes"]
    assert len(beside) == 2 * 2 * len(QUICK.cases)
    # Not all: a stand-in's turn is shorter than the tick that processor time is counted in.
    assert statistics.median(entry.idle_workers for entry in beside.values()) < 0.5

    said = capsys.readouterr().out
    assert "transformers FAILED: wrong logits" in said
    cpu.report(bench, outcomes, beside, BANDWIDTH)
    said = capsys.readouterr().out
    assert "| failed |" in said
    assert "llama.cpp: 0 MB of weights a token, at most 10000000.0 tokens/s; 2.0 are 0%" in said
    rows = result_rows(outcomes, "machine", "abc")
    assert {row[1].split()[0] for row in rows} == {OWN, "llama.cpp"}


def test_a_system_that_fails_on_the_way_loses_its_times_and_the_others_go_on(prepared, tmp_path):
    (prepared / "q4_0.gguf").touch()
    bench = make_bench(prepared, tmp_path, {OWN: "right", "llama.cpp": "failing"}, runs=1)
    own, failed = bench.measure()[0]
    assert failed.failure is not None
    assert failed.failure.startswith("llama.cpp: ValueError: no memory; see ")
    assert failed.rates == {}
    assert own.rates == {"decode 1": [2.0], "decode 4": [8.0], "prefill 160": [80.0]}


def test_a_worker_that_cannot_start_says_so_in_one_line(tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text("{}")
    worker = Worker(OWN, sys.executable, spec, tmp_path / "log")
    try:
        with pytest.raises(WorkerFailed, match=r"^weft: KeyError: 'workload'; see .*log$"):
            worker.read()
        with pytest.raises(WorkerFailed, match=r"^weft ended with 0"):
            worker.ask(do="facts")
    finally:
        worker.close()


def outcome(name, **rates):
    """Rates by case, written decode_1 for "decode 1"."""
    facts = {
        "version": "1",
        "weights": "w",
        "weight_bytes": 3 << 20,
        "token_bytes": 5e8,
        "resident_bytes": 1 << 20,
    }
    return Outcome(name, facts, {}, {case.replace("_", " "): list(values) for case, values in rates.items()})


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = ratio([10, 20, 30, 40, 100], [10, 10, 10, 20, 20])
    assert found.value == 3.0
    # Rounds: 1, 2, 3, 2, 5.
    assert (found.low, found.high) == (2.0, 3.0)


def full(own_1, own_16, prefill):
    return [
        outcome(OWN, decode_1=[own_1] * 3, decode_16=[own_16] * 3, prefill_512=[prefill] * 3),
        outcome("llama.cpp", decode_1=[40] * 3, decode_16=[80] * 3, prefill_512=[100] * 3),
        outcome("transformers", decode_1=[4] * 3, decode_16=[40] * 3, prefill_512=[100] * 3),
    ]


def test_lines_are_judged_by_their_own_figures():
    # 0.5 and 5 times, 0.8 and 1.6 times, 0.99 times.
    lines = {(line["rival"], line["case"]): line for line in judged_lines(full(20, 64, 99))}
    assert len(lines) == len(LINES) == 5
    assert lines["llama.cpp", "decode 1"]["is_accepted"]
    assert lines["llama.cpp", "decode 1"]["is_at_goal"] is False
    assert lines["llama.cpp", "decode 16"]["ratio"] == pytest.approx(0.8)
    assert lines["llama.cpp", "decode 16"]["is_accepted"]
    assert not lines["llama.cpp", "prefill 512"]["is_accepted"]
    assert lines["transformers", "decode 1"]["is_accepted"]
    assert lines["transformers", "decode 16"]["is_accepted"]
    assert lines["transformers", "decode 16"]["is_at_goal"] is None
    assert not judged_lines(full(20, 64 * 0.99, 99))[4]["is_accepted"]


def test_a_rival_that_failed_is_no_line_met_and_one_left_out_is_no_line():
    own, rival, other = full(40, 100, 200)
    rival.rates, rival.failure = {}, "gone"
    lines = judged_lines([own, rival])
    assert [line["rival"] for line in lines] == ["llama.cpp"] * 3
    assert not any(line["is_accepted"] for line in lines)
    assert lines[0]["ratio"] is None
    assert all(line["is_accepted"] for line in judged_lines([own, other]))


def test_the_table_says_what_was_missed():
    text = table(full(20, 64, 99), has_lines=True)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert rows["decode 1"].count("accepted") == 2
    assert "0.50 (0.50 to 0.50): accepted at 0.5, goal 0.8" in rows["decode 1"]
    assert "0.99 (0.99 to 0.99): **missed** at 1.0, goal 1.3" in rows["prefill 512"]
    assert "accepted" not in table(full(20, 64, 99), has_lines=False)


def test_the_share_of_the_memory_s_speed_is_computed():
    # 10 GB/s over 500 MB are 20 tokens a second.
    assert roofline([outcome(OWN, decode_1=[15, 15])], 1e10) == [
        "weft: 500 MB of weights a token, at most 20.0 tokens/s; 15.0 are 75%"
    ]


def test_rows_are_read_back_as_they_were_written(tmp_path):
    outcomes = full(20, 64, 99)
    path = tmp_path / "results.csv"
    results.append(result_rows(outcomes, "a machine, 2 threads", "abc1234"), path)
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    # Three cases: own ones once for each rival, the rivals' once.
    assert len(rows) == 3 * 2 + 3 + 3
    assert {row["machine"] for row in rows} == {"a machine, 2 threads"}
    found = ratios(outcomes)
    for row in rows:
        assert (row["benchmark"], row["unit"], row["git_sha"]) == ("cpu", "tokens/s", "abc1234")
        name, case = row["case"].split(" ", 1)
        assert float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
        if name == OWN:
            assert float(row["ratio"]) == pytest.approx(found[row["baseline"], case].value, rel=1e-3)
            quotient = float(row["median"]) / float(row["baseline_median"])
            assert float(row["ratio"]) == pytest.approx(quotient, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "prefill", "fails", "expected"),
    [
        (["--check"], 101, False, 0),
        (["--check"], 99, False, 1),
        ([], 99, False, 0),
        ([], 101, True, 1),
    ],
)
def test_the_exit_code(monkeypatch, tmp_path, flags, prefill, fails, expected):
    outcomes = full(20, 64, prefill)
    if fails:
        outcomes[0].failure, outcomes[0].rates = "wrong logits", {}

    def measure(bench):
        bench.out.mkdir(parents=True)
        return outcomes, {"1, decode 1, weft": Beside(0.0, 0.25)}

    monkeypatch.setattr(cpu.Bench, "measure", measure)
    monkeypatch.setattr(cpu, "measured_bandwidth", lambda threads, mebibytes: BANDWIDTH)
    assert cpu.main([*flags, "--rival-python", "python", "--work", str(tmp_path)]) == expected
    (stored,) = tmp_path.glob("run-*/results.json")
    kept = json.loads(stored.read_text())
    assert len(kept["lines"]) == 5
    assert kept["systems"][1]["rates"]["decode 1"] == [40, 40, 40]


def test_rivals_are_chosen_by_name(capsys):
    assert cpu.parse(["--rivals", "transformers"]).rivals == ["transformers"]
    assert cpu.parse(["--rivals", "none"]).rivals == []
    with pytest.raises(SystemExit):
        cpu.parse(["--rivals", "vllm"])
    assert "'vllm' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--quick"], ["--rivals", "none"]])
def test_a_check_of_nothing_is_refused(capsys, flags):
    with pytest.raises(SystemExit) as caught:
        cpu.parse(["--check", *flags])
    assert caught.value.code == 2
    assert "nothing to check" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_wrong():
    found = Outcome(OWN, errors={"decode 1": float("inf")})
    found.judge()
    assert found.failure is not None
    found = Outcome(OWN, errors={"decode 1": float(np.nan)})
    found.judge()
    assert found.failure is not None
    found = Outcome(OWN, errors={"decode 1": 0.02})
    found.judge()
    assert found.failure is None
