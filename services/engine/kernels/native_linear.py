"""Linears of the native kernels: weights of 4, 8 or 16 bits, activations in bf16, fp32 sums.

A row's bits do not depend on the rows beside it. Knows how the C code wants weights to lie (`native/linear.c`
says it in full); does not know where a weight comes from.
"""

from __future__ import annotations

import ctypes
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels import native
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

_PANEL = 64
_LANES = 16
_DENSE_GROUP = 128
_ZERO_MASK = 15
_INT8_GROUPS = (128, 64, 32)
_QUANTIZED_AT_ONCE = 4096
"""Outputs that are in fp32 at the same time while a head is rounded: all would be several times the head."""


class _OfThread(threading.local):
    """One scratch for all linears of a thread: they run one after the other, but those of two threads at
    once, since a call into C lets other threads run.
    """

    def __init__(self) -> None:
        self.scratch = Scratch()


_OF_THREAD = _OfThread()


def is_supported(in_features: int, group_size: int, numerics: Numerics) -> bool:
    """Whether the kernels are in use and take this shape."""
    return (
        native.active() is not None
        and numerics.dtype == torch.bfloat16
        and numerics.device.type == "cpu"
        and group_size % 8 == 0
        and in_features % group_size == 0
    )


class NativeLinear:
    """A linear over codes ready for the C code. `make_int4`, `make_int8` and `make_dense` make one."""

    def __init__(
        self,
        codes: Tensor,
        params: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        bits: int,
    ) -> None:
        """codes and params as linear.c has them; `shape` is (in, out)."""
        library = native.active()
        if library is None:
            raise RuntimeError("the native kernels are not in use")
        self.in_features, self.out_features = shape
        self.path = {4: "native-int4", 8: "native-int8", 16: "native-bf16"}[bits]
        wide = None if bias is None else F.pad(bias.float(), (0, -bias.shape[0] % _PANEL))
        self._tensors = (codes, params, wide)
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors if tensor is not None)
        group_size = self.in_features // params.shape[1]
        self._weight = native.Weight(
            codes.data_ptr(),
            params.data_ptr(),
            0 if wide is None else wide.data_ptr(),
            *shape,
            group_size,
            bits,
        )
        self._pointer = ctypes.pointer(self._weight)
        self._library = library

    def __call__(self, x: Tensor) -> Tensor:
        rows, threads = x.shape[0], torch.get_num_threads()
        x = x.contiguous()
        y = torch.empty(rows, self.out_features, dtype=torch.bfloat16)
        size = self._library.weft_linear_scratch(self._pointer, rows, threads)
        scratch = _OF_THREAD.scratch.take("native", (size,), torch.uint8)
        self._library.weft_linear(
            self._pointer, x.data_ptr(), y.data_ptr(), rows, scratch.data_ptr(), threads
        )
        return y


def make_int4(values: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> NativeLinear:
    """values uint8 [in, out], zeros uint8 and scales [in / group, out]. Scales keep 20 bits of their
    mantissa.
    """
    in_features, out_features = values.shape
    panels = _panels(values)
    # [panels, in / 8, pair, half, blocks, lanes] -> lane by lane its lower and upper half, four nibbles each.
    nibbles = panels.view(panels.shape[0], in_features // 8, 4, 2, -1, _LANES).permute(0, 1, 4, 5, 3, 2)
    codes = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous()
    params = _panels(scales.float()).view(torch.int32).bitwise_and(~_ZERO_MASK) | _panels(zeros.int())
    return NativeLinear(codes, params.contiguous(), bias, (in_features, out_features), 4)


def int8_group(in_features: int) -> int | None:
    """Inputs that share a scale in 8 bits; None where none of the usual numbers divides them."""
    return next((group for group in _INT8_GROUPS if in_features % group == 0), None)


def make_int8(weight: Tensor, group_size: int, bias: Tensor | None) -> NativeLinear:
    """Round weight [out, in] to signed bytes, one scale per output and group of inputs."""
    out_features, in_features = weight.shape
    codes, scales = quantize_int8(weight, group_size)
    packed = _pairs(codes.view(out_features, in_features).t())
    params = _panels(scales.t().contiguous()).view(torch.int32)
    return NativeLinear(packed, params, bias, (in_features, out_features), 8)


def quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, groups, group], scales fp32 [out, groups]): the largest of a group becomes 127."""
    out_features, in_features = weight.shape
    codes = torch.empty(out_features, in_features // group_size, group_size, dtype=torch.int8)
    scales = torch.empty(codes.shape[:2])
    for first in range(0, out_features, _QUANTIZED_AT_ONCE):
        span = slice(first, first + _QUANTIZED_AT_ONCE)
        grouped = weight[span].float().unflatten(1, (-1, group_size))
        scales[span] = grouped.abs().amax(-1).div_(127.0).clamp_(min=2.0**-100)
        codes[span] = (grouped / scales[span].unsqueeze(-1)).round_()
    return codes, scales


def make_dense(weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """weight bf16 [out, in] as it is."""
    out_features, in_features = weight.shape
    group = _DENSE_GROUP if in_features % _DENSE_GROUP == 0 else in_features
    codes = _pairs(weight.to(torch.bfloat16).t())
    params = _panels(torch.ones(in_features // group, out_features)).view(torch.int32)
    return NativeLinear(codes, params, bias, (in_features, out_features), 16)


def _panels(x: Tensor) -> Tensor:
    """[n, out] -> contiguous [panels, n, 64], zeros where there is no output."""
    padded = F.pad(x, (0, -x.shape[1] % _PANEL))
    return padded.view(x.shape[0], -1, _PANEL).transpose(0, 1).contiguous()


def _pairs(x: Tensor) -> Tensor:
    """[in, out] -> [panels, in / 2, blocks * lanes, 2]: each lane's pairs of inputs side by side."""
    panels = _panels(x)
    return panels.view(panels.shape[0], -1, 2, _PANEL).transpose(2, 3).contiguous()
