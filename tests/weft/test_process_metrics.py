"""Memory and processor of this process, as /metrics of a service says them."""

from __future__ import annotations

import os
import sys

import pytest
from prometheus_client import CollectorRegistry

from weft import __version__
from weft.process_metrics import add_process_metrics


def test_two_registries_of_one_process_say_the_same_build() -> None:
    for service in ("engine", "gateway"):
        registry = CollectorRegistry()
        add_process_metrics(registry, service)
        assert registry.get_sample_value("weft_build_info", {"service": service, "version": __version__}) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_memory_and_processor_are_this_processes() -> None:
    registry = CollectorRegistry()
    add_process_metrics(registry, "engine")
    resident = registry.get_sample_value("process_resident_memory_bytes")
    assert resident is not None
    assert 5e6 < resident < 64e9
    used = registry.get_sample_value("process_cpu_seconds_total")
    assert used is not None
    assert used <= sum(os.times()[:2]) + 1
