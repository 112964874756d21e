"""The autoscalers' metrics are exported, and reach the API under the names that the autoscalers use."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from services.gateway.config import GatewayConfig
from tests.deploy.kubernetes_manifests import (
    FOLDER,
    arguments,
    examples,
    main_container,
    manifests,
    of_kind,
    one,
)
from tests.deploy.observed import OBSERVE, known_series, problems
from tests.deploy.running import Families
from tests.deploy.test_manifest_wiring import config_of

Rule = dict[str, Any]
# What a scrape in Kubernetes adds (examples/prometheus-scrape.yaml).
ADDED = {"namespace", "pod"}


@pytest.fixture(scope="module")
def adapter() -> dict[str, list[Rule]]:
    (config,) = examples()["prometheus-adapter.yaml"]
    loaded = yaml.safe_load(config["data"]["config.yaml"])
    assert set(loaded) == {"rules", "externalRules"}
    return dict(loaded)


def name_of(rule: Rule) -> str:
    """The metric's name in the API: what `as` says, else the series' own."""
    series = str(rule["seriesQuery"]).partition("{")[0]
    return str(rule.get("name", {}).get("as", series))


def query_of(rule: Rule, group: str) -> str:
    """A rule's query as the adapter sends it."""
    series = str(rule["seriesQuery"]).partition("{")[0]
    query = str(rule["metricsQuery"]).replace("<<.Series>>", series)
    return query.replace("<<.LabelMatchers>>", 'namespace="weft"').replace("<<.GroupBy>>", group)


def test_the_rules_name_what_is_exported(
    adapter: dict[str, list[Rule]], exported: dict[str, Families]
) -> None:
    known = {name: labels | ADDED for name, labels in known_series(exported).items()}
    for kind, group in (("rules", "pod"), ("externalRules", "namespace")):
        for rule in adapter[kind]:
            assert not problems(query_of(rule, group), known)
            assert not problems(rule["seriesQuery"], known)
            assert ":" not in name_of(rule)
            assert {"namespace"} <= set(rule["resources"]["overrides"]) <= ADDED


def test_every_metric_of_an_autoscaler_has_a_rule(adapter: dict[str, list[Rule]]) -> None:
    served = {
        "Pods": {name_of(rule) for rule in adapter["rules"] if "pod" in rule["resources"]["overrides"]},
        "External": {name_of(rule) for rule in adapter["externalRules"]},
    }
    asked: dict[str, set[str]] = {"Pods": set(), "External": set()}
    for scaler in of_kind(manifests("cpu"), "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] == "Resource":
                assert metric["resource"]["name"] == "cpu"
            else:
                asked[metric["type"]].add(metric[metric["type"].lower()]["metric"]["name"])
    assert asked == served


def targets(name: str) -> dict[str, float]:
    found = {}
    for metric in one(manifests("cpu"), "HorizontalPodAutoscaler", name)["spec"]["metrics"]:
        body = metric[metric["type"].lower()]
        if "metric" in body:
            found[body["metric"]["name"]] = float(body["target"]["averageValue"])
    return found


def test_targets_are_below_what_one_pod_takes() -> None:
    """An autoscaler that aims at the bound, or above it, would never act before requests are refused."""
    objects = manifests("cpu")
    engine = config_of("engine", arguments(objects, main_container(one(objects, "Deployment", "engine"))))
    assert 0 < targets("engine")["weft_requests_running"] < engine.max_batch_size
    gateway = config_of("gateway", arguments(objects, main_container(one(objects, "Deployment", "gateway"))))
    assert isinstance(gateway, GatewayConfig)
    assert 0 < targets("gateway")["weft_gateway_requests_live"] < gateway.max_live_requests
    assert 0 < targets("gateway")["weft_gateway_requests_waiting"] < gateway.max_waiting_requests


def test_the_scrape_adds_the_labels_that_the_rules_need() -> None:
    loaded = yaml.safe_load((FOLDER / "examples" / "prometheus-scrape.yaml").read_text(encoding="utf-8"))
    objects = manifests("cpu")
    compose = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    jobs = [job["job_name"] for job in loaded["scrape_configs"]]
    assert jobs == [job["job_name"] for job in compose], "alerts name them"
    for job in loaded["scrape_configs"]:
        rules = job["relabel_configs"]
        assert {rule["target_label"] for rule in rules if "target_label" in rule} == ADDED
        kept = {rule["source_labels"][0]: rule["regex"] for rule in rules if rule.get("action") == "keep"}
        name = kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"]
        container = main_container(one(objects, "Deployment", name))
        ports = {port["name"] for port in container["ports"]}
        assert kept["__meta_kubernetes_pod_container_port_name"] in ports
        (discovery,) = job["kubernetes_sd_configs"]
        assert discovery["namespaces"]["names"] == [of_kind(objects, "Namespace")[0]["metadata"]["name"]]
