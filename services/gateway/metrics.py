"""Prometheus metrics of the gateway, read off its counters when somebody asks. Nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.gateway import Gateway

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class GatewayMetrics(Collector):
    """One registry per gateway, so that several can live in one process."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.first_token_s = Histogram(
            "weft_gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.request_s = Histogram(
            "weft_gateway_request_seconds",
            "Time from a request's arrival to its end.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        gateway.observe_first_token = self.first_token_s.observe
        gateway.observe_request = self.request_s.observe

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        gateway = self._gateway
        yield CounterMetricFamily(
            "weft_gateway_requests_begun", "Requests begun.", value=gateway.counters.begun
        )
        ended = CounterMetricFamily(
            "weft_gateway_requests_ended", "Requests ended, by status.", labels=["code"]
        )
        for code, count in gateway.counters.by_code.items():
            ended.add_metric([code], count)
        yield ended
        yield GaugeMetricFamily("weft_gateway_requests_live", "Requests in flight.", value=gateway.num_live)
        yield GaugeMetricFamily(
            "weft_gateway_requests_waiting",
            "Requests without a first token.",
            value=gateway.admission.num_waiting,
        )
        yield CounterMetricFamily(
            "weft_gateway_requests_refused",
            "Requests refused at admission.",
            value=gateway.admission.num_refused,
        )
        yield CounterMetricFamily(
            "weft_gateway_replays", "Attempts to start a sample again.", value=gateway.router.num_replays
        )
        yield from self._links()

    def _links(self) -> Iterable[Metric]:
        links = self._gateway.router.links
        up = GaugeMetricFamily("weft_gateway_engine_up", "Whether the link stands.", labels=["engine"])
        slots = GaugeMetricFamily("weft_gateway_engine_slots", "Slots in use.", labels=["engine"])
        for link in links:
            up.add_metric([link.target], float(link.is_up))
            slots.add_metric([link.target], link.num_live)
        yield up
        yield slots
        for name in (name for name, _ in links[0].counters.items()) if links else ():
            family = CounterMetricFamily(
                f"weft_gateway_link_{name}", f"Link counter: {name.replace('_', ' ')}.", labels=["engine"]
            )
            for link in links:
                family.add_metric([link.target], getattr(link.counters, name))
            yield family
