"""Mixture of experts: this rank's experts, each cut over moe_tp, and the shared expert, cut over tp.

Every rank routes all tokens of its tensor-parallel group and computes what its experts add, a partial sum that the
layer's one all-reduce completes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.moe.contract import SILU
from shardwise.ops.moe.reference import run_experts, swiglu_clamped
from shardwise.ops.moe.triton import triton_moe_fused
from shardwise.parallel.layers import LinearLike
from shardwise.parallel.routing import route
from shardwise.sharding.spec import Routing


@dataclass(frozen=True, kw_only=True)
class GatedUnit:
    """What lies between the two matrices of a gated expert: (gate, up) -> hidden."""

    activation: Callable[[Tensor], Tensor]
    alpha: float = 1.0
    limit: float | None = None
    """With a limit: gpt-oss' clamped form, gate * sigmoid(alpha * gate) * (up + 1)."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is not None:
            return swiglu_clamped(gate, up, self.alpha, self.limit)
        return self.activation(gate) * up

    @property
    def is_silu(self) -> bool:
        return self.limit is None and self.activation is F.silu


class Experts:
    """The local experts' weights, stacked: up_gate [E, 2I, H] (up rows, then gate rows), down [E, H, I], biases."""

    def __init__(
        self,
        *,
        up_gate: Tensor,
        down: Tensor,
        unit: GatedUnit,
        up_gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ):
        self.up_gate, self.down, self.unit = up_gate, down, unit
        self.up_gate_bias, self.down_bias = up_gate_bias, down_bias
        self._fused = up_gate.is_cuda and unit.is_silu and up_gate_bias is None and down_bias is None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K] of local experts (others are skipped), weights [T, K] -> partial sum [T, H]."""
        if self._fused:
            return triton_moe_fused(x, ids, weights, self.up_gate, self.down, is_gated_mlp=True, act_fn=SILU)
        return run_experts("experts", x, ids, weights, self.down.shape[0], self._one, "", 0, False)

    def _one(self, expert: int, rows: Tensor) -> Tensor:
        up_gate_bias = None if self.up_gate_bias is None else self.up_gate_bias[expert]
        up, gate = F.linear(rows, self.up_gate[expert], up_gate_bias).chunk(2, dim=-1)
        down_bias = None if self.down_bias is None else self.down_bias[expert]
        return F.linear(self.unit(gate, up), self.down[expert], down_bias)


class MoeBlock:
    """Router, local experts and shared expert.

    slots   int64 [number of experts of the model]: local slot of each expert, -1 for those of other ranks
    """

    def __init__(
        self,
        *,
        router: LinearLike,
        routing: Routing,
        slots: Tensor,
        experts: Experts,
        correction: Tensor | None = None,
        shared: Callable[[Tensor], Tensor] | None = None,
        shared_gate: LinearLike | None = None,
    ):
        self.router, self.routing, self.correction = router, routing, correction
        self.slots, self.experts = slots, experts
        self.shared, self.shared_gate = shared, shared_gate

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> this rank's partial sum [T, H]."""
        ids, weights = route(self.router(x), self.routing, self.correction)
        out = self.experts(x, self.slots[ids], weights)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(self.shared_gate(x))
        return out + shared
