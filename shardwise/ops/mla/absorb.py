"""Every head's rows by its part of the weight, which absorbs the weight into queries and takes it out of outputs.

For few tokens the weight is all that counts: 16.8 MB of 16-bit numbers for 128 heads, where a token has 32 KB and
128 KB. There a kernel of ours reads it once, as it lies, and rows where they stand in a step's tensors; more tokens are
left to PyTorch's batched product.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import await_predecessor, dependent_launch, interpreting, tl, triton
from shardwise.plan_cache import view

Product = Callable[[Tensor, Tensor, Tensor], object]
"""(x, weight, out): x [T, N, K] times the weight's [N, K, J] is written to [T, N, J], at the places planned for"""
MOST_TOKENS = 64
"""On an H200 both products of up to 16 tokens take 1 to 4 % less time than PyTorch's, those of up to 64 from 4 % less
to 2 % more (16 to 128 heads), and all 15 µs less of the host."""
_INTERPRET = tl.constexpr(interpreting())


class Rows(NamedTuple):
    """Where [T, N, *] lies in a tensor, in elements; a row is contiguous."""

    token: int
    """From a token to the next"""
    head: int
    before: int = 0
    """Tokens before the first"""


class Factor(NamedTuple):
    """Where [N, K, J] lies in the weight, in elements."""

    first: int
    head: int
    row: int
    """From one k to the next"""
    column: int


class Tile(NamedTuple):
    """What a program multiplies at a time, of one head: all tokens, `rows` of its K, `columns` of its J."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    """Tiles on their way through shared memory, where K takes several"""


def tile_for(tokens: int, heads: int, k: int) -> Tile:
    """The tile for so many tokens and heads, of sweeps on an H200: few heads ask for more programs of each."""
    few, many_heads = tokens <= 16, heads > 48
    if k <= 128:
        return Tile(32, 64, 2, 4) if few else Tile(32, 128 if many_heads else 64, 4, 4)
    if many_heads:
        return Tile(64, 64, 4, 6)
    return Tile(128, 16, 2, 4) if few else Tile(64, 32, 4, 6)


def head_product(like: Tensor, tokens: int, heads: int, k: int, j: int, x: Rows, factor: Factor, out: Rows) -> Product:
    """A product of tensors of `like`'s dtype and device."""
    tile = tile_for(tokens, heads, k)
    if tokens > MOST_TOKENS or k % tile.rows or j % tile.columns:
        return _batched(tokens, heads, k, j, x, factor, out)
    pdl = dependent_launch(like.device)
    fixed = (x.token, x.head, factor.first, factor.head, out.token, out.head, factor.row, factor.column, k,
             max(16, triton.next_power_of_2(tokens)), tile.rows, tile.columns, tile.stages, pdl)  # fmt: skip
    form = _KERNEL.form_for(like.device, (like,), fixed, warps=tile.warps, pdl=pdl)
    grid, free = (j // tile.columns, heads, 1), (tokens, x.before, out.before)
    return lambda x, weight, out: form(grid, (x, weight, out), free)


def _batched(tokens: int, heads: int, k: int, j: int, x: Rows, factor: Factor, out: Rows) -> Product:
    """By views [N, T, K], [N, K, J] and [N, T, J]; no copy is made before or after the product."""
    rows = (heads, tokens, k), (x.head, x.token, 1), x.before * x.token
    weights = (heads, k, j), (factor.head, factor.row, factor.column), factor.first
    result = (heads, tokens, j), (out.head, out.token, 1), out.before * out.token
    return lambda x, weight, out: torch.bmm(view(x, *rows), view(weight, *weights), out=view(out, *result))


@triton.jit(do_not_specialize=["tokens", "x_before", "out_before"])
def head_product_kernel(
    x_ptr, weight_ptr, out_ptr, tokens, x_before, out_before, X_TOKEN, X_HEAD, W_FIRST, W_HEAD, OUT_TOKEN, OUT_HEAD,
    W_ROW: tl.constexpr, W_COLUMN: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_J columns of one head's product, for all tokens."""
    await_predecessor(PDL)
    head = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    real = t[:, None] < tokens
    x_at = x_ptr + (x_before + t).to(tl.int64)[:, None] * X_TOKEN + head * X_HEAD + k[None, :]
    weight_at = weight_ptr + W_FIRST + head * W_HEAD + k[:, None] * W_ROW + j[None, :] * W_COLUMN
    out_at = out_ptr + (out_before + t).to(tl.int64)[:, None] * OUT_TOKEN + head * OUT_HEAD + j[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_at + first * W_ROW, eviction_policy="evict_first")
        x = tl.load(x_at + first, mask=real, other=0.0)
        if _INTERPRET:  # whose product knows no bfloat16
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, weight, total)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=real)


_KERNEL = Kernel(head_product_kernel)
