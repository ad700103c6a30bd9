"""Constant factors of a layer's inputs and outputs, as models have them that were tuned at another width: Falcon-H1."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Of a product: what its inputs are multiplied by, and runs of its outputs, (outputs, factor) each, in their order.

    They become part of the weights, which then are no longer quantised.
    """

    inputs: float
    outputs: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, *outputs: tuple[int, float], inputs: float = 1.0) -> Self | None:
        """None where nothing is multiplied."""
        plain = inputs == 1.0 and all(factor == 1.0 for _, factor in outputs)
        return None if plain else cls(inputs, outputs)

    def scale(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] and bias [out], in place."""
        rows = torch.cat([torch.full((count,), factor) for count, factor in self.outputs]).to(weight.device)
        weight.mul_((self.inputs * rows)[:, None])
        if bias is not None:
            bias.mul_(rows)
