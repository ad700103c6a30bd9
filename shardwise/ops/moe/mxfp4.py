"""MXFP4 mixture of experts for gpt-oss: four or five launches, weights read as they lie, packed once.

router product + top-k + softmax (and grouping, for few tokens) -> grouping -> gate/up GEMM with the activation ->
down GEMM -> weighted sum. Intermediate rows stand in the order of experts; nothing is sorted but indices.
"""

import torch
from torch import Tensor

from shardwise.ops.moe.mxfp4_gemm import mxfp4_gemm
from shardwise.ops.moe.mxfp4_layout import TILE, PackedMXFP4
from shardwise.ops.moe.routing import Routing, combine, group_pairs, most_blocks, multiprocessors, power_of_two
from shardwise.ops.moe.routing_kernels import route_kernel
from shardwise.ops.moe.tiles import Plan, Tiles
from shardwise.ops.moe.workspace import Workspace
from shardwise.ops.triton_support import Launcher, aligned, dependent_launch, interpreting

_route, _gemm = Launcher(route_kernel), Launcher(mxfp4_gemm)
_GROUP_IN_ROUTER = 16  # tokens of one router block; more are grouped by a launch of their own
WIDE_TOKENS = 256  # up to here an expert's results wait for their sum in float32: the bytes do not count yet


def choose_plan(pairs: int, experts: int) -> Plan:
    """Few pairs an expert: narrow blocks, many programs, bandwidth. Many: wide blocks for the matrix units.

    The fastest of 82 shapes on one H200 at 128 experts, 2880 x 2880, top-4 and 1 to 8192 tokens; splitting K
    paid for one token only (benchmarks/moe_mxfp4.md).
    """
    each = pairs / max(1, experts)
    if each <= 4:
        return Plan(16, Tiles(64, 64, 4, 4, 4), Tiles(64, 64, 4, 6, 4, 4 if pairs <= 8 else 1))
    if each <= 16:
        return Plan(16, Tiles(128, 128, 4, 3, 3), Tiles(128, 128, 4, 3, 3))
    if each <= 64:
        return Plan(64, Tiles(64, 64, 4, 4, 3), Tiles(64, 64, 4, 4, 3))
    return Plan(128, Tiles(64, 64, 4, 4, 3), Tiles(64, 64, 4, 4, 3))


def mxfp4_moe(
    tokens: Tensor,  # [T, H]
    router_weight: Tensor,  # [E, H]
    router_bias: Tensor,  # [E]
    top_k: int,
    up: PackedMXFP4,
    down: PackedMXFP4,
    alpha: float,
    limit: float,
    first: int,
    plan: Plan | None = None,
) -> Tensor:
    """Partial sum [T, H] over the local experts, whose first is `first`; a token without one gives exact zero."""
    count, hidden = tokens.shape
    if count == 0 or up.words.shape[0] == 0:
        return torch.zeros_like(tokens)
    if count * top_k * max(hidden, up.rows) >= 2**31:
        raise ValueError(f"{count} tokens x {top_k} choices x {max(hidden, up.rows)} columns exceed 2**31 elements")
    local = up.words.shape[0]
    plan = plan or choose_plan(count * top_k, router_weight.shape[0])
    space = Workspace.of(tokens.device, count)
    routing = _run_router(space, tokens, router_weight, router_bias, top_k, first, local, plan.bt)
    pairs, size = count * top_k, up.rows // 2
    wide = torch.float32 if count <= WIDE_TOKENS else tokens.dtype
    inner = space.take("inner", (pairs, size), tokens.dtype)
    values = space.take("values", (plan.down.splits, pairs, hidden), wide)
    run_gemm(plan.up, plan.bt, tokens, up, inner, routing, "swiglu", alpha, limit)
    run_gemm(plan.down, plan.bt, inner, down, values, routing, "none")
    return combine(values, routing, tokens.dtype)


