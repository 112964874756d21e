"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter must be chosen before the first kernel is decorated, hence here and not in a fixture.
"""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
interpreter = pytest.importorskip("triton.runtime.interpreter")
import triton.language as tl  # noqa: E402

from tests.services.engine.kernels.gpu.ptx_emulator import create_inline_asm  # noqa: E402


def _fused(self, x, y, z):
    """A product and a sum rounded once, as on a device; the interpreter would round twice, and a kernel that
    takes one rounding for the other would pass.
    """
    wide = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _builtins_of(place):
    return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _look_up_builtins_once():
    """The interpreter looks through all members of the language at every call of a function in a kernel, a
    quarter of all the time of these tests. Called before any kernel has run, while nothing is replaced yet.
    """
    places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    known = {place: _builtins_of(place) for place in places}

    def patch_builtin(place, builder, scope):
        for name in known.get(place) or _builtins_of(place):
            if tl.core.is_builtin(member := getattr(place, name)):
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if not torch.cuda.is_available():
    _look_up_builtins_once()
interpreter.InterpreterBuilder.create_fma = _fused
interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


@pytest.fixture(scope="session")
def device():
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison_empty():
    """What `torch.empty` gives holds NaN (integers their largest value), so that a slot left out shows."""
    # Only a warning from what has no deterministic form: cuBLAS wants a setting of its own for that.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
