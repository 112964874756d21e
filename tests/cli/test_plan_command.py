"""`weft plan` prints the figures of weft.memory, and refuses what it cannot compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.__main__ import app

runner = CliRunner()


def plan_json(*args: str) -> dict[str, object]:
    result = runner.invoke(app, ["plan", "--json", *args])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def test_both_tables_and_the_roofline() -> None:
    tables = json.loads(runner.invoke(app, ["plan", "--json"]).stdout)
    figures = {(r["model"], r["weight_bits"]): (r["weight_gb"], r["kv_gib"]) for r in tables["memory"]}
    assert figures == {
        ("llama-7b", 16): (14, [8, 32, 128]),
        ("llama-7b", 4): (3.5, [4, 16, 64]),
        ("llama-70b", 16): (140, [5, 20, 80]),
        ("llama-70b", 4): (35, [2.5, 10, 40]),
    }
    rows = {r["device"]: r["rows_16_bits"] for r in tables["roofline"]}
    assert 128 <= rows["a100-80"] <= 156
    assert {"h100", "h200"} <= rows.keys()


def test_tables_are_readable_in_eighty_columns() -> None:
    text = runner.invoke(app, ["plan"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("as quoted", "140", "2.578", "3.889", "153"):
        assert figure in text
    assert "…" not in text


def test_a_block_of_the_7b() -> None:
    answer = plan_json("--model", "llama-7b")
    assert answer["block_bytes"] == 64 * 2**20
    assert answer["kv_bytes_per_sequence"] == 2**30


def test_every_flag_reaches_the_formula() -> None:
    base = plan_json("--model", "llama-7b")
    for args, field in (
        (("--weight-bits", "16"), "weight_bytes"),
        (("--group-size", "32"), "weight_bytes"),
        (("--kv-dtype", "int8"), "kv_bytes_per_token"),
        (("--block-size", "16"), "block_bytes"),
        (("--batch", "3"), "kv_bytes_per_batch"),
        (("--context", "4096"), "kv_bytes_per_sequence"),
        (("--device", "h200"), "compute_bound_rows"),
        (("--device-memory", "24GiB"), "num_blocks"),
        (("--memory-fraction", "0.5"), "num_blocks"),
    ):
        assert plan_json("--model", "llama-7b", *args)[field] != base[field], args


def test_a_config_of_ones_own(demo_model: Path) -> None:
    answer = plan_json("--config", str(demo_model / "config.json"), "--device-memory", "1 GiB")
    assert answer["kv_bytes_per_token"] == 2 * 6 * 2 * 64 * 2
    assert answer["device_memory"] == 2**30
    assert "demo on a100-80" in runner.invoke(app, ["plan", "--config", str(demo_model)]).stdout


@pytest.mark.parametrize(
    "args",
    [
        ("--model", "llama-8t"),
        ("--device", "abacus"),
        ("--kv-dtype", "int2"),
        ("--block-size", "100"),
        ("--weight-bits", "5"),
        ("--model", "llama-7b", "--device-memory", "lots"),
        ("--model", "llama-7b", "--config", "x"),
        ("--batch", "0"),
    ],
)
def test_a_wrong_option_is_a_usage_error(args: tuple[str, ...]) -> None:
    assert runner.invoke(app, ["plan", *args]).exit_code == 2


@pytest.mark.parametrize("text", [None, "{", '{"hidden_size": 0}'])
def test_a_config_that_cannot_be_read_is_one_line(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    result = runner.invoke(app, ["plan", "--config", str(path)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("weft: ")
