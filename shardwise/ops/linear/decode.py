"""Matrix-vector products for decoding: one token (or a few), every weight streamed once.

Not registered operators: the runtime's fused decode step calls them directly. One kernel serves all forms,

    y = f( (x * (g + b)) W^T * rsqrt(mean(x^2) + eps) + bias ) + residual

where the RMS normalisation (g, b, eps), the bias, the gated activation f and the residual are each optional. The
normalisation costs nothing extra: its scale is one factor a token and is applied after the product. With programmatic
dependent launch a kernel fetches its first weights while the kernel before it still runs.

bf16, fp16 or float32 weights, float32 accumulation. CUDA only, or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.ptx import prefetch_to_l2
from shardwise.ops.triton_support import interpreting, tl, triton

MAX_TOKENS = 4
"""A program holds a sum for each token and each weight of its tile; more would leave the registers."""


@triton.jit
def _tile(pointers, inside, here, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=inside[:, None] & here[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _token(x_ptr, norm, token: tl.constexpr, K, columns, here, NORM: tl.constexpr):
    """A token's columns in float32, times the norm's weights, and their squares."""
    x = tl.load(x_ptr + token * K + columns, mask=here, other=0.0).to(tl.float32)
    squares = x * x
    if NORM:
        x *= norm
    return x, squares


@triton.jit
def _add(totals, products, squares, w, u, x_ptr, norm_ptr, norm_bias, K, columns, here,
         TOKENS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """One tile's part of every sum."""
    norm = tl.load(norm_ptr + columns, mask=here, other=0.0).to(tl.float32) + norm_bias if NORM else 1.0
    w = w.to(tl.float32)
    u = u.to(tl.float32)
    new_totals = ()
    new_products = ()
    new_squares = ()
    for token in tl.static_range(TOKENS):
        x, square = _token(x_ptr, norm, token, K, columns, here, NORM)
        new_totals = new_totals + (totals[token] + w * x[None, :],)
        new_products = new_products + (products[token] + u * x[None, :] if GATED else products[token],)
        new_squares = new_squares + (squares[token] + square if NORM else squares[token],)
    return new_totals, new_products, new_squares


@triton.jit(do_not_specialize=["eps", "norm_bias"])
def skinny_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or [2N, K] when GATED: gate rows, then up rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    normed_ptr,  # [T, K]
    N,
    K,
    eps,
    norm_bias,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    inside = rows < N
    weights = weight_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    ups = weights + N.to(tl.int64) * K
    if PREFETCH:
        slab = weight_ptr + first.to(tl.int64) * K
        nbytes = tl.minimum(BLOCK_N, N - first) * K * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_to_l2(slab, nbytes)
        if GATED:
            prefetch_to_l2(slab + N.to(tl.int64) * K, nbytes)
    w = tl.zeros([BLOCK_N, BLOCK_K], weight_ptr.dtype.element_ty)
    u = w
    if STAGES == 1:  # the first tile waits in registers
        w = _tile(weights, inside, columns < K, EVEN_N and EVEN_K)
        u = _tile(ups, inside, columns < K, EVEN_N and EVEN_K) if GATED else w
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    totals = ()
    products = ()
    squares = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        products = products + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32) if GATED else 0.0,)
        squares = squares + (tl.zeros([BLOCK_K], tl.float32) if NORM else 0.0,)
    if STAGES == 1:
        for start in range(0, K, BLOCK_K):
            following = start + BLOCK_K + columns < K
            next_w = _tile(weights + start + BLOCK_K, inside, following, False)
            next_u = _tile(ups + start + BLOCK_K, inside, following, False) if GATED else next_w
            totals, products, squares = _add(
                totals, products, squares, w, u, x_ptr, norm_ptr, norm_bias, K, start + columns, start + columns < K,
                TOKENS, NORM, GATED,
            )  # fmt: skip
            w = next_w
            u = next_u
    else:
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            here = start + columns < K
            w = _tile(weights + start, inside, here, EVEN_N and EVEN_K)
            u = _tile(ups + start, inside, here, EVEN_N and EVEN_K) if GATED else w
            totals, products, squares = _add(
                totals, products, squares, w, u, x_ptr, norm_ptr, norm_bias, K, start + columns, here,
                TOKENS, NORM, GATED,
            )  # fmt: skip
    for token in tl.static_range(TOKENS):
        y = tl.sum(totals[token], 1)
        scale = tl.rsqrt(tl.sum(squares[token], 0) / K + eps) if NORM else 1.0
        y *= scale
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            y = y / (1.0 + tl.exp(-y)) * (tl.sum(products[token], 1) * scale)
        if RESIDUAL:
            y += tl.load(residual_ptr + token * N + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * N + rows, y.to(out_ptr.dtype.element_ty), mask=inside)
        if KEEP and tl.program_id(0) == 0:
            _keep(x_ptr + token * K, normed_ptr + token * K, norm_ptr, norm_bias, scale, K, BLOCK_K, NORM)


