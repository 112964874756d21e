"""docs/metrics.md lists every metric that the services export, with its type and labels, and none besides."""

from __future__ import annotations

import re

import pytest

from tests.deploy.observed import ROOT
from tests.deploy.running import Families, Running

Row = tuple[str, str, frozenset[str]]
_ROW = re.compile(r"^\| `([a-z0-9_:]+)` \| (\w+) \|([\w, ]*)\| (.+) \|$", re.M)


def rows_of(text: str) -> dict[str, list[Row]]:
    """By section: (name, type, labels) of each row."""
    found: dict[str, list[Row]] = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        rows = [(name, kind, labels, says) for name, kind, labels, says in _ROW.findall(body)]
        assert len(rows) == body.count("\n| `"), f"a row of {title} cannot be read"
        found[title] = [
            (name, kind, frozenset(word.strip() for word in labels.split(",") if word.strip()))
            for name, kind, labels, _ in rows
        ]
    return found


@pytest.fixture(scope="module")
def page() -> dict[str, list[Row]]:
    return rows_of((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("service", ["engine", "gateway"])
def test_the_page_lists_what_is_exported(
    service: str, page: dict[str, list[Row]], exported: dict[str, Families]
) -> None:
    listed = [*page[service.capitalize()], *page["Both"]]
    real = {(name, kind, frozenset(labels)) for name, (kind, labels, _) in exported[service].items()}
    assert len(listed) == len(set(listed))
    assert set(listed) - real == set(), "on the page, but not like that in /metrics"
    assert real - set(listed) == set(), "in /metrics, but not like that on the page"


def test_a_row_that_is_no_metric_is_seen(exported: dict[str, Families]) -> None:
    text = "# M\n\n## Engine\n\n| metric | type | labels | says |\n| `vllm:x` | gauge | a, b | it |\n"
    ((row,),) = rows_of(text).values()
    assert row == ("vllm:x", "gauge", frozenset({"a", "b"}))
    assert row[0] not in exported["engine"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("weft_gateway_routing_events_total", "event"),
        ("weft_gateway_engine_choices_total", "by"),
        ("weft_gateway_requests_refused_total", "reason"),
        ("vllm:request_success_total", "finished_reason"),
        ("weft:blocks", "state"),
        ("weft_gateway_key_tokens_total", "kind"),
    ],
)
def test_a_labels_values_on_the_page_are_the_real_ones(name: str, label: str, running: Running) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}`"))
    listed = set(re.findall(r"`(\w+)`", line.split("|")[4]))
    real = set(re.findall(rf'^{name}{{.*\b{label}="(\w+)"', "\n".join(running.scrape().values()), re.M))
    assert listed == real
