"""Generate the Python stubs of protos/ under a directory: `python tools/generate_stubs.py OUT`.

The path of a .proto is the path of its Python package, so `from weft.v1 import ...` inside the stubs resolves
as it stands. The generator is grpcio-tools 1.74: what it writes loads on newer runtimes, while newer stubs
refuse older ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = "1.74.0"


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `out`; SystemExit on the wrong generator."""
    from importlib.metadata import version

    if (found := version("grpcio-tools")) != GENERATOR:
        raise SystemExit(f"grpcio-tools {GENERATOR} writes the stubs, found {found}: make setup")
    protos = ROOT / "protos"
    sources = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    outputs = [f"--{kind}={out}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", *outputs, *sources], check=True, cwd=ROOT
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    generate(Path(sys.argv[1]).resolve())
