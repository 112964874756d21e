"""The tensors of a quantized linear, read into one form whatever layout they have on disk.

Checks names, shapes and dtypes; the layouts themselves are weft.artifact.packing's. Does not know what an
artifact can hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.errors import QuantizerError
from services.quantizer.importing.scheme import PER_CHANNEL, Scheme
from weft.artifact.checkpoint import Checkpoint
from weft.artifact.packing import ORDER, SEQUENTIAL, SYMMETRIC_ZERO, unpack_int4, unpack_rows

_FLOATS = ("F16", "BF16", "F32")
_INTEGERS = ("I32", "I64")
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """weight[row, i] = (values[row, i] - zeros[row, g]) * scales[row, g], g the group of input i.

    Attributes:
        values: uint8 [out, in].
        zeros: int16 [out, groups], 0 to 16: the largest cannot be written in 4 bits.
        scales: [out, groups] in the stored dtype.
        group_index: int64 [in], the group of each input; None when groups are consecutive runs of equal
            length.
    """

    values: Tensor
    zeros: Tensor
    scales: Tensor
    group_index: Tensor | None = None


class Layout(ABC):
    """One way to store a linear. `key` is the tensor that marks one, `others` what may lie beside it."""

    key: str
    others: tuple[str, ...]

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        self._checkpoint, self._scheme = checkpoint, scheme

    @abstractmethod
    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in), from the shapes in the header alone."""

    @abstractmethod
    def read(self, linear: str) -> StoredWeight:
        """All of a linear. Raises QuantizerError that names the tensor."""

    def group_index(self, linear: str) -> Tensor | None:
        """int64 [in], if a tensor says to which group each input belongs."""
        name = f"{linear}.{self.index}" if self.index else ""
        if name not in self._checkpoint.names:
            if self.index and self._scheme.has_order:
                raise QuantizerError(f"tensor {name}: missing, though config.json says act-order")
            return None
        num_in = self.shape(linear)[1]
        index = self._load(name, (num_in,), _INTEGERS).to(torch.int64)
        if not bool(((index >= 0) & (index < self.num_groups(linear))).all()):
            raise QuantizerError(f"tensor {name}: holds a group that does not exist")
        return index

    def num_groups(self, linear: str) -> int:
        """Scales per output."""
        num_in = self.shape(linear)[1]
        size = self._scheme.group_size
        size = num_in if size is None or size == PER_CHANNEL else size
        if num_in % size:
            raise QuantizerError(
                f"tensor {linear}.{self.key}: {num_in} inputs do not divide into groups of {size}"
            )
        return num_in // size

    index: str = ""

    def _key_shape(self, linear: str) -> tuple[int, int]:
        """Dimensions of the packed weight, from its header."""
        name = f"{linear}.{self.key}"
        shape = self._checkpoint.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise QuantizerError(f"tensor {name}: shape {list(shape)}; two dimensions are expected")
        return shape[0], shape[1]

    def _load(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        if name not in self._checkpoint.names:
            raise QuantizerError(f"tensor {name}: missing")
        found = self._checkpoint.shape(name)
        if found != shape:
            raise QuantizerError(f"tensor {name}: shape {list(found)}, expected {list(shape)}")
        if self._checkpoint.dtype(name) not in dtypes:
            raise QuantizerError(
                f"tensor {name}: dtype {self._checkpoint.dtype(name)}, expected {' or '.join(dtypes)}"
            )
        return self._checkpoint.load(name)


class Gemm(Layout):
    """AutoAWQ gemm."""

    key, others = "qweight", ("qzeros", "scales")

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in)."""
        rows, words = self._key_shape(linear)
        return _PER_WORD * words, rows

    def read(self, linear: str) -> StoredWeight:
        """The linear."""
        num_out, num_in = self.shape(linear)
        groups = self.num_groups(linear)
        words = self._load(f"{linear}.qweight", (num_in, num_out // _PER_WORD), ("I32",))
        zeros = self._load(f"{linear}.qzeros", (groups, num_out // _PER_WORD), ("I32",))
        scales = self._load(f"{linear}.scales", (groups, num_out), _FLOATS)
        zeros = unpack_int4(zeros, ORDER).to(torch.int16)
        return StoredWeight(unpack_int4(words, ORDER).T.contiguous(), zeros.T, scales.T)


class Gemv(Layout):
    """AutoAWQ gemv: rows padded behind the last group."""

    key, others = "qweight", ("qzeros", "scales")

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in)."""
        rows, words = self._key_shape(linear)
        return rows, _PER_WORD * words

    def read(self, linear: str) -> StoredWeight:
        """The linear."""
        num_out, num_in = self.shape(linear)
        groups = self.num_groups(linear)
        width = self._checkpoint.shape(f"{linear}.qzeros")[-1:] if self._has(linear) else ()
        width_words = width[0] if width else 0
        if width_words * _PER_WORD < groups:
            raise QuantizerError(f"tensor {linear}.qzeros: missing, or too narrow for {groups} groups")
        words = self._load(f"{linear}.qweight", (num_out, num_in // _PER_WORD), ("I32",))
        zeros = self._load(f"{linear}.qzeros", (num_out, width_words), ("I32",))
        scales = self._load(f"{linear}.scales", (num_out, width_words * _PER_WORD), _FLOATS)
        zeros = unpack_int4(zeros, SEQUENTIAL)[:, :groups].to(torch.int16)
        return StoredWeight(unpack_int4(words, SEQUENTIAL), zeros, scales[:, :groups])

    def _has(self, linear: str) -> bool:
        return f"{linear}.qzeros" in self._checkpoint.names


class Gptq(Layout):
    """GPTQ: `zero_offset` is what was taken off the zero points before they were stored."""

    key, others = "qweight", ("qzeros", "scales", "g_idx")
    index = "g_idx"
    zero_offset = 1

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in)."""
        words, columns = self._key_shape(linear)
        return columns, _PER_WORD * words

    def read(self, linear: str) -> StoredWeight:
        """The linear."""
        num_out, num_in = self.shape(linear)
        groups = self.num_groups(linear)
        if num_out % _PER_WORD:
            raise QuantizerError(f"tensor {linear}.qweight: {num_out} outputs do not divide by {_PER_WORD}")
        words = self._load(f"{linear}.qweight", (num_in // _PER_WORD, num_out), ("I32",))
        zeros = self._load(f"{linear}.qzeros", (groups, num_out // _PER_WORD), ("I32",))
        scales = self._load(f"{linear}.scales", (groups, num_out), _FLOATS)
        zeros = unpack_int4(zeros, SEQUENTIAL).to(torch.int16) + self.zero_offset
        return StoredWeight(unpack_rows(words).T.contiguous(), zeros.T, scales.T, self.group_index(linear))


class GptqV2(Gptq):
    """GPTQ with zero points stored as they are."""

    zero_offset = 0


class PackQuantized(Layout):
    """compressed-tensors pack-quantized, symmetric where there is no zero point."""

    key = "weight_packed"
    others = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    index = "weight_g_idx"

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in)."""
        rows, words = self._key_shape(linear)
        return rows, _PER_WORD * words

    def num_groups(self, linear: str) -> int:
        """Scales per output: as many as there are."""
        name, num_in = f"{linear}.weight_scale", self.shape(linear)[1]
        found = self._checkpoint.shape(name) if name in self._checkpoint.names else ()
        if len(found) != 2 or found[1] < 1 or num_in % found[1]:
            raise QuantizerError(
                f"tensor {name}: shape {list(found)} does not divide {num_in} inputs into groups"
                if found
                else f"tensor {name}: missing"
            )
        return found[1]

    def read(self, linear: str) -> StoredWeight:
        """The linear."""
        num_out, num_in = self.shape(linear)
        groups = self.num_groups(linear)
        if num_out % _PER_WORD:
            raise QuantizerError(
                f"tensor {linear}.weight_packed: {num_out} outputs do not divide by {_PER_WORD}"
            )
        stated = self._load(f"{linear}.weight_shape", (2,), _INTEGERS).tolist()
        if stated != [num_out, num_in]:
            raise QuantizerError(f"tensor {linear}.weight_shape: {stated}, expected {[num_out, num_in]}")
        words = self._load(f"{linear}.weight_packed", (num_out, num_in // _PER_WORD), ("I32",))
        scales = self._load(f"{linear}.weight_scale", (num_out, groups), _FLOATS)
        values, zeros = unpack_int4(words, SEQUENTIAL), self._zeros(linear, num_out, groups)
        return StoredWeight(values, zeros, scales, self.group_index(linear))

    def _zeros(self, linear: str, num_out: int, groups: int) -> Tensor:
        name = f"{linear}.weight_zero_point"
        is_stored = name in self._checkpoint.names
        if is_stored and self._scheme.has_zeros is False:
            raise QuantizerError(f"tensor {name}: zero points, though config.json says symmetric")
        if not is_stored and self._scheme.has_zeros is not True:
            return torch.full((num_out, groups), SYMMETRIC_ZERO, dtype=torch.int16)
        return unpack_rows(self._load(name, (num_out // _PER_WORD, groups), ("I32",))).to(torch.int16)


LAYOUTS: dict[str, type[Layout]] = {
    "gemm": Gemm,
    "gemv": Gemv,
    "gptq": Gptq,
    "gptq_v2": GptqV2,
    "pack-quantized": PackQuantized,
}


def open_layout(checkpoint: Checkpoint, scheme: Scheme) -> Layout:
    """The reader for a scheme."""
    return LAYOUTS[scheme.layout](checkpoint, scheme)
