"""Feed-forwards of the decode step that every token passes: dense layers, and the shared expert beside the routed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.decode import skinny_linear
from shardwise.parallel.decode_moe import ExpertStep
from shardwise.parallel.decode_stream import Product, Stream, gated_product, joined, row_product
from shardwise.parallel.layers import GatedMlp, ResidualNorm
from shardwise.parallel.moe import MoeBlock, MoeWithShared

FeedForward = Callable[[Stream, ResidualNorm, Tensor], Stream]
"""(stream, join, positions) -> the stream after the feed-forward, joined with the residual"""


def feed_forward_step(inner: Callable[[Tensor], Tensor], *, pdl: bool) -> FeedForward:
    """Any feed-forward that a step can hold; those without kernels of their own run as they are."""
    if isinstance(inner, MoeBlock):
        return ExpertStep(inner, pdl=pdl)
    if isinstance(inner, MoeWithShared):
        return SharedExpertStep(inner, pdl=pdl)
    gated = _gated(inner, pdl)
    if gated is not None:
        return gated
    return lambda stream, join, positions: joined(inner(stream.normed()), stream.residual, join)


def _gated(inner: object, pdl: bool) -> "GatedStep | None":
    """Kernels for a dense layer that they can serve."""
    if isinstance(inner, GatedMlp) and inner.activation is F.silu and inner.gate_up.bias is None:
        return GatedStep(inner, pdl=pdl)
    return None


class GatedStep:
    """down(silu(gate x) * up x), of a dense layer."""

    def __init__(self, mlp: GatedMlp, *, pdl: bool):
        self.gate_up, self.down, self.pdl = Product.of(mlp.gate_up), Product.of(mlp.down), pdl

    def __call__(self, stream: Stream, join: ResidualNorm, positions: Tensor) -> Stream:
        return row_product(self.down, self.inner(stream), stream.residual, join, pdl=self.pdl)

    def inner(self, stream: Stream) -> Tensor:
        return gated_product(self.gate_up, stream, pdl=self.pdl)

    def added_to(self, total: Tensor | None, inner: Tensor) -> Tensor:
        """The second product of few tokens' `inner`, plus `total` where there is one."""
        return skinny_linear(inner, self.down.weight, bias=self.down.bias, residual=total, pdl=self.pdl)


class SharedExpertStep:
    """Routed experts and the shared one. For one token the sums begin with the shared expert's and need no kernel."""

    def __init__(self, inner: MoeWithShared, *, pdl: bool):
        self.routed, self.shared = ExpertStep(inner.routed, pdl=pdl), inner.shared
        self.dense = _gated(inner.shared.mlp, pdl) if inner.shared.gate is None else None

    def __call__(self, stream: Stream, join: ResidualNorm, positions: Tensor) -> Stream:
        few = stream.x.shape[0] <= self.routed.most_few
        if self.dense is None or not (few and stream.is_skinny):
            return joined(self._partial(stream, few, positions), stream.residual, join)
        alone = join.group.size == 1 and join.is_plain
        shared = self.dense.added_to(stream.residual if alone else None, self.dense.inner(stream))
        summed = self.routed.few(stream, positions, shared)
        return Stream(summed, summed, join.norm) if alone else joined(summed, stream.residual, join)

    def _partial(self, stream: Stream, few: bool, positions: Tensor) -> Tensor:
        """This rank's partial sum [B, H]."""
        normed = Stream(stream.normed(), stream.residual)
        routed = self.routed.partial(stream if few else normed, positions)
        if self.dense is None:
            return routed + self.shared(normed.x)
        inner, down = self.dense.inner(normed), self.dense.down
        shared = routed if down.bias is None else routed + down.bias
        return torch.addmm(shared, inner, down.weight.t())
