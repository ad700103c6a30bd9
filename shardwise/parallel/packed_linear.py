"""A linear layer of a GPU whose weights stay packed; its kinds are in `float8_linear` and `int4_linear`."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.wide_buffer import Packed

Weight = TypeVar("Weight", bound=Packed)


class PackedLinear(Generic[Weight]):
    """x [T, in] -> x W^T + b [T, out], with a weight that stays as it is; x is not quantised.

    widened  gives the weight as a plain matrix, for products of many tokens
    """

    def __init__(self, *, weight: Weight, bias: Tensor | None, widened: Callable[[Weight], Tensor]):
        self.weight, self.bias, self.out_features = weight, bias, weight.shape[0]
        self._widened = widened

    @property
    def most_packed(self) -> int:
        """Most tokens of `packed_product`."""
        raise NotImplementedError

    def packed_product(self, x: Tensor) -> Tensor:
        """The product of so many tokens at the most, contiguous, with the weight as it is."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        if x.shape[0] <= self.most_packed:
            return self.packed_product(x.contiguous())
        return F.linear(x, self._widened(self.weight), self.bias)
