"""What passes between the blocks of the decode step, and how a block's result joins it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops.linear.decode import gated_activation, skinny_linear
from shardwise.ops.linear.float8 import few_float8, skinny_float8
from shardwise.ops.linear.int4 import few_int4
from shardwise.ops.linear.int4_many import int4_product
from shardwise.ops.normalization.decode import RowNorm, join
from shardwise.ops.normalization.triton import triton_rms_norm
from shardwise.ops.quantization.float8 import Float8Weight
from shardwise.ops.quantization.int4_weight import Int4Weight
from shardwise.parallel.layers import LayerNorm, Linear, LinearLike, Norm, ResidualNorm
from shardwise.parallel.packed_linear import PackedLinear

SKINNY_ROWS = 1
"""Most tokens for which reading the weights once in matrix-vector products beats a matrix product. On an H200 gate
and up of Llama-3.1-8B took 88 µs for two tokens in the former, and 62 µs for 64 in the latter."""


@dataclass(frozen=True)
class Product:
    """A linear layer with its weight as rows [out, in], which the kernels stream."""

    weight: Tensor | Float8Weight | Int4Weight
    bias: Tensor | None

    @staticmethod
    def takes(linear: LinearLike) -> bool:
        """Other weights that stay quantised are the CPU's."""
        return isinstance(linear, Linear | PackedLinear)

    @classmethod
    def of(cls, linear: LinearLike) -> "Product":
        if isinstance(linear, PackedLinear):
            return cls(linear.weight, linear.bias)
        assert isinstance(linear, Linear)
        return cls(linear.weight.t().contiguous(), linear.bias)


@dataclass(frozen=True)
class Stream:
    """The activations between two blocks: `x`, still to be normed by `norm` if there is one (an RMS norm), and the
    residual."""

    x: Tensor
    residual: Tensor
    norm: Norm | None = None

    @property
    def is_skinny(self) -> bool:
        return self.x.shape[0] <= SKINNY_ROWS

    def normed(self) -> Tensor:
        return self.x if self.norm is None else triton_rms_norm(self.x, self.norm.weight, self.norm.eps)


def joined(partial: Tensor, residual: Tensor, joining: ResidualNorm, *, pdl: bool) -> Stream:
    """The sum over the group, the residual and the norm; both arguments may be overwritten."""
    if joining.is_plain:
        return Stream(*joining(partial, residual))
    if joining.group.size > 1:
        joining.group.all_reduce(partial, out=partial)
    post, norm = _row_norm(joining.post), _row_norm(joining.norm)
    return Stream(join(partial, residual, post=post, multiplier=joining.multiplier, norm=norm, pdl=pdl), residual)


def _row_norm(norm: Norm | None) -> RowNorm | None:
    if norm is None:
        return None
    centred = isinstance(norm, LayerNorm)
    return RowNorm(norm.weight, norm.eps, norm.bias if isinstance(norm, LayerNorm) else None, centred)


def product(weights: Product, stream: Stream, *, dtype: torch.dtype | None = None, pdl: bool) -> Tensor:
    """`dtype`: of the result where that costs nothing."""
    if not isinstance(weights.weight, Tensor):
        return _packed_product(weights, stream, pdl=pdl)
    if not stream.is_skinny:
        return F.linear(stream.normed(), weights.weight, weights.bias)
    return skinny_linear(stream.x, weights.weight, **_norm_of(stream), bias=weights.bias, out_dtype=dtype, pdl=pdl)


def gated_product(gate_up: Product, stream: Stream, *, gelu: bool, pdl: bool) -> Tensor:
    """silu(gate) * up of two products that are one matrix; `gelu`: GELU's tanh form instead."""
    if not isinstance(gate_up.weight, Tensor):
        assert not gelu
        return _packed_product(gate_up, stream, gated=True, pdl=pdl)
    if not stream.is_skinny:
        return gated_activation(F.linear(stream.normed(), gate_up.weight), gelu=gelu, pdl=pdl)
    return skinny_linear(stream.x, gate_up.weight, **_norm_of(stream), gated=True, gelu=gelu, pdl=pdl)


def row_product(weights: Product, x: Tensor, residual: Tensor, joining: ResidualNorm, *, pdl: bool) -> Stream:
    """The row-parallel product, its sum over the group, the residual, and the norm now or with the next product."""
    if joining.group.size == 1 and joining.is_plain and x.shape[0] <= SKINNY_ROWS:
        summed = added_product(weights, x, residual, pdl=pdl)
        return Stream(summed, summed, joining.norm)
    return joined(product(weights, Stream(x, x), pdl=pdl), residual, joining, pdl=pdl)


def added_product(weights: Product, x: Tensor, total: Tensor | None, *, pdl: bool) -> Tensor:
    """The product, plus `total` where there is one."""
    if not isinstance(weights.weight, Tensor):
        return _packed_product(weights, Stream(x, x), total=total, pdl=pdl)
    if x.shape[0] <= SKINNY_ROWS:
        return skinny_linear(x, weights.weight, bias=weights.bias, residual=total, pdl=pdl)
    if total is None:
        return F.linear(x, weights.weight, weights.bias)
    return torch.addmm(total if weights.bias is None else total + weights.bias, x, weights.weight.t())


def _packed_product(
    weights: Product, stream: Stream, *, gated: bool = False, total: Tensor | None = None, pdl: bool
) -> Tensor:
    weight, bias = weights.weight, weights.bias
    if isinstance(weight, Int4Weight):
        if stream.is_skinny:
            return few_int4(stream.x, weight, **_norm_of(stream), bias=bias, residual=total, gated=gated)
        return int4_product(stream.normed().contiguous(), weight, bias=bias, residual=total, gated=gated, pdl=pdl)
    assert isinstance(weight, Float8Weight)
    if stream.is_skinny:
        return skinny_float8(stream.x, weight, **_norm_of(stream), bias=bias, residual=total, gated=gated, pdl=pdl)
    return few_float8(stream.normed(), weight, bias=bias, residual=total, gated=gated)


def _norm_of(stream: Stream) -> dict:
    norm = stream.norm
    return {} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}
