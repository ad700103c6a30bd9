"""Tensors with poison before and behind them and in the gaps between their rows.

An operator that reads past an argument computes with the poison, one that writes past it spoils it: calls between two
kinds of poison must agree, and the poison must stay.
"""

from dataclasses import dataclass

import torch

GUARD = 4096  # bytes on either side: more than a tile's row
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Guarded:
    """`tensor` lies inside `memory`, bytes of value `poison` where `outside` is set."""

    tensor: torch.Tensor
    memory: torch.Tensor
    outside: torch.Tensor
    poison: int

    @classmethod
    def around(cls, tensor: torch.Tensor, poison: int) -> "Guarded":
        """A copy of `tensor` with its strides and its alignment to 16 bytes."""
        item = tensor.element_size()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        begin = GUARD + tensor.data_ptr() % 16 // item * item
        memory = torch.full((begin + extent * item + GUARD,), poison, dtype=torch.uint8, device=tensor.device)
        used = torch.zeros_like(memory)

        def place(bytes_, dtype):
            inside = bytes_[begin : begin + extent * item].view(dtype)
            return inside.as_strided(tensor.shape, tensor.stride()) if extent else inside.reshape(tensor.shape)

        if all(stride or n == 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            place(memory, tensor.dtype).copy_(tensor)
            if item in _BITS:
                place(used, _BITS[item]).fill_(-1)
            else:  # complex128
                used[begin : begin + extent * item] = 1
        else:  # expanded: elements share memory, gaps included
            flat = tensor.as_strided((extent,), (1,))
            memory[begin : begin + extent * item].view(tensor.dtype).copy_(flat)
            used[begin : begin + extent * item] = 1
        return cls(place(memory, tensor.dtype), memory, used == 0, poison)

    def untouched(self) -> bool:
        """Whether the poison is still there."""
        return bool((self.memory[self.outside] == self.poison).all())


def guard_all(value, poison: int, made: list[Guarded]):
    """`value` with every tensor in it guarded; what was made is appended to `made`."""
    if isinstance(value, torch.Tensor):
        made.append(Guarded.around(value, poison))
        return made[-1].tensor
    if isinstance(value, (tuple, list)):
        return type(value)(guard_all(item, poison, made) for item in value)
    return value
