"""Kernel of `int4.py`: grouped products with 4-bit weights of experts, on the matrix unit; and what it multiplies with.

As `linear/int4_kernels.py`, whose words and unpacking these are: a warp's codes come from memory straight into the
registers from which the matrix unit reads them, and tokens are the columns of the products.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.linear.int4_kernels import (
    slab_of,
    sum_layout,
    tile_values,
    token_layout,
    turned,
    word_layout,
    words_of,
)
from shardwise.ops.ptx import silu
from shardwise.ops.quantization.int4_weight import scale_of
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.constexpr_function
def warp_layout(warps, tile):
    """Of [W], what `product` is told of each warp."""
    return gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, word_layout(warps, tile)))))


@jit
def _load(word_at, beside_at, k, k_row, stop, stop_row, ahead, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Words [W, S, 8, 4, STEPS] and [W, 16 S] of each warp's tile `ahead` tiles on; scales of zero beyond its last."""
    there = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(k + ahead < stop, 1), 2), 3), 4)
    words = gl.load(word_at + ahead * (2 * TILE), mask=there, eviction_policy="evict_first")
    group = (k_row + ahead) >> (GROUP // TILE - 1)  # one or two tiles share a scale
    there = gl.expand_dims(k_row + ahead < stop_row, 1)
    return words, gl.load(beside_at + gl.expand_dims(group, 1) * 16, mask=there, other=0)


@jit
def product(
    word_ptr, beside_ptr, x_ptr, expert, x_row, first, stop, step, rounds, slab, slabs, columns,
    S: tl.constexpr, W: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    HALF: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """[W, 16 S, BT] sums of each warp over every step-th tile of K from `first` to `stop`, in `rounds` times DEEP.

    expert, first, stop  [W]
    x_row                [W or 1, BT]: where each token's inputs begin
    slab, slabs          the program's first one, and those of an expert (GATED: of each half, and S / 2 of each are the
                         program's)
    """
    TILE: tl.constexpr = 64 if GROUP > 64 else GROUP
    ACC: tl.constexpr = sum_layout(W)
    WORDS: tl.constexpr = word_layout(W, TILE)
    X: tl.constexpr = token_layout(W, x_row.shape[1], TILE)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    OF_ROW: tl.constexpr = gl.SliceLayout(2, ACC)
    OF_SLAB: tl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, WORDS)))
    OF_X: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, X))
    all_slabs = slabs * 2 if GATED else slabs
    tiles = columns // TILE
    k = first
    of_program = slab_of(gl.arange(0, S, layout=gl.SliceLayout(0, OF_SLAB)), slab, slabs, S, GATED)
    place = gl.expand_dims(expert.to(gl.int64) * all_slabs, 1) + gl.expand_dims(of_program, 0)
    word = words_of(place, tiles, TILE // 16, WORDS)
    tile = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(k, 1), 2), 3), 4)
    word_at = word_ptr + (word + tile * (2 * TILE))

    k_row = gl.convert_layout(first, gl.SliceLayout(1, OF_ROW))
    stop_row = gl.convert_layout(stop, gl.SliceLayout(1, OF_ROW))
    row = gl.arange(0, 16 * S, layout=gl.SliceLayout(0, OF_ROW))
    of_row = gl.expand_dims(slab_of(row // 16, slab, slabs, S, GATED), 0)
    place = gl.expand_dims(gl.convert_layout(expert, gl.SliceLayout(1, OF_ROW)).to(gl.int64) * all_slabs, 1) + of_row
    beside_at = beside_ptr + (place * (columns // GROUP * 16) + gl.expand_dims(row % 16, 0))

    words, besides = (), ()
    for ahead in gl.static_range(DEEP):
        w, b = _load(word_at, beside_at, k, k_row, stop, stop_row, ahead * step, TILE, GROUP)
        words = words + (w,)
        besides = besides + (b,)

    k_x = gl.convert_layout(first, OF_X)
    stop_x = gl.convert_layout(stop, OF_X)
    column = gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(1, X))), 0)
    column = gl.expand_dims(gl.expand_dims(k_x * TILE, 1) + column, 1)
    x_at = x_ptr + (gl.expand_dims(x_row, 2) + column)
    acc = gl.zeros([W, 16 * S, x_row.shape[1]], gl.float32, ACC)
    for _ in range(rounds):
        inputs, next_words, next_besides = (), (), ()
        for ahead in gl.static_range(DEEP):
            there = gl.expand_dims(gl.expand_dims(k_x + ahead * step < stop_x, 1), 1)
            inputs = inputs + (gl.load(x_at + ahead * step * TILE, mask=there, other=0.0),)
        for ahead in gl.static_range(DEEP):
            weights = tile_values(words[ahead], besides[ahead], DTYPE, WORDS, LEFT, INTERPRET)
            scale = gl.expand_dims(scale_of(besides[ahead], HALF), 2)
            w, b = _load(word_at, beside_at, k, k_row, stop, stop_row, (ahead + DEEP) * step, TILE, GROUP)
            next_words = next_words + (w,)
            next_besides = next_besides + (b,)
            none = gl.zeros([W, 16 * S, x_row.shape[1]], gl.float32, ACC)
            acc += mma_v2(weights, turned(inputs[ahead], RIGHT, INTERPRET), none) * scale
        words = next_words
        besides = next_besides
        word_at += DEEP * step * (2 * TILE)
        x_at += DEEP * step * TILE
        k += DEEP * step
        k_row += DEEP * step
        k_x += DEEP * step
    return acc


@jit
def grouped_int4(
    x_ptr, word_ptr, beside_ptr, out_ptr, sorted_ptr, block_ptr, rows, columns,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BT: tl.constexpr, S: tl.constexpr, W: tl.constexpr, DEEP: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """S slabs of the product for a block of at most BT pairs of one expert; its warps take tiles of K in turn.

    Blocks of an expert run side by side, so that its rows come from memory once. sorted_ptr and block_ptr are as
    `grouping_kernels.py` writes them.

    GATED   x has tokens, out [pairs, N] is by sorted position and gated by SiLU, ups before gates; else x is by sorted
            position and out by pair
    """
    TILE: tl.constexpr = 64 if GROUP > 64 else GROUP
    ACC: tl.constexpr = sum_layout(W)
    OF_WARP: tl.constexpr = warp_layout(W, TILE)
    X: tl.constexpr = token_layout(W, BT, TILE)
    SUM: tl.constexpr = gl.SliceLayout(0, ACC)
    N: tl.constexpr = 8 * S if GATED else 16 * S
    await_predecessor(PDL)
    number = gl.program_id(0)
    block = gl.program_id(1)
    if number < gl.load(block_ptr):
        expert = gl.load(block_ptr + 1 + 3 * number)
        start = gl.load(block_ptr + 2 + 3 * number)
        count = gl.minimum(gl.load(block_ptr + 3 + 3 * number) - start, BT)
        # Columns of absent tokens hold the last one's, so that nothing is masked for them.
        position = start + gl.minimum(gl.arange(0, BT, layout=gl.SliceLayout(0, gl.SliceLayout(2, X))), count - 1)
        row = gl.load(sorted_ptr + position) // TOP_K if GATED else position
        warp = gl.arange(0, W, layout=OF_WARP)
        tiles = columns // TILE
        acc = product(
            word_ptr, beside_ptr, x_ptr, warp * 0 + expert, gl.expand_dims(row.to(gl.int64) * columns, 0), warp,
            warp * 0 + tiles, W, gl.cdiv(tiles, W * DEEP), block * (S // 2 if GATED else S), rows // 16,
            columns, S, W, DEEP, GROUP, GATED, HALF, INTERPRET,
        )  # fmt: skip
        sums = gl.sum(acc, 0)
        t = gl.arange(0, BT, layout=gl.SliceLayout(0, SUM))
        position = start + gl.minimum(t, count - 1)
        row = position if GATED else gl.load(sorted_ptr + position)
        n = gl.expand_dims(block * N + gl.arange(0, 16 * S, layout=gl.SliceLayout(1, SUM)) % N, 1)
        at = gl.expand_dims(row.to(gl.int64) * rows, 0) + n
        at = gl.where((n < rows) & gl.expand_dims(t < count, 0), at, -1)
        if GATED:  # what an element needs to know goes its way, and so has its layout
            up, gate = gl.split(gl.permute(gl.reshape(sums, (2, N, BT)), (1, 2, 0)))
            at, _ = gl.split(gl.permute(gl.reshape(at, (2, N, BT)), (1, 2, 0)))
            sums = silu(gate) * up
        gl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=at >= 0)
