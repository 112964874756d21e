"""The GPTQ sweep: columns rounded one after the other, each error handed on to the columns not yet rounded.

For a linear with inputs X and H = X^T X, rounding one column wrongly can be made up for by the others as
far as the inputs are correlated: with U the upper Cholesky factor of H^-1, the best answer to the error e
of column j is to take e / U_jj * U_j,k from every later column k (Frantar et al., 2022). Columns with the
largest inputs go first. The grids are static: each column keeps the scale and the zero of its group wherever
it stands in the order, so nothing of the order is stored. This module does not know how grids are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.errors import QuantizerError
from services.quantizer.grid import MAX_VALUE

DAMPING = 0.01
_MAX_OWN_SHARE = 100.0
_MAX_DAMPING = 1e6
_BLOCK = 128
_LEAST_MAXIMUM = 1e-25


@dataclass(frozen=True, slots=True)
class Factor:
    """`upper` [in, in]: the Cholesky factor of the damped H^-1 in the order `order` (int64 [in])."""

    order: Tensor
    upper: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """`rows` [rows, in] times the damped H^-1."""
        solution = torch.empty_like(rows)
        solution[:, self.order] = (rows[:, self.order] @ self.upper.T) @ self.upper
        return solution


def factorize(gram: Tensor) -> Factor:
    """Of `gram` [in, in], damped by a part of its diagonal's mean; but nowhere by more than the entry itself,
    so that a channel of large inputs does not drown the others. Damping grows until the factor exists. A
    channel without any input gets a little.
    """
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    # What was never seen must not divide by nothing, nor by what rounding errors left of it.
    # The floor of the maximum is for inputs that are all zero: 1 over it must still be a number.
    least = diagonal.max().clamp(min=_LEAST_MAXIMUM) * torch.finfo(gram.dtype).eps
    own = torch.where(diagonal > least, diagonal, least)[order]
    share = torch.minimum(own.mean(), own * _MAX_OWN_SHARE)
    # One matrix is all it takes, column by column as LAPACK wants it: every step works in place.
    upper = torch.empty_like(gram).T
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    damping = DAMPING
    while damping <= _MAX_DAMPING:
        for begin in range(0, len(order), _BLOCK):
            rows = order[begin : begin + _BLOCK]
            upper[begin : begin + _BLOCK] = gram[rows.unsqueeze(1), order]
        upper.diagonal().copy_(own + share * damping)
        torch.linalg.cholesky_ex(upper, out=(upper, failed))
        if not failed:
            torch.cholesky_inverse(upper, out=upper)
            torch.linalg.cholesky_ex(upper, upper=True, out=(upper, failed))
            if not failed and _is_finite(upper):
                return Factor(order, upper)
        damping *= 10.0
    raise QuantizerError("the inputs of a linear are not finite on this text")


def _is_finite(matrix: Tensor) -> bool:
    """Without a mask of all of it."""
    return all(bool(torch.isfinite(part).all()) for part in matrix.split(_BLOCK))


def sweep(target: Tensor, factor: Factor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Integers 0..15 as fp32 [out, in] for `target` [out, in] on the grids `scales` and `zeros`
    [out, in/group].
    """
    num_in = target.shape[1]
    order, upper = factor.order, factor.upper
    group = torch.div(order, num_in // scales.shape[1], rounding_mode="floor")
    # Transposed, so that a column lies in one piece.
    left = target.T[order].contiguous()
    scale, zero = scales.T[group].contiguous(), zeros.T[group].contiguous()
    values = torch.empty_like(left)
    errors = left.new_empty(_BLOCK, left.shape[1])
    for begin in range(0, num_in, _BLOCK):
        end = min(begin + _BLOCK, num_in)
        for j in range(begin, end):
            value = (left[j] / scale[j]).round_().add_(zero[j]).clamp_(0, MAX_VALUE)
            error = ((value - zero[j]) * scale[j]).sub_(left[j]).div_(upper[j, j])
            left[j + 1 : end].addr_(upper[j, j + 1 : end], error)
            values[j], errors[j - begin] = value, error
        left[end:].addmm_(upper[begin:end, end:].T, errors[: end - begin])
    found = torch.empty_like(values)
    found[order] = values
    return found.T.contiguous()
