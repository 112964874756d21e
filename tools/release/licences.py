"""Whether what Weft needs may go out with a program under Apache-2.0.

A licence is an SPDX expression (https://spdx.org/licenses), or what an older package says of itself. This is
a filter for people to look behind, and no advice of a lawyer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tools.release.pins import BROUGHT_BY_TORCH, OWN, normalised, read_report
from tools.release.work import StepFailed, Work

# They ask for their text and a notice, and for nothing else.
PERMISSIVE = frozenset(
    {
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC"),
        *("MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unicode-3.0", "Unlicense", "Zlib"),
    }
)
EXCEPTIONS = frozenset({"LLVM-exception"})
# Copyleft that ends at the file: carried unchanged beside Apache-2.0, and worth a look.
UNUSUAL = frozenset({"MPL-2.0", "EPL-2.0", "CNRI-Python"})
CLASSIFIER = "License :: OSI Approved :: "
# What packages without an expression say, and what it means.
NAMES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_TOKEN = re.compile(r"\s*([()]|[A-Za-z0-9.+-]+)")


def expression_of(metadata: Mapping[str, Any]) -> str:
    """The licence of a package as an SPDX expression where that can be told, else its own words ("" without
    any).
    """
    if expression := metadata.get("license_expression"):
        return str(expression)
    named = [c.removeprefix(CLASSIFIER) for c in metadata.get("classifier", []) if c.startswith(CLASSIFIER)]
    text = (metadata.get("license") or "").strip()
    words = named or [text.splitlines()[0]] if named or text else []
    return " AND ".join(NAMES.get(word, word) for word in words)


def is_allowed(expression: str) -> bool:
    """Whether one way to read the expression holds allowed licences alone. Raises ValueError for what is no
    expression.
    """
    tokens = _tokens(expression)
    allowed = _any_of(tokens)
    if tokens:
        raise ValueError(f"{expression!r} is no licence expression")
    return allowed


def _tokens(expression: str) -> list[str]:
    tokens, at = [], 0
    while at < len(expression.rstrip()):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression!r} is no licence expression")
        tokens.append(match[1])
        at = match.end()
    return tokens


def _any_of(tokens: list[str]) -> bool:
    allowed = _all_of(tokens)
    while tokens and tokens[0].upper() == "OR":
        tokens.pop(0)
        right = _all_of(tokens)
        allowed = allowed or right
    return allowed


def _all_of(tokens: list[str]) -> bool:
    allowed = _one(tokens)
    while tokens and tokens[0].upper() == "AND":
        tokens.pop(0)
        right = _one(tokens)
        allowed = allowed and right
    return allowed


def _one(tokens: list[str]) -> bool:
    if not tokens:
        raise ValueError("an expression ends too early")
    token = tokens.pop(0)
    if token == "(":
        allowed = _any_of(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return allowed
    allowed = token in PERMISSIVE | UNUSUAL
    if tokens and tokens[0].upper() == "WITH":
        tokens.pop(0)
        exception = tokens.pop(0) if tokens else ""
        allowed = allowed and exception in EXCEPTIONS
    return allowed


def judge(metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the package may be carried, and its expression."""
    expression = expression_of(metadata)
    try:
        return is_allowed(expression), expression
    except ValueError:
        return False, expression or "no licence named"


def check(work: Work) -> str:
    """Judge everything that pip would install for any extra."""
    refused: dict[str, str] = {}
    unusual: dict[str, str] = {}
    seen = set()
    for path in work.need_reports.values():
        for item in read_report(path)["install"]:
            metadata = item["metadata"]
            name = normalised(metadata["name"])
            if name == OWN or BROUGHT_BY_TORCH.fullmatch(name):
                continue
            seen.add(name)
            allowed, expression = judge(metadata)
            if not allowed:
                refused[name] = expression
            elif UNUSUAL & set(re.findall(r"[\w.+-]+", expression)):
                unusual[name] = expression
    if refused:
        lines = [f"{name}: {expression}" for name, expression in sorted(refused.items())]
        raise StepFailed(f"{len(lines)} not allowed or not known\n" + "\n".join(lines))
    shown = ", ".join(f"{name} ({expression})" for name, expression in sorted(unusual.items()))
    return f"{len(seen)} packages; unusual: {shown or 'none'}"
