"""A layer of experts in the decode step: few tokens by matrix-vector products, more by the grouped kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.decode import MAX_TOKENS, skinny_linear
from shardwise.ops.moe import decode
from shardwise.ops.moe.decode import Choice, Gate, Shared, expert_down, expert_up
from shardwise.parallel.decode_stream import Stream, joined
from shardwise.parallel.float8_linear import Float8Experts
from shardwise.parallel.layers import Linear, ResidualNorm
from shardwise.parallel.moe import Experts, MoeBlock, PackedExperts
from shardwise.sharding.spec import Routing

FEW_TOKENS = 4
"""Most tokens for which every token reads its own experts."""


def reason_against(block: MoeBlock) -> str:
    """Why a step cannot hold these experts; empty when it can."""
    experts = block.experts
    if isinstance(experts, Experts) and not experts.is_fused:
        return _reason_against_few(block)  # the layer itself looks at the routing on the host
    return ""


def _reason_against_few(block: MoeBlock) -> str:
    """Why the kernels for few tokens cannot serve this block; empty when they can."""
    routing, experts = block.routing, block.experts
    if not isinstance(block.router, Linear):
        return "the router's weights stay quantised"
    if block.latent is not None:
        return "experts in a width of their own"
    if not _gate_of(experts):
        return "experts with another activation than SiLU"
    if routing.score != "softmax" or routing.groups > 1 or block.correction is not None:
        return "routing by other scores than a softmax, by groups or with a correction"
    if not isinstance(experts, PackedExperts):
        return decode.reason_against(len(block.slots), routing.top_k)
    if not (decode.takes_packed(experts.up_gate) and decode.takes_packed(experts.down)):
        return "scales above 2, or a Triton without Gluon"
    return decode.reason_against(len(block.slots), routing.top_k, packed=True)


def _gate_of(experts: Experts | PackedExperts | Float8Experts) -> Gate | None:
    """None for an activation that the kernels for few tokens lack."""
    if isinstance(experts, Float8Experts):
        return Gate()
    unit = experts.unit
    return Gate(unit.alpha, unit.limit) if unit.is_silu or unit.limit is not None else None


def _choice(routing: Routing) -> Choice:
    """A softmax over all that is normalised over the chosen is the softmax over the chosen."""
    return Choice(routing.top_k, routing.normalize or routing.softmax_after_topk, routing.scale)


class ExpertStep:
    """`step(stream, joining, positions)`: routed experts of one layer, summed, joined with the residual.

    Where `most_few` is above 0, the kernels for few tokens have what they take of the block: the router's weights
    `router` [E, H] (a copy) and `bias`, `slots` int32 [E], the `choice` of experts, and the `gate` between products.
    The router's last row is `shared_gate` [1, H], the gate of a shared expert, where there is one.
    """

    def __init__(self, block: MoeBlock, *, shared_gate: Tensor | None = None, pdl: bool):
        self.block, self.pdl = block, pdl
        experts = block.experts
        few = not _reason_against_few(block)
        fused = isinstance(experts, PackedExperts) or experts.is_fused
        self.most_few = (FEW_TOKENS if fused else torch.iinfo(torch.int64).max) if few else 0
        """Most tokens for the kernels for few: all, where no others can be part of a graph."""
        if few:
            assert isinstance(block.router, Linear)
            self.router, self.bias = _with_row(block.router, shared_gate)
            self.slots, self.choice = block.slots.int(), _choice(block.routing)
            self.gate = _gate_of(experts) or Gate()

    def __call__(self, stream: Stream, joining: ResidualNorm, positions: Tensor) -> Stream:
        if joining.group.size == 1 and joining.is_plain and stream.x.shape[0] <= self.most_few:
            summed = self.few(stream, positions, stream.residual)
            return Stream(summed, summed, joining.norm)
        return joined(self.partial(stream, positions, None), stream.residual, joining, pdl=self.pdl)

    def partial(self, stream: Stream, positions: Tensor, total: Tensor | None) -> Tensor:
        """This rank's partial sum [B, H], plus `total` where there is one."""
        if stream.x.shape[0] <= self.most_few:
            return self.few(stream, positions, total)
        partial = self.block(stream.normed())
        return partial if total is None else partial + total

    def few(self, stream: Stream, positions: Tensor, residual: Tensor | None, shared: Tensor | None = None) -> Tensor:
        """Of at most `most_few` tokens: this rank's partial sum, plus `residual` where there is one, and what a gated
        shared expert yields."""
        x, experts = stream.x, self.block.experts
        normed, logits = self._routed(stream)
        gated = None if shared is None else Shared(shared, logits[:, -1])
        logits = logits[:, : len(self.slots)]
        biases = (experts.up_gate_bias, experts.down_bias) if isinstance(experts, Experts) else (None, None)
        routed = expert_up(
            normed,
            logits,
            self.slots,
            self.choice,
            experts.up_gate,
            self.gate,
            bias=biases[0],
            positions=positions,
            pdl=self.pdl,
        )
        return expert_down(
            routed, experts.down, bias=biases[1], residual=residual, shared=gated, dtype=x.dtype, pdl=self.pdl
        )

    def _routed(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normed input, and the router's logits with the shared expert's gate behind them."""
        x, norm = stream.x, stream.norm
        if x.shape[0] > MAX_TOKENS:
            normed = stream.normed()
            return normed, F.linear(normed, self.router, self.bias).float()
        packed = isinstance(self.block.experts, PackedExperts)  # which multiply with 16-bit floats
        normed = torch.empty(x.shape, dtype=x.dtype if packed else torch.float32, device=x.device)
        logits = skinny_linear(
            x,
            self.router,
            norm_weight=norm.weight if norm else None,
            eps=norm.eps if norm else 0.0,
            bias=self.bias,
            normed=normed,
            out_dtype=torch.float32,
            pdl=self.pdl,
        )
        return normed, logits


def _with_row(router: Linear, row: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The router's weights [E, H] and bias, with one more row, without a bias, behind them."""
    weight, bias = router.weight.t(), router.bias
    if row is None:
        return weight.contiguous(), bias
    return torch.cat([weight, row]), bias if bias is None else torch.cat([bias, bias.new_zeros(1)])
