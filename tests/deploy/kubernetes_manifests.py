"""The manifests of deploy/kubernetes, rendered: each overlay alone and with each component."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path

import yaml

from tests.deploy.kustomize import Object, containers_of, pod_template, read_all, render

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
COMPONENTS = ("keys", "one-node", "sessions", "tls")
EVERYTHING = "+".join(COMPONENTS)
VARIANTS = [*(("cpu", part) for part in ("", *COMPONENTS, EVERYTHING)), ("gpu", ""), ("gpu", EVERYTHING)]
ENTRY = {"quantizer": "services.quantizer", "engine": "services.engine", "gateway": "services.gateway"}


def kustomization(overlay: str, part: str) -> str:
    """The kustomization of an overlay with components, as somebody would write it beside the checkout."""
    parts = [f"{FOLDER}/components/{name}" for name in part.split("+") if name]
    return yaml.safe_dump(
        {"kind": "Kustomization", "resources": [f"{FOLDER}/overlays/{overlay}"], "components": parts}
    )


@functools.cache
def _rendered(overlay: str, part: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kustomization.yaml").write_text(kustomization(overlay, part), encoding="utf-8")
        return json.dumps(render(Path(folder)))


def manifests(overlay: str, part: str = "") -> list[Object]:
    """Every object of a variant: new ones each time, to be changed at will."""
    return list(json.loads(_rendered(overlay, part)))


def examples() -> dict[str, list[Object]]:
    """The Kubernetes objects among the examples, by file."""
    files = {path.name: read_all(path) for path in sorted((FOLDER / "examples").glob("*.yaml"))}
    return {name: found for name, found in files.items() if all("kind" in each for each in found)}


def one(objects: list[Object], kind: str, name: str) -> Object:
    """The object of a kind and name."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """All objects of a kind."""
    return [each for each in objects if each["kind"] == kind]


def workloads(objects: list[Object]) -> list[Object]:
    """What has pods."""
    return [each for each in objects if pod_template(each) is not None]


def main_container(workload: Object) -> Object:
    """The one container that is no init container."""
    (container,) = pod_template(workload)["spec"]["containers"]  # type: ignore[index]
    return dict(container)


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """A container's variables, those from ConfigMaps looked up."""
    found: dict[str, str] = {}
    for variable in container.get("env", []):
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["configMapKeyRef"]
            found[variable["name"]] = one(objects, "ConfigMap", reference["name"])["data"][reference["key"]]
    return found


def arguments(objects: list[Object], container: Object) -> list[str]:
    """A container's args with $(NAME) replaced as the kubelet does; KeyError for a name that is not set."""
    variables = environment(objects, container)
    return [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], word) for word in container["args"]]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether labels have all that a selector asks for."""
    return selector.items() <= labels.items()


def pods_of(objects: list[Object], selector: dict[str, str]) -> list[Object]:
    """The workloads whose pods a selector takes."""
    return [
        each
        for each in workloads(objects)
        if selects(selector, pod_template(each)["metadata"]["labels"])  # type: ignore[index]
    ]


def all_containers(objects: list[Object]) -> list[tuple[Object, Object]]:
    """(workload, container) of everything."""
    return [(each, container) for each in workloads(objects) for container in containers_of(each)]
