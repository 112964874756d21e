"""Prometheus itself reads the configuration, judges the rules, and finds data for every panel (slow)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observed import OBSERVE, rules
from tests.deploy.prometheus_programs import fetched, program
from tests.deploy.running import Running, use
from tests.deploy.test_observe import expressions, filled

WAIT_S = 90.0


@pytest.fixture
def promtool() -> str:
    found = program("promtool")
    if found is None:
        pytest.skip("promtool is not installed (the slow tests fetch it where they can)")
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["check", "config", OBSERVE / "prometheus.yml"],
        ["check", "rules", OBSERVE / "rules" / "alerts.yml", OBSERVE / "rules" / "recording.yml"],
        ["test", "rules", Path(__file__).with_name("alert_tests.yml")],
    ],
    ids=["config", "rules", "alerts"],
)
def test_promtool_takes_it(promtool: str, words: list[Any]) -> None:
    done = subprocess.run([promtool, *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_of_the_tests_is_one() -> None:
    text = yaml.safe_load(Path(__file__).with_name("alert_tests.yml").read_text(encoding="utf-8"))
    tested = {check["alertname"] for case in text["tests"] for check in case["alert_rule_test"]}
    assert len(tested) >= 10
    assert tested <= {rule["alert"] for rule in rules() if "alert" in rule}


class Prometheus:
    """A real one, asked over HTTP."""

    def __init__(self, command: str, folder: Path, targets: dict[str, str]) -> None:
        settings = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))
        settings["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        for job in settings["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        settings["rule_files"] = [str(OBSERVE / "rules" / "*.yml")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [command, *flags, f"--web.listen-address={self._address}"], stdout=self._log, stderr=self._log
        )

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; a refused query raises."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[Any]:
        """What an expression is now."""
        return list(self.get("query", query=expression)["result"])

    def stop(self) -> None:
        """End it."""
        os.kill(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@pytest.fixture
def prometheus(running: Running, tmp_path: Path) -> Iterator[Prometheus]:
    command = fetched("prometheus")
    if command is None:
        pytest.skip("Prometheus cannot be had here")
    targets = {"engine": running.engine_metrics, "gateway": running.gateway_http}
    server = Prometheus(command, tmp_path, targets)
    yield server
    server.stop()


def until(is_so: Callable[[], Any], what: object) -> None:
    """Wait until something is so, for it may take a scrape or two."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            if is_so():
                return
        except urllib.error.URLError:
            pass
        assert time.monotonic() < end, str(what)
        time.sleep(0.5)


@pytest.mark.slow
def test_every_panel_has_data_in_a_real_prometheus(prometheus: Prometheus, running: Running) -> None:
    until(lambda: len(prometheus.values("up == 1")) == 2, "both are scraped")
    empty = [(title, filled(expression)) for title, expression, _ in expressions()]

    def all_have_data() -> bool:
        use(running, 12)
        # Grafana's shortest range is four scrapes. A query that Prometheus refuses raises.
        empty[:] = [each for each in empty if not prometheus.values(each[1])]
        return not empty

    until(all_have_data, empty)
    values = [
        prometheus.values(filled(expression)) for title, expression, _ in expressions() if title == "Tokens/s"
    ]
    assert float(values[0][0]["value"][1]) > 0
    groups = prometheus.get("rules")["groups"]
    assert sum(len(group["rules"]) for group in groups) == len(rules())
    until(
        lambda: all(r["health"] == "ok" for g in prometheus.get("rules")["groups"] for r in g["rules"]),
        "rules",
    )
    for rule in rules():
        if "record" in rule:
            until(lambda name=rule["record"]: prometheus.values(name), rule["record"])
    firing = {
        each["labels"]["alertname"]
        for each in prometheus.get("alerts")["alerts"]
        if each["state"] == "firing"
    }
    assert not firing & {"WeftNoEngine", "WeftTargetDown", "WeftStepHangs", "WeftStreamsLost"}


@pytest.mark.slow
def test_a_killed_engine_is_told(tmp_path: Path) -> None:
    from tests.deploy.running import started

    command = fetched("prometheus")
    if command is None:
        pytest.skip("Prometheus cannot be had here")
    with started() as services:
        targets = {"engine": services.engine_metrics, "gateway": services.gateway_http}
        server = Prometheus(command, tmp_path, targets)
        try:
            until(lambda: len(server.values("up == 1")) == 2, "both are scraped")
            services.engine.kill()

            def told() -> set[str]:
                return {each["labels"]["alertname"] for each in server.get("alerts")["alerts"]}

            until(
                lambda: {"WeftNoEngine", "WeftEngineLost", "WeftTargetDown"} <= told(), "alerts are pending"
            )
        finally:
            server.stop()
