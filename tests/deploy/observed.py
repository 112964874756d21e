"""What there is to be named in an expression, and what an expression names that there is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.deploy.promql import names_in
from tests.deploy.running import Families

ROOT = Path(__file__).resolve().parents[2]
OBSERVE = ROOT / "deploy" / "observe"
# What Prometheus puts on everything it scrapes.
SCRAPED = {"instance", "job"}
Known = dict[str, set[str]]


def rules() -> list[dict[str, Any]]:
    """Every recording rule and alert."""
    files = sorted((OBSERVE / "rules").glob("*.yml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def known_series(exported: dict[str, Families]) -> Known:
    """Every series by name, with its labels: what services export, `up`, and what rules record."""
    known: Known = {"up": set(SCRAPED)}
    for families in exported.values():
        for name, (kind, labels, _) in families.items():
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            for suffix in suffixes:
                le = {"le"} if suffix == "_bucket" else set()
                known.setdefault(name + suffix, set()).update(labels | SCRAPED | le)
    for rule in rules():
        if "record" in rule:
            known[rule["record"]] = names_in(rule["expr"]).labels - {"le"}
    return known


def problems(expression: str, known: Known) -> list[str]:
    """Metrics and labels that an expression names and that are not there. Raises PromqlError."""
    named = names_in(expression)
    found, all_labels = [], set()
    for name, matchers in named.metrics:
        if name not in known:
            found.append(f"no metric {name}")
            continue
        all_labels |= known[name]
        found += [f"{name} has no label {label}" for label in matchers.keys() - known[name]]
    found += [f"no label {label}" for label in named.labels - all_labels]
    return found if named.metrics else [*found, "names no metric"]


def labels_of(expression: str, known: Known) -> set[str]:
    """Labels that what comes of an expression may have: what it groups by, else those of its metrics."""
    named = names_in(expression)
    if named.labels - {"le"}:
        return named.labels
    return set().union(*(known.get(name, set()) for name, _ in named.metrics))
