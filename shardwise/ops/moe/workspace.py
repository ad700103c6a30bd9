"""Scratch memory of the grouped kernels."""

import threading

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors of one call, kept between calls for few tokens, where the host time of allocating counts.

    One set a thread (ranks may be threads), device, stream and token count: captured graphs and concurrent callers
    never share or lose it.
    """

    KEPT_TOKENS = 64

    def __init__(self, owner: tuple):
        self._owner = owner
        self._tensors: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, device: torch.device, tokens: int) -> "Workspace":
        """The workspace for a call with so many tokens on the current stream."""
        owner = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if tokens > cls.KEPT_TOKENS:
            return cls(owner)
        return _kept("workspaces").setdefault((*owner, tokens), cls(owner))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the same at every call."""
        key = (name, shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=self._owner[0])
        return self._tensors[key]

    def counters(self, count: int) -> Tensor:
        """int32 zeros; kernels that count in them leave zeros behind."""
        size = max(1024, 1 << (count - 1).bit_length())
        kept = _kept("counters")
        if (self._owner, size) not in kept:  # a smaller one stays: a captured graph may count in it
            kept[self._owner, size] = torch.zeros(size, dtype=torch.int32, device=self._owner[0])
        return kept[self._owner, size]


_THREAD = threading.local()


def _kept(kind: str) -> dict:
    """What this thread keeps of a kind."""
    return _THREAD.__dict__.setdefault(kind, {})
