"""A linear layer of a GPU whose weights stay 4-bit integers."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.int4_many import int4_product, most_tokens
from shardwise.ops.quantization.int4_weight import Int4Weight


class Int4Linear:
    """x [T, in] -> x W^T + b [T, out], with a weight that stays in 4 bits; x is not quantised.

    widened  gives the weight as a plain matrix, for products of many tokens
    """

    def __init__(self, *, weight: Int4Weight, bias: Tensor | None, widened: Callable[[Int4Weight], Tensor]):
        self.weight, self.bias, self.out_features = weight, bias, weight.shape[0]
        self._widened = widened

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        if x.shape[0] <= most_tokens(self.weight):
            return int4_product(x.contiguous(), self.weight, bias=self.bias)
        return F.linear(x, self._widened(self.weight), self.bias)
