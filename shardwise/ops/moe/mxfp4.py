"""MXFP4 mixture of experts for gpt-oss: four or five launches, weights read as they lie, packed once.

router product + top-k + softmax (and grouping, for few tokens) -> grouping -> gate/up GEMM with the activation ->
down GEMM -> weighted sum. Intermediate rows stand in the order of experts; nothing is sorted but indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.ops.gluon_support import GLUON
from shardwise.ops.kernel_launch import Launcher, aligned
from shardwise.ops.moe.mxfp4_few import mxfp4_few
from shardwise.ops.moe.mxfp4_gemm import mxfp4_gemm
from shardwise.ops.moe.mxfp4_layout import TILE, PackedMXFP4
from shardwise.ops.moe.mxfp4_plan import choose_plan
from shardwise.ops.moe.mxfp4_stream import mxfp4_stream
from shardwise.ops.moe.routing import WIDE_TOKENS, Routing, combine, most_blocks, route_tokens, routed, turn_rows
from shardwise.ops.moe.tiles import Plan, Stream, Tiles
from shardwise.ops.triton_support import asynchronous_products, dependent_launch, interpreting, multiprocessors
from shardwise.ops.workspace import Workspace

_gemm, _few, _stream = Launcher(mxfp4_gemm), Launcher(mxfp4_few), Launcher(mxfp4_stream)
AHEAD_BYTES = 16384
"""Of a program's next weights, asked for while it computes."""


@dataclass(frozen=True)
class PackedMixture:
    """Both products' weights, the activation between them and where routing weights multiply."""

    up: PackedMXFP4
    down: PackedMXFP4
    act: str = "swiglu"
    """"swiglu" (gpt-oss, with alpha and limit), "silu" or "relu2"."""
    alpha: float = 1.0
    limit: float = 0.0
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    """float32 [E] for each product of NVFP4."""
    on_input: bool = False
    """Routing weights multiply the input instead of the output."""

    @property
    def few(self) -> bool:
        """Whether the kernels for few tokens can: they know the usual scales and activation only."""
        narrow = self.up.format == self.down.format == "narrow"
        return GLUON and narrow and self.act == "swiglu" and not self.on_input


@dataclass(frozen=True)
class Product:
    """One grouped GEMM: rows of x by the weights of their experts."""

    x: Tensor
    """Tokens, or with `act` "none" rows at sorted positions; turned for the kernels for few tokens."""
    packed: PackedMXFP4
    out: Tensor
    """At sorted positions; with `act` "none" [splits, pairs, N] at the pairs."""
    routing: Routing
    act: str
    """"none" is launched behind a GEMM, so that the blocks were complete before that began."""
    alpha: float = 1.0
    limit: float = 0.0
    factor: Tensor | None = None
    on_input: bool = False


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
    if hidden != router_weight.shape[1] or hidden != up.columns:
        columns = f"{router_weight.shape[1]} columns of the router and {up.columns} of the experts"
        raise ValueError(f"mxfp4_moe: tokens {tuple(tokens.shape)} must have the {columns}")
    if count == 0 or up.words.shape[0] == 0:
        return torch.zeros_like(tokens)
    if count * top_k * max(hidden, up.rows) >= 2**31:
        wide = max(hidden, up.rows)
        raise ValueError(f"mxfp4_moe: {count} tokens x {top_k} choices x {wide} columns exceed 2**31 elements")
    experts = PackedMixture(up, down, "swiglu", alpha, limit)
    plan = plan or choose_plan(count * top_k, router_weight.shape[0], experts.few)
    space = Workspace.of(tokens.device, count)
    rows = space.take("turned", (count, _turned_columns(up)), tokens.dtype) if plan.few else None
    routing = route_tokens(
        space, tokens, router_weight, router_bias, top_k, first, up.words.shape[0], plan.block, rows
    )  # fmt: skip
    return _experts(space, plan, tokens if rows is None else rows, experts, routing)


def packed_moe(
    tokens: Tensor,  # [T, H], contiguous; bf16 on a GPU
    ids: Tensor,  # int [T, K], local; others are skipped
    weights: Tensor,  # [T, K]
    experts: PackedMixture,
) -> Tensor:
    """Routed sum [T, H] over packed experts, for callers that route themselves."""
    pairs, local = ids.numel(), experts.up.words.shape[0]
    if pairs == 0 or local == 0:
        return torch.zeros_like(tokens)
    plan = choose_plan(pairs, local, experts.few)
    space = Workspace.of(tokens.device, tokens.shape[0])
    routing = routed(space, ids, weights, local, plan.block)
    rows = turn_rows(space, tokens, _turned_columns(experts.up)) if plan.few else tokens
    return _experts(space, plan, rows, experts, routing)


def _turned_columns(packed: PackedMXFP4) -> int:
    """Columns of turned rows: whole tiles and 64 bytes, so that two rows read at once come from different banks."""
    return packed.words.shape[2] * TILE + 32


def _experts(space: Workspace, plan: Plan, tokens: Tensor, experts: PackedMixture, routing: Routing) -> Tensor:
    """Both GEMMs and the sum. The kernels for few tokens take turned rows of whole tiles."""
    count, pairs, up, down = tokens.shape[0], routing.ids.numel(), experts.up, experts.down
    inner = space.take("inner", (pairs, _turned_columns(down) if plan.few else down.columns), tokens.dtype)
    wide = torch.float32 if count <= WIDE_TOKENS else tokens.dtype
    values = space.take("values", (plan.down.splits, pairs, down.rows), wide)
    act = (experts.act, experts.alpha, experts.limit)
    run_gemm(plan, plan.up, Product(tokens, up, inner, routing, *act, experts.factors[0], experts.on_input))
    run_gemm(plan, plan.down, Product(inner, down, values, routing, "none", factor=experts.factors[1]))
    return combine(values, routing, tokens.dtype, weighted=not experts.on_input)


