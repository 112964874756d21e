"""Print lines per folder, every file over 300 lines, every function over 60: questions about the design.

Standard library only, so that `make size` needs no environment. It judges nothing and always exits 0.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("weft", "services", "cli", "tools", "tests")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


def sources() -> Iterator[Path]:
    """Every hand-written Python file, as a path relative to the root."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "_pb2" not in path.name:
                yield path.relative_to(ROOT)


def long_functions(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield (lines, "file:line name") of every function in `text` that is over the limit."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield lines, f"{path}:{node.lineno} {node.name}"


def main() -> None:
    folders: Counter[str] = Counter()
    files: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    for path in sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        lines = text.count("\n")
        depth = 2 if path.parts[0] == "services" and len(path.parts) > 2 else 1
        folders["/".join(path.parts[:depth])] += lines
        if lines > MAX_FILE_LINES:
            files.append((lines, str(path)))
        functions.extend(long_functions(path, text))
    for title, rows in (
        ("lines per folder", [(count, name) for name, count in folders.items()]),
        (f"files over {MAX_FILE_LINES} lines", files),
        (f"functions over {MAX_FUNCTION_LINES} lines", functions),
    ):
        print(f"{title}:")
        for count, name in sorted(rows, reverse=True):
            print(f"  {count:6d}  {name}")
        if not rows:
            print("       none")


if __name__ == "__main__":
    main()
