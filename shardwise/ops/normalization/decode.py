"""Norms of a decode step that no product takes in: as a block's result joins the residual, and of all heads at once.

Not registered operators: the runtime's fused decode step calls them directly. Weights are fetched while the kernel
before still runs (programmatic dependent launch). Statistics are float32. CUDA, or Triton's interpreter.
"""

# Triton's language, not Python's, where the kernels' types are concerned.
# mypy: disable-error-code="assignment"

from dataclasses import dataclass

import torch

from shardwise.ops.triton_support import await_predecessor, interpreting, tl, triton

_NONE, _RMS, _LAYER = 0, 1, 2
"""Kinds of norm."""


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm of rows [H], or a layer norm where `centred`: weight [H], bias [H] or None."""

    weight: torch.Tensor
    eps: float
    bias: torch.Tensor | None = None
    centred: bool = False


@triton.jit
def _factors(weight_ptr, bias_ptr, column, inside, KIND: tl.constexpr, BIAS: tl.constexpr):
    """Weight and bias of a norm, float32 [BLOCK]; zero where there is none."""
    weight = 0.0
    bias = 0.0
    if KIND > 0:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _normed(x, weight, bias, inside, eps, SIZE: tl.constexpr, KIND: tl.constexpr):
    """A row [BLOCK], zero outside, normed."""
    if KIND == 2:
        x = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight + bias


@triton.jit(do_not_specialize=["multiplier", "post_eps", "eps"])
def join_kernel(
    partial_ptr,  # [B, H]
    residual_ptr,  # [B, H]
    post_ptr,  # [H]
    post_bias_ptr,  # [H]
    norm_ptr,  # [H]
    bias_ptr,  # [H]
    multiplier,
    post_eps,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    POST: tl.constexpr,
    POST_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """POST, NORM: 0 no norm, 1 RMS, 2 layer norm."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    post, post_bias = _factors(post_ptr, post_bias_ptr, column, inside, POST, POST_BIAS)
    weight, bias = _factors(norm_ptr, bias_ptr, column, inside, NORM, BIAS)
    await_predecessor(PDL)
    x = tl.load(partial_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if POST > 0:
        x = _normed(x, post, post_bias, inside, post_eps, SIZE, POST)
    total = (residual + x * multiplier).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + at, total, mask=inside)
    if NORM > 0:
        normed = _normed(total.to(tl.float32), weight, bias, inside, eps, SIZE, NORM)
        tl.store(partial_ptr + at, normed.to(partial_ptr.dtype.element_ty), mask=inside)


def join(
    partial: torch.Tensor,  # [B, H], overwritten
    residual: torch.Tensor,  # [B, H], to which it is added
    *,
    post: RowNorm | None = None,
    multiplier: float = 1.0,
    norm: RowNorm | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """residual += multiplier * post(partial), and norm(residual) [B, H]: without a norm the residual itself.

    Both contiguous.
    """
    (batch, size), pdl = partial.shape, pdl and not interpreting()
    if residual.shape != partial.shape or not (partial.is_contiguous() and residual.is_contiguous()):
        raise ValueError(f"join: contiguous tensors of one shape, came {partial.shape} and {residual.shape}")
    block = triton.next_power_of_2(size)
    join_kernel[(batch,)](
        partial, residual, *_tensors(post), *_tensors(norm), multiplier, post.eps if post else 0.0,
        norm.eps if norm else 0.0, SIZE=size, BLOCK=block, POST=_kind(post), POST_BIAS=_tensors(post)[1] is not None,
        NORM=_kind(norm), BIAS=_tensors(norm)[1] is not None, PDL=pdl, num_warps=16 if block > 4096 else 8,
        launch_pdl=pdl,
    )  # fmt: skip
    return residual if norm is None else partial


def _kind(norm: RowNorm | None) -> int:
    return _NONE if norm is None else _LAYER if norm.centred else _RMS


def _tensors(norm: RowNorm | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)


@triton.jit(do_not_specialize=["eps"])
def heads_kernel(
    qkv_ptr,  # [B, columns]: queries, keys, and what stays as it is
    weight_ptr,  # [(N + Nkv) D]
    share_ptr,  # float32 [N + Nkv]
    mean_ptr,  # float32 [B, 2]
    columns,
    q_columns,
    k_columns,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    MEASURE: tl.constexpr,
    APPLY: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)  # 0: queries, 1: keys
    column = tl.arange(0, BLOCK)
    inside = column < tl.where(part == 0, q_columns, k_columns)
    column += part * q_columns
    weight = 1.0
    share = 1.0
    if MEASURE:
        share = tl.load(share_ptr + column // D, mask=inside, other=0.0)
    if APPLY:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    await_predecessor(PDL)
    at = qkv_ptr + row.to(tl.int64) * columns + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x * share, 0) if MEASURE else tl.load(mean_ptr + row * 2 + part)
    if APPLY:
        tl.store(at, (x * tl.rsqrt(mean + eps) * weight).to(qkv_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(mean_ptr + row * 2 + part, mean)


@dataclass(frozen=True, kw_only=True)
class AllHeads:
    """RMS norms of all query heads at once and of all key heads at once, in place in a projection's rows [B, columns].

    weight  [(N + Nkv) D], of this rank's queries and then of its keys
    share   float32 [N + Nkv]: what a head's sum of squares counts in the mean over the model's queries or keys
    heads   N and Nkv of this rank
    """

    weight: torch.Tensor
    share: torch.Tensor
    heads: tuple[int, int]
    eps: float

    def __call__(self, qkv: torch.Tensor, *, pdl: bool = False) -> None:
        """Where this rank has all heads."""
        self._launch(qkv, None, True, True, pdl)

    def means(self, qkv: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
        """float32 [B, 2]: this rank's part of the mean squares of queries and of keys."""
        means = torch.empty(qkv.shape[0], 2, dtype=torch.float32, device=qkv.device)
        self._launch(qkv, means, True, False, pdl)
        return means

    def apply(self, qkv: torch.Tensor, means: torch.Tensor, *, pdl: bool = False) -> None:
        """By the mean squares of all ranks' heads."""
        self._launch(qkv, means, False, True, pdl)

    def _launch(self, qkv: torch.Tensor, means: torch.Tensor | None, measure: bool, apply: bool, pdl: bool) -> None:
        size, pdl = len(self.weight) // sum(self.heads), pdl and not interpreting()
        if not qkv.is_contiguous() or qkv.shape[1] < len(self.weight):
            raise ValueError(f"AllHeads: contiguous rows of {len(self.weight)} columns or more, came {qkv.shape}")
        q_columns, k_columns = (count * size for count in self.heads)
        block = triton.next_power_of_2(max(q_columns, k_columns))
        heads_kernel[(qkv.shape[0], 2)](
            qkv, self.weight, self.share, means, qkv.shape[1], q_columns, k_columns, self.eps, D=size, BLOCK=block,
            MEASURE=measure, APPLY=apply, PDL=pdl, num_warps=16 if block > 4096 else 8, launch_pdl=pdl,
        )  # fmt: skip
