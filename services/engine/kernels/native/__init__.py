"""Kernels in C for x86 with AVX-512 BF16, compiled when an engine loads and kept beside its other
measurements.

`library` compiles (under a second) or finds the shared object and declares its functions; without the
processor's instructions or a compiler it is None and says why once, and the plain torch paths serve. What is
found is code: it is run only from a folder and a file that nobody else may write, and if it still is what was
compiled. `use` switches the CPU's operations to it: one engine runs in a process, so the choice is the
process's. Knows no tensor's meaning.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
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
_FEATURES = frozenset(
    (
        *("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"),
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"),
    )
)
"""What the flags above let the compiler use; a hypervisor may hide any of it."""
_COMPILERS = ("gcc", "cc")
"""clang brings an OpenMP of its own, a second set of threads beside torch's."""
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
    compiler = _Compiler()
    if cache_dir is not None:
        try:
            return _kept(cache_dir.absolute(), compiler)
        except (NativeError, OSError) as error:
            _log.warning("native kernels are not kept but compiled at every start: %s", error)
    with tempfile.TemporaryDirectory(prefix="weft-") as scratch:
        # Once it is open its name is not needed any more.
        return _declared(compiler.compile(Path(scratch)))


def _kept(directory: Path, compiler: _Compiler) -> ctypes.CDLL:
    """The kernels that lie in a folder, or are compiled into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_is_ours(directory, directory.stat())
    for path in sorted(directory.glob(f"native-{compiler.key}-*.so")):
        _check_is_ours(path, path.lstat())
        if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
            return _declared(path)
        _log.warning("%s is damaged and compiled anew", path)
        path.unlink(missing_ok=True)
    return _declared(compiler.compile(directory))


def _check_is_ours(path: Path, facts: os.stat_result) -> None:
    """Refuse what anybody but this user and root could have written, and links (their mode is 0777)."""
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeError(f"others may write {path}, and no code from there is run")


def _declared(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
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


class _Compiler:
    """The system's C compiler over this package's sources. `key` names what it makes of them."""

    def __init__(self) -> None:
        found = next(filter(None, map(shutil.which, _COMPILERS)), None)
        if found is None:
            raise NativeError(f"no C compiler ({', '.join(_COMPILERS)}) is installed")
        self._command, self._gomp = found, _openmp()
        sources = sorted((*_HERE.glob("*.c"), *_HERE.glob("*.h")))
        self._sources = [source for source in sources if source.suffix == ".c"]
        facts = [found, _run([found, "--version"]), self._gomp, *_FLAGS]
        facts += [source.read_text("utf-8") for source in sources]
        self.key = _digest("\0".join(facts).encode())

    def compile(self, directory: Path) -> Path:
        """The shared object, put into a folder whole; its name holds its digest."""
        with tempfile.TemporaryDirectory(dir=directory, prefix="compile-") as scratch:
            objects = []
            for source in self._sources:
                objects.append(f"{scratch}/{source.stem}.o")
                _run([self._command, *_FLAGS, "-c", str(source), "-o", objects[-1]])
            built = Path(scratch, "native.so")
            _run([self._command, "-shared", *objects, self._gomp, "-lm", "-o", str(built)])
            built.chmod(0o700)
            path = directory / f"native-{self.key}-{_digest(built.read_bytes())}.so"
            os.replace(built, path)
        return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _openmp() -> str:
    """torch's own copy of GNU's OpenMP: a second one would keep a second set of threads, which wait by
    spinning.
    """
    for directory in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"):
        for path in sorted(directory.glob("libgomp*.so*")):
            return str(path)
    return "-lgomp"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise NativeError(f"{command[0]} failed: {reason:.200}")
    return done.stdout.decode(errors="replace")
