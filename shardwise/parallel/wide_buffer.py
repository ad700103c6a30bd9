"""Memory in which packed weights become plain ones for a product."""

from math import prod
from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """A weight [out, in] in a form of its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def widened(self, out: Tensor) -> Tensor:
        """The weight as a plain matrix: written into `out`, in its dtype, and returned."""


class WideBuffer:
    """Memory for one weight at a time as a plain matrix, for products of many tokens; all layers share it."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._elements = 0
        self._memory: Tensor | None = None

    def reserve(self, weight: Packed) -> None:
        """Before `allocate`: such a weight is to come."""
        self._elements = max(self._elements, prod(weight.shape))

    def allocate(self) -> None:
        if self._elements:
            self._memory = torch.empty(self._elements, dtype=self.dtype, device=self.device)

    def widened(self, weight: Packed) -> Tensor:
        """[out, in], until the next call."""
        assert self._memory is not None
        return weight.widened(self._memory[: prod(weight.shape)].view(*weight.shape))
