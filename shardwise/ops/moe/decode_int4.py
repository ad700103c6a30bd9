"""Kernels of `decode.py` for 4-bit weights: routing and the two products of a token's experts, on the matrix unit.

Each pair of a token and an expert reads the rows of its own expert, and is all eight columns of its products.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.linear.int4_kernels import sum_layout, token_layout
from shardwise.ops.moe.decode_kernels import activate, routed_slot, store_sum
from shardwise.ops.moe.decode_packed import dealt
from shardwise.ops.moe.int4_kernels import product, warp_layout
from shardwise.ops.triton_support import await_and_trigger, tl

COLUMNS = tl.constexpr(8)  # of a product of the matrix unit


@jit
def _equal_columns(row, X: tl.constexpr):
    """Where inputs begin of each warp's product, [W] to [W, COLUMNS]."""
    row = gl.expand_dims(gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(2, X))), 1)
    return row + gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, X))) * 0, 0)


@jit(do_not_specialize=["scale", "alpha", "limit"])
def int4_up(
    x_ptr, logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, out_ptr, size, hidden, experts, logit_row, scale,
    alpha, limit, word_ptr, beside_ptr,
    TOP_K: tl.constexpr, E_BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, CLAMPED: tl.constexpr,
    PDL: tl.constexpr, S: tl.constexpr, W: tl.constexpr, DEEP: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """8 S rows of one pair's activation, whose warps take tiles of K in turn; as `plain_up`."""
    ACC: tl.constexpr = sum_layout(W)
    TILE: tl.constexpr = 64 if GROUP > 64 else GROUP
    OF_WARP: tl.constexpr = warp_layout(W, TILE)
    EXPERTS: tl.constexpr = gl.BlockedLayout([E_BLOCK // 32], [32], [W], [0])  # all of them in every warp
    X: tl.constexpr = token_layout(W, 8, TILE)
    block = gl.program_id(0)
    pair = gl.program_id(1)
    token = pair // TOP_K
    e = gl.arange(0, E_BLOCK, layout=EXPERTS)
    slot = routed_slot(
        logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, pair, e, logit_row, experts, scale,
        TOP_K, NORMALIZE, PADDED, PDL,
    )  # fmt: skip
    if slot >= 0:
        warp = gl.arange(0, W, layout=OF_WARP)
        tiles = hidden // TILE
        x_row = _equal_columns(warp * 0 + token.to(gl.int64) * hidden, X)
        acc = product(
            word_ptr, beside_ptr, x_ptr, warp * 0 + slot, x_row, warp, warp * 0 + tiles, W, gl.cdiv(tiles, W * DEEP),
            block * (S // 2), size // 16, hidden, S, W, DEEP, GROUP, True, HALF, INTERPRET,
        )  # fmt: skip
        sums = gl.sum(gl.max(acc, 2), 0)  # columns are equal
        at = block * (8 * S) + gl.arange(0, 16 * S, layout=gl.SliceLayout(0, gl.SliceLayout(2, ACC))) % (8 * S)
        # What an element needs to know goes its way, and so has its layout.
        up, gate = gl.split(gl.permute(gl.reshape(sums, (2, 8 * S)), (1, 0)))
        at, _ = gl.split(gl.permute(gl.reshape(at, (2, 8 * S)), (1, 0)))
        value = activate(gate, up, alpha, limit, CLAMPED)
        gl.store(out_ptr + pair.to(gl.int64) * size + at, value.to(out_ptr.dtype.element_ty), mask=at < size)


@jit
def int4_down(
    inner_ptr, id_ptr, route_ptr, residual_ptr, out_ptr, hidden, size, word_ptr, beside_ptr,
    CHOICES: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    DEEP: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """16 S rows of one token's sum. Its local experts are dealt to the warps, as many to each."""
    ACC: tl.constexpr = sum_layout(W)
    TILE: tl.constexpr = 64 if GROUP > 64 else GROUP
    OF_WARP: tl.constexpr = warp_layout(W, TILE)
    X: tl.constexpr = token_layout(W, 8, TILE)
    await_and_trigger(PDL)
    slab = gl.program_id(0) * S
    token = gl.program_id(1)
    warp = gl.arange(0, W, layout=OF_WARP)
    count, parts, expert, pair, held = dealt(id_ptr, token, warp, CHOICES, W)
    tiles = size // TILE
    first = warp % parts
    stop = gl.where(held, tiles, first)
    rounds = gl.cdiv(gl.cdiv(tiles, parts), DEEP) if count > 0 else 0
    x_row = _equal_columns(pair.to(gl.int64) * size, X)
    acc = product(
        word_ptr, beside_ptr, inner_ptr, expert, x_row, first, stop, parts, rounds, slab, hidden // 16, size,
        S, W, DEEP, GROUP, False, HALF, INTERPRET,
    )  # fmt: skip
    OF_SUM: tl.constexpr = gl.SliceLayout(2, ACC)
    weight = gl.convert_layout(gl.load(route_ptr + pair), gl.SliceLayout(1, OF_SUM))
    total = gl.sum(gl.max(acc, 2) * gl.expand_dims(weight, 1), 0)  # columns are equal
    rows = slab * 16 + gl.arange(0, 16 * S, layout=gl.SliceLayout(0, OF_SUM))
    store_sum(total, token, rows, rows < hidden, residual_ptr, out_ptr, hidden, RESIDUAL)
