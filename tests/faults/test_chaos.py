"""A short chaos run: the schedule, the clients and the checker together, on a crowded engine or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.chaos.__main__ import main
from tools.chaos.faults import KILL, RESET, STOP, TERMINATE
from tools.chaos.plans import Plan, run_mock
from tools.chaos.workload import Mix


async def test_a_short_run_loses_nothing(tmp_path: Path) -> None:
    """Blocks are so few that one engine alone has to preempt."""
    kinds = (KILL, STOP, RESET, TERMINATE)
    mix = Mix(output_lengths=(20, 120), slow=0.05)
    plan = Plan(seed=7, seconds=5.0, num_streams=16, num_blocks=128, kinds=kinds, mix=mix)
    report = await run_mock(plan, tmp_path)
    text = "\n".join(report.lines())
    assert report.problems == [], text
    assert report.schedule is not None
    assert report.schedule.trace, text
    assert report.num_tokens > 1000, text
    assert report.num_replays + report.num_moves > 0, text


@pytest.mark.slow
def test_chaos_over_mock_and_real_engines() -> None:
    assert main(["--seconds", "30", "--seed", "3"]) == 0
