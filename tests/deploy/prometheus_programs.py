"""Prometheus and promtool: those on the path, else Debian's package, unpacked below .weft."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".weft" / "prometheus"


def program(name: str) -> str | None:
    """Where a program is, if it is there already."""
    unpacked = KEPT / "usr" / "bin" / name
    return shutil.which(name) or (str(unpacked) if unpacked.exists() else None)


@functools.cache
def fetched(name: str) -> str | None:
    """The same; when it is not there, apt is asked for it once. None when that fails."""
    if (found := program(name)) is not None:
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["apt-get", "download", "prometheus"],
                cwd=folder,
                check=True,
                capture_output=True,
                timeout=300,
            )
            (package,) = Path(folder).glob("prometheus_*.deb")
            subprocess.run(
                ["dpkg", "-x", str(package), str(KEPT)], check=True, capture_output=True, timeout=300
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    return program(name)
