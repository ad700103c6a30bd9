"""Layers of a GPU whose weights stay float8: linear ones and experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.float8 import MAX_FEW, few_float8
from shardwise.ops.moe.contract import WeightScales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.quantization.float8 import Float8Weight


class Float8Linear:
    """x [T, in] -> x W^T + b [T, out], with a weight that stays float8; x is not quantised.

    widened  gives the weight as a plain matrix, for products of many tokens
    """

    def __init__(self, *, weight: Float8Weight, bias: Tensor | None, widened: Callable[[Float8Weight], Tensor]):
        self.weight, self.bias, self.out_features = weight, bias, weight.shape[0]
        self._widened = widened

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        if x.shape[0] <= MAX_FEW:
            return few_float8(x.contiguous(), self.weight, bias=self.bias)
        return F.linear(x, self._widened(self.weight), self.bias)


class Float8Experts:
    """The local experts with weights that stay float8, gated by SiLU: up_gate [E, 2I, H] (up rows, then gate rows),
    down [E, H, I]."""

    is_fused = True
    """One call computes all experts, which a CUDA graph can hold."""

    def __init__(self, *, up_gate: Float8Weight, down: Float8Weight):
        self.up_gate, self.down = up_gate, down

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K] of local experts (others are skipped), weights [T, K] -> partial sum [T, H]."""
        if not x.shape[0]:
            return torch.zeros_like(x)
        scales = WeightScales(self.up_gate.scales, self.down.scales)
        return grouped_moe(x.contiguous(), ids, weights, self.up_gate.codes, self.down.codes, "silu", scales=scales)
