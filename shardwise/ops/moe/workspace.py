"""Scratch memory of the grouped kernels."""

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors of one call, kept between calls for few tokens, where the host time of allocating counts.

    One set a device, stream and token count, so that captured graphs and concurrent streams never share or lose it.
    """

    KEPT_TOKENS = 256
    _kept: dict[tuple, "Workspace"] = {}
    _counters: dict[tuple, Tensor] = {}

    def __init__(self, owner: tuple):
        self._owner = owner
        self._tensors: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, device: torch.device, tokens: int) -> "Workspace":
        """The workspace for a call with so many tokens on the current stream."""
        owner = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if tokens > cls.KEPT_TOKENS:
            return cls(owner)
        return cls._kept.setdefault((*owner, tokens), cls(owner))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, the same at every call."""
        key = (name, shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=self._owner[0])
        return self._tensors[key]

    def counters(self, count: int) -> Tensor:
        """int32 zeros; kernels that count in them leave zeros behind."""
        found = self._counters.get(self._owner)
        if found is None or found.numel() < count:
            found = torch.zeros(max(count, 1024), dtype=torch.int32, device=self._owner[0])
            self._counters[self._owner] = found
        return found
