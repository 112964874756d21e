"""Who may import whom, read off the syntax trees: lazy imports count, and so do relative ones."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Area (folder or file) -> import prefixes that it never holds.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "weft": ("services", "cli", "tools", "tests"),
    "weft/rpc": ("torch", "triton", "weft.artifact"),
    "weft/artifact": ("grpc", "weft.v1", "weft.rpc"),
    "weft/artifact/store.py": ("torch", "numpy", "safetensors"),
    "weft/artifact/manifest.py": ("torch", "numpy", "safetensors"),
    "weft/memory.py": ("torch", "numpy", "grpc"),
    "services/gateway": (
        "torch",
        "triton",
        "safetensors",
        "transformers",
        "services.engine",
        "services.quantizer",
    ),
    "services/gateway/text": (
        "grpc",
        "services.gateway.links",
        "services.gateway.routing",
        "services.gateway.admission",
        "services.gateway.sessions",
        "services.gateway.streams",
        "services.gateway.http",
    ),
    # A request in flight does not know where its tokens come from, nor who let it in.
    "services/gateway/streams": (
        "services.gateway.links",
        "services.gateway.routing",
        "services.gateway.admission",
        "services.gateway.http",
    ),
    "services/gateway/sessions": (
        "services.gateway.links",
        "services.gateway.routing",
        "services.gateway.admission",
        "services.gateway.http",
    ),
    "services/gateway/links": (
        "services.gateway.admission",
        "services.gateway.sessions",
        "services.gateway.http",
    ),
    "services/gateway/routing": (
        "services.gateway.admission",
        "services.gateway.sessions",
        "services.gateway.http",
    ),
    "services/quantizer": ("triton", "services.engine", "services.gateway"),
    "services/engine": ("services.gateway", "services.quantizer", "transformers", "tokenizers"),
    "services/engine/core": (
        "torch",
        "triton",
        "numpy",
        "grpc",
        "google",
        "weft",
        "services.engine.config",
        "services.engine.loop",
        "services.engine.metrics",
        "services.engine.kernels",
        "services.engine.models",
        "services.engine.rpc",
        "services.engine.runner",
    ),
    "services/engine/kernels": (
        "grpc",
        "services.engine.core",
        "services.engine.models",
        "services.engine.rpc",
        "services.engine.runner",
    ),
    "services/engine/models": (
        "grpc",
        "services.engine.core",
        "services.engine.rpc",
        "services.engine.runner",
    ),
    "services/engine/runner": ("grpc", "services.engine.rpc"),
    "services/engine/loop.py": ("torch", "grpc"),
    "cli": ("torch", "triton", "transformers", "tools", "tests"),
    "cli/demo": ("services", "torch", "tests"),
    "tools/gpu": ("services", "weft", "torch", "triton", "grpc", "tests"),
    # Runs without grpc on a machine that has little but torch and triton.
    "tools/kernels": ("grpc", "weft", "tests", "services.gateway", "services.quantizer"),
}

# Area -> (prefix, the only names below that prefix that the area may import).
ONLY: dict[str, tuple[str, tuple[str, ...]]] = {
    "services/gateway": ("weft.artifact", ("weft.artifact.manifest", "weft.artifact.store")),
    "services/engine/core": ("services", ("services.engine.core",)),
    "cli": ("services", ("services.engine.config", "services.gateway.config", "services.quantizer.config")),
}

# Prefix -> the only files of an area that may import it.
DOORS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (
        "services/quantizer",
        ("grpc", "weft.rpc", "weft.v1"),
        ("services/quantizer/rpc/", "services/quantizer/serve.py"),
    ),
    (
        "services/quantizer",
        ("ray",),
        ("services/quantizer/ray_cluster.py", "services/quantizer/ray_pool.py"),
    ),
    ("services/engine", ("triton",), ("services/engine/kernels/",)),
]


class Import(NamedTuple):
    """One imported name and where it stands."""

    path: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def python_files(area: str) -> list[Path]:
    """The Python files of an area, relative to the root; an area that is gone is a mistake in a table."""
    path = ROOT / area
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files, f"{area} holds no Python: fix the table"
    return [file.relative_to(ROOT) for file in files]


def imports(path: Path) -> Iterator[Import]:
    """Every name that a file imports, as `package.module.name`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join((*parents, node.module) if node.module else parents)
            for alias in node.names:
                yield Import(path, node.lineno, f"{base}.{alias.name}")


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("area", FORBIDDEN)
def test_area_imports_nothing_forbidden(area: str) -> None:
    broken = [i for path in python_files(area) for i in imports(path) if is_below(i.name, FORBIDDEN[area])]
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize("area", ONLY)
def test_area_imports_only_the_named_part(area: str) -> None:
    prefix, allowed = ONLY[area]
    broken = [
        i
        for path in python_files(area)
        for i in imports(path)
        if is_below(i.name, (prefix,)) and not is_below(i.name, allowed)
    ]
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize(("area", "prefixes", "doors"), DOORS, ids=lambda value: str(value))
def test_only_the_doors_import(area: str, prefixes: tuple[str, ...], doors: tuple[str, ...]) -> None:
    broken = [
        i
        for path in python_files(area)
        if not path.as_posix().startswith(doors)
        for i in imports(path)
        if is_below(i.name, prefixes)
    ]
    assert not broken, "\n".join(map(str, broken))


DISTRIBUTIONS = {
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "google": "protobuf",
}
# Area -> the extra that its users install.
EXTRAS = {"services/engine": "engine", "services/gateway": "gateway", "services/quantizer": "quantizer"}
# Extras that add something to an area which works without.
OPTIONAL = {"services/quantizer": "ray", "cli": "bench"}


@pytest.mark.parametrize("area", ["cli", "cli/demo", *EXTRAS])
def test_what_is_imported_is_declared_and_what_is_declared_is_imported(area: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for name in (EXTRAS.get(area), OPTIONAL.get(area)) if name]
    base, *extra_sets = (
        {re.split(r"[<>=]", line)[0] for line in lines}
        for lines in (
            project["dependencies"],
            *(project["optional-dependencies"][name] for name in extras),
        )
    )
    extra = set().union(*extra_sets)
    own = {"weft", "services", "cli", "tools"} | sys.stdlib_module_names
    names = {i.name.partition(".")[0] for path in python_files(area) for i in imports(path)} - own
    found = {DISTRIBUTIONS.get(name, name) for name in names}
    # triton comes with torch, or by `make setup`; torch wants numpy for what it hands over to it.
    assert found - {"triton"} <= base | extra
    assert extra - {"numpy"} <= found


def test_one_file_of_the_gateway_speaks_to_engines() -> None:
    named = [
        p
        for p in python_files("services/gateway")
        if "EngineServiceStub" in (ROOT / p).read_text(encoding="utf-8")
    ]
    assert [path.as_posix() for path in named] == ["services/gateway/links/engine_client.py"]


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself: a forbidden import cannot hide behind dots, a function body or an alias."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = Path("services/engine/core/x.py")
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(
        "def f():\n    from .. import loop as _\n    from ..rpc.convert import g\n    import torch.nn\n"
    )
    assert [(i.line, i.name) for i in imports(path)] == [
        (2, "services.engine.loop"),
        (3, "services.engine.rpc.convert.g"),
        (4, "torch.nn"),
    ]
