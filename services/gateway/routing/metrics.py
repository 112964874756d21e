"""Metrics of links and routing, read off their counters when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.gateway.links.breaker import BreakerState
from services.gateway.links.engine_client import EngineLink
from services.gateway.routing.router import Router

_STATES = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 1.0, BreakerState.OPEN: 2.0}


def routing_metrics(router: Router) -> Iterable[Metric]:
    """Every metric of the router and its links. For the event loop's thread."""
    now = asyncio.get_running_loop().time()
    yield CounterMetricFamily(
        "weft_gateway_replays", "Samples that were started again.", value=router.num_replays
    )
    events = CounterMetricFamily(
        "weft_gateway_routing_events", "What happened to samples on their way to engines.", labels=["event"]
    )
    for name, count in router.counters.items():
        events.add_metric([name], count)
    yield events
    choices = CounterMetricFamily(
        "weft_gateway_engine_choices", "Choices between several engines, by what decided.", labels=["by"]
    )
    for name, count in router.choice.counters.items():
        choices.add_metric([name], count)
    yield choices
    yield GaugeMetricFamily(
        "weft_gateway_samples_without_engine",
        "Samples that wait for an engine.",
        value=len(router.failover.waiting),
    )
    yield GaugeMetricFamily(
        "weft_gateway_retry_budget", "Samples that may be started again now.", value=router.budget.tokens(now)
    )
    yield from _links(router.links, now)


def _links(links: Iterable[EngineLink], now: float) -> Iterable[Metric]:
    links = list(links)
    gauges: dict[tuple[str, str], Callable[[EngineLink], float]] = {
        ("up", "Whether the link stands."): lambda link: link.is_up,
        ("usable", "Whether the engine takes samples."): lambda link: link.is_usable,
        ("slots", "Slots in use."): lambda link: link.num_live,
        ("sequences", "Sequences there, those of other gateways included."): lambda link: (
            link.load.num_sequences(link.num_live)
        ),
        ("prefill_tokens_per_second", "The pace of prefill; 0 while unknown."): lambda link: (
            link.load.tokens_per_second
        ),
        ("breaker_state", "0 closed, 1 half open, 2 open."): lambda link: _STATES[link.breaker.state(now)],
    }
    for (name, text), value in gauges.items():
        gauge = GaugeMetricFamily(f"weft_gateway_engine_{name}", text, labels=["engine"])
        for link in links:
            gauge.add_metric([link.target], float(value(link)))
        yield gauge
    opened = CounterMetricFamily(
        "weft_gateway_engine_breaker_opened", "How often the breaker opened.", labels=["engine"]
    )
    for link in links:
        opened.add_metric([link.target], link.breaker.num_opened)
    yield opened
    for name in (name for name, _ in links[0].counters.items()) if links else ():
        family = CounterMetricFamily(
            f"weft_gateway_link_{name}", f"Link counter: {name.replace('_', ' ')}.", labels=["engine"]
        )
        for link in links:
            family.add_metric([link.target], getattr(link.counters, name))
        yield family
