"""Layers of a GPU whose weights stay 4-bit integers: linear ones and experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardwise.ops.linear.int4_many import int4_product, most_tokens
from shardwise.ops.moe.grouped import grouped_moe
from shardwise.ops.moe.int4 import PAIRS_OF_EXPERT, grouped_int4_experts
from shardwise.ops.quantization.int4_weight import Int4Stack, Int4Weight
from shardwise.parallel.packed_linear import PackedLinear


class Int4Linear(PackedLinear[Int4Weight]):
    """A linear layer whose weight stays in 4 bits."""

    @property
    def most_packed(self) -> int:
        return most_tokens(self.weight)

    def packed_product(self, x: Tensor) -> Tensor:
        return int4_product(x, self.weight, bias=self.bias)


class Int4Experts:
    """The local experts with weights that stay in 4 bits, gated by SiLU: up_gate [E, 2I, H] (up rows, then gate rows),
    down [E, H, I].

    experts  of the model, on all ranks
    widened  gives stacks as plain ones, for many tokens
    """

    is_fused = True
    """One call computes all experts, which a CUDA graph can hold."""

    def __init__(
        self,
        *,
        up_gate: Int4Stack,
        down: Int4Stack,
        experts: int,
        widened: Callable[[Int4Stack, Int4Stack], Sequence[Tensor]],
    ):
        self.up_gate, self.down = up_gate, down
        self._most_pairs, self._widened = PAIRS_OF_EXPERT * experts, widened

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K] of local experts (others are skipped), weights [T, K] -> partial sum [T, H]."""
        x = x.contiguous()
        if not x.shape[0]:
            return torch.zeros_like(x)
        if ids.numel() <= self._most_pairs:
            return grouped_int4_experts(x, ids, weights, self.up_gate, self.down)
        up_gate, down = self._widened(self.up_gate, self.down)
        return grouped_moe(x, ids, weights, up_gate, down, "silu")
