"""The quality gate: what the evaluation measured, held against what the user allows.

Standard library only: an artifact that is up to date is judged again, without torch. The bounds are no part
of the recipe, for they decide whether there is an artifact and not what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import GateMissed
from weft.artifact.store import Artifact


@dataclass(frozen=True, slots=True)
class Miss:
    """One figure above its bound.

    Attributes:
        flag: of the bound.
        found, bound: as fractions, or in nats.
        text: both, for people.
    """

    flag: str
    found: float
    bound: float
    text: str


def misses(config: QuantizerConfig, quality: dict[str, Any] | None) -> list[Miss]:
    """Every bound of `config` that `quality` (the manifest's section) does not keep. What was not measured
    and what is not a number keeps no bound.
    """
    found = []
    if config.max_perplexity_increase is not None:
        increase, bound = perplexity_increase(quality), config.max_perplexity_increase
        if not increase <= bound:
            text = f"perplexity rises by {_percent(increase)}, {_percent(bound)} is allowed"
            found.append(Miss("--max-perplexity-increase", increase, bound, text))
    if config.max_kl is not None:
        kl = float("nan") if quality is None else float(quality["chosen"]["mean_kl"])
        if not kl <= config.max_kl:
            text = f"mean KL is {kl:.5g} nats, {config.max_kl:.5g} is allowed"
            found.append(Miss("--max-kl", kl, config.max_kl, text))
    return found


def perplexity_increase(quality: dict[str, Any] | None) -> float:
    """Of what is stored over the source, as a fraction; NaN when it was not measured."""
    if quality is None:
        return float("nan")
    return float(quality["chosen"]["perplexity"]) / float(quality["source"]["perplexity"]) - 1


def explain(missed: list[Miss], where: object) -> str:
    """One line: every figure with its bound and flag, and where the report lies."""
    return "; ".join(f"{miss.text} ({miss.flag})" for miss in missed) + f"; the report: {where}"


def require(config: QuantizerConfig, artifact: Artifact) -> None:
    """Judge a published artifact again. Raises GateMissed; the artifact stays as it is."""
    missed = misses(config, artifact.manifest.quality)
    if missed:
        raise GateMissed(explain(missed, artifact.path / "report.html"))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
