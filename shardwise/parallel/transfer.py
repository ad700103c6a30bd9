"""Small host tensors to a device in one copy: one by one, each of a step's dozen costs the host 0.1 to 0.2 ms."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: kernels are compiled for pointers that are multiples of it, and for those that are not."""


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on `device`, in memory that they share there."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        staged[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.view(-1))
    moved = staged.to(device, non_blocking=True)
    return [
        moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
