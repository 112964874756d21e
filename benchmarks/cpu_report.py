"""Figures of the comparison on a CPU: ratios of medians, the lines to be met, the table, rows of results.csv.

Knows numbers and names; runs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OWN = "weft"
MAX_ERROR = 0.05
"""Logits further than this from the reference (relative norm of the difference, worst row) are wrong."""


@dataclass(frozen=True)
class Line:
    """What a ratio of this engine to a rival should come to."""

    rival: str
    case: str
    accept: float
    goal: float | None


LINES = (
    Line("llama.cpp", "decode 1", 0.5, 0.8),
    Line("llama.cpp", "decode 16", 0.7, 1.2),
    Line("llama.cpp", "prefill 512", 1.0, 1.3),
    Line("transformers", "decode 1", 4.0, None),
    Line("transformers", "decode 16", 1.6, None),
)


@dataclass
class Outcome:
    """One system: what it said of itself, its errors by case, its tokens per second by case and run.
    `failure` is why it has no times.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    def judge(self) -> None:
        """Wrong logits, or none at all, are a failure."""
        wrong = {case: error for case, error in self.errors.items() if not error <= MAX_ERROR}
        if wrong:
            told = ", ".join(f"{case} {error:.3g}" for case, error in wrong.items())
            self.failure = f"wrong logits: error {told} (at most {MAX_ERROR})"


def quantile(values: Sequence[float], share: float) -> float:
    """The value at this share of the sorted ones, nearest rank."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


@dataclass(frozen=True)
class Ratio:
    """Own median over a rival's; `low` and `high` are p20 and p80 of the rounds' own ratios."""

    value: float
    low: float
    high: float


def ratio(own: Sequence[float], rival: Sequence[float]) -> Ratio:
    """Of rates by round."""
    rounds = [a / b for a, b in zip(own, rival, strict=True)]
    value = statistics.median(own) / statistics.median(rival)
    return Ratio(value, quantile(rounds, 0.2), quantile(rounds, 0.8))


def ratios(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Ratio]:
    """By rival and case, where both sides were timed."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    own = by_name[OWN].rates
    return {
        (name, case): ratio(own[case], rates)
        for name, outcome in by_name.items()
        if name != OWN
        for case, rates in outcome.rates.items()
        if case in own
    }


def judged_lines(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each line whose rival took part: what was found, and whether that is accepted and at the goal. A system
    that failed accepts nothing.
    """
    found, rivals = ratios(outcomes), {outcome.name for outcome in outcomes}
    judged = []
    for line in LINES:
        if line.rival not in rivals:
            continue
        value = found.get((line.rival, line.case))
        judged.append(
            {
                "rival": line.rival,
                "case": line.case,
                "ratio": None if value is None else value.value,
                "accept": line.accept,
                "goal": line.goal,
                "is_accepted": value is not None and value.value >= line.accept,
                "is_at_goal": None if line.goal is None else value is not None and value.value >= line.goal,
            }
        )
    return judged


def table(outcomes: Sequence[Outcome], *, has_lines: bool) -> str:
    """Markdown: a row for each case, a column for each system and for each ratio; the lines to be met beside
    it where they apply.
    """
    found = ratios(outcomes)
    rivals = [outcome for outcome in outcomes if outcome.name != OWN]
    cases = list(dict.fromkeys(case for outcome in outcomes for case in outcome.rates))
    lines = {(line.rival, line.case): line for line in LINES if has_lines}
    heads = [
        "tokens/s",
        *(outcome.name for outcome in outcomes),
        *(f"{OWN} / {rival.name}" for rival in rivals),
    ]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in cases:
        cells = [case, *(_rate_cell(outcome, case) for outcome in outcomes)]
        for key in ((rival.name, case) for rival in rivals):
            cells += [_ratio_cell(found.get(key), lines.get(key))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _rate_cell(outcome: Outcome, case: str) -> str:
    if outcome.failure is not None:
        return "failed"
    rates = outcome.rates[case]
    return f"{statistics.median(rates):.3g} ({quantile(rates, 0.2):.3g} to {quantile(rates, 0.8):.3g})"


def _ratio_cell(found: Ratio | None, line: Line | None) -> str:
    if found is None:
        return "failed" if line else ""
    text = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    if line is None:
        return text
    goal = "" if line.goal is None else f", goal {line.goal}{' reached' if found.value >= line.goal else ''}"
    verdict = "accepted" if found.value >= line.accept else "**missed**"
    return f"{text}: {verdict} at {line.accept}{goal}"


def roofline(outcomes: Sequence[Outcome], read_bytes_per_s: float) -> list[str]:
    """What share of the memory's speed decoding one sequence reaches: weights read for each token, the cache
    left out.
    """
    lines = []
    for outcome in outcomes:
        rates = outcome.rates.get("decode 1")
        if rates is None:
            continue
        size = outcome.facts["token_bytes"]
        bound = read_bytes_per_s / size
        rate = statistics.median(rates)
        lines.append(
            f"{outcome.name}: {size / 1e6:.0f} MB of weights a token, at most {bound:.1f} tokens/s; "
            f"{rate:.1f} are {rate / bound:.0%}"
        )
    return lines


def result_rows(outcomes: Sequence[Outcome], machine: str, sha: str) -> list[tuple[object, ...]]:
    """Rows of results.csv: each system's rates; the own ones once for each rival, with the ratio."""
    found, rows = ratios(outcomes), []
    for outcome in outcomes:
        for case, rates in outcome.rates.items():
            median = statistics.median(rates)
            figures = [f"{value:.5g}" for value in (median, quantile(rates, 0.2), quantile(rates, 0.8))]
            against: list[tuple[object, object, object]] = [("", "", "")]
            if outcome.name == OWN:
                against = [
                    (rival, f"{median / value.value:.5g}", f"{value.value:.4g}")
                    for (rival, compared), value in found.items()
                    if compared == case
                ] or against
            rows += [
                ("cpu", f"{outcome.name} {case}", "tokens/s", *figures, *baseline, machine, sha)
                for baseline in against
            ]
    return rows
