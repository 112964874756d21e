"""The renderer that the other tests use makes what kubectl makes, and refuses what it does not know."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.kubernetes_manifests import ROOT, VARIANTS, manifests
from tests.deploy.kustomize import KustomizeError, Object, render

POD = """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers:
    - {name: x, image: weft/engine, args: [one]}
"""


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


@pytest.mark.parametrize(("overlay", "part"), [(o, p) for o, p in VARIANTS if p == "" or "+" in p])
def test_it_renders_what_kubectl_renders(overlay: str, part: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = ROOT / "deploy" / "kubernetes"
    parts = [os.path.relpath(folder / "components" / name, tmp_path) for name in part.split("+") if name]
    settings = {
        "kind": "Kustomization",
        "resources": [os.path.relpath(folder / "overlays" / overlay, tmp_path)],
        "components": parts,
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [kubectl, "kustomize", "--load-restrictor=LoadRestrictionsNone", tmp_path],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = by_name(list(yaml.safe_load_all(done.stdout)))
    ours = by_name(manifests(overlay, part))
    assert ours.keys() == theirs.keys()
    for key, each in ours.items():
        assert each == theirs[key], key


def folder_of(tmp_path: Path, settings: str) -> Path:
    (tmp_path / "pod.yaml").write_text(POD)
    (tmp_path / "kustomization.yaml").write_text(f"kind: Kustomization\nresources: [pod.yaml]\n{settings}")
    return tmp_path


def test_tags_labels_namespace_and_patches(tmp_path: Path) -> None:
    settings = """
namespace: there
images: [{name: weft/engine, newTag: "7"}]
labels: [{pairs: {a: b}, includeTemplates: true}]
patches:
  - patch: |-
      kind: Pod
      metadata: {name: a}
      spec: {containers: [{name: x, env: [{name: E, value: "1"}]}]}
  - target: {kind: Pod}
    patch: |-
      - {op: add, path: /spec/containers/0/args/-, value: two}
"""
    (pod,) = render(folder_of(tmp_path, settings))
    assert pod["metadata"] == {"name": "a", "namespace": "there", "labels": {"a": "b"}}
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "weft/engine:7"
    assert container["args"] == ["one", "two"]
    assert container["env"] == [{"name": "E", "value": "1"}]


@pytest.mark.parametrize(
    "settings",
    [
        "namePrefix: a-",
        "configMapGenerator: []",
        "images: [{name: weft/engine, newName: other}]",
        "patches: [{patch: '{kind: Pod, metadata: {name: other}}'}]",
        "patches: [{target: {kind: Pod}, patch: '[{op: remove, path: /spec, value: 1}]'}]",
        "components: [nowhere]",
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, settings: str) -> None:
    with pytest.raises(KustomizeError):
        render(folder_of(tmp_path, settings))
