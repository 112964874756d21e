"""Whether constraints.txt pins everything that pip would install for each extra, and whether the services'
dependencies stay apart. Reads pip's report of an installation that it plans and does not make.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.release.work import EXTRAS, StepFailed, Work

OWN = "weft"
# Extra -> what must never come with it.
APART = {
    "engine": ("transformers", "tokenizers", "huggingface-hub", "starlette", "uvicorn", "docker", "ray"),
    "gateway": ("torch", "numpy", "transformers", "safetensors", "docker", "ray", "triton"),
    "quantizer": ("starlette", "uvicorn", "prometheus-client", "ray"),
    "bench": ("torch", "transformers", "starlette", "uvicorn", "docker", "ray"),
    "ray": ("torch", "transformers", "starlette", "uvicorn", "docker"),
}
# A CUDA build of torch brings its own, at versions that it names itself.
BROUGHT_BY_TORCH = re.compile(r"(triton|nvidia-.*|cuda-.*)")


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Name -> version of a constraints file. Raises ValueError for a line that is no exact pin."""
    pins: dict[str, str] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, equals, version = line.partition("==")
        if not equals or not version or set(version) & set("*<>=!,; "):
            raise ValueError(f"constraints.txt: {line!r} is no exact pin")
        if normalised(name) in pins:
            raise ValueError(f"constraints.txt: {name} stands there twice")
        pins[normalised(name)] = version
    return pins


def resolved(report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> version of what pip would install, our own package left out."""
    packages = [item["metadata"] for item in report["install"]]
    return {normalised(m["name"]): m["version"] for m in packages if normalised(m["name"]) != OWN}


def problems(extra: str, found: Mapping[str, str], pins: Mapping[str, str]) -> list[str]:
    """What is not pinned, not as pinned, or of another service. A local label (2.13.0+cpu) may follow."""
    wrong = []
    for name, version in sorted(found.items()):
        if name not in pins and not BROUGHT_BY_TORCH.fullmatch(name):
            wrong.append(f"[{extra}] {name} {version} is not pinned")
        elif name in pins and version.partition("+")[0] != pins[name]:
            wrong.append(f"[{extra}] {name} {version} is pinned to {pins[name]}")
    return wrong + [f"[{extra}] {name} does not belong there" for name in APART[extra] if name in found]


def check(work: Work) -> str:
    """Ask pip what it would install for each extra."""
    wheel = work.need_wheel
    pins = read_pins(work.constraints.read_text(encoding="utf-8"))
    wrong: list[str] = []
    counts = []
    reports = {}
    for extra in EXTRAS:
        path = work.folder / f"report-{extra}.json"
        command = [work.tool_python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        work.run([*command, "--report", path, "-c", work.constraints, f"{wheel}[{extra}]"])
        found = resolved(read_report(path))
        wrong += problems(extra, found, pins)
        counts.append(f"{extra} {len(found)}")
        reports[extra] = path
    work.reports = reports
    if wrong:
        raise StepFailed(f"{len(wrong)} wrong\n" + "\n".join(wrong))
    return f"all pinned: {', '.join(counts)} packages"


def read_report(path: Path) -> dict[str, Any]:
    """pip's report."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
