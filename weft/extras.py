"""What pip calls extras: the sets of packages that one service needs and another does not.

Knows how to say in one line which of them is missing. What each holds is read from the installed metadata,
that is, from pyproject.toml; a bare clone has none, and then only a failed import tells.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence

DISTRIBUTION = "weft"
_OWN = ("weft", "services", "cli", "tools")
_EXIT_USAGE = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")


@contextlib.contextmanager
def said_in_one_line(extra: str, program: str) -> Iterator[None]:
    """For the body that imports a service: a module of somebody else's that is not there ends the process
    with code 2 and one line that names the extra. One of our own is a fault, and is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in _OWN:
            raise
        print(f"{program}: {module} is not installed: {how_to_install([extra])}", file=sys.stderr)
        raise SystemExit(_EXIT_USAGE) from None


def need(module: str) -> None:
    """For a package that is imported late: raises ModuleNotFoundError now if it is not there."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def how_to_install(extras: Sequence[str]) -> str:
    """The command that installs them."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"


def missing(extras: Sequence[str]) -> dict[str, list[str]]:
    """Extra -> those of its packages that are not installed, for the extras that lack any. Versions are not
    compared. Nothing is known of a bare clone: then the answer is empty.
    """
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name and extra and extra[1] in extras and not _is_installed(name[0]):
            found.setdefault(extra[1], []).append(name[0])
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