@triton.jit
def _keep(x_ptr, normed_ptr, norm_ptr, norm_bias, scale, K, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """Write a normed token down, for kernels that would have to norm it again."""
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
        if NORM:
            x *= scale * (tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32) + norm_bias)
        tl.store(normed_ptr + columns, x.to(normed_ptr.dtype.element_ty), mask=columns < K)


@dataclass(frozen=True)
class Tile:
    """How one product is cut.

    A program's warps lie side by side along the columns, eight to a thread, so that every thread finds its part of x
    by itself: with any other shape x goes through shared memory, with barriers, in every step.
    """

    rows: int
    warps: int
    stages: int = 1
    """1: the next tile waits in registers; more: that many tiles wait in shared memory."""
    prefetch: bool = False
    """Ask for all rows of a program to come to the L2 cache while the kernel before still runs."""

    @property
    def columns(self) -> int:
        return 256 * self.warps


def tile_for(rows: int, gated: bool, tokens: int = 1) -> Tile:
    """The tile for a weight of so many rows; more tokens take registers, so fewer rows."""
    height = 4 if tokens <= 2 or not gated else 2
    return Tile(height, 4, prefetch=rows <= 65536)


def skinny_linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K], gated: [2N, K]
    *,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    norm_bias: float = 0.0,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    normed: torch.Tensor | None = None,  # [T, K]
    gated: bool = False,
    out: torch.Tensor | None = None,  # [T, N]
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """See the module's formula, for T from 1 to MAX_TOKENS. Returns [T, N] in `out_dtype`, or x's dtype.

    `gated` takes SiLU of the first N rows' product times the other N rows'. x after the norm is written to `normed`.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if weight.shape[1] != k or not weight.is_contiguous() or not x.is_contiguous():
        raise ValueError(f"skinny_linear: contiguous x [T, K] and weight [N, K], got {x.shape} and {weight.shape}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"skinny_linear: {tokens} tokens; legal: 1 to {MAX_TOKENS}")
    if gated and bias is not None:
        raise ValueError("skinny_linear: a gated product takes no bias")
    out = torch.empty(tokens, n, dtype=out_dtype or x.dtype, device=x.device) if out is None else out
    tile = tile or tile_for(n, gated, tokens)
    pdl = pdl and not interpreting()
    skinny_kernel[(triton.cdiv(n, tile.rows),)](
        x, weight, out, norm_weight, bias, residual, normed, n, k, eps, norm_bias,
        TOKENS=tokens, BLOCK_N=tile.rows, BLOCK_K=tile.columns, STAGES=tile.stages,
        PREFETCH=tile.prefetch and pdl and k * weight.element_size() % 16 == 0,
        NORM=norm_weight is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        KEEP=normed is not None, EVEN_N=n % tile.rows == 0, EVEN_K=k % tile.columns == 0, PDL=pdl,
        num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
