"""Feed-forwards of the decode step that every token passes: dense layers, and the shared expert beside the routed."""

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear import float8, int4
from shardwise.ops.moe.decode import SharedExpert
from shardwise.ops.quantization.int4_weight import Int4Weight
from shardwise.parallel.decode_moe import ExpertStep
from shardwise.parallel.decode_stream import (
    Product,
    Stream,
    added_product,
    gated_product,
    joined,
    product,
    row_product,
)
from shardwise.parallel.float8_linear import Float8Linear
from shardwise.parallel.int4_linear import Int4Linear
from shardwise.parallel.layers import GatedMlp, Linear, LinearLike, PlainMlp, ResidualNorm, gelu_tanh
from shardwise.parallel.moe import MoeBlock, MoeWithShared


class FeedForward(Protocol):
    def __call__(self, stream: Stream, joining: ResidualNorm, positions: Tensor) -> Stream:
        """The stream after the feed-forward, joined with the residual."""

    def partial(self, stream: Stream, positions: Tensor, total: Tensor | None) -> Tensor:
        """This rank's partial sum [B, H], plus `total` where there is one."""


def feed_forward_step(inner: Callable[[Tensor], Tensor], *, pdl: bool) -> FeedForward:
    """Any feed-forward that a step can hold; those without kernels of their own run as they are."""
    if isinstance(inner, MoeBlock):
        return ExpertStep(inner, pdl=pdl)
    if isinstance(inner, MoeWithShared):
        return SharedExpertStep(inner, pdl=pdl)
    return _dense(inner, pdl) or PlainStep(inner, pdl=pdl)


def _dense(inner: object, pdl: bool) -> "DenseStep | None":
    """Kernels for a dense layer that they can serve."""
    if isinstance(inner, GatedMlp) and inner.gate_up.bias is None and inner.activation in _gates(inner.gate_up):
        return GatedStep(inner, pdl=pdl)
    if isinstance(inner, PlainMlp) and isinstance(inner.up, Linear) and isinstance(inner.down, Linear):
        return UngatedStep(inner, pdl=pdl)
    return None


def _gates(gate_up: LinearLike) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Activations that the kernels of a gated product have for such weights."""
    if isinstance(gate_up, Float8Linear):
        return (F.silu,) if float8.takes_gated(gate_up.weight) else ()
    if isinstance(gate_up, Int4Linear):
        return (F.silu,) if int4.takes_gated(gate_up.weight) else ()
    return F.silu, gelu_tanh


class PlainStep:
    """Layers that run as they are."""

    def __init__(self, inner: Callable[[Tensor], Tensor], *, pdl: bool):
        self._inner, self._pdl = inner, pdl

    def __call__(self, stream: Stream, joining: ResidualNorm, positions: Tensor) -> Stream:
        return joined(self._inner(stream.normed()), stream.residual, joining, pdl=self._pdl)

    def partial(self, stream: Stream, positions: Tensor, total: Tensor | None) -> Tensor:
        partial = self._inner(stream.normed())
        return partial if total is None else partial.add_(total)


class DenseStep:
    """A dense layer: `inner`, which norms as well, then the product `down`."""

    down: Product
    pdl: bool

    def inner(self, stream: Stream) -> Tensor:
        raise NotImplementedError

    def __call__(self, stream: Stream, joining: ResidualNorm, positions: Tensor) -> Stream:
        return row_product(self.down, self.inner(stream), stream.residual, joining, pdl=self.pdl)

    def partial(self, stream: Stream, positions: Tensor, total: Tensor | None) -> Tensor:
        return added_product(self.down, self.inner(stream), total, pdl=self.pdl)


class GatedStep(DenseStep):
    """down(act(gate x) * up x), where act is SiLU or GELU's tanh form."""

    def __init__(self, mlp: GatedMlp, *, pdl: bool):
        self.gate_up, self.down, self.pdl = Product.of(mlp.gate_up), Product.of(mlp.down), pdl
        self.gelu = mlp.activation is gelu_tanh

    def inner(self, stream: Stream) -> Tensor:
        return gated_product(self.gate_up, stream, gelu=self.gelu, pdl=self.pdl)


class UngatedStep(DenseStep):
    """down(act(up x))."""

    def __init__(self, mlp: PlainMlp, *, pdl: bool):
        self.up, self.down, self.pdl = Product.of(mlp.up), Product.of(mlp.down), pdl
        self._activation = mlp.activation

    def inner(self, stream: Stream) -> Tensor:
        return self._activation(product(self.up, stream, pdl=self.pdl))


class SharedExpertStep:
    """Routed experts and the shared one. For few tokens a gated one may be one of the routed experts' kernels; without
    a gate, for one token the sums begin with the shared expert's and need no kernel."""

    def __init__(self, inner: MoeWithShared, *, pdl: bool):
        self.shared, self.pdl = inner.shared, pdl
        self.dense = _dense(inner.shared.mlp, pdl)
        self.routed = ExpertStep(inner.routed, shared=_as_routed(self.dense, inner.shared.gate), pdl=pdl)

    def __call__(self, stream: Stream, joining: ResidualNorm, positions: Tensor) -> Stream:
        alone = joining.group.size == 1 and joining.is_plain
        if self._is_few(stream) and alone:
            summed = self.partial(stream, positions, stream.residual)
            return Stream(summed, summed, joining.norm)
        return joined(self.partial(stream, positions, None), stream.residual, joining, pdl=self.pdl)

    def _is_few(self, stream: Stream) -> bool:
        """Whether kernels for few tokens serve both kinds of experts."""
        if stream.x.shape[0] > self.routed.most_few:
            return False
        ungated = self.dense is not None and self.shared.gate is None
        return self.routed.shared is not None or (ungated and stream.is_skinny)

    def partial(self, stream: Stream, positions: Tensor, total: Tensor | None) -> Tensor:
        if self._is_few(stream):
            if self.routed.shared is None and self.dense is not None:
                total = self.dense.partial(stream, positions, total)
            return self.routed.few(stream, positions, total)
        normed = Stream(stream.normed(), stream.residual)
        routed = self.routed.partial(stream if stream.x.shape[0] <= self.routed.most_few else normed, positions, total)
        if self.dense is None:
            return routed + self.shared(normed.x)
        if self.shared.gate is None:
            return self.dense.partial(normed, positions, routed)
        return routed.addcmul_(self.dense.partial(normed, positions, None), self.shared.gate(normed.x).sigmoid_())


def _as_routed(dense: DenseStep | None, gate: LinearLike | None) -> tuple[SharedExpert, Tensor] | None:
    """The weights of a gated shared expert as one of the routed, and its gate's row."""
    if not isinstance(dense, GatedStep) or dense.gelu or dense.down.bias is not None or not isinstance(gate, Linear):
        return None
    gate_up, down = dense.gate_up.weight, dense.down.weight
    if isinstance(gate_up, Int4Weight) or isinstance(down, Int4Weight):
        return None
    return SharedExpert(gate_up, down), gate.weight.t()
