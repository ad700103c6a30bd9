"""A layer of experts in the decode step: few tokens by matrix-vector products, more by the grouped kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.decode import MAX_TOKENS, skinny_linear
from shardwise.ops.moe import decode
from shardwise.ops.moe.decode import Choice, Gate, SharedExpert, expert_down, expert_up
from shardwise.parallel.decode_stream import Stream, joined
from shardwise.parallel.float8_linear import Float8Experts
from shardwise.parallel.int4_linear import Int4Experts
from shardwise.parallel.layers import Linear, ResidualNorm
from shardwise.parallel.moe import AnyExperts, Experts, MoeBlock, PackedExperts
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
    if isinstance(experts, PackedExperts) and not (
        decode.takes_packed(experts.up_gate) and decode.takes_packed(experts.down)
    ):
        return "scales above 2, or a Triton without Gluon"
    return decode.reason_against(len(block.slots), routing.top_k, decode.most_choices(experts.up_gate))


def _gate_of(experts: AnyExperts) -> Gate | None:
    """None for an activation that the kernels for few tokens lack."""
    if isinstance(experts, Float8Experts | Int4Experts):
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
    They take a `shared` expert with a gate among the chosen ones, where it is of their form: the gate's row [1, H]
    is then the router's last.
    """

    def __init__(self, block: MoeBlock, *, shared: tuple[SharedExpert, Tensor] | None = None, pdl: bool):
        self.block, self.pdl = block, pdl
        self.shared: SharedExpert | None = None
        experts = block.experts
        few = not _reason_against_few(block)
        fused = isinstance(experts, PackedExperts) or experts.is_fused
        self.most_few = (FEW_TOKENS if fused else torch.iinfo(torch.int64).max) if few else 0
        """Most tokens for the kernels for few: all, where no others can be part of a graph."""
        if few:
            assert isinstance(block.router, Linear)
            self.slots, self.choice = block.slots.int(), _choice(block.routing)
            self.gate = _gate_of(experts) or Gate()
            self.router, self.bias = block.router.weight.t().contiguous(), block.router.bias
            plain = self.gate == Gate() and getattr(experts, "up_gate_bias", None) is None
            plain = plain and not decode.reason_against(len(self.slots), self.choice.top_k + 1)
            if shared is not None and plain and shared[0].fits(experts.up_gate, experts.down):
                self.shared = shared[0]
                self.router = torch.cat([self.router, shared[1]])
                self.bias = self.bias if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(1)])

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

    def few(self, stream: Stream, positions: Tensor, residual: Tensor | None) -> Tensor:
        """Of at most `most_few` tokens: this rank's partial sum, plus `residual` where there is one."""
        x, experts = stream.x, self.block.experts
        normed, logits = self._routed(stream)
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
            shared=self.shared,
            pdl=self.pdl,
        )
        return expert_down(
            routed,
            experts.down,
            bias=biases[1],
            residual=residual,
            shared=self.shared,
            dtype=x.dtype,
            pdl=self.pdl,
        )

    def _routed(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normed input, and the router's logits, behind them that of the shared expert's gate."""
        x, norm = stream.x, stream.norm
        if x.shape[0] > MAX_TOKENS:
            normed = stream.normed()
            return normed, F.linear(normed, self.router, self.bias).float()
        packed = decode.is_packed(self.block.experts.up_gate)  # which multiply with 16-bit floats
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
