"""Finds the launches to compile: `compile_cases()` of every module of the kernel package, or of given files.

Knows modules and their lists. Compiles nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from services.engine.kernels.gpu.compile_case import CompileCase

PACKAGE = "services.engine.kernels.gpu"
LAUNCHES = "tools.kernels.launches"


@dataclass(frozen=True, slots=True)
class Entry:
    """A case and the module it came from. `archs`: the only architectures it is for; None for all."""

    module: str
    case: CompileCase
    archs: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Every entry, by module and in the module's order, and "module: error" for each that gave none."""

    entries: list[Entry]
    failures: list[str]


def find_cases(sources: list[str]) -> Found:
    """Cases of `sources` (module names or paths of Python files); for an empty list all of the kernel package
    and what the engine was seen to launch. Names must be unique. A module's ARCHS are its cases' only
    architectures.
    """
    entries: list[Entry] = []
    failures: list[str] = []
    for source in sources or _kernel_modules():
        try:
            module = _load(source)
            if not hasattr(module, "compile_cases"):
                if sources:
                    failures.append(f"{source}: has no compile_cases()")
                continue
            short = source.removesuffix(".py").replace("/", ".").rpartition(".")[2]
            archs = getattr(module, "ARCHS", None)
            entries.extend(Entry(short, case, archs) for case in module.compile_cases())
        except Exception as error:
            failures.append(f"{source}: {type(error).__name__}: {error}")
    names = [entry.case.name for entry in entries]
    failures.extend(
        f"two cases are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})
    )
    return Found(entries, failures)


def _kernel_modules() -> list[str]:
    package = importlib.import_module(PACKAGE)
    return [*(f"{PACKAGE}.{info.name}" for info in pkgutil.iter_modules(package.__path__)), LAUNCHES]


def _load(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source).resolve()
    spec = importlib.util.spec_from_file_location(f"kernels_from_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
