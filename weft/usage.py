"""What a program says that has one command, when it is called with another word or with none."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def tell_usage(program: str, arguments: Sequence[str]) -> int:
    """Print how `program` is called; the exit status: 0, and standard output, for who asked; else 2."""
    is_asked = bool(arguments) and arguments[0] in ("-h", "--help")
    usage = f"usage: {program} serve [--help | OPTIONS]"
    print(usage, file=sys.stdout if is_asked else sys.stderr)
    return 0 if is_asked else 2
