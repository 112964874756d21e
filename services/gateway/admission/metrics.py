"""Metrics of the door and of the queue, read off counters when somebody asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from services.gateway.gateway import Gateway


def admission_metrics(gateway: Gateway) -> Iterable[Metric]:
    """Refusals by reason, queue lengths, tokens by key."""
    refused = CounterMetricFamily(
        "weft_gateway_requests_refused", "Requests refused at admission.", labels=["reason"]
    )
    for reason, count in gateway.admission.refused.items():
        refused.add_metric([reason], count)
    yield refused
    dispatcher = gateway.dispatcher
    queued = GaugeMetricFamily(
        "weft_gateway_queue_length",
        "Requests that wait for room on an engine.",
        labels=["model", "priority"],
    )
    lengths: Counter[tuple[str, str]] = Counter()
    for model, priority, num_requests in dispatcher.waiting():
        lengths[model, priority] += num_requests
    for labels, num_requests in lengths.items():
        queued.add_metric(labels, num_requests)
    yield queued
    yield CounterMetricFamily(
        "weft_gateway_requests_queued", "Requests that had to wait.", value=dispatcher.num_queued_ever
    )
    yield CounterMetricFamily(
        "weft_gateway_queue_expired",
        "Requests whose deadline came while they waited.",
        value=dispatcher.num_expired,
    )
    tokens = CounterMetricFamily(
        "weft_gateway_key_tokens", "Tokens of requests that have ended, by key.", labels=["key", "kind"]
    )
    for name, used in gateway.usage.items():
        tokens.add_metric([name, "prompt"], used.prompt)
        tokens.add_metric([name, "completion"], used.completion)
    yield tokens


def dashboard_metrics(gateway: Gateway) -> Iterable[Metric]:
    """What waits here, under the name by which dashboards add up what waits on engines: a request is here or
    there. All other `vllm:` names are the engines' alone, or sums over both would count twice.
    """
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting", "Requests that wait for room on an engine.", labels=["model_name"]
    )
    lengths: Counter[str] = Counter()
    for model, _, num_requests in gateway.dispatcher.waiting():
        lengths[model] += num_requests
    for model, num_requests in lengths.items():
        waiting.add_metric([model], num_requests)
    yield waiting
