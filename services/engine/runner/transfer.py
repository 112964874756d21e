"""Copies between the host and a device that neither of them waits for.

A plain copy from the host waits until the device has done everything queued before it: one of those in a step
undoes the overlap of the whole step. Knows tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def send(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, in stream order; itself when it is there already."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def send_values(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or lists of them, as a tensor on the device."""
    return send(torch.tensor(values, dtype=dtype), device)


def fetch(tensor: Tensor) -> Tensor:
    """A copy on the host, valid once what is queued now has run."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
