"""What dashboards see: Prometheus metrics under the names that dashboards for vLLM know, and our own beside
them.

Counters and gauges are read off the loop's newest snapshot when somebody scrapes; only the histograms cost
a step anything. Knows the loop's reports; knows no call and no tensors.
"""

from __future__ import annotations

import bisect
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from services.engine.core.events import StepReport
from services.engine.core.sequence import FinishReason
from weft.rpc.address import Address
from weft.rpc.interceptor import RpcCounters

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
E2E_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0,
)  # fmt: skip

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "deadline",
    FinishReason.ERROR: "error",
}


class Histogram:
    """Counts by bucket. Takes many equal values at once, which the library's own does not: one by one, the
    gaps of 64 tokens cost more than all else that a step costs the host.

    One thread writes; a reader may see a value before it is in the sum.
    """

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value `count` times. A bucket holds its upper bound."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, model_name: str) -> HistogramMetricFamily:
        """The histogram as it stands."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(self._counts), strict=True))
        family.add_metric([model_name], buckets, self._sum)
        return family


class EngineMetrics(Collector):
    """The metrics of one engine. `observe` runs on the engine's thread, `collect` on the scraper's."""

    def __init__(
        self,
        registry: CollectorRegistry,
        load: Callable[[], StepReport],
        *,
        model_name: str,
        block_size: int,
        num_blocks: int,
        rpcs: RpcCounters | None = None,
    ) -> None:
        self._load = load
        self._rpcs = rpcs or RpcCounters()
        self._model_name = model_name
        self._block_size, self._num_blocks = block_size, num_blocks
        self._ends: Counter[FinishReason] = Counter()
        self._ttft = Histogram("vllm:time_to_first_token_seconds", "Submit to first token.", TTFT_BUCKETS)
        self._itl = Histogram(
            "vllm:inter_token_latency_seconds", "Gap between two tokens of a sequence.", ITL_BUCKETS
        )
        self._e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "Submit to the end of a sequence.", E2E_BUCKETS
        )
        registry.register(self)

    def observe(self, report: StepReport) -> None:
        """Take in one step."""
        # Sequences that ran in the same two steps have the same gap.
        gaps = Counter(report.tokens.itls_s)
        for itl_s, count in gaps.items():
            if itl_s is not None:
                self._itl.observe(itl_s, count)
        for ttft_s in report.tokens.ttfts_s.values():
            self._ttft.observe(ttft_s)
        for end in report.finished:
            self._ends[end.reason] += 1
            self._e2e.observe(end.total_s)

    def collect(self) -> Iterable[Metric]:
        """Everything, as of now."""
        report = self._load()
        for histogram in (self._ttft, self._itl, self._e2e):
            yield histogram.family(self._model_name)
        yield from self._gauges(report)
        yield from self._counters(report)

    def _gauges(self, report: StepReport) -> Iterable[Metric]:
        blocks = report.blocks
        usage = blocks.active / self._num_blocks if self._num_blocks else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the batch.", report.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", report.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV blocks that sequences own, 0 to 1.", usage),
            ("weft:num_requests_paused", "Sequences paused by their gateway.", report.num_paused),
            (
                "weft:peak_batch_size",
                "Largest number of sequences in one step.",
                report.counters.peak_batch_size,
            ),
        ):
            yield self._family(GaugeMetricFamily, name, text, {(): value})
        yield self._family(
            GaugeMetricFamily,
            "weft:blocks",
            "KV blocks by state; they add up to the number of blocks.",
            {("free",): blocks.free, ("active",): blocks.active, ("cached",): blocks.cached},
            "state",
        )
        yield self._family(
            GaugeMetricFamily,
            "vllm:cache_config_info",
            "How the KV cache is cut; the value is always 1.",
            {(str(self._block_size), str(self._num_blocks)): 1},
            "block_size",
            "num_gpu_blocks",
        )

    def _counters(self, report: StepReport) -> Iterable[Metric]:
        counters = report.counters
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", counters.cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", counters.cache_hits),
            ("vllm:num_preemptions", "Sequences that lost their blocks.", counters.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens of admitted sequences.", counters.prompt_tokens),
            ("vllm:generation_tokens", "Tokens drawn.", counters.generation_tokens),
            ("weft:requests_begun", "Sequences admitted.", counters.begun),
            ("weft:requests_ended", "Sequences ended, whatever the reason.", counters.ended),
            ("weft:steps", "Steps run.", counters.steps),
            ("weft:rpcs_begun", "Calls begun, links included.", self._rpcs.begun),
            ("weft:rpcs_ended", "Calls ended, whatever the status.", self._rpcs.ended),
        ):
            yield self._family(CounterMetricFamily, name, text, {(): value})
        ends = {(label,): self._ends[reason] for reason, label in _REASONS.items()}
        yield self._family(
            CounterMetricFamily,
            "vllm:request_success",
            "Sequences ended, by reason.",
            ends,
            "finished_reason",
        )

    def _family(
        self, kind: Any, name: str, text: str, values: dict[tuple[str, ...], float], *labels: str
    ) -> Metric:
        family = kind(name, text, labels=["model_name", *labels])
        for label_values, value in values.items():
            family.add_metric([self._model_name, *label_values], value)
        return family  # type: ignore[no-any-return]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each scrape, which ends with the process."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, and ask no name server how this machine is called, as the library does: it may be far."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.setup_environ()


class _Server6(_Server):
    """The same on an IPv6 address."""

    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    """Logs nothing. Lets nobody wait for ever: a thread would be left for each who does."""

    timeout = 30.0

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _plain_text(registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    """The page as text 0.0.4, whatever the scraper would rather have. In OpenMetrics, which Prometheus asks
    for first, the library writes the colons of names as underscores, and no dashboard knows them any more.
    """
    page = make_wsgi_app(registry)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ.pop("HTTP_ACCEPT", None)
        answer: Iterable[bytes] = page(environ, start_response)
        return answer

    return serve


class MetricsServer:
    """Serves a registry over HTTP from a thread of its own. Raises OSError when the address is taken."""

    def __init__(self, registry: CollectorRegistry, address: Address) -> None:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        self._server = make_server(
            address.host,
            address.port,
            _plain_text(registry),
            server_class=_Server6 if family == socket.AF_INET6 else _Server,
            handler_class=_Handler,
        )
        self.address = address._replace(port=self._server.server_port)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        """Stop serving."""
        stopper = threading.Thread(target=self._server.shutdown, daemon=True)
        stopper.start()
        stopper.join(2.0)
        self._server.server_close()