def packed_moe(
    tokens: Tensor,  # [T, H], contiguous; bf16 on a GPU
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    up: PackedMXFP4,
    down: PackedMXFP4,
    act: str,
    *,
    alpha: float = 1.0,
    limit: float = 0.0,
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
    on_input: bool = False,
) -> Tensor:
    """Routed sum [T, H] over packed experts, for callers that route themselves.

    act       "swiglu" (gpt-oss, with alpha and limit), "silu" or "relu2"
    factors   float32 [E] for each product of NVFP4
    on_input  routing weights multiply the input instead of the output
    """
    pairs, experts = ids.numel(), up.words.shape[0]
    if pairs == 0 or experts == 0:
        return torch.zeros_like(tokens)
    plan = choose_plan(pairs, experts)
    space = Workspace.of(tokens.device, tokens.shape[0])
    order = space.take("order", (pairs,), torch.int32)
    blocks = space.take("blocks", (1 + 3 * most_blocks(pairs, experts, plan.bt),), torch.int32)
    routing = Routing(ids.contiguous(), weights.contiguous(), order, blocks, 0, experts)
    group_pairs(routing, plan.bt)
    inner = space.take("inner", (pairs, down.columns), tokens.dtype)
    wide = torch.float32 if tokens.shape[0] <= WIDE_TOKENS else tokens.dtype
    values = space.take("values", (plan.down.splits, pairs, tokens.shape[1]), wide)
    run_gemm(plan.up, plan.bt, tokens, up, inner, routing, act, alpha, limit, factors[0], on_input)
    run_gemm(plan.down, plan.bt, inner, down, values, routing, "none", factor=factors[1])
    return combine(values, routing, tokens.dtype, weighted=not on_input)


def _router_shape(count: int) -> tuple[int, int, int, int]:
    """(tokens, experts, parts of K, warps) of a router program."""
    return (16, 16, 4, 4) if count <= 512 else (64, 64, 2, 4)


def _run_router(space, tokens, weight, bias, top_k, first, local, block) -> Routing:
    count, hidden = tokens.shape
    experts, pairs = weight.shape[0], count * top_k
    bt, be, splits, warps = _router_shape(count)
    group = count <= _GROUP_IN_ROUTER
    logits = space.take("logits", (splits, count, experts), torch.float32)
    ids = space.take("ids", (count, top_k), torch.int32)
    weights = space.take("weights", (count, top_k), torch.float32)
    order = space.take("order", (pairs,), torch.int32)
    blocks = space.take("blocks", (1 + 3 * most_blocks(pairs, local, block),), torch.int32)
    e_block, k_block = power_of_two(experts), power_of_two(top_k)
    device, pdl = tokens.device, dependent_launch(tokens.device)
    weight = weight.to(tokens.dtype)
    grid = (-(-count // bt), -(-experts // be), splits)
    counters = space.counters(grid[0])
    constants = (bt, be, 128, splits, e_block, top_k, k_block, group, block, interpreting(), pdl)
    _route(
        device,
        (tokens.dtype, bias.dtype, aligned(tokens, weight, bias), hidden, experts, constants),
        grid,
        (tokens, weight, bias, logits, ids, weights, order, blocks, counters, count, hidden, experts, first, local)
        + constants,
        num_warps=warps,
        launch_pdl=pdl,
    )
    routing = Routing(ids, weights, order, blocks, first, local)
    if not group:
        group_pairs(routing, block)
    return routing


def run_gemm(
    tiles: Tiles,
    bt: int,
    x: Tensor,
    packed: PackedMXFP4,
    out: Tensor,
    routing: Routing,
    act: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    factor: Tensor | None = None,
    on_input: bool = False,
) -> None:
    """One grouped GEMM with packed weights, see `mxfp4_gemm`; `factor` float32 [E] with NVFP4."""
    tiles_n, tiles_k = packed.words.shape[1:3]
    pairs, top_k = routing.order.shape[0], routing.ids.shape[1]
    even = packed.columns % tiles.bk == 0 and tiles_k * TILE // tiles.bk % tiles.splits == 0
    device, pdl = x.device, dependent_launch(x.device)
    n_tiles = -(-tiles_n * TILE // tiles.bn)
    bound = most_blocks(pairs, routing.local, bt) * n_tiles * tiles.splits
    constants = (
        (top_k, act, on_input, tiles.bn, bt, tiles.bk, tiles.splits)
        + (packed.format, even, tiles.stages, interpreting(), pdl)
    )  # fmt: skip
    factor = packed.bias if factor is None else factor
    kinds = (x.dtype, out.dtype, routing.weights.dtype, aligned(x, out, factor, routing.weights))
    _gemm(
        device,
        (kinds, packed.columns, out.shape[-1], tiles_n, tiles_k, tiles.warps, constants),
        (min(bound, tiles.per_sm * multiprocessors(device)), 1, 1),
        (x, packed.words, packed.scales, packed.bias, out, routing.order, routing.blocks, factor, routing.weights)
        + (alpha, limit, pairs, packed.columns, out.shape[-1], tiles_n, tiles_k, x.stride(0))
        + constants,
        num_warps=tiles.warps,
        launch_pdl=pdl,
    )
