"""Products with 4-bit weights that stay so: a token or a few, bound by reading them. Activations are not quantised.

Not a registered operator: the runtime's layers call it directly.

    y = f( (x * g) W^T * rsqrt(mean(x^2) + eps) + bias ) + residual

in bf16 or fp16, with float32 sums. CUDA (compute capability 8.0), or Triton's interpreter with fp16 and float32.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.gluon_support import GLUON
from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.linear.int4_kernels import few_int4_kernel
from shardwise.ops.quantization.int4_weight import SLAB, Int4Weight, tile_columns
from shardwise.ops.triton_support import dependent_launch, interpreting, triton

MAX_FEW = 64
"""Most tokens."""
MOST_SQUARED = 8192
"""Columns whose squares a norm sums at once, which wait in registers."""


@dataclass(frozen=True)
class Tile:
    """Shape of one launch of `few_int4_kernel`."""

    slabs: int
    """Of a program; half of them gates in a gated product."""
    warps: int
    """Of a program, which take tiles of K in turn."""
    deep: int
    """Tiles that each warp has on their way."""
    early: bool = True
    """Tokens' columns of all of them are asked for at once."""


def tile_for(tokens: int, rows: int, tiles: int, gated: bool) -> Tile:
    """The tile for so many tokens and a weight of so many rows (of each half, if gated) and tiles of K: within 12 % of
    the best of a sweep on an H200 over the layers of Llama-3.1-8B."""
    if tokens > 16:
        warps, deep = 4, 4
    elif gated:
        warps, deep = 4, 4 if tokens <= 8 else 2
    else:
        warps, deep = (4, 8) if rows > 4096 else (8, 4)
    # Where rounds are whole nothing is masked.
    whole = (fewer for fewer in range(deep, deep // 2 - 1, -1) if tiles % (warps * fewer) == 0)
    return Tile(2 if gated else 1, warps, next(whole, deep), tokens <= 16)


_few = Launcher(few_int4_kernel)


def few_int4(
    x: torch.Tensor,  # [T, K]
    weight: Int4Weight,  # [N, K], gated: [2N, K]
    *,
    norm_weight: torch.Tensor | None = None,  # [K]
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    gated: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[T, N] in x's dtype for T from 1 to MAX_FEW; f is SiLU of the first half of the rows times the second if `gated`,
    which takes no bias."""
    (tokens, k), (rows, columns) = x.shape, weight.shape
    if columns != k or not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"few_int4: aligned contiguous x [T, {columns}], got {tuple(x.shape)} at {x.data_ptr() % 16}")
    if not 1 <= tokens <= MAX_FEW:
        raise ValueError(f"few_int4: {tokens} tokens; legal: 1 to {MAX_FEW}")
    if gated and (bias is not None or not takes_gated(weight)):
        raise ValueError(f"few_int4: a gated product takes no bias, and 2 x {SLAB} n rows, not {rows}")
    if norm_weight is not None and tokens > 1:
        raise ValueError(f"few_int4: norms are those of one token, got {tokens}")
    n, device = rows // 2 if gated else rows, x.device
    tiles = columns // tile_columns(weight.group)
    tile = tile or tile_for(tokens, n, tiles, gated)
    block, pdl = max(8, triton.next_power_of_2(tokens)), dependent_launch(device)
    out = torch.empty(tokens, n, dtype=x.dtype, device=device)
    options = (norm_weight, bias, residual)
    given = tuple(option is not None for option in options[1:])
    least = 256 * tile.warps  # columns that all threads load at once
    norm = 0 if norm_weight is None else min(MOST_SQUARED, max(least, triton.next_power_of_2(k)))
    deep = min(tile.deep, triton.cdiv(tiles, tile.warps))
    even = tiles % (deep * tile.warps) == 0
    constants = (
        (block, tile.slabs, tile.warps, deep, tile.early, weight.group, norm, *given, gated)
        + (weight.scale_dtype == torch.float16, even, interpreting(), pdl)
    )  # fmt: skip
    tensors = (x, weight.words, weight.scales, out, *(x if option is None else option for option in options))
    per = tile.slabs // 2 if gated else tile.slabs
    _few(
        device,
        (*(tensor.dtype for tensor in tensors), n, k, aligned(*tensors), constants),
        (triton.cdiv(triton.cdiv(n, SLAB), per), 1, 1),
        (*tensors, tokens, eps, n, k, *constants),
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out


def reason_against(device: torch.device) -> str:
    """Why kernels here do not run on a device; empty where they do."""
    if not GLUON:
        return "4-bit weights need Triton with its Gluon language"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
        return "4-bit weights need GPUs of compute capability 8.0 or later"
    return ""


def takes_gated(weight: Int4Weight) -> bool:
    """Whether no slab of a weight [2N, K] has gates and ups."""
    return weight.shape[0] % (2 * SLAB) == 0
