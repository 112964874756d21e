"""The profile observe: what Prometheus scrapes is there, every expression of rules and dashboard names what
the services really export, and the dashboard is one that Grafana takes.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import yaml

from tests.deploy.observed import OBSERVE, ROOT, known_series, labels_of, problems, rules
from tests.deploy.running import Families

DASHBOARD = json.loads((OBSERVE / "dashboards" / "weft.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
UNITS = {"s", "bytes", "percentunit", "short", "none", "reqps"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def known(exported: dict[str, Families]) -> dict[str, set[str]]:
    return known_series(exported)


# Compose


def test_prometheus_scrapes_where_services_listen(compose: dict[str, Any]) -> None:
    settings = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))
    flags = {"engine": "--metrics", "gateway": "--http"}
    assert {job["job_name"] for job in settings["scrape_configs"]} == set(flags)
    networks = set(compose["services"]["prometheus"]["networks"])
    for job in settings["scrape_configs"]:
        (source,) = job["dns_sd_configs"]
        (service,) = source["names"]
        assert service == job["job_name"]
        assert source["type"] == "A"
        assert f"{flags[service]}=0.0.0.0:{source['port']}" in compose["services"][service]["command"]
        assert networks & set(compose["services"][service]["networks"])
    assert list(OBSERVE.glob(settings["rule_files"][0]))


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_they_run_with_little_power(compose: dict[str, Any], service: str) -> None:
    settings = compose["services"][service]
    assert settings["profiles"] == ["observe"]
    assert settings["read_only"] is True
    assert settings["init"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["healthcheck"]["test"][0] == "CMD"
    assert settings["mem_limit"]
    (port,) = settings["ports"]
    assert port.startswith("127.0.0.1:")
    name, _, tag = settings["image"].partition(":")
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), "one release"
    assert "." not in name, "no registry's host"
    for volume in settings["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert volume.endswith(":ro")
        else:
            assert source in compose["volumes"]
            assert target in ("/prometheus", "/var/lib/grafana")


def test_what_is_mounted_is_what_is_named(compose: dict[str, Any]) -> None:
    services = compose["services"]
    mounts = {
        v.split(":")[1]: v.split(":")[0] for s in ("prometheus", "grafana") for v in services[s]["volumes"]
    }
    (flag,) = (word for word in services["prometheus"]["command"] if word.startswith("--config.file="))
    assert mounts[flag.partition("=")[2]] == "./deploy/observe/prometheus.yml"
    assert mounts["/etc/weft/rules"] == "./deploy/observe/rules", "beside the file that names rules/*.yml"
    (provider,) = yaml.safe_load((OBSERVE / "grafana/dashboards/weft.yml").read_text())["providers"]
    assert mounts[provider["options"]["path"]] == "./deploy/observe/dashboards"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/weft.json"
    (source,) = yaml.safe_load((OBSERVE / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "--web.listen-address=0.0.0.0:9090" in services["prometheus"]["command"]
    assert set(services["grafana"]["networks"]) & set(services["prometheus"]["networks"])
    assert VARIABLES["datasource"]["current"]["value"] == source["uid"]


# Rules


def test_every_rule_names_what_is_exported(known: dict[str, set[str]]) -> None:
    assert len(rules()) > 20
    for rule in rules():
        assert not problems(rule["expr"], known), rule


@pytest.mark.parametrize(
    "expression",
    [
        "rate(weft_gateway_replay_total[5m])",
        "sum by (engine) (vllm:num_requests_running)",
        'vllm:num_requests_running{modelname="demo"}',
        "weft_gateway_time_to_first_token_seconds",
        "vector(1)",
    ],
)
def test_a_name_that_nobody_exports_is_seen(expression: str, known: dict[str, set[str]]) -> None:
    assert problems(expression, known)


def test_alerts_say_how_bad_and_about_what(known: dict[str, set[str]]) -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    names = [rule["alert"] for rule in alerts] + [rule["record"] for rule in rules() if "record" in rule]
    assert len(names) == len(set(names))
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "warn")
        summary = rule["annotations"]["summary"]
        named = set(re.findall(r"\$labels\.(\w+)", summary))
        assert named <= labels_of(rule["expr"], known), rule["alert"]
        assert summary.count("{{") == summary.count("}}")
    text = " ".join(rule["expr"] for rule in rules())
    for metric in (
        "engine_up",
        "breaker_state",
        "replays",
        "preemptions",
        "refused",
        "kv_cache_usage",
        "lag",
    ):
        assert metric in text
    assert len({rule["labels"]["severity"] for rule in alerts}) == 2


# Dashboard


def filled(expression: str) -> str:
    """An expression as Grafana sends it."""
    expression = expression.replace("$__rate_interval", "30s")
    return re.sub(r"\$(\w+)", lambda match: dict.fromkeys(VARIABLES, ".*")[match[1]], expression)


def expressions() -> list[tuple[str, str, str]]:
    return [(p["title"], t["expr"], t["legendFormat"]) for p in PANELS for t in p["targets"]]


def test_every_panel_names_what_is_exported(known: dict[str, set[str]]) -> None:
    assert len(PANELS) > 25
    for title, expression, legend in expressions():
        assert not problems(filled(expression), known), title
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels_of(filled(expression), known), title
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match, name
            assert not problems(filled(match[1]), known)
            assert match[2] in labels_of(filled(match[1]), known)


def test_panels_show_what_operators_ask_for() -> None:
    text = " ".join(expression for _, expression, _ in expressions())
    for metric in (
        "time_to_first_token", "inter_token_latency", "num_requests_running", "num_requests_waiting",
        "kv_cache_usage", "prefix_cache_hits", "num_preemptions", "requests_refused", "routing_events",
        "resumes", "sessions", "coalesced", "key_tokens", "process_resident_memory", "process_cpu",
        "loop_lag",
    ):  # fmt: skip
        assert metric in text, metric


def test_panels_are_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles))
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        if panel["fieldConfig"]["defaults"]["unit"] == "s":
            assert all("seconds" in target["expr"] for target in panel["targets"])


def test_panels_do_not_lie_over_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_variables_choose_models_engines_and_gateways() -> None:
    assert list(VARIABLES) == ["datasource", "model", "engine", "gateway"]
    used = {name for _, expression, _ in expressions() for name in re.findall(r"\$([a-z]+)", expression)}
    assert used == {"model", "engine", "gateway"}
    for name in used:
        assert VARIABLES[name]["multi"] is True
        assert VARIABLES[name]["includeAll"] is True
    assert DASHBOARD["uid"] == "weft"
    assert DASHBOARD["schemaVersion"] >= 36
