"""Kernels in C for x86 with AVX-512 BF16, compiled when an engine loads and kept beside its other
measurements.

`library` compiles (under a second) or finds the shared object and declares its functions; without the
processor's instructions or a compiler it is None and says why once, and the plain torch paths serve. `use`
switches the CPU's operations to it: one engine runs in a process, so the choice is the process's. Knows no
tensor's meaning.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-ffp-contract=off",  # where products are fused into sums is the source's choice, not the compiler's
    "-march=x86-64-v4",
    "-mavx512bf16",
)
_FEATURES = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512_bf16"))
_COMPILERS = ("gcc", "cc", "clang")
_TIMEOUT_S = 120.0
_HERE = Path(__file__).parent
_log = logging.getLogger(__name__)


class NativeError(RuntimeError):
    """Why there are no native kernels here."""


class Weight(Structure):
    """As in linear.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "params", "bias")),
        *((name, c_int64) for name in ("in_features", "out_features", "group_size", "bits")),
    )


class Attention(Structure):
    """As in layer.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "keys", "values", "out")),
        *((name, c_void_p) for name in ("tables", "starts", "lengths", "contexts")),
        *(
            (name, c_int64)
            for name in ("num_seqs", "table_width", "heads", "kv_heads", "block_size", "dim", "window")
        ),
        ("scale", c_float),
    )


_SIGNATURES = {
    "weft_linear": (POINTER(Weight), c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    "weft_linear_scratch": (POINTER(Weight), c_int64, c_int64),
    "weft_rms_norm": (*[c_void_p] * 4, c_int64, c_float, c_void_p, *[c_int64] * 3),
    "weft_silu_mul": (c_void_p, c_void_p, *[c_int64] * 3),
    "weft_rotary_write_kv": (*[c_void_p] * 7, *[c_int64] * 6),
    "weft_attention": (POINTER(Attention), c_void_p, *[c_int64] * 3),
}

_active: ctypes.CDLL | None = None


def use(library: ctypes.CDLL | None) -> None:
    """Run the CPU's bf16 operations on this library from now on; None: on torch."""
    global _active
    _active = library


def active() -> ctypes.CDLL | None:
    """The library in use."""
    return _active


def library(cache_dir: Path | None) -> ctypes.CDLL | None:
    """The kernels, compiled into `cache_dir` unless they lie there; None, with one line in the log, where
    there can be none.
    """
    try:
        return _open(cache_dir)
    except (NativeError, OSError, subprocess.SubprocessError) as error:
        _log.info("no native kernels, torch's are used: %s", error)
        return None


@cache
def _open(cache_dir: Path | None) -> ctypes.CDLL:
    missing = _FEATURES - _processor_flags()
    if missing:
        raise NativeError(f"the processor lacks {', '.join(sorted(missing))}")
    if cache_dir is not None and _can_write(cache_dir):
        found = ctypes.CDLL(str(_compiled(cache_dir)))
    else:
        with tempfile.TemporaryDirectory(prefix="weft-") as scratch:
            # Once it is open its name is not needed any more.
            found = ctypes.CDLL(str(_compiled(Path(scratch))))
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes = arguments
        function.restype = c_int64 if name == "weft_linear_scratch" else None
    return found


def _processor_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def _compiled(directory: Path) -> Path:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NativeError(f"no C compiler ({', '.join(_COMPILERS)}) is installed")
    gomp = _openmp()
    sources = sorted((*_HERE.glob("*.c"), *_HERE.glob("*.h")))
    version = _run([compiler, "--version"])
    facts = [compiler, version, gomp, *_FLAGS, *(source.read_text("utf-8") for source in sources)]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    path = directory / f"native-{key}.so"
    if not path.exists():
        _compile(compiler, [source for source in sources if source.suffix == ".c"], gomp, path)
    return path


def _openmp() -> str:
    """torch's own copy of GNU's OpenMP: a second one would keep a second set of threads, which wait by
    spinning.
    """
    for directory in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"):
        for path in sorted(directory.glob("libgomp*.so*")):
            return str(path)
    return "-lgomp"


def _compile(compiler: str, sources: list[Path], gomp: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="compile-") as scratch:
        objects = []
        for source in sources:
            objects.append(f"{scratch}/{source.stem}.o")
            _run([compiler, *_FLAGS, "-c", str(source), "-o", objects[-1]])
        built = f"{scratch}/{path.name}"
        _run([compiler, "-shared", *objects, gomp, "-lm", "-o", built])
        os.replace(built, path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise NativeError(
            f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]:.200}"
        )
    return done.stdout


def _can_write(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)
