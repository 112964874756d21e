"""Every manifest is one that the API would take, in the oldest and the newest version; and none asks for more
power than it needs. Wiring (flags, ports, selectors) is test_manifest_wiring's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.kubernetes_manifests import (
    FOLDER,
    OVERLAYS,
    VARIANTS,
    all_containers,
    examples,
    manifests,
    of_kind,
    one,
    workloads,
)
from tests.deploy.kustomize import Object, containers_of, pod_template, read_all
from weft import __version__

validator = pytest.importorskip("kubernetes_validate")

OLDEST = "1.30"
VERSIONS = (OLDEST, validator.latest_version())


@pytest.fixture(autouse=True, scope="module")
def _schemas_are_read_once() -> Iterator[None]:
    """They are megabytes, and the validator reads them for every object."""
    original = validator.utils.schema_contents
    validator.utils.schema_contents = functools.lru_cache(maxsize=None)(original)
    yield
    validator.utils.schema_contents = original


def every_object() -> dict[str, Object]:
    """What differs, of all variants and examples, by a name for people."""
    found: dict[str, Object] = {}
    for overlay, part in VARIANTS:
        for each in manifests(overlay, part):
            found.setdefault(json.dumps(each, sort_keys=True), each)
    for objects in examples().values():
        for each in objects:
            found.setdefault(json.dumps(each, sort_keys=True), each)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_would_take_every_object(version: str) -> None:
    objects = every_object()
    assert len(objects) > 30
    for each in objects.values():
        validator.validate(each, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "name", "way", "value"),
    [
        ("Deployment", "engine", "replica", 2),
        ("Service", "engine", "publishNotReadyAddress", True),
        ("PodDisruptionBudget", "engine", "maxUnavailable", [1]),
        ("HorizontalPodAutoscaler", "gateway", "minReplicas", "two"),
    ],
)
def test_the_schema_sees_mistakes(kind: str, name: str, way: str, value: object) -> None:
    broken = one(manifests("cpu"), kind, name)
    broken["spec"][way] = value
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, OLDEST, strict=True)


def test_every_file_is_part_of_a_kustomization() -> None:
    for settings in FOLDER.rglob("kustomization.yaml"):
        (found,) = read_all(settings)
        named = set(found.get("resources", []))
        named |= {patch["path"] for patch in found.get("patches", []) if "path" in patch}
        beside = {path.name for path in settings.parent.glob("*.yaml")} - {settings.name}
        assert beside == {name for name in named if name.endswith(".yaml")}, settings


def test_names_are_unique_and_in_one_namespace() -> None:
    for overlay, part in VARIANTS:
        objects = manifests(overlay, part)
        names = [(each["kind"], each["metadata"]["name"]) for each in objects]
        assert len(names) == len(set(names))
        (namespace,) = of_kind(objects, "Namespace")
        homes = {e["metadata"].get("namespace") for e in objects if e["kind"] != "Namespace"}
        assert homes == {namespace["metadata"]["name"]}


def power(workload: Object) -> dict[str, Any]:
    template = pod_template(workload)
    assert template is not None
    return dict(template["spec"])


@pytest.mark.parametrize(("overlay", "part"), VARIANTS)
def test_pods_have_no_more_power_than_they_need(overlay: str, part: str) -> None:
    objects = [*manifests(overlay, part), *examples()["fill-models.yaml"]]
    for workload in workloads(objects):
        spec = power(workload)
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers_of(workload):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
        for volume in spec["volumes"]:
            assert "hostPath" not in volume
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"]


def test_the_user_is_that_of_the_images() -> None:
    for service in ("quantizer", "engine", "gateway"):
        text = (FOLDER.parents[1] / "services" / service / "Dockerfile").read_text(encoding="utf-8")
        assert "\nUSER 10001:10001\n" in text


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_of_this_version(overlay: str) -> None:
    for _, container in all_containers([*manifests(overlay), *examples()["fill-models.yaml"]]):
        name, _, tag = container["image"].partition(":")
        assert name in ("weft/quantizer", "weft/engine", "weft/gateway")
        has_cuda = overlay == "gpu" and name != "weft/gateway"
        allowed = {__version__, f"{__version__}-cuda" if has_cuda else __version__}
        assert tag in allowed, "weft.__version__ moved: deploy/kubernetes moves with it"
    gpu = {c["name"]: c["image"] for _, c in all_containers(manifests("gpu"))}
    assert gpu["engine"].endswith("-cuda")
    assert gpu["quantizer"].endswith("-cuda")


def test_every_workload_has_an_account_of_its_own() -> None:
    objects = manifests("cpu")
    accounts = {each["metadata"]["name"]: each for each in of_kind(objects, "ServiceAccount")}
    assert all(each["automountServiceAccountToken"] is False for each in accounts.values())
    used = [power(each)["serviceAccountName"] for each in workloads(objects)]
    assert sorted(used) == sorted(accounts)
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
