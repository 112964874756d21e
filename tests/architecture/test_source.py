"""What no source file of the product does, read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("weft", "services", "cli", "tools")

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"}


def product_files() -> list[Path]:
    files = [p for folder in PRODUCT for p in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in p.name]
    assert files, "no source"
    return files


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what) of everything that could run what a file or a client says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in UNSAFE_BUILTINS or name in UNSAFE_CALLS:
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    yield node.lineno, f"{keyword.arg}=True"


def reads_environment(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv", "os.environb"):
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from ((node.lineno, f"os.{a.name}") for a in node.names if a.name in ("environ", "getenv"))


def asserts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    yield from ((node.lineno, "assert") for node in ast.walk(tree) if isinstance(node, ast.Assert))


def swallows(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler) or not all(
            isinstance(line, ast.Pass) for line in node.body
        ):
            continue
        if node.type is None or dotted(node.type) in ("Exception", "BaseException"):
            yield node.lineno, "a swallowed exception"


def found(check: object, files: list[Path]) -> list[str]:
    assert callable(check)
    return [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in files
        for line, what in check(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_nothing_runs_what_a_file_says() -> None:
    broken = found(unsafe, product_files())
    assert not broken, "\n".join(broken)


def test_one_file_reads_the_environment() -> None:
    broken = found(reads_environment, [p for p in product_files() if p != ROOT / "weft" / "config.py"])
    assert not broken, "\n".join(broken)


def test_no_assert_outside_the_kernels() -> None:
    """An assert is gone under `python -O`; a kernel's launcher may state the strides it trusts with one."""
    kernels = ROOT / "services" / "engine" / "kernels"
    broken = found(asserts, [p for p in product_files() if kernels not in p.parents])
    assert not broken, "\n".join(broken)


def test_no_exception_is_swallowed() -> None:
    broken = found(swallows, product_files())
    assert not broken, "\n".join(broken)


def test_every_module_says_what_it_is() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in product_files()
        if (tree := ast.parse(path.read_text(encoding="utf-8"))).body and not ast.get_docstring(tree)
    ]
    assert not bare, f"without a docstring: {bare}"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (unsafe, "import pickle"),
        (unsafe, "from dill import loads"),
        (unsafe, "eval('1')"),
        (unsafe, "import torch\ntorch.load('x')"),
        (unsafe, "f(trust_remote_code=True)"),
        (reads_environment, "import os\nos.environ['X']"),
        (reads_environment, "from os import getenv"),
        (asserts, "assert x"),
        (swallows, "try:\n    f()\nexcept Exception:\n    pass"),
    ],
)
def test_checks_see_what_they_look_for(check: object, text: str) -> None:
    assert callable(check)
    assert list(check(ast.parse(text)))


def test_checks_leave_the_innocent_alone() -> None:
    tree = ast.parse("model.eval()\nre.compile('x')\nf(shell=False)\nos.path.join('a')")
    assert not [*unsafe(tree), *reads_environment(tree)]
