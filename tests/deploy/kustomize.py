"""What `kubectl kustomize` makes of a folder, for the part of it that deploy/kubernetes uses.

All else is refused. Where kubectl is installed a test holds the two against each other.
Strategic merges know the lists that pods have: what merges by a key, and by which; every other list is
replaced.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "labels", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
Object = dict[str, Any]


class KustomizeError(Exception):
    """The folder asks for something that is not there, or that this renderer does not know."""


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization, in the order of its resources."""
    return _build(folder, [])


def read_all(path: Path) -> list[Object]:
    """Every document of a YAML file."""
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


def _build(folder: Path, objects: list[Object]) -> list[Object]:
    path = folder / "kustomization.yaml"
    if not path.is_file():
        raise KustomizeError(f"{path}: is not there")
    (settings,) = read_all(path)
    if unknown := settings.keys() - KNOWN:
        raise KustomizeError(f"{path}: unknown: {', '.join(sorted(unknown))}")
    objects = list(objects)
    for name in settings.get("resources", []):
        objects += _build(folder / name, []) if (folder / name).is_dir() else _read(folder / name)
    for name in settings.get("components", []):
        objects = _build(folder / name, objects)
    for patch in settings.get("patches", []):
        objects = _patched(objects, folder, patch)
    for rule in settings.get("images", []):
        _set_tag(objects, rule)
    for rule in settings.get("labels", []):
        _label(objects, rule)
    if (namespace := settings.get("namespace")) is not None:
        for each in objects:
            if each["kind"] not in CLUSTER_WIDE:
                each["metadata"]["namespace"] = namespace
    return objects


def _read(path: Path) -> list[Object]:
    if not path.is_file():
        raise KustomizeError(f"{path}: is not there")
    return read_all(path)


def _patched(objects: list[Object], folder: Path, patch: Object) -> list[Object]:
    if unknown := patch.keys() - {"path", "patch", "target"}:
        raise KustomizeError(f"patch: unknown: {', '.join(sorted(unknown))}")
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
    body = yaml.safe_load(text)
    target = patch.get("target") or {"kind": body["kind"], "name": body["metadata"]["name"]}
    if unknown := target.keys() - {"kind", "name"}:
        raise KustomizeError(f"target: unknown: {', '.join(sorted(unknown))}")
    found = [each for each in objects if _is_meant(each, target)]
    if not found:
        raise KustomizeError(f"no object is {target}")
    if isinstance(body, dict) and body.get("$patch") == "delete":
        return [each for each in objects if not _is_meant(each, target)]
    for each in found:
        if isinstance(body, list):
            _apply_json_patch(each, body)
        else:
            merged = {key: value for key, value in body.items() if key not in ("apiVersion", "kind")}
            merged["metadata"] = {k: v for k, v in body.get("metadata", {}).items() if k != "name"}
            _merge(each, merged)
    return objects


def _is_meant(each: Object, target: Object) -> bool:
    return each["kind"] == target["kind"] and target.get("name") in (None, each["metadata"]["name"])


def _apply_json_patch(each: Object, operations: list[Object]) -> None:
    for operation in operations:
        *way, last = operation["path"].lstrip("/").split("/")
        place: Any = each
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place[step]
        value = copy.deepcopy(operation["value"])
        if operation["op"] == "add" and last == "-":
            place.append(value)
        elif operation["op"] == "replace" and isinstance(place, dict) and last in place:
            place[last] = value
        else:
            raise KustomizeError(f"{operation['op']} {operation['path']}: not known here")


def _merge(into: Object, patch: Object) -> None:
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, list) and key in MERGE_KEYS and key in into:
            _merge_list(into[key], value, MERGE_KEYS[key])
        else:
            into[key] = copy.deepcopy(value)


def _merge_list(into: list[Object], patch: list[Object], key: str) -> None:
    """What the patch names comes first, in its order: as kustomize does it."""
    first: list[Object] = []
    for item in patch:
        same = [each for each in into if each[key] == item[key]]
        if same:
            _merge(same[0], item)
        first.append(same[0] if same else copy.deepcopy(item))
    named = {item[key] for item in patch}
    into[:] = first + [each for each in into if each[key] not in named]


def pod_template(each: Object) -> Object | None:
    """The pod template of an object, a pod itself, or None."""
    if each["kind"] == "Pod":
        return each
    found: Object | None = each.get("spec", {}).get("template") if each["kind"] != "ConfigMap" else None
    return found


def containers_of(each: Object) -> list[Object]:
    """Init containers and containers of an object's pods."""
    template = pod_template(each)
    if template is None:
        return []
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def _set_tag(objects: list[Object], rule: Object) -> None:
    if unknown := rule.keys() - {"name", "newTag"}:
        raise KustomizeError(f"images: unknown: {', '.join(sorted(unknown))}")
    for each in objects:
        for container in containers_of(each):
            if container["image"].partition(":")[0] == rule["name"]:
                container["image"] = f"{rule['name']}:{rule['newTag']}"


def _label(objects: list[Object], rule: Object) -> None:
    if rule.keys() != {"pairs", "includeTemplates"}:
        raise KustomizeError("labels: only pairs with includeTemplates")
    for each in objects:
        each["metadata"].setdefault("labels", {}).update(rule["pairs"])
        template = pod_template(each)
        if template is not None and template is not each:
            template["metadata"].setdefault("labels", {}).update(rule["pairs"])
