"""One-row products of the CPU's decode step: out = factor * (x * norm) W^T, from and into buffers made once.

The factor of a norm costs neither kind an operation: a panel product scales its sum by it, a block product applies it
where it rounds its input.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.parallel.block_linear import BlockLinear
from shardwise.parallel.layers import Linear, LinearLike, Norm

Product = Callable[[float, Tensor], None]
"""Called with the factor and the output buffer, which has `product_shape` of the layer."""


def product_shape(linear: LinearLike) -> tuple[int, ...]:
    """The shape in which a product writes its [1, out]."""
    if isinstance(linear, Linear):
        panels, _, width = linear.panels.shape
        return panels, 1, width
    return 1, linear.out_features


def product(linear: LinearLike, x: Tensor, norm: Norm | None = None) -> Product:
    """For x [1, in]. In float32 weights the norm's are multiplied in: layer and norm, which becomes ones, change."""
    if isinstance(linear, Linear):
        if norm is not None:
            linear.panels.mul_(norm.weight[:, None])
            norm.weight = torch.ones_like(norm.weight)
        return PanelProduct(linear, x)
    assert isinstance(linear, BlockLinear)
    return BlockProduct(linear, x, None if norm is None else norm.weight)


class PanelProduct:
    """Of float32 weights in panels."""

    def __init__(self, linear: Linear, x: Tensor):
        self._panels = linear.panels
        self._x = x.expand(len(linear.panels), *x.shape)
        self._zero = torch.zeros(())

    def __call__(self, factor: float, out: Tensor) -> None:
        torch.baddbmm(self._zero, self._x, self._panels, beta=0, alpha=factor, out=out)


class BlockProduct:
    """Of weights in 4-bit blocks. Without the weight [in] of a norm, the factor is 1."""

    def __init__(self, linear: BlockLinear, x: Tensor, weight: Tensor | None):
        (self._plane,) = linear.planes
        self._x, self._weight = x, weight
        self._rounded = x.new_empty(x.shape, dtype=torch.bfloat16)
        self._zero = torch.zeros(())

    def __call__(self, factor: float, out: Tensor) -> None:
        if self._weight is None:
            self._rounded.copy_(self._x)
        else:
            torch.addcmul(self._zero, self._x, self._weight, value=factor, out=self._rounded)
        out.copy_(self._plane(self._rounded))
