"""Host side of routing: the router's launch, pairs grouped by expert, and the weighted sum of their results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.moe.grouping_kernels import count_kernel, group_few_kernel, place_kernel
from shardwise.ops.moe.routing_kernels import combine_kernel, route_kernel, turn_kernel
from shardwise.ops.triton_support import dependent_launch, interpreting, multiprocessors
from shardwise.ops.workspace import Workspace

_route, _combine, _turn = Launcher(route_kernel), Launcher(combine_kernel), Launcher(turn_kernel)
_few, _count, _place = Launcher(group_few_kernel), Launcher(count_kernel), Launcher(place_kernel)
_FEW_PAIRS = 64
"""Most pairs that one program groups by comparing all with all."""
WIDE_TOKENS = 128
"""Up to here an expert's results wait for their sum in float32. Beyond, its bytes count: 7 us of 256 tokens."""
_PART = 512
"""Pairs of a part of a counting sort, where the router has not counted already."""
_COUNTED_BY_ALL = 8192
"""Most pairs that each part counts by itself, which spares the launch that counts."""
_FEW_PART = 128
"""Pairs of a part there: as many as are compared with one another at once."""


@dataclass(frozen=True)
class Routing:
    """What the GEMMs and the sum need to know of the routing."""

    ids: Tensor  # int [T, K], global
    weights: Tensor  # [T, K]
    order: Tensor  # int32 [T * K], pairs by expert
    blocks: Tensor  # int32 [1 + 3 * blocks]
    first: int
    local: int


@dataclass(frozen=True)
class _RouterShape:
    """Shape of the router's launch."""

    tokens: int  # of a program's block
    experts: int  # of a program
    splits: int  # parts of K
    stages: int
    warps: int = 4


