"""Matrix-vector products for decoding: one token (or a few), every weight streamed once.

Not registered operators: the runtime's fused decode step calls them directly. One kernel serves all forms,

    y = f( (x * (g + b)) W^T * rsqrt(mean(x^2) + eps) + bias ) + residual

where the RMS normalisation (g, b, eps), the bias, the gated activation f and the residual are each optional. The
normalisation costs nothing extra: its scale is one factor a token and is applied after the product. With
programmatic dependent launch a kernel loads its first weights while the kernel before it still runs.

bf16 or fp16 weights, float32 accumulation. CUDA only, or Triton's interpreter with fp16.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.triton_support import interpreting, tl, triton


@triton.jit
def _skinny_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K], or [2N, K] when GATED: gate rows, then up rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    N,
    K,
    eps,
    norm_bias,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    inside = rows < N
    weights = weight_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    ups = weights + N.to(tl.int64) * K
    here = columns < K
    w = _tile(weights, inside, here, EVEN)
    u = _tile(ups, inside, here, EVEN) if GATED else w
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        here = start + columns < K
        following = start + BLOCK_K + columns < K
        next_w = _tile(weights + start + BLOCK_K, inside, following, False)
        next_u = _tile(ups + start + BLOCK_K, inside, following, False) if GATED else next_w
        x = tl.load(x_ptr + token * K + start + columns, mask=here, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + columns, mask=here, other=0.0).to(tl.float32) + norm_bias
        total += w.to(tl.float32) * x[None, :]
        if GATED:
            total_up += u.to(tl.float32) * x[None, :]
        w = next_w
        u = next_u
    y = tl.sum(total, 1)
    up = tl.sum(total_up, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        y *= scale
        up *= scale
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    if RESIDUAL:
        y += tl.load(residual_ptr + token * N + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + rows, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(pointers, inside, here, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=inside[:, None] & here[None, :], other=0.0, eviction_policy="evict_first")


@dataclass(frozen=True)
class Tile:
    """How one product is cut: rows and columns that a program holds at once, and its warps."""

    rows: int
    columns: int
    warps: int


def tile_for(rows: int, gated: bool) -> Tile:
    """The tile for a weight of so many rows.

    Best of 15 tiles on one H200 with dependent launch: 8 x 512 for projections of 17 to 117 MB (2.8 to 4.1 TB/s, cuBLAS
    2.1 to 3.7), 4 x 1024 for gated pairs (3.8 TB/s, cuBLAS 4.2 without the activation) and for heads (4.2 to 4.6 TB/s).
    """
    if gated or rows > 65536:
        return Tile(4, 1024, 4)
    return Tile(8, 512, 8)


def skinny_linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K], gated: [2N, K]
    *,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    norm_bias: float = 0.0,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    gated: bool = False,
    out: torch.Tensor | None = None,  # [T, N]
    tile: Tile | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """See the module's formula. `gated` takes SiLU of the first N rows' product times the other N rows'.

    Meant for T up to 4: every token reads the weights again (from L2, mostly). Returns [T, N] in x's dtype.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if weight.shape[1] != k or not weight.is_contiguous() or not x.is_contiguous():
        raise ValueError(f"skinny_linear: contiguous x [T, K] and weight [N, K], got {x.shape} and {weight.shape}")
    if gated and bias is not None:
        raise ValueError("skinny_linear: a gated product takes no bias")
    out = x.new_empty(tokens, n) if out is None else out
    tile = tile or tile_for(n, gated)
    pdl = pdl and not interpreting()
    _skinny_kernel[(triton.cdiv(n, tile.rows), tokens)](
        x, weight, out, norm_weight, bias, residual, n, k, eps, norm_bias,
        BLOCK_N=tile.rows, BLOCK_K=tile.columns, NORM=norm_weight is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, GATED=gated, EVEN=n % tile.rows == 0 and k >= tile.columns, PDL=pdl,
        num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
