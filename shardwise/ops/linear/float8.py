"""Products with e4m3 weights that stay so: a token or a few, bound by reading them. Activations are not quantised.

Not registered operators: the runtime's layers call them directly. `skinny_float8` has the form of `skinny_linear`,

    y = f( (x * g) W^T * rsqrt(mean(x^2) + eps) + bias ) + residual

and `few_float8`, for more tokens, y = f(x W^T + bias) + residual on the matrix unit, in parts of K where outputs are
few. bf16, fp16 or float32 inputs, float32 sums. CUDA (compute capability 9.0), or Triton's interpreter with fp16 and
float32.
"""

import math
from dataclasses import dataclass

import torch

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.linear.float8_kernels import few_float8_kernel, skinny_float8_kernel
from shardwise.ops.quantization.float8 import TILE, Float8Weight
from shardwise.ops.tensor_memory import matrix_tiles
from shardwise.ops.triton_support import dependent_launch, interpreting, multiprocessors, triton
from shardwise.ops.workspace import Workspace

MAX_SKINNY, MAX_FEW = 4, 64
"""Most tokens of the two."""
AHEAD_LINES = 8
_MOST_PROGRAMS = 4096
"""Tiles of a product in parts: as many counters as a stream has."""


@dataclass(frozen=True)
class Tile:
    """How a product of a token or a few is cut; as `decode.Tile`, but a thread has 16 columns."""

    rows: int
    warps: int
    stages: int = 1
    whole: bool = False

    @property
    def columns(self) -> int:
        return 512 * self.warps


@dataclass(frozen=True)
class FewTile:
    """Shape of one launch of `few_float8_kernel`."""

    rows: int
    """Of a tile; half of them gate rows in a gated product."""
    step: int
    warps: int
    stages: int
    splits: int


def tile_for(rows: int, columns: int, gated: bool) -> Tile:
    """The tile for a weight of so many rows (of each half, if gated) and columns: within 4 % of the best of a sweep on
    an H200 over the layers of DeepSeek-V3 and Llama-3.1-8B."""
    if gated:
        return Tile(2, 2, whole=columns <= 4096)
    if columns <= 1536:
        return Tile(4, 1, whole=True)
    return Tile(8, 4) if rows <= 4096 else Tile(4, 2)


def few_tile_for(tokens: int, rows: int, columns: int, gated: bool, processors: int) -> FewTile:
    """The tile for `few_float8_kernel`, from the same sweep.

    Parts of K make programs enough to keep a multiprocessor's memory busy: some three for each where tiles are small.
    They also even out the last round of tall ones, where that is nearly empty.
    """
    tall = gated or (tokens > 32 and rows * columns > 30_000_000)
    tiles, steps = triton.cdiv(rows, 64 if gated or not tall else 128), triton.cdiv(columns, 128)
    wanted = processors * 7 // 5 if tall or tokens > 32 else processors * 8 // 3
    splits = 1
    while tiles * splits < wanted and splits < 8 and steps // (2 * splits) >= 3:
        splits *= 2
    rounds = tiles * splits / processors
    if tokens > 32 and tall and math.ceil(rounds) > 1.25 * rounds and steps // splits >= 16:
        splits *= 2
    deep = not tall and tokens <= 32 and tiles * splits <= 3 * processors
    return FewTile(128 if tall else 64, 128, 4, 6 if deep else 4, splits)


def skinny_float8(
    x: torch.Tensor,  # [T, K]
    weight: Float8Weight,  # [N, K], gated: [2N, K]
    *,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    gated: bool = False,
    tile: Tile | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[T, N] in x's dtype for T from 1 to MAX_SKINNY; options as those of `skinny_linear`."""
    tokens, k = x.shape
    n = _outputs("skinny_float8", x, weight, bias, gated, MAX_SKINNY)
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    tile = tile or tile_for(n, k, gated)
    pdl = pdl and not interpreting()
    skinny_float8_kernel[(triton.cdiv(n, tile.rows),)](
        x, weight.words, weight.scales, out, norm_weight, bias, residual, n, k, eps,
        TOKENS=tokens, BLOCK_N=tile.rows, BLOCK_K=tile.columns, STAGES=tile.stages,
        WHOLE=triton.cdiv(k, tile.columns) if tile.whole else 0, NORM=norm_weight is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, GATED=gated, TILED=weight.tiled, PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


_few = Launcher(few_float8_kernel)


def few_float8(
    x: torch.Tensor,  # [T, K]
    weight: Float8Weight,  # [N, K], gated: [2N, K]
    *,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    gated: bool = False,
    tile: FewTile | None = None,
) -> torch.Tensor:
    """[T, N] in x's dtype for T from 1 to MAX_FEW."""
    tokens, k = x.shape
    n = _outputs("few_float8", x, weight, bias, gated, MAX_FEW)
    device = x.device
    tile = tile or few_tile_for(tokens, n, k, gated, multiprocessors(device))
    block, rows = max(16, triton.next_power_of_2(tokens)), tile.rows // 2 if gated else tile.rows
    tiles, pdl = triton.cdiv(n, rows), dependent_launch(device)
    splits = tile.splits if tiles <= _MOST_PROGRAMS else 1
    out = torch.empty(tokens, n, dtype=x.dtype, device=device)
    codes, scales = weight.codes, weight.scales
    parts, counters = scales, scales
    if splits > 1:
        space = Workspace.of(device, block)
        parts = space.take("float8 parts", ((1 + gated) * tiles * splits * rows * block,), torch.float32)
        counters = space.counters(tiles)
    constants = (
        (block, tile.rows, tile.step, tile.stages, splits, gated, bias is not None, residual is not None)
        + (weight.tiled, 0 if interpreting() else AHEAD_LINES, interpreting(), pdl)
    )  # fmt: skip
    bias, residual = scales if bias is None else bias, scales if residual is None else residual
    even = aligned(codes, scales, bias, residual, out, parts, counters)
    key = (x.dtype, bias.dtype, residual.dtype, counters.dtype, n, k, tile.warps, even)
    _few(
        device,
        (*key, constants),
        (tiles, splits, 1),
        (matrix_tiles(x, block, tile.step), matrix_tiles(codes, rows, tile.step), codes, scales, bias)
        + (residual, out, parts, counters, tokens, n, k)
        + constants,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out


def takes_gated(weight: Float8Weight) -> bool:
    """Whether no tile of a weight [2N, K] has gates and ups."""
    return not weight.tiled or weight.shape[0] % (2 * TILE) == 0


def _outputs(
    name: str, x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor | None, gated: bool, most: int
) -> int:
    """N. ValueError for what the kernels do not take."""
    (tokens, k), (rows, columns) = x.shape, weight.shape
    if columns != k or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"{name}: aligned contiguous x [T, {columns}], got {tuple(x.shape)} at {x.data_ptr() % 16}")
    if not 1 <= tokens <= most:
        raise ValueError(f"{name}: {tokens} tokens; legal: 1 to {most}")
    if gated and bias is not None:
        raise ValueError(f"{name}: a gated product takes no bias")
    if gated and not takes_gated(weight):
        raise ValueError(f"{name}: {rows} rows of gates and ups; whole tiles of 128 each are legal")
    return rows // 2 if gated else rows
