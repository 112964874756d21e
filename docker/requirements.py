"""Print what an image installs: the dependencies of the named extras of pyproject.toml, one per line.

Run at image build as `python requirements.py pyproject.toml EXTRA...`; standard library only. The image
runs from the source tree, so the project itself is not installed.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The base dependencies and those of each extra. Raises KeyError on an extra that does not exist."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
