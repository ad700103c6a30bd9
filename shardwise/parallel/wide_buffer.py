"""Memory in which packed weights become plain ones for a product."""

from math import prod
from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """A weight [out, in], or a stack of them, in a form of its own."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def widened(self, out: Tensor) -> Tensor:
        """The weight as a plain matrix: written into `out`, in its dtype, and returned."""


class WideBuffer:
    """Memory for one layer's weights at a time as plain matrices, for products of many tokens; all layers share it."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._elements = 0
        self._memory: Tensor | None = None

    def reserve(self, *weights: Packed) -> None:
        """Before `allocate`: such weights are to come, all at once."""
        self._elements = max(self._elements, sum(prod(weight.shape) for weight in weights))

    def allocate(self) -> None:
        if self._elements:
            self._memory = torch.empty(self._elements, dtype=self.dtype, device=self.device)

    def widened(self, weight: Packed) -> Tensor:
        """[out, in], until the next call."""
        return self.all_widened(weight)[0]

    def all_widened(self, *weights: Packed) -> list[Tensor]:
        """Each in its own shape, until the next call."""
        assert self._memory is not None
        sizes = [prod(weight.shape) for weight in weights]
        parts = self._memory[: sum(sizes)].split(sizes)
        return [weight.widened(part.view(*weight.shape)) for weight, part in zip(weights, parts, strict=True)]