def route_tokens(
    space: Workspace,
    tokens: Tensor,  # [T, H], contiguous
    weight: Tensor,  # [E, H]
    bias: Tensor,  # [E]
    top_k: int,
    first: int,
    local: int,
    block: int,
    turned_rows: Tensor | None = None,
) -> Routing:
    """The router's product, top-k with softmax over the k, and the pairs of local experts in blocks of `block`.

    turned_rows   [T, H in whole tiles of 64], becomes the tokens as `mxfp4_few` reads them
    """
    count, hidden = tokens.shape
    experts, pairs = weight.shape[0], count * top_k
    e_block, k_block = power_of_two(experts), power_of_two(top_k)
    device, pdl = tokens.device, dependent_launch(tokens.device)
    shape = _router_shape(count, hidden, experts, multiprocessors(device))
    parts = -(-count // shape.tokens)
    rows = min(shape.tokens, power_of_two(count))
    group = parts == 1 and rows * k_block <= _FEW_PAIRS
    ids = space.take("ids", (count, top_k), torch.int32)
    weights = space.take("weights", (count, top_k), torch.float32)
    order, blocks = _order_and_blocks(space, pairs, local, block)
    logits = space.take("logits", (shape.splits, count, experts), torch.float32)
    counts = space.take("counts", (parts, experts), torch.int32)
    weight, bias = weight.to(tokens.dtype).contiguous(), bias.contiguous()
    grid = (parts, -(-experts // shape.experts) + (turned_rows is not None), shape.splits)
    constants = (
        (shape.tokens, rows, shape.experts, _ROUTER_STEP, shape.splits, e_block, top_k, k_block, group, block)
        + (turned_rows is not None, shape.stages, interpreting(), pdl)
    )  # fmt: skip
    rows_out = tokens if turned_rows is None else turned_rows
    _route(
        device,
        (tokens.dtype, bias.dtype, aligned(tokens, weight, bias), hidden, rows_out.shape[1], experts, constants),
        grid,
        (tokens, weight, bias, rows_out, logits, ids, weights, order, blocks, counts, space.counters(parts))
        + (count, hidden, rows_out.shape[1], experts, first, local) + constants,
        num_warps=shape.warps,
        launch_pdl=pdl,
    )  # fmt: skip
    routing = Routing(ids, weights, order, blocks, first, local)
    if not group:
        _place_pairs(routing, counts, shape.tokens * top_k, block)
    return routing


_ROUTER_STEP = 128  # columns


def _router_shape(count: int, hidden: int, experts: int, programs: int) -> _RouterShape:
    """Few tokens: all multiprocessors read a part of the weights. Many: a program sees all experts."""
    most = 8192 // power_of_two(experts)  # logits that a program compares, 64 a thread
    tokens = min(max(16, most), 16 if count <= 1024 else 64)
    width = min(16 if count <= 16 else 128, max(16, power_of_two(experts)))
    tiles = -(-count // tokens) * -(-experts // width)
    steps = -(-hidden // _ROUTER_STEP)
    # A program chooses for 16 tokens, and reads their logits of all parts: they are to be fewer.
    least = 2 if count <= 8 or 16 < count <= 128 else 4
    each = max(least, -(-steps // max(1, programs // tiles)), -(-steps // 16))
    area = width * tokens
    return _RouterShape(tokens, width, -(-steps // each), 4 if area <= 2048 else 3, 4 if area <= 4096 else 8)


def routed(space: Workspace, ids: Tensor, weights: Tensor, local: int, block: int) -> Routing:
    """Given routing, ids local: the pairs grouped in blocks of `block`."""
    order, blocks = _order_and_blocks(space, ids.numel(), local, block)
    routing = Routing(ids.contiguous(), weights.contiguous(), order, blocks, 0, local)
    group_pairs(routing, block)
    return routing


def _order_and_blocks(space: Workspace, pairs: int, local: int, block: int) -> tuple[Tensor, Tensor]:
    order = space.take("order", (pairs,), torch.int32)
    return order, space.take("blocks", (1 + 3 * most_blocks(pairs, local, block),), torch.int32)


def group_pairs(routing: Routing, block: int) -> None:
    """Fill `order` and `blocks` from `ids`."""
    ids, pairs, device = routing.ids, routing.ids.numel(), routing.ids.device
    pdl, key = dependent_launch(device), (ids.dtype, aligned(ids))
    if pairs <= _FEW_PAIRS:
        constants = (power_of_two(pairs), block, pdl)
        args = (ids, routing.order, routing.blocks, pairs, routing.first, routing.local)
        _few(device, (*key, constants), (1, 1, 1), args + constants, num_warps=4, launch_pdl=pdl)
        return
    if pairs <= _COUNTED_BY_ALL:
        return _place_pairs(routing, None, _FEW_PART, block)
    parts, experts = -(-pairs // _PART), routing.first + routing.local
    counts = torch.empty((parts, experts), dtype=torch.int32, device=device)
    counting = (_PART, power_of_two(experts), pdl)
    _count(
        device, (*key, counting), (parts, 1, 1), (ids, counts, pairs, experts) + counting, num_warps=4, launch_pdl=pdl
    )  # fmt: skip
    _place_pairs(routing, counts, _PART, block)


def _place_pairs(routing: Routing, counts: Tensor | None, part: int, block: int) -> None:
    """counts   [parts, experts], or None for no more than _COUNTED_BY_ALL pairs"""
    ids, pairs, device = routing.ids, routing.ids.numel(), routing.ids.device
    pdl, experts = dependent_launch(device), power_of_two(routing.local)
    if counts is None:
        parts, stride, step = -(-pairs // part), 0, min(2048, max(256, power_of_two(pairs)))
    else:
        (parts, stride), step = counts.shape, max(16, min(power_of_two(len(counts)), 4096 // experts))
    constants = (part, power_of_two(part), experts, step, counts is not None, block, pdl)
    sources = (ids, ids if counts is None else counts)
    _place(
        device,
        (ids.dtype, aligned(ids), stride, constants),
        (parts, 1, 1),
        (*sources, routing.order, routing.blocks, pairs, parts, stride, routing.first, routing.local) + constants,
        num_warps=4,
        launch_pdl=pdl,
    )


def turn_rows(space: Workspace, tokens: Tensor, columns: int) -> Tensor:
    """Tokens [T, H] as `mxfp4_few` reads them, [T, columns]: `columns` is H in whole tiles of 64."""
    rows, pdl = space.take("turned", (tokens.shape[0], columns), tokens.dtype), dependent_launch(tokens.device)
    _turn(
        tokens.device,
        (tokens.dtype, aligned(tokens), tokens.shape[1], columns, pdl),
        (tokens.shape[0], -(-columns // 1024), 1),
        (tokens, rows, tokens.shape[1], columns, pdl),
        num_warps=4,
        launch_pdl=pdl,
    )
    return rows


def most_blocks(pairs: int, experts: int, block: int) -> int:
    """Upper bound of the token blocks of any routing: the grid must not depend on values on the device."""
    return min(pairs, experts) + pairs // block


def combine(values: Tensor, routing: Routing, dtype: torch.dtype, weighted: bool = True) -> Tensor:
    """[T, H] from values [splits, T * K, H]: sum over a token's local pairs, times the routing weight."""
    splits, pairs, hidden = values.shape
    count, top_k = routing.ids.shape
    out = torch.empty((count, hidden), dtype=dtype, device=values.device)
    device, pdl = values.device, dependent_launch(values.device)
    block = 512 if count <= 64 else 1024
    constants = (top_k, splits, block, weighted, pdl)
    key = (values.dtype, routing.ids.dtype, routing.weights.dtype, dtype, aligned(routing.ids, routing.weights))
    _combine(
        device,
        (*key, hidden, constants),
        (count, -(-hidden // block), 1),
        (values, routing.ids, routing.weights, out, pairs, routing.first, routing.local, hidden) + constants,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()