def run_gemm(plan: Plan, tiles: Tiles | Stream, product: Product) -> None:
    """One grouped GEMM with packed weights, see `mxfp4_gemm`."""
    if isinstance(tiles, Stream) or plan.few:
        return _run_turned(plan, tiles, product)
    x, packed, out, routing = product.x, product.packed, product.out, product.routing
    tiles_n, tiles_k = packed.words.shape[1:3]
    pairs, top_k = routing.order.shape[0], routing.ids.shape[1]
    even = packed.columns % tiles.bk == 0 and tiles_k * TILE // tiles.bk % tiles.splits == 0
    device, pdl = x.device, dependent_launch(x.device)
    bound = most_blocks(pairs, routing.local, plan.block) * tiles_n * TILE // 16 * tiles.splits
    ahead = AHEAD_BYTES // (tiles.bn * TILE // 2)
    constants = (
        (top_k, product.act, product.on_input, tiles.bn, plan.bt, plan.short, plan.side, tiles.bk, tiles.splits)
        + (packed.format, even, tiles.stages, ahead, product.act == "none", interpreting())
        + (asynchronous_products(device), pdl)
    )  # fmt: skip
    factor = packed.bias if product.factor is None else product.factor
    kinds = (x.dtype, out.dtype, routing.weights.dtype, aligned(x, out, factor, routing.weights))
    _gemm(
        device,
        (kinds, packed.columns, out.shape[-1], tiles_n, tiles_k, tiles.warps, tiles.most_registers, constants),
        (min(bound, tiles.per_sm * multiprocessors(device)), 1, 1),
        (x, packed.words, packed.scales, packed.bias, out, routing.order, routing.blocks, factor, routing.weights)
        + (product.alpha, product.limit, pairs, packed.columns, out.shape[-1], tiles_n, tiles_k, x.shape[1])
        + constants,
        num_warps=tiles.warps,
        maxnreg=tiles.most_registers,
        launch_pdl=pdl,
    )


def _run_turned(plan: Plan, tiles: Tiles | Stream, product: Product) -> None:
    """The same for blocks of 8 or 16 tokens, by `mxfp4_stream` or `mxfp4_few`: rows of x and of the activation are
    turned."""
    x, packed, out, routing = product.x, product.packed, product.out, product.routing
    if plan.block not in (8, 16) or packed.format != "narrow" or product.act not in ("swiglu", "none"):
        came = f"blocks of {plan.block}, {packed.format} scales, {product.act}"
        raise ValueError(f"kernels for few tokens: {came}; legal: blocks of 8 or 16, narrow scales, swiglu or none")
    tiles_n, tiles_k = packed.words.shape[1:3]
    pairs, top_k = routing.order.shape[0], routing.ids.shape[1]
    device, pdl = x.device, dependent_launch(x.device)
    most = most_blocks(pairs, routing.local, plan.bt)
    slabs = tiles.slabs if isinstance(tiles, Stream) else tiles.warps
    programs = min(most * tiles_n * 4 // slabs * tiles.splits, tiles.per_sm * multiprocessors(device))
    columns: tuple[int, ...] = ()
    shared: tuple[Tensor, ...] = ()
    if isinstance(tiles, Stream):
        launcher, shape = _stream, _stream_shape(tiles, tiles_k)
    else:
        launcher, shape = _few, _few_shape(tiles, tiles_k, packed.columns)
        columns, shared = (packed.columns,), _shared_units(device, (programs, 2, 16 * slabs, plan.bt))
    constants = (top_k, product.act, plan.bt, tiles.splits, *shape, product.act == "none", interpreting(), pdl)
    launcher(
        device,
        (x.dtype, out.dtype, aligned(x, out), columns, out.shape[-1], tiles_n, tiles_k, tiles.per_sm, constants),
        (programs, 1, 1),
        (x, packed.words, packed.scales, packed.bias, out, routing.order, routing.blocks, *shared)
        + (product.alpha, product.limit, pairs, most, *columns, out.shape[-1], tiles_n, tiles_k, x.shape[1])
        + constants,
        # `mxfp4_few` shares nothing: the cache gets all, 70.8 for 72.6 us with 4 tokens, but 31.7 for 30.7 with one.
        sharing=tiles.per_sm if tiles.warps > 1 or isinstance(tiles, Stream) else 0,
        num_warps=tiles.warps,
        maxnreg=tiles.most_registers,
        launch_pdl=pdl,
    )


def _shared_units(device: torch.device, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What `mxfp4_few` needs where two programs share rows: their sums' parts and counters, one set for a stream."""
    space = Workspace.of(device, 0)
    return space.take("parts", shape, torch.float32), space.counters(shape[0])


def _few_shape(tiles: Tiles, tiles_k: int, columns: int) -> tuple[bool | int, ...]:
    """EVEN, DEEP and WARPS of `mxfp4_few`."""
    deep = min(tiles.stages, -(-tiles_k // tiles.splits))
    return columns % TILE == 0 and tiles_k % (deep * tiles.splits) == 0, deep, tiles.warps


def _stream_shape(stream: Stream, tiles_k: int) -> tuple[bool | int, ...]:
    """EVEN, DEEP, RING, SLABS, ROW_WARPS and W of `mxfp4_stream`."""
    each = -(-tiles_k // stream.splits)
    steps = -(-each // stream.k_warps)
    deep = min(stream.deep, steps)
    ring = min(stream.ring, -(-steps // deep) + 1)
    even = tiles_k % stream.splits == 0 and steps % deep == 0
    return even, deep, ring, stream.slabs, stream.row_warps, stream.k_warps
