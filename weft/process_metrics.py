"""What Prometheus is told of a process, whatever it does: memory, processor, files, and which build it is.

For the services that serve metrics (engine, gateway); knows neither.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from weft import __version__


def add_process_metrics(registry: CollectorRegistry, service: str) -> None:
    """Register `process_*`, read from /proc at each scrape (nothing where there is none), and
    `weft_build_info{service,version}`, which is 1.
    """
    ProcessCollector(registry=registry)
    text = "Which build runs; the value is always 1."
    info = Gauge("weft_build_info", text, ["service", "version"], registry=registry)
    info.labels(service, __version__).set(1)
