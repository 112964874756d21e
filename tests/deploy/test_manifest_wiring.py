"""What the manifests name is there: flags, ports, selectors, volumes, keys, files; and times that belong
together add up.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.engine import config as engine_config
from services.gateway import config as gateway_config
from services.quantizer.config import ENV_PREFIX, QuantizerConfig
from tests.deploy.kubernetes_manifests import (
    ROOT,
    VARIANTS,
    all_containers,
    arguments,
    environment,
    examples,
    main_container,
    manifests,
    of_kind,
    one,
    pods_of,
    workloads,
)
from tests.deploy.kustomize import Object, containers_of, pod_template
from tests.deploy.running import Running
from weft.config import load_config
from weft.rpc import healthcheck
from weft.rpc.health import LIVENESS
from weft.rpc.server import STOP_GRACE_S

SLACK_S = 5


def spec_of(workload: Object) -> dict[str, Any]:
    template = pod_template(workload)
    assert template is not None
    return dict(template["spec"])


def config_of(service: str, words: list[str]) -> Any:
    """What the service makes of its command line; SystemExit where it would refuse it."""
    verb, *flags = words
    if service == "quantizer":
        assert verb == "run"
        return load_config(QuantizerConfig, flags, prog="quantizer", env_prefix=ENV_PREFIX)
    assert verb == "serve"
    return (engine_config if service == "engine" else gateway_config).load(flags)


def configs(objects: list[Object]) -> dict[str, Any]:
    names = {"quantizer": "Job", "engine": "Deployment", "gateway": "Deployment"}
    found = {}
    for name, kind in names.items():
        container = main_container(one(objects, kind, name))
        found[name] = config_of(name, arguments(objects, container))
    return found


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_every_flag_is_the_services_own_and_its_value_good(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    found = configs(objects)
    settings = one(objects, "ConfigMap", "settings")["data"]
    assert found["engine"].model == found["quantizer"].name == settings["model"]
    assert str(found["quantizer"].source) == settings["source"]
    assert found["engine"].device == found["quantizer"].device == ("cuda" if overlay == "gpu" else "cpu")
    for _, container in all_containers(objects):
        services_own = [n for n in environment(objects, container) if re.match("WEFT_[A-Z]+_", n)]
        assert not services_own, "flags say it, so that one look tells"


@pytest.mark.parametrize("flag", ["--metric=0.0.0.0:9101", "--threads=many", "--listen=0.0.0.0"])
def test_a_wrong_flag_is_seen(flag: str) -> None:
    container = main_container(one(manifests("cpu"), "Deployment", "engine"))
    with pytest.raises(SystemExit):
        config_of("engine", [*arguments(manifests("cpu"), container), flag])


def test_a_variable_that_is_not_set_is_seen() -> None:
    with pytest.raises(KeyError):
        arguments([], {"args": ["--model=$(NOTHING)"]})


def listening(service: str, config: Any) -> dict[str, int]:
    """The named ports that a service listens on."""
    if service == "engine":
        return {"grpc": config.listen.port, "metrics": config.metrics.port}
    return {"grpc": config.listen.port, "http": config.http.port}


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_ports_are_those_that_the_flags_listen_on(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    for service in ("engine", "gateway"):
        config = configs(objects)[service]
        assert config.listen.host == "0.0.0.0"
        container = main_container(one(objects, "Deployment", service))
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == listening(service, config)
        for port in one(objects, "Service", service)["spec"]["ports"]:
            assert port["targetPort"] == port["name"]
            assert port["port"] == ports[port["name"]]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]
            if "grpc" in probe:
                assert probe["grpc"]["port"] == config.listen.port
                assert config.tls_cert is None, "the kubelet's own probe speaks no TLS"
            else:
                assert f"127.0.0.1:{config.listen.port}" in probe["exec"]["command"]
                assert config.tls_cert is not None


@pytest.mark.parametrize("part", ["", "tls"])
def test_liveness_asks_for_a_process_that_answers_and_readiness_for_more(part: str) -> None:
    for service in ("engine", "gateway"):
        container = main_container(one(manifests("cpu", part), "Deployment", service))

        def asked(probe: Object) -> str:
            if "grpc" in probe:
                return str(probe["grpc"].get("service", ""))
            flags = dict(word.split("=", 1) for word in probe["exec"]["command"] if word.startswith("--"))
            return flags.get("--service", "")

        assert asked(container["livenessProbe"]) == LIVENESS
        assert asked(container["readinessProbe"]) == ""
        live, ready = container["livenessProbe"], container["readinessProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] >= 60, "load must never restart a process"
        assert ready["periodSeconds"] * ready["failureThreshold"] <= 30
        assert ready["failureThreshold"] > 1, "one late answer is no reason to let a pod be evicted"
    gateway = main_container(one(manifests("cpu", part), "Deployment", "gateway"))
    assert asked(gateway["startupProbe"]) == LIVENESS, "without an engine a gateway is not ready, but started"


def test_running_services_answer_what_the_probes_ask(running: Running) -> None:
    for service, address in (("engine", running.engine_grpc), ("gateway", running.gateway_grpc)):
        container = main_container(one(manifests("cpu"), "Deployment", service))
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[name]["grpc"].get("service", "")
            assert healthcheck.check(address, asked, 30.0) == "SERVING", (service, name)
    assert healthcheck.check(running.engine_grpc, "livenes", 30.0) == "NOT_FOUND"


def test_probes_by_hand_have_flags_that_the_probe_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(healthcheck, "check", lambda *given: seen.append(given) or "SERVING")
    container = main_container(one(manifests("cpu", "tls"), "Deployment", "gateway"))
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        python, dash, module, *words = container[name]["exec"]["command"]
        assert (python, dash, module) == ("python", "-m", "weft.rpc.healthcheck")
        assert healthcheck.main(words) == 0
        assert seen[-1][2] < container[name]["timeoutSeconds"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all(str(given[3].ca.parent) in mounts for given in seen)


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_selectors_take_the_pods_they_mean(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    for service in ("engine", "gateway"):
        workload = one(objects, "Deployment", service)
        takers = [
            workload["spec"]["selector"]["matchLabels"],
            one(objects, "Service", service)["spec"]["selector"],
        ]
        takers.append(one(objects, "PodDisruptionBudget", service)["spec"]["selector"]["matchLabels"])
        takers += [
            c["labelSelector"]["matchLabels"] for c in spec_of(workload).get("topologySpreadConstraints", [])
        ]
        for selector in takers:
            assert [each["metadata"]["name"] for each in pods_of(objects, selector)] == [service]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        scaled = one(objects, target["kind"], target["name"])
        assert target["apiVersion"] == scaled["apiVersion"]
        assert "replicas" not in scaled["spec"], "an apply would undo what the autoscaler did"


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_volumes_claims_and_settings_are_there(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    used: set[str] = set()
    for workload in workloads(objects):
        volumes = {volume["name"]: volume for volume in spec_of(workload)["volumes"]}
        used |= {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        }
        mounted = {m["name"] for c in containers_of(workload) for m in c["volumeMounts"]}
        assert mounted == set(volumes)
    assert used == claims
    secrets = {each["metadata"]["name"]: each for each in examples()["keys.yaml"]}
    for workload in workloads(objects):
        container = main_container(workload) if workload["kind"] == "Deployment" else None
        for volume in spec_of(workload)["volumes"]:
            if "secret" not in volume or volume["name"] != "keys":
                continue
            assert container is not None
            (mount,) = (m for m in container["volumeMounts"] if m["name"] == "keys")
            files = {w.split("=")[1] for w in container["args"] if f"={mount['mountPath']}/" in w}
            keys = secrets[volume["secret"]["secretName"]]["stringData"]
            assert files == {f"{mount['mountPath']}/{key}" for key in keys}


def test_everything_is_written_below_a_volume() -> None:
    """The root is read-only: where a flag names a place to write, something is mounted there."""
    objects = manifests("cpu", "sessions")
    gateway = main_container(one(objects, "Deployment", "gateway"))
    config = configs(objects)["gateway"]
    places = {mount["mountPath"]: mount for mount in gateway["volumeMounts"]}
    assert not places[str(config.sessions.parent)].get("readOnly")
    for name, kind in (("engine", "Deployment"), ("gateway", "Deployment")):
        mounts = {m["mountPath"]: m for m in main_container(one(objects, kind, name))["volumeMounts"]}
        assert mounts["/artifacts"]["readOnly"] is True
        assert not mounts["/tmp"].get("readOnly")
    quantizer = {m["mountPath"]: m for m in main_container(one(objects, "Job", "quantizer"))["volumeMounts"]}
    assert not quantizer["/artifacts"].get("readOnly")
    assert quantizer["/models"]["readOnly"] is True


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_there_is_time_to_drain(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    for service, config in configs(objects).items():
        if service == "quantizer":
            continue
        workload = one(objects, "Deployment", service)
        hook = main_container(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
        needed = hook["seconds"] + config.drain_seconds + STOP_GRACE_S + SLACK_S
        assert spec_of(workload)["terminationGracePeriodSeconds"] >= needed
    gateway = main_container(one(objects, "Deployment", "gateway"))
    assert gateway["lifecycle"]["preStop"]["sleep"]["seconds"] >= 5, "endpoints lag behind"


def test_the_gateway_finds_engines_by_the_name_of_their_service() -> None:
    objects = manifests("cpu")
    service = one(objects, "Service", "engine")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    kind, name, port = configs(objects)["gateway"].engine[0].split(":")
    assert (kind, name) == ("dns", service["metadata"]["name"])
    assert int(port) == configs(objects)["engine"].listen.port
    rolling = one(objects, "Deployment", "engine")["spec"]
    assert rolling["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    # A cached answer (30 s) and the gateway's own period.
    assert rolling["minReadySeconds"] >= 30 + configs(objects)["gateway"].engine_resolve_seconds


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_the_network_lets_through_what_is_needed_and_no_more(overlay: str, part: str) -> None:
    objects = manifests(overlay, part)
    deny = one(objects, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    found = configs(objects)
    engine = one(objects, "NetworkPolicy", "engine")["spec"]
    gateway = one(objects, "NetworkPolicy", "gateway")["spec"]
    for name, policy in (("engine", engine), ("gateway", gateway)):
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        pods = pods_of(objects, policy["podSelector"]["matchLabels"])
        assert [each["metadata"]["name"] for each in pods] == [name]
    allowed = {rule["ports"][0]["port"]: rule["from"] for rule in engine["ingress"]}
    assert set(allowed) == set(listening("engine", found["engine"]).values())
    (callers,) = allowed[found["engine"].listen.port]
    assert [e["metadata"]["name"] for e in pods_of(objects, callers["podSelector"]["matchLabels"])] == [
        "gateway"
    ]
    assert "namespaceSelector" not in callers
    assert "namespaceSelector" in allowed[found["engine"].metrics.port][0]
    assert "egress" not in engine
    (open_door,) = gateway["ingress"]
    assert {port["port"] for port in open_door["ports"]} == set(
        listening("gateway", found["gateway"]).values()
    )
    to_engine, to_dns = gateway["egress"]
    (target,) = to_engine["to"]
    assert [e["metadata"]["name"] for e in pods_of(objects, target["podSelector"]["matchLabels"])] == [
        "engine"
    ]
    assert [port["port"] for port in to_engine["ports"]] == [found["engine"].listen.port]
    assert {(port["port"], port["protocol"]) for port in to_dns["ports"]} == {(53, "UDP"), (53, "TCP")}


def test_a_gpu_is_asked_for_where_one_is_used() -> None:
    objects = manifests("gpu")
    for kind, name in (("Deployment", "engine"), ("Job", "quantizer")):
        workload = one(objects, kind, name)
        assert main_container(workload)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "--device=cuda" in main_container(workload)["args"]
        assert any(t["key"] == "nvidia.com/gpu" for t in spec_of(workload)["tolerations"])
        assert "nodeSelector" not in spec_of(workload), "the device plugin labels no node"
    for _, container in all_containers(manifests("cpu")):
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert "--device=cuda" not in container.get("args", [])


def test_the_cpu_engine_takes_what_it_asks_for() -> None:
    objects = manifests("cpu")
    asked = main_container(one(objects, "Deployment", "engine"))["resources"]
    config = configs(objects)["engine"]
    assert str(config.threads) == asked["requests"]["cpu"]
    assert asked["requests"]["memory"] == asked["limits"]["memory"]
    assert config.kv_memory < int(asked["limits"]["memory"].removesuffix("Gi")) << 30


def test_the_engine_waits_until_something_is_published(tmp_path: Path) -> None:
    (wait,) = spec_of(one(manifests("cpu"), "Deployment", "engine"))["initContainers"]
    shell, dash, script = wait["command"]
    script = script.replace("/artifacts/", f"{tmp_path}/").replace("sleep 5", "sleep 0.1")
    env = environment(manifests("cpu"), wait)
    process = subprocess.Popen([shell, dash, script], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "nothing is published as demo" in process.stdout.readline()
        (tmp_path / "demo").mkdir()
        time.sleep(0.3)
        assert process.poll() is None
        (tmp_path / "demo" / "CURRENT").write_text("v1\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_an_engine_that_waits_can_be_stopped() -> None:
    """The first process of its container: without a handler SIGTERM would do nothing for its whole grace."""
    (wait,) = spec_of(one(manifests("cpu"), "Deployment", "engine"))["initContainers"]
    shell, dash, script = wait["command"]
    script = script.replace("/artifacts/", "/nowhere/").replace("sleep 5", "sleep 0.1")
    env = environment(manifests("cpu"), wait)
    process = subprocess.Popen([shell, dash, script], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "waiting" in process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 143, "by its own handler"
    finally:
        process.kill()
        process.wait()


def test_exit_codes_that_end_the_job_are_the_quantizers() -> None:
    from services.quantizer import __main__ as quantizer

    rules = one(manifests("cpu"), "Job", "quantizer")["spec"]["podFailurePolicy"]["rules"]
    (codes,) = (rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
    assert codes["containerName"] == main_container(one(manifests("cpu"), "Job", "quantizer"))["name"]
    assert codes["values"] == [quantizer._EXIT_USAGE, quantizer._EXIT_GATE_MISSED]
    done = subprocess.run(
        [sys.executable, "-m", "services.quantizer", "run", "--no-such-flag"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode in codes["values"]


# Where Kubernetes differs from one machine, and why.
DIFFERENT = {
    # A database has one owner, and here are several gateways: components/sessions has it.
    ("gateway", "--sessions"),
    # Rolling updates are everyday here: streams get longer to end, or to move.
    ("gateway", "--drain-seconds"),
    ("engine", "--drain-seconds"),
    # A node has more cores and memory than a pod may take.
    ("engine", "--threads"),
    ("engine", "--kv-memory"),
    ("quantizer", "--threads"),
}


def test_compose_and_kubernetes_pass_the_same_flags() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    objects = manifests("cpu")
    differing = set()
    for name, kind in (("quantizer", "Job"), ("engine", "Deployment"), ("gateway", "Deployment")):
        here = set(arguments(objects, main_container(one(objects, kind, name))))
        there = {re.sub(r"\$\{WEFT_MODEL:-demo\}", "demo", word) for word in compose[name]["command"]}
        differing |= {(name, word.partition("=")[0]) for word in here ^ there}
    assert differing == DIFFERENT
    with_sessions = main_container(one(manifests("cpu", "sessions"), "Deployment", "gateway"))["args"]
    assert [w for w in with_sessions if w.startswith("--sessions")] == [
        w for w in compose["gateway"]["command"] if w.startswith("--sessions")
    ]
    assert "--device=cuda" in main_container(one(manifests("gpu"), "Deployment", "engine"))["args"]
    gpu = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))["services"]
    assert gpu["engine"]["environment"]["WEFT_ENGINE_DEVICE"].endswith("cuda}")


def test_an_engine_may_load_as_long_in_compose_as_in_kubernetes() -> None:
    """Compose starts no gateway, and `up --wait` fails, when an engine that loads counts as unhealthy."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    probe = main_container(one(manifests("cpu"), "Deployment", "engine"))["startupProbe"]
    allowed_s = int(compose["engine"]["healthcheck"]["start_period"].removesuffix("s"))
    assert allowed_s >= probe["periodSeconds"] * probe["failureThreshold"]


def test_sessions_have_one_gateway() -> None:
    objects = manifests("cpu", "sessions")
    gateway = one(objects, "Deployment", "gateway")["spec"]
    assert gateway["replicas"] == 1
    assert gateway["strategy"] == {"type": "Recreate"}
    assert [e["metadata"]["name"] for e in of_kind(objects, "HorizontalPodAutoscaler")] == ["engine"]
    assert one(objects, "PersistentVolumeClaim", "sessions")["spec"]["accessModes"] == ["ReadWriteOncePod"]
    for overlay, part in VARIANTS:
        if "sessions" not in part:
            assert configs(manifests(overlay, part))["gateway"].sessions is None, "several gateways, one file"
