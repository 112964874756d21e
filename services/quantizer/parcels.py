"""Tasks and results as they travel between processes: the tensors apart from the rest.

A tensor goes as the bytes of the storage that it spans, so that tensors which share memory share the bytes,
large ones are sent once, and what arrives has the same strides and the same place within a line of 64 bytes:
a matrix product may differ in its last bits when one of them does. This module does not know how parcels are
carried.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Buffer = NDArray[np.uint8]

_LINE = 64
_INVARIANT = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in a parcel: `buffer` is its number, `begin` the first element's place there in
    bytes. What was on the sender's device comes to be on the receiver's.
    """

    buffer: int
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_on_device: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one storage, uint8 [n]; while `data` lives, no other bytes have its `key`."""

    key: tuple[Any, ...]
    data: Tensor


def pack(content: Any) -> tuple[Any, list[Span]]:
    """`content` with a Slot for every tensor in it, and the spans by number.

    Looks into dataclasses, dicts, lists and tuples; anything else is left as it is.
    """
    spans: list[Span] = []
    numbers: dict[tuple[Any, ...], int] = {}

    def replace(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        span, begin = _span(tensor)
        number = numbers.setdefault(span.key, len(spans))
        if number == len(spans):
            spans.append(span)
        return Slot(
            number, begin, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device.type != "cpu"
        )

    return _walk(content, replace), spans


def unpack(content: Any, buffers: Sequence[Tensor], device: torch.device) -> Any:
    """What `pack` was given, its tensors over `buffers` (uint8 [n], CPU), or copies of them on `device`."""
    moved: dict[int, Tensor] = {}

    def restore(slot: Any) -> Any:
        if not isinstance(slot, Slot):
            return slot
        data = buffers[slot.buffer]
        if slot.is_on_device:
            data = moved.setdefault(slot.buffer, data.to(device))
        if not data.numel():
            return torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, device=data.device)
        first = data.storage_offset() + slot.begin
        return data.view(slot.dtype).as_strided(slot.shape, slot.stride, first // slot.dtype.itemsize)

    return _walk(content, restore)


def as_array(data: Tensor) -> Buffer:
    """uint8 [n] over the same memory, or a copy of what is on a device."""
    array: Buffer = data.cpu().numpy()
    return array


def as_tensor(array: Buffer) -> Tensor:
    """uint8 [n] over the same memory, which the caller may not be allowed to write to; a copy if its
    beginning is not on a line of 64 bytes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the array is not writable: nobody writes
        tensor = torch.from_numpy(array)
    return tensor if tensor.data_ptr() % _LINE == 0 else tensor.clone()


def _span(tensor: Tensor) -> tuple[Span, int]:
    """The bytes from the line of the first element to the end of the last, and where the first is in them."""
    tensor = tensor.detach()
    itemsize = tensor.element_size()
    first = tensor.storage_offset() * itemsize
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + (steps + 1) * itemsize if tensor.numel() else first
    base = tensor.untyped_storage().data_ptr()
    lead = min(first, (base + first) % _LINE) // itemsize * itemsize
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    data = whole[first - lead : last]
    return Span((str(tensor.device), base + first - lead, len(data)), data), lead


def _walk(content: Any, change: Callable[[Any], Any]) -> Any:
    changed = change(content)
    if changed is not content or isinstance(content, _INVARIANT):
        return changed
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        twin = copy.copy(content)
        for field in dataclasses.fields(content):
            # The class may be frozen, and may check or convert what its constructor is given.
            object.__setattr__(twin, field.name, _walk(getattr(content, field.name), change))
        return twin
    if isinstance(content, tuple):
        parts = [_walk(part, change) for part in content]
        return type(content)(*parts) if hasattr(content, "_fields") else tuple(parts)
    if isinstance(content, list):
        return [_walk(part, change) for part in content]
    if isinstance(content, dict):
        return {key: _walk(value, change) for key, value in content.items()}
    return content
