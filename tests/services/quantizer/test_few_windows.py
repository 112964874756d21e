"""What is tried where there is little to judge by."""

import json

import pytest

from services.quantizer.config import QuantizerConfig
from services.quantizer.job import run
from services.quantizer.statistics import is_held_out


@pytest.mark.parametrize(("num_windows", "held"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (9, [3, 7])])
def test_all_windows_but_a_lone_one_are_judged_on_others(num_windows, held):
    assert [index for index in range(num_windows) if is_held_out(index, num_windows)] == held


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({"samples": 1}, {"rounding", "search"}),
        ({"samples": 2}, {"rounding", "search", "gptq", "gptaq"}),
        ({"samples": 2, "propagate_error": False}, {"rounding", "search", "gptq"}),
        ({"samples": 1, "method": "gptq"}, {"rounding", "gptq"}),
    ],
)
def test_methods_are_those_that_can_be_judged(make_checkpoint, tmp_path, changes, tried):
    source = make_checkpoint(num_hidden_layers=1)
    values = {"sequence_length": 16, "evaluation_tokens": 0, "group_size": 32, "threads": 1, **changes}
    artifact = run(QuantizerConfig(source=source, artifacts=tmp_path / "a", name="tiny", **values))
    linears = json.loads((artifact.path / "report.json").read_text())["linears"]
    assert linears
    assert all(set(linear["held_out"]) == tried for linear in linears.values())
