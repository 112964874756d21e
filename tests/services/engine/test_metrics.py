"""The metrics page: names and labels that dashboards know, values that follow the reports."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from services.engine.core.block_manager import BlockCounts
from services.engine.core.events import Counters, FinishedEvent, StepReport, TokenEvent, Tokens
from services.engine.core.sequence import FinishReason
from services.engine.metrics import TTFT_BUCKETS, EngineMetrics, MetricsServer
from weft.rpc.address import Address


def token(ttft_s: float | None, itl_s: float | None) -> TokenEvent:
    return TokenEvent(None, 1, 0, None, (), ttft_s, itl_s)


def finished(reason: FinishReason) -> FinishedEvent:
    return FinishedEvent(None, reason, 5, 3, 0, 0.1, 0.2, 1.2, 0)


REPORT = StepReport(
    step=9,
    tokens=Tokens.of(
        [token(1.9, None), token(None, 0.03), token(None, 0.05), token(None, 0.03), token(None, 0.05001)]
    ),
    finished=[finished(FinishReason.STOP), finished(FinishReason.LENGTH), finished(FinishReason.CANCELLED)],
    num_running=3,
    num_waiting=2,
    num_paused=1,
    blocks=BlockCounts(free=50, active=20, cached=10),
    counters=Counters(
        begun=8, ended=3, steps=9, preemptions=4, cache_queries=100, cache_hits=64, prompt_tokens=40,
        generation_tokens=17, peak_batch_size=5,
    ),
)  # fmt: skip


@pytest.fixture
def page() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, lambda: REPORT, model_name="demo", block_size=16, num_blocks=80)
    metrics.observe(REPORT)
    server = MetricsServer(registry, Address("127.0.0.1", 0))
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics") as response:
            text = response.read().decode()
    finally:
        server.stop()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "demo"
            samples[sample.name, frozenset(labels.items())] = sample.value
    return samples


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("vllm:num_requests_running", {}, 3),
        ("vllm:num_requests_waiting", {}, 2),
        ("vllm:kv_cache_usage_perc", {}, 0.25),
        ("vllm:cache_config_info", {"block_size": "16", "num_gpu_blocks": "80"}, 1),
        ("vllm:prefix_cache_queries_total", {}, 100),
        ("vllm:prefix_cache_hits_total", {}, 64),
        ("vllm:num_preemptions_total", {}, 4),
        ("vllm:prompt_tokens_total", {}, 40),
        ("vllm:generation_tokens_total", {}, 17),
        ("vllm:request_success_total", {"finished_reason": "stop"}, 1),
        ("vllm:request_success_total", {"finished_reason": "length"}, 1),
        ("vllm:request_success_total", {"finished_reason": "abort"}, 1),
        ("vllm:request_success_total", {"finished_reason": "error"}, 0),
        ("vllm:time_to_first_token_seconds_count", {}, 1),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "1.0"}, 0),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "2.0"}, 1),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "+Inf"}, 1),
        ("vllm:inter_token_latency_seconds_count", {}, 4),
        ("vllm:inter_token_latency_seconds_sum", {}, pytest.approx(0.16001)),
        ("vllm:inter_token_latency_seconds_bucket", {"le": "0.025"}, 0),
        ("vllm:inter_token_latency_seconds_bucket", {"le": "0.05"}, 3),
        ("vllm:inter_token_latency_seconds_bucket", {"le": "0.075"}, 4),
        ("vllm:e2e_request_latency_seconds_sum", {}, pytest.approx(3.6)),
        ("weft:blocks", {"state": "free"}, 50),
        ("weft:blocks", {"state": "active"}, 20),
        ("weft:blocks", {"state": "cached"}, 10),
        ("weft:requests_begun_total", {}, 8),
        ("weft:requests_ended_total", {}, 3),
        ("weft:num_requests_paused", {}, 1),
        ("weft:steps_total", {}, 9),
        ("weft:peak_batch_size", {}, 5),
        ("weft:rpcs_begun_total", {}, 0),
        ("weft:rpcs_ended_total", {}, 0),
    ],
)
def test_the_page(page, name, labels, value):
    assert page[name, frozenset(labels.items())] == value


def test_two_seconds_is_a_bucket():
    assert 2.0 in TTFT_BUCKETS
    assert sorted(TTFT_BUCKETS) == list(TTFT_BUCKETS)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=1.0.0,text/plain;q=0.5,*/*;q=0.1", "text/plain", None]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_names_keep_their_colons_whatever_the_scraper_would_rather_have(host, accept):
    """Prometheus asks for OpenMetrics first, in which the library writes vllm_ for vllm:."""
    registry = CollectorRegistry()
    EngineMetrics(registry, lambda: REPORT, model_name="demo", block_size=16, num_blocks=80)
    try:
        server = MetricsServer(registry, Address(host, 0))
    except OSError:
        pytest.skip(f"no {host} here")
    try:
        headers = {} if accept is None else {"Accept": accept}
        request = urllib.request.Request(f"http://{server.address}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = response.read().decode()
    finally:
        server.stop()
    assert "\nvllm:generation_tokens_total{" in text
    assert "vllm_" not in text


def test_a_taken_address_is_refused():
    registry = CollectorRegistry()
    server = MetricsServer(registry, Address("127.0.0.1", 0))
    try:
        with pytest.raises(OSError):
            MetricsServer(CollectorRegistry(), server.address)
    finally:
        server.stop()
