"""Products with 4-bit weights that stay so, of any number of tokens for which that pays.

    y = f(x W^T + bias) + residual

A token or a few are `few_int4`'s. `many_int4` computes more on the matrix unit of Hopper (compute capability 9), or in
Triton's interpreter with fp16 and float32, in parts of K where outputs are few. For still more a plain copy of the
weight is faster.
"""

from dataclasses import dataclass

import torch

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.linear.decode import gated_activation
from shardwise.ops.linear.int4 import MAX_FEW, few_int4
from shardwise.ops.linear.int4_many_kernels import many_int4_kernel, turn_kernel
from shardwise.ops.quantization.int4_weight import Int4Weight
from shardwise.ops.tensor_memory import matrix_tiles
from shardwise.ops.triton_support import asynchronous_products, dependent_launch, interpreting, multiprocessors, triton
from shardwise.ops.workspace import Workspace

FEW = 32
"""Tokens up to which `few_int4` is the faster one."""
MAX_MANY = 256
"""Tokens beyond which a plain copy is."""
GROUPS = (64, 128)
"""That `many_int4` takes."""
TALL = 16384
"""Rows from which on tiles of 128 are many enough."""


def most_tokens(weight: Int4Weight) -> int:
    """Of a product with such a weight, by `int4_product`."""
    return MAX_MANY if _takes_many(weight) else MAX_FEW


def _takes_many(weight: Int4Weight) -> bool:
    return weight.group in GROUPS and (interpreting() or asynchronous_products(weight.words.device))


def int4_product(
    x: torch.Tensor,  # [T, K]
    weight: Int4Weight,  # [N, K], gated: [2N, K]
    *,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    gated: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """[T, N] in x's dtype for T from 1 to `most_tokens`; `gated` as of `few_int4`."""
    if x.shape[0] <= FEW:
        return few_int4(x, weight, bias=bias, residual=residual, gated=gated)
    product = many_int4 if _takes_many(weight) else few_int4
    out = product(x, weight, bias=bias, residual=None if gated else residual)
    if not gated:
        return out
    out = gated_activation(out, pdl=pdl)
    return out if residual is None else out.add_(residual)


@dataclass(frozen=True)
class ManyTile:
    """Shape of one launch of `many_int4_kernel`."""

    rows: int
    tokens: int
    warps: int
    stages: int
    splits: int
    """Parts of K."""


def many_tile_for(tokens: int, rows: int, columns: int, processors: int) -> ManyTile:
    """The tile for so many tokens and a weight of so many rows and columns: from the same sweep as `tile_for`'s.

    Of the smaller tiles two share a multiprocessor, of those of 128 tokens none.
    """
    block = min(128, max(16, triton.next_power_of_2(tokens)))
    if rows >= TALL:
        return ManyTile(128, block, 8, 3, 1)
    tiles, splits = triton.cdiv(rows, 64) * triton.cdiv(tokens, block), 1
    room = processors if block == 128 else 2 * processors
    while 2 * tiles * splits <= room and columns // 128 // (2 * splits) >= 4:
        splits *= 2
    return ManyTile(64, block, 4, 4, splits)


_turn, _many = Launcher(turn_kernel), Launcher(many_int4_kernel)
TURNED = 2048
"""Columns of a row that a program puts in order."""
AHEAD = 4
"""Groups of a part of K whose words are brought to the L2 cache before the tokens are there."""


def many_int4(
    x: torch.Tensor,  # [T, K]
    weight: Int4Weight,  # [N, K]
    *,
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [T, N]
    tile: ManyTile | None = None,
) -> torch.Tensor:
    """[T, N] in x's dtype, for weights in groups of 64 and 128."""
    (tokens, k), (n, columns) = x.shape, weight.shape
    if columns != k or weight.group not in GROUPS or not tokens:
        came = f"{tuple(x.shape)} and groups of {weight.group}"
        raise ValueError(f"many_int4: x [T, {columns}] and groups of {' or '.join(map(str, GROUPS))}, got {came}")
    device = x.device
    tile = tile or many_tile_for(tokens, n, columns, multiprocessors(device))
    tiles, blocks, pdl = triton.cdiv(n, tile.rows), triton.cdiv(tokens, tile.tokens), dependent_launch(device)
    turned = torch.empty_like(x)
    _turn(
        device,
        (x.dtype, k, pdl, aligned(x, turned)),
        (tokens, triton.cdiv(k, TURNED), 1),
        (x, turned, k, TURNED, pdl and not interpreting()),
        num_warps=4,
        launch_pdl=pdl,
    )
    out = torch.empty(tokens, n, dtype=x.dtype, device=device)
    parts = counters = weight.scales
    if tile.splits > 1:
        space = Workspace.of(device, tile.tokens)
        parts = space.take("int4 parts", (tiles * blocks * tile.splits * tile.rows * tile.tokens,), torch.float32)
        counters = space.counters(tiles * blocks)
    tensors = (
        (weight.words, weight.scales, *(out if option is None else option for option in (bias, residual)))
        + (out, parts, counters)
    )  # fmt: skip
    constants = (
        (tile.tokens, tile.rows, tile.stages, tile.splits, weight.group, bias is not None, residual is not None)
        + (weight.scale_dtype == torch.float16, AHEAD, interpreting(), pdl)
    )  # fmt: skip
    _many(
        device,
        (x.dtype, *(tensor.dtype for tensor in tensors), n, k, tile.warps, aligned(*tensors), constants),
        (tiles, tile.splits, blocks),
        (matrix_tiles(turned, tile.tokens, weight.group), *tensors, tokens, n, k, *constants),
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out
