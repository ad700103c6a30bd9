"""Matrix-vector products for decoding: one token (or a few), every weight streamed once.

Not registered operators: the runtime's fused decode step calls them directly. One kernel serves all forms,

    y = f( (x * g) W^T * rsqrt(mean(x^2) + eps) + bias ) + residual

where the RMS normalisation (g, eps), the bias, the gated activation f and the residual are each optional. The
normalisation costs nothing extra: its scale is one factor a token and is applied after the product. With programmatic
dependent launch a kernel fetches its first weights while the kernel before it still runs.

bf16, fp16 or float32 weights, float32 accumulation. CUDA only, or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass, replace

import torch

from shardwise.ops.linear.decode_kernels import gate_kernel, skinny_kernel
from shardwise.ops.triton_support import interpreting, triton

MAX_TOKENS = 4
"""A program holds a sum for each token and each weight of its tile; more would leave the registers."""


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
    early: bool = False
    """With one stage: the next tile's loads are issued before this tile's sums, which takes registers."""
    whole: bool = False
    """With one stage: all tiles of a program's rows wait in registers, loaded while the kernel before still runs."""

    @property
    def columns(self) -> int:
        return 256 * self.warps


def tile_for(rows: int, columns: int, gated: bool, tokens: int = 1) -> Tile:
    """The tile for a weight of so many rows and columns, within 5 % of the best of sweeps on an H100 and an H200.

    Much to read: tall tiles, whose loads cover the way to memory, or several on their way through shared memory.
    Little: short programs, so that all multiprocessors have some. More tokens take registers, so fewer rows, not swept.
    Early loads pay where tiles are low (3 % of a step of gpt-oss on an H200), and cost where they are tall. Whole rows
    in registers, which load while attention or a sum over ranks leaves the memory idle, took 0.5 to 1.5 % off whole
    steps on H100s (gpt-oss-20b on one, gpt-oss-120b and Llama-3.1-8B on two). Tall tiles are for rows that run at once,
    or in several full waves: those of [4608, 18432] took 54 µs on an H200, low ones 41. Whole rows of 2048 columns took
    2.6 % off a step of Qwen3-Next there, whose layers begin with [12352, 2048].
    """
    if rows <= 512:
        return Tile(1, 8, early=tokens == 1)
    even = columns % 1024 == 0
    if rows > 65536:
        tile = Tile(8, 4 if even else 2, stages=5)
    elif gated:
        tile = Tile(4, 4, stages=3)
    elif rows * columns > _MUCH and even and columns <= 2048 and tokens == 1:
        tile = Tile(4, 4, whole=True)
    elif rows * columns > _MUCH and even:
        spills = rows > _WAVE and -rows % _WAVE > 0.3 * rows
        tile = Tile(8, 2) if rows > columns else Tile(2, 4) if spills else Tile(8, 4)
    elif rows * columns > _MUCH:
        tile = Tile(2, 4, whole=columns <= 5120 and tokens == 1)
    else:
        tile = Tile(2, 4) if columns > _WHOLE or tokens > 1 else Tile(4, 4, whole=True)
    if tokens == 1:
        return replace(tile, early=tile.stages == 1 and tile.rows <= 4 and not tile.whole)
    return replace(tile, rows=min(tile.rows, 2 if gated else 4), stages=1)


_MUCH, _WHOLE = 15_000_000, 4096
"""Weights; columns of which a thread holds all that its rows have."""
_WAVE = 8 * 4 * 132
"""Rows that run at once in tiles of eight, four programs to each multiprocessor of an H100 or H200."""


def skinny_linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [N, K], gated: [2N, K]
    *,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    normed: torch.Tensor | None = None,  # [T, K]
    gated: bool = False,
    gelu: bool = False,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """See the module's formula, for T from 1 to MAX_TOKENS. Returns [T, N] in `out_dtype`, or x's dtype.

    `gated` takes SiLU of the first N rows' product times the other N rows'; `gelu`: GELU's tanh form instead. x after
    the norm is written to `normed`.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    if weight.shape[1] != k or not weight.is_contiguous() or not x.is_contiguous():
        raise ValueError(f"skinny_linear: contiguous x [T, K] and weight [N, K], got {x.shape} and {weight.shape}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"skinny_linear: {tokens} tokens; legal: 1 to {MAX_TOKENS}")
    if gated and bias is not None:
        raise ValueError("skinny_linear: a gated product takes no bias")
    if gelu and not gated:
        raise ValueError("skinny_linear: gelu is the activation of a gated product")
    out = torch.empty(tokens, n, dtype=out_dtype or x.dtype, device=x.device)
    tile = tile or tile_for(n, k, gated, tokens)
    pdl = pdl and not interpreting()
    skinny_kernel[(triton.cdiv(n, tile.rows),)](
        x, weight, out, norm_weight, bias, residual, normed, n, k, eps,
        TOKENS=tokens, BLOCK_N=tile.rows, BLOCK_K=tile.columns, STAGES=tile.stages,
        WHOLE=triton.cdiv(k, tile.columns) if tile.whole else 0, EARLY=tile.early,
        NORM=norm_weight is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        GELU=gelu, KEEP=normed is not None, EVEN_N=n % tile.rows == 0, EVEN_K=k % tile.columns == 0,
        PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def gated_activation(both: torch.Tensor, *, gelu: bool = False, pdl: bool = False) -> torch.Tensor:
    """silu(gate) * up of [T, 2N] whose first N columns are gates -> [T, N]; `gelu`: GELU's tanh form instead."""
    tokens, size = both.shape[0], both.shape[1] // 2
    out, block, pdl = both.new_empty(tokens, size), 1024, pdl and not interpreting()
    gate_kernel[(triton.cdiv(size, block), tokens)](
        both, out, size, BLOCK=block, GELU=gelu, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out
