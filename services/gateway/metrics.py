"""Prometheus metrics of the gateway, read off its counters when somebody asks. Nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.admission.metrics import admission_metrics, dashboard_metrics
from services.gateway.gateway import Gateway
from services.gateway.routing.metrics import routing_metrics
from services.gateway.sessions.sessions import Sessions
from weft.process_metrics import add_process_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_PACE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class GatewayMetrics(Collector):
    """One registry per gateway, so that several can live in one process."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.registry = CollectorRegistry()
        self.registry.register(self)
        add_process_metrics(self.registry, "gateway")
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
        self.queue_s = Histogram(
            "weft_gateway_queue_seconds",
            "Time in the queue of those that had to wait for room on an engine.",
            ["priority"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pace_s = Histogram(
            "weft_gateway_time_per_output_token_seconds",
            "Time from a request's first token to its end, for each token after the first.",
            buckets=_PACE_S,
            registry=self.registry,
        )
        self.lag_s = Histogram(
            "weft_gateway_loop_lag_seconds",
            "How late the event loop came to what was due, four times a second.",
            buckets=_LAG_S,
            registry=self.registry,
        )
        gateway.dispatcher.observe_wait = lambda name, seconds: self.queue_s.labels(name).observe(seconds)
        gateway.observe_first_token = self.first_token_s.observe
        gateway.observe_request = self.request_s.observe
        gateway.observe_pace = self.pace_s.observe

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
            "weft_gateway_coalesced",
            "Times that a stream's tokens were held, to be sent with those that came after.",
            value=gateway.pacer.num_held,
        )
        yield from _session_metrics(gateway.sessions)
        retention = gateway.attendance.retention
        yield GaugeMetricFamily(
            "weft_gateway_requests_kept",
            "Requests kept for clients that may come back.",
            value=len(retention),
        )
        yield GaugeMetricFamily(
            "weft_gateway_kept_bytes", "About the memory that those take.", value=retention.num_bytes
        )
        resumes = CounterMetricFamily(
            "weft_gateway_resumes", "Calls that took a request up again, by how.", labels=["how"]
        )
        for how, count in gateway.counters.resumes.items():
            resumes.add_metric([how], count)
        yield resumes
        yield from admission_metrics(gateway)
        yield from dashboard_metrics(gateway)
        yield from routing_metrics(gateway.router)


def _session_metrics(sessions: Sessions) -> Iterable[Metric]:
    num_sessions, num_tokens = sessions.store.counts
    yield GaugeMetricFamily("weft_gateway_sessions", "Sessions that are kept.", value=num_sessions)
    yield GaugeMetricFamily("weft_gateway_session_tokens", "Their tokens.", value=num_tokens)
    yield GaugeMetricFamily(
        "weft_gateway_session_turns_live", "Their turns in flight.", value=sessions.num_live
    )
