"""Mixture of experts: this rank's experts, each cut over moe_tp, and the shared expert, cut over tp.

Every rank routes all tokens of its tensor-parallel group and computes what its experts add, a partial sum that the
layer's one all-reduce completes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.comm.rank import Groups
from shardwise.ops.moe.choice import MOST_EXPERTS, SCORES, Choice, choose_experts
from shardwise.ops.moe.contract import RELU2, SILU
from shardwise.ops.moe.exchange import dispatch_and_combine
from shardwise.ops.moe.mxfp4 import PackedMixture, mxfp4_moe, packed_moe
from shardwise.ops.moe.mxfp4_layout import PackedMXFP4
from shardwise.ops.moe.reference import run_experts, swiglu_clamped
from shardwise.ops.moe.routing import route_tokens
from shardwise.ops.moe.triton import triton_moe_fused
from shardwise.ops.workspace import Workspace
from shardwise.parallel.float8_linear import Float8Experts
from shardwise.parallel.int4_linear import Int4Experts
from shardwise.parallel.layers import Linear, LinearLike, relu2
from shardwise.parallel.routing import route
from shardwise.parallel.trace import watched
from shardwise.partition import extent, lengths
from shardwise.sharding.spec import Routing


@dataclass(frozen=True, kw_only=True)
class ExpertUnit:
    """What lies between the two matrices of an expert: [T, 2I], up before gate, or [T, I] without gates -> [T, I]."""

    activation: Callable[[Tensor], Tensor]
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    """With a limit: gpt-oss' clamped form, gate * sigmoid(alpha * gate) * (up + 1)."""

    def __call__(self, rows: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(rows)
        up, gate = rows.chunk(2, dim=-1)
        if self.limit is not None:
            return swiglu_clamped(gate, up, self.alpha, self.limit)
        return self.activation(gate) * up

    @property
    def is_silu(self) -> bool:
        return self.gated and self.limit is None and self.activation is F.silu

    @property
    def kernel(self) -> int | None:
        """The operators' number of it; None where they have none."""
        return SILU if self.is_silu else RELU2 if not self.gated and self.activation is relu2 else None


class Experts:
    """The local experts' weights, stacked: up_gate [E, 2I, H] (up rows, then gate rows; [E, I, H] without a gate), down
    [E, H, I], biases."""

    def __init__(
        self,
        *,
        up_gate: Tensor,
        down: Tensor,
        unit: ExpertUnit,
        up_gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ):
        self.up_gate, self.down, self.unit = up_gate, down, unit
        self.up_gate_bias, self.down_bias = up_gate_bias, down_bias
        self.is_fused = up_gate.is_cuda and unit.kernel is not None and up_gate_bias is None and down_bias is None
        """One call computes all experts, which a CUDA graph can hold."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, K] of local experts (others are skipped), weights [T, K] -> partial sum [T, H]."""
        if self.is_fused and self.unit.kernel is not None:
            stacked, act = (self.up_gate, self.down), self.unit.kernel
            return triton_moe_fused(x, ids, weights, *stacked, is_gated_mlp=self.unit.gated, act_fn=act)
        return run_experts("experts", x, ids, weights, self.down.shape[0], self._one, "", 0, False)

    def _one(self, expert: int, rows: Tensor) -> Tensor:
        up_gate_bias = None if self.up_gate_bias is None else self.up_gate_bias[expert]
        inner = self.unit(F.linear(rows, self.up_gate[expert], up_gate_bias))
        down_bias = None if self.down_bias is None else self.down_bias[expert]
        return F.linear(inner, self.down[expert], down_bias)


class PackedExperts:
    """The local experts of gpt-oss as its checkpoints store them, MXFP4 re-laid out for the kernels, biases inside."""

    def __init__(self, *, up_gate: PackedMXFP4, down: PackedMXFP4, unit: ExpertUnit):
        self.up_gate, self.down, self.unit = up_gate, down, unit

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `Experts`."""
        unit = self.unit
        experts = PackedMixture(self.up_gate, self.down, "swiglu", unit.alpha, unit.limit or 0.0)
        return packed_moe(x.contiguous(), ids, weights, experts)

    def routed(self, x: Tensor, router: Linear, bias: Tensor, top_k: int, first: int) -> Tensor:
        """Routing by the same kernels: the largest logits, softmax over these; local experts begin at `first`."""
        up, down, alpha, limit = self.up_gate, self.down, self.unit.alpha, self.unit.limit or 0.0
        return mxfp4_moe(x.contiguous(), router.weight.t(), bias, top_k, up, down, alpha, limit, first)


AnyExperts = Experts | PackedExperts | Float8Experts | Int4Experts


class MoeBlock:
    """Router and local experts.

    slots   int64 [number of experts of the model]: local slot of each expert, -1 for those of other ranks
    first   the first local expert, where they are consecutive
    latent  products into the width that experts work in, and out of it; None: they work at hidden size
    """

    def __init__(
        self,
        *,
        router: LinearLike,
        routing: Routing,
        slots: Tensor,
        experts: AnyExperts,
        first: int | None = None,
        correction: Tensor | None = None,
        latent: tuple[LinearLike, LinearLike] | None = None,
    ):
        self.router, self.routing, self.correction, self.latent = router, routing, correction, latent
        self.slots, self.experts, self.first = slots, experts, first
        self._choice = _kernel_choice(routing, len(slots))
        if isinstance(router, Linear):
            self._bias = router.panels.new_zeros(router.out_features) if router.bias is None else router.bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> this rank's partial sum [T, H]."""
        experts, router, first = self.experts, self.router, self.first
        if first is not None and isinstance(router, Linear) and self._routes_in_kernel(x):
            if isinstance(experts, PackedExperts):
                return experts.routed(x, router, self._bias, self.routing.top_k, first)
            ids, weights = _route_in_kernel(x.contiguous(), router, self._bias, self.routing.top_k)
            return experts(x, ids - first, weights)
        if x.is_cuda and self._choice is not None and not watched():
            chosen = choose_experts(router(x), self.slots, self._choice, self.correction)
            return self.leave(experts(self.enter(x), *chosen))
        return self.leave(self.compute(self.enter(x), *self.choose(x)))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> each token's experts, by their numbers in the model, and weights, both [T, K]."""
        return route(self.router(x), self.routing, self.correction)

    def enter(self, x: Tensor) -> Tensor:
        """[T, H] in the width that the experts work in."""
        return x if self.latent is None else self.latent[0](x)

    def leave(self, summed: Tensor) -> Tensor:
        """What experts add, at hidden size again."""
        return summed if self.latent is None else self.latent[1](summed)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the local ones of these experts add, from and in their width."""
        return self.experts(x, self.slots[ids], weights)

    def _routes_in_kernel(self, x: Tensor) -> bool:
        """Whether the operators' router does what this one does: the largest logits, softmax over these."""
        routing, packed = self.routing, isinstance(self.experts, PackedExperts)
        over_chosen = routing.softmax_after_topk or (routing.score == "softmax" and routing.normalize)
        plain = over_chosen and routing.groups == 1 and routing.scale == 1.0
        plain = plain and self.correction is None and self.latent is None
        sixteen_bit = x.is_cuda and x.dtype != torch.float32  # else its products would be rounded
        return plain and (packed or sixteen_bit) and not watched()  # a watcher is given the routing


def _route_in_kernel(x: Tensor, router: Linear, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Global expert ids and weights, both [T, K]."""
    space = Workspace.of(x.device, x.shape[0])
    found = route_tokens(space, x, router.weight.t(), bias, top_k, 0, router.out_features, _BLOCK)
    return found.ids, found.weights


def _kernel_choice(routing: Routing, experts: int) -> Choice | None:
    """What the kernel that chooses from logits is told; None where it cannot choose so."""
    if routing.score not in SCORES or routing.hash_layer or experts > MOST_EXPERTS:
        return None
    return Choice(
        top_k=routing.top_k,
        score=routing.score,
        normalize=routing.normalize or routing.softmax_after_topk,  # of all, normalised over the chosen
        groups=routing.groups,
        top_groups=routing.top_groups,
        by_two=routing.group_score == "top2_sum",
        scale=routing.scale,
    )


_BLOCK = 16  # of the grouping, which the experts' kernels do again as they need it


class SharedExpert:
    """A dense feed-forward for all tokens, whose output a sigmoid may scale."""

    def __init__(self, *, mlp: Callable[[Tensor], Tensor], gate: LinearLike | None = None):
        self.mlp, self.gate = mlp, gate

    def __call__(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        return out if self.gate is None else out * torch.sigmoid(self.gate(x))


class MoeWithShared:
    """Routed experts and the shared one, in one partial sum."""

    def __init__(self, *, routed: MoeBlock, shared: SharedExpert):
        self.routed, self.shared = routed, shared

    def __call__(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class DataParallelMoe:
    """Experts that all ranks share while attention is data parallel: each attn_dp group brings tokens of its own.

    Each tensor-parallel rank cares for some of its group's tokens; the layer's all-reduce puts them together. Where the
    experts are whole (moe_tp 1), a token travels to the ranks of its experts, and their sums back: all-to-all. Where
    they are cut, every rank has a part in every token: tokens of all groups are gathered, and the sum over the world is
    scattered.

    holders   int64 [number of experts of the model]: the moe_ep rank that has each
    """

    def __init__(
        self,
        *,
        routed: MoeBlock,
        groups: Groups,
        holders: Tensor,
        shared: Callable[[Tensor], Tensor] | None = None,
    ):
        self.routed, self.shared, self.groups, self.holders = routed, shared, groups, holders

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H], T different for each attn_dp group and possibly 0 -> partial sum [T, H]."""
        tp = self.groups.tp
        start, stop = extent(x.shape[0], tp.size, tp.rank)
        out = torch.zeros_like(x)
        out[start:stop] = self._sent(x[start:stop]) if self.groups.moe_tp.size == 1 else self._gathered(x)
        return out if self.shared is None else out + self.shared(x)

    def _sent(self, x: Tensor) -> Tensor:
        """Rows of this rank's own -> what all experts add to them."""
        group, (ids, weights) = self.groups.moe_ep, self.routed.choose(x)
        there = self.holders[ids]
        wanted = torch.stack([(there == rank).any(dim=1) for rank in range(group.size)])
        rows = self.routed.enter(x)
        return self.routed.leave(dispatch_and_combine(group, wanted, rows, ids, weights, self.routed.compute))

    def _gathered(self, x: Tensor) -> Tensor:
        """Rows of the group -> what all experts add to those of this rank's own."""
        groups = self.groups
        mine = torch.tensor([x.shape[0]], dtype=torch.int64)
        counts = groups.attn_dp.all_gather(mine.to(x.device)).tolist()
        everyone = groups.attn_dp.all_gather(x, dim=0, sizes=counts)
        parts = [size for count in counts for size in lengths(count, groups.tp.size)]  # tp is fastest inside attn_dp
        return groups.world.reduce_scatter(self.routed(everyone), dim=0, sizes=parts)
