"""The reader of PromQL reads what it should and refuses the rest."""

from __future__ import annotations

import pytest

from tests.deploy.promql import PromqlError, names_in


def test_metrics_matchers_and_groupings() -> None:
    named = names_in(
        'histogram_quantile(0.99, sum by (le, model) (rate(a:b_bucket{x=~"$y",z!="a{b}"}[$__interval]))) '
        "> ignoring (reason) group_left 1.5e3 * max(c) or vector(0)"
    )
    assert named.metrics == [("a:b_bucket", {"x": "$y", "z": "a{b}"}), ("c", {})]
    assert named.labels == {"le", "model", "reason"}


def test_an_aggregate_with_its_grouping_behind_it() -> None:
    named = names_in("sum(up) by (instance) unless on (instance) process_open_fds")
    assert named.metrics == [("up", {}), ("process_open_fds", {})]
    assert named.labels == {"instance"}


@pytest.mark.parametrize(
    "text", ["sum(a", "a{b}", "a{b=1}", "rat(a[5m])", '{x="y"}', "a ? b", "sum by a (b)", "(a}"]
)
def test_what_it_cannot_read_is_refused(text: str) -> None:
    with pytest.raises(PromqlError):
        names_in(text)
