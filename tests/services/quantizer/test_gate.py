"""The gate: what misses it is not published, says so with status 3, and keeps its report."""

import json
import os

import pytest

from services.quantizer.__main__ import main
from services.quantizer.config import QuantizerConfig
from services.quantizer.gate import misses
from services.quantizer.quantize import BlockQuantizer
from services.quantizer.rejection import keep_rejected, remove_rejected
from weft.artifact.store import ArtifactStore

QUALITY = {
    "source": {"perplexity": 40.0},
    "rounding": {"perplexity": 42.0, "mean_kl": 0.03},
    "chosen": {"perplexity": 40.4, "mean_kl": 0.02},
}


def config(tmp_path, **changes):
    return QuantizerConfig(source=tmp_path, artifacts=tmp_path, name="x", **changes)


@pytest.mark.parametrize(
    ("bounds", "missed"),
    [
        ({}, []),
        ({"max_perplexity_increase": 0.0101, "max_kl": 0.02}, []),
        ({"max_perplexity_increase": 0.0099}, ["--max-perplexity-increase"]),
        ({"max_kl": 0.0199}, ["--max-kl"]),
        ({"max_perplexity_increase": 0.0, "max_kl": 0.0}, ["--max-perplexity-increase", "--max-kl"]),
    ],
)
def test_each_bound_is_held_against_its_figure(tmp_path, bounds, missed):
    assert [miss.flag for miss in misses(config(tmp_path, **bounds), QUALITY)] == missed


def test_what_is_no_number_or_was_not_measured_keeps_no_bound(tmp_path):
    bounds = config(tmp_path, max_perplexity_increase=0.5, max_kl=0.5)
    nothing = {**QUALITY, "chosen": {"perplexity": float("nan"), "mean_kl": float("nan")}}
    assert len(misses(bounds, nothing)) == len(misses(bounds, None)) == 2


@pytest.fixture
def attempt(make_checkpoint, tmp_path, capfd):
    """attempt(*flags) -> (status, last line of stderr, stdout) of runs on one checkpoint and volume."""
    source = make_checkpoint(num_hidden_layers=1)
    base = ["run", "--source", str(source), "--artifacts", str(tmp_path / "a"), "--name", "tiny"]
    quick = ["--samples", "2", "--sequence-length", "64", "--evaluation-tokens", "512"]

    def run(*flags):
        try:
            status = main([*base, *quick, "--group-size", "32", "--threads", "1", *flags])
        except SystemExit as exit:
            status = exit.code
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if line]
        return status, lines[-1] if lines else "", captured.out

    return run


def test_a_run_that_misses_publishes_nothing_and_keeps_its_report(attempt, tmp_path, monkeypatch):
    model = tmp_path / "a" / "tiny"
    status, line, out = attempt("--max-perplexity-increase", "1000%", "--max-kl", "1e-6")
    assert (status, out) == (3, "")
    (version,) = os.listdir(model / "rejected")
    report = model / "rejected" / version / "report.html"
    kl = json.loads(report.with_suffix(".json").read_text())["quality"]["chosen"]["mean_kl"]
    assert line == f"error: mean KL is {kl:.5g} nats, 1e-06 is allowed (--max-kl); the report: {report}"
    assert sorted(os.listdir(report.parent)) == ["report.html", "report.json"]
    assert not (model / "CURRENT").exists()
    assert ArtifactStore(tmp_path / "a").models() == []
    rejected = json.loads(report.with_suffix(".json").read_text())
    assert rejected["missed"] == [f"mean KL is {kl:.5g} nats, 1e-06 is allowed (--max-kl)"]
    assert "Not published: mean KL is" in report.read_text()
    # The finished blocks are kept: nothing is computed again for wider bounds.
    assert [name for name in os.listdir(model) if name.startswith(".work-")]
    monkeypatch.setattr(BlockQuantizer, "run", None)

    # Wider bounds publish the very version that was refused, and its report is no longer kept apart.
    status, _, out = attempt("--max-perplexity-increase", "1000%", "--max-kl", "10")
    assert (status, out.splitlines()[0]) == (0, str(model / version))
    assert not (model / "rejected").exists()
    assert json.loads((model / version / "report.json").read_text())["missed"] == []

    # What is up to date is judged again, and stays published.
    status, line, out = attempt("--max-kl", "1e-6")
    assert (status, out) == (3, "")
    assert line.endswith(str(model / version / "report.html"))
    assert ArtifactStore(tmp_path / "a").current("tiny") == version
    assert attempt()[0] == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--max-kl", "-1"), "--max-kl: -1.0 is negative"),
        (("--max-kl", "nan"), "--max-kl: 'nan' is not finite"),
        (
            ("--max-perplexity-increase", "1"),
            "--max-perplexity-increase: '1': write 1% or a fraction below 1",
        ),
        (("--max-perplexity-increase=-1%",), "--max-perplexity-increase: -0.01 is negative"),
        (("--max-perplexity-increase", "%"), "--max-perplexity-increase: '' is no number"),
        (("--evaluation-tokens", "0", "--max-kl", "1"), "--max-kl: there is nothing to judge by"),
        (("--evaluation-tokens", "0", "--max-perplexity-increase", "1%"), "--max-perplexity-increase: there"),
    ],
)
def test_bounds_that_mean_nothing_are_wrong_usage(attempt, flags, named):
    status, line, _ = attempt(*flags)
    assert status == 2
    assert line.startswith(f"python -m services.quantizer run: {named}")


def test_a_report_that_was_kept_before_is_replaced(tmp_path):
    keep_rejected(tmp_path, "awq-1", {"report.html": b"old", "report.json": b"{}"})
    where = keep_rejected(tmp_path, "awq-1", {"report.html": b"new"})
    assert os.listdir(where) == ["report.html"]
    assert (where / "report.html").read_bytes() == b"new"
    keep_rejected(tmp_path, "awq-2", {})
    remove_rejected(tmp_path, "awq-1")
    assert os.listdir(tmp_path / "rejected") == ["awq-2"]
