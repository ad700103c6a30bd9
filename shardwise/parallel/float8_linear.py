"""Layers of a GPU whose weights stay float8: linear ones and experts."""

import torch
from torch import Tensor

from shardwise.ops.linear.float8 import MAX_FEW, few_float8
from shardwise.ops.moe.contract import WeightScales
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.parallel.packed_linear import PackedLinear


class Float8Linear(PackedLinear[Float8Weight]):
    """A linear layer whose weight stays float8."""

    most_packed = MAX_FEW

    def packed_product(self, x: Tensor) -> Tensor:
        return few_float8(x, self.weight, bias=self.bias)


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
