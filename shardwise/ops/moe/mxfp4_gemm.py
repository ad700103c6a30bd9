"""Grouped GEMM over routed token rows with MXFP4 weights, transposed: out^T [N, tokens] = W [N, K] x^T [K, tokens].

With the weights on the left their fragments stay in registers from unpacking to the matrix unit, and a block of as
few as 16 tokens wastes nothing but the matrix unit's time. A block's rows are cut into chunks of whole slabs (16 rows),
as many as let all programs end together.
"""

from shardwise.ops.moe.mxfp4_convert import dequantize_tile
from shardwise.ops.ptx import finish_products, prefetch_to_l2
from shardwise.ops.triton_support import await_and_trigger, tl, triton


@triton.jit
def _chunks(blocks, slabs, programs, SPLITS: tl.constexpr, MOST: tl.constexpr):
    """Into how many chunks of at most MOST slabs to cut a block: the least time of the busiest program.

    Starting a chunk counts like one slab.
    """
    less = tl.arange(0, MOST)
    size = MOST - less
    count = (slabs + size - 1) // size
    rounds = (blocks * count * SPLITS + programs - 1) // programs
    best = tl.min(rounds * (size + 1) * MOST + less, axis=0) % MOST
    return tl.cdiv(slabs, MOST - best)


@triton.jit
def _rows(index, count, slabs, SPLITS: tl.constexpr):
    """(first slab, end of slabs, split) of a tile."""
    number = index // SPLITS % count
    return number * slabs // count, (number + 1) * slabs // count, index % SPLITS


@triton.jit
def _block(block_ptr, index, total, count, SPLITS: tl.constexpr):
    """(expert, first and end of sorted positions) of a tile, of the last one where there is none.

    Read past the first-level cache, whose lines may be from before the blocks were made.
    """
    entry = block_ptr + 1 + 3 * (tl.maximum(tl.minimum(index, total - 1), 0) // SPLITS // count)
    expert = tl.load(entry, cache_modifier=".cg")
    return expert, tl.load(entry + 1, cache_modifier=".cg"), tl.load(entry + 2, cache_modifier=".cg")


@triton.jit
def _ask(
    word_ptr, scale_ptr, expert, first, stop, k, tiles_n, tiles_k,
    SLABS: tl.constexpr, AHEAD: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Have AHEAD tiles of K of these slabs, from tile k on, brought to the L2 cache."""
    count = tl.minimum(AHEAD, tiles_k - k)
    for number in tl.static_range(SLABS // 4 + 1):
        row = first // 4 + number
        if (row * 4 < stop) & (count > 0):
            tile = (expert.to(tl.int64) * tiles_n + row) * tiles_k + k
            prefetch_to_l2(word_ptr + tile * 512, count * 2048)
            prefetch_to_l2(scale_ptr + tile * SCALES, count * (4 * SCALES))


@triton.jit
def _first_k(split, tiles_k, SPLITS: tl.constexpr, CHUNKS: tl.constexpr):
    """(first k-tile of a split, k-tiles of each)."""
    each = tl.cdiv(tl.cdiv(tiles_k, SPLITS), CHUNKS) * CHUNKS
    return split * each, each


@triton.jit
def _product(
    x_ptr, word_ptr, scale_ptr, rows, valid, side_rows, side_valid, first, stop, k_start, k_stop, tiles_k, columns,
    stride_x,
    BN: tl.constexpr, SIDE: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, EVEN_K: tl.constexpr, ASYNC: tl.constexpr,
):  # fmt: skip
    """[BN, BT] and, where SIDE, [BN, SIDE] float32 sums over the k-tiles of 64 in [k_start, k_stop).

    Pointers at the expert's weights; rows of slabs from `stop` on hold anything.
    """
    CHUNKS: tl.constexpr = BK // 64
    SLABS: tl.constexpr = BN // 16
    part = tl.arange(0, CHUNKS * SLABS)
    chunk, slab = part // SLABS, first + part % SLABS
    tile = (slab // 4 * tiles_k + chunk) * 4 + slab % 4
    # Loads of equal shape share one thread layout; these words must not get the one of an x tile of 128 columns.
    HALVES: tl.constexpr = 2 if BK == 128 else 1
    line = tl.arange(0, CHUNKS * SLABS * HALVES)
    line_chunk, line_slab = line // HALVES // SLABS, first + line // HALVES % SLABS
    line_tile = (line_slab // 4 * tiles_k + line_chunk) * 4 + line_slab % 4
    word_at = (line_tile * 128 + line % HALVES * 64)[:, None] + tl.arange(0, 128 // HALVES)[None, :]
    SCALES: tl.constexpr = 16 if FORMAT == "nvfp4" else 8
    scale_at = tile[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
    column = tl.arange(0, BK)
    x_at = rows[:, None] * stride_x + column[None, :]
    side_at = side_rows[:, None] * stride_x + column[None, :]
    acc = tl.zeros((BN, rows.shape[0]), dtype=tl.float32)
    side = tl.zeros((BN, side_rows.shape[0]), dtype=tl.float32)
    for k in tl.range(k_start, k_stop, CHUNKS, num_stages=STAGES):
        real, line_real = slab < stop, line_slab < stop
        if not EVEN_K:
            real &= chunk + k < k_stop
            line_real &= line_chunk + k < k_stop
        words = tl.load(word_ptr + word_at + k * 512, mask=line_real[:, None])
        # Absent scales are zero: whatever the words are, they become finite and meet zeros of x.
        if EVEN_K:
            scales = tl.load(scale_ptr + scale_at + k * (4 * SCALES), mask=real[:, None])
        else:
            scales = tl.load(scale_ptr + scale_at + k * (4 * SCALES), mask=real[:, None], other=0)
        x = _columns(x_ptr + x_at + k * 64, valid, column + k * 64, columns, EVEN_K)
        weights = dequantize_tile(words, scales, CHUNKS, FORMAT, INTERPRET)
        acc = _add(acc, weights, x, INTERPRET)
        if SIDE > 0:
            x = _columns(x_ptr + side_at + k * 64, side_valid, column + k * 64, columns, EVEN_K)
            side = _add(side, weights, x, INTERPRET)
        if ASYNC:  # the next step unpacks into the registers that these products read
            finish_products()
    return acc, side


@triton.jit
def _columns(at, valid, column, columns, EVEN_K: tl.constexpr):
    """Some columns of token rows, zeros of those that are not valid."""
    mask = valid[:, None] if EVEN_K else valid[:, None] & (column < columns)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _add(acc, weights, x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return acc + tl.dot(weights, tl.trans(x).to(tl.float32), input_precision="ieee")
    return tl.dot(weights, tl.trans(x), acc)


_LOGISTIC = tl.constexpr("""
{
    .reg .f32 e;
    ex2.approx.ftz.f32 e, $1;
    add.f32 e, e, 0f3F800000;
    rcp.approx.ftz.f32 $0, e;
}
""")


@triton.jit
def _logistic(x, INTERPRET: tl.constexpr):
    """1 / (1 + exp(-x)) within a few units in float32's last place, without the detours for subnormal numbers."""
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    power = x * -1.4426950408889634
    return tl.inline_asm_elementwise(_LOGISTIC, "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gated(acc, alpha, limit, ACT: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, INTERPRET: tl.constexpr):
    """Gate in rows 0..7 and up in rows 8..15 of each slab: [BN, BT] to [BN / 2, BT]."""
    halves = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BT)), (0, 2, 3, 1))
    gate, up = tl.split(halves)
    gate = tl.reshape(gate, (BN // 2, BT))
    up = tl.reshape(up, (BN // 2, BT))
    if ACT == "silu":
        return up * gate * _logistic(gate, INTERPRET)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * gate * _logistic(alpha * gate, INTERPRET)


@triton.jit
def _store(
    acc, bias_ptr, out_ptr, factor_ptr, routing_ptr, alpha, limit, pairs, out_rows, tiles_n, expert, position, valid,
    pair, first, stop, split,
    ACT: tl.constexpr, WEIGHT_IN: tl.constexpr, BN: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """What becomes of the products of slabs [first, stop) with the pairs at some sorted positions."""
    n = first * 16 + tl.arange(0, BN)
    bias = tl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n < stop * 16) & (split == 0), other=0.0)
    if FORMAT == "nvfp4":
        acc *= tl.load(factor_ptr + expert)
    if WEIGHT_IN:
        acc *= tl.load(routing_ptr + pair, mask=valid, other=0.0).to(tl.float32)[None, :]
    acc += bias[:, None]
    at = position if ACT != "none" else split * pairs + pair
    if (ACT == "swiglu") | (ACT == "silu"):
        value = _gated(acc, alpha, limit, ACT, BN, position.shape[0], INTERPRET)
        n = first * 8 + tl.arange(0, BN // 2)
        real = n < tl.minimum(stop * 8, out_rows)
    else:
        value = tl.maximum(acc, 0.0) * tl.maximum(acc, 0.0) if ACT == "relu2" else acc
        real = n < tl.minimum(stop * 16, out_rows)
    out = out_ptr + at.to(tl.int64)[None, :] * out_rows + n[:, None]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=real[:, None] & valid[None, :])


@triton.jit
def _tile(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, factor_ptr, routing_ptr, alpha, limit, pairs, columns,
    out_rows, tiles_n, tiles_k, stride_x, expert, start, end, first, stop, split,
    TOP_K: tl.constexpr, ACT: tl.constexpr, WEIGHT_IN: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    SIDE: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, FORMAT: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr, ASYNC: tl.constexpr,
):  # fmt: skip
    """Slabs [first, stop) of an expert for the sorted positions [start, min(start + BT + SIDE, end))."""
    position = start + tl.arange(0, BT)
    valid = position < end
    pair = tl.load(sorted_ptr + position, mask=valid, other=0)
    rows = position if ACT == "none" else pair // TOP_K
    more = start + BT + tl.arange(0, SIDE if SIDE > 0 else 16)
    more_valid = more < end
    more_pair = tl.load(sorted_ptr + more, mask=more_valid, other=0)
    more_rows = more if ACT == "none" else more_pair // TOP_K
    k, each = _first_k(split, tiles_k, SPLITS, BK // 64)
    k_stop = tl.minimum(k + each, tiles_k)
    if SPLITS == 1:  # ptxas lets products wait for each other in loops that may have no round, where a kernel has two
        tl.assume(k_stop > k)
    acc, side = _product(
        x_ptr, word_ptr, scale_ptr, rows, valid, more_rows, more_valid, first, stop, k, k_stop, tiles_k, columns,
        stride_x, BN, SIDE, BK, FORMAT, INTERPRET, STAGES, EVEN_K, ASYNC,
    )  # fmt: skip
    _store(
        acc, bias_ptr, out_ptr, factor_ptr, routing_ptr, alpha, limit, pairs, out_rows, tiles_n, expert, position,
        valid, pair, first, stop, split, ACT, WEIGHT_IN, BN, FORMAT, INTERPRET,
    )  # fmt: skip
    if SIDE > 0:
        _store(
            side, bias_ptr, out_ptr, factor_ptr, routing_ptr, alpha, limit, pairs, out_rows, tiles_n, expert, more,
            more_valid, more_pair, first, stop, split, ACT, WEIGHT_IN, BN, FORMAT, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=["alpha", "limit", "pairs"])
def mxfp4_gemm(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, factor_ptr, routing_ptr, alpha, limit, pairs,
    columns, out_rows, tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, ACT: tl.constexpr, WEIGHT_IN: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    SHORT: tl.constexpr, SIDE: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
    ASYNC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, chunk of rows, k split).

    ACT         "swiglu" (gpt-oss), "silu", "relu2": x rows are tokens, gathered by pair // TOP_K; writes the activation
                at the sorted position, [pairs, N/2] or, with relu2, [pairs, N]
                "none": x rows are sorted positions; writes partial sums at the pair, [SPLITS, pairs, N]
    SHORT       a block of so few tokens is computed as one of SHORT instead of BT; 0: none is
    SIDE        tokens of a block beyond BT, computed with the same unpacked weights; 0: none
    AHEAD       k-tiles of a tile's weights that are asked for while the one before is computed
    EARLY       the first tile's even while the kernel before still runs, which must not be the one that made the blocks
    ASYNC       products run behind the program's back (wgmma)
    factor_ptr  float32 [E], multiplied on the products of NVFP4
    WEIGHT_IN   products are multiplied with routing_ptr[pair], which is the routing weight applied to the input
    block_ptr   int32 [1 + 3 * blocks]: number of blocks, then (expert, first and end of sorted positions) of each;
                only the first BT + SIDE positions of a block are its own
    """
    SLABS: tl.constexpr = BN // 16
    SCALES: tl.constexpr = 64 if FORMAT == "nvfp4" else 32
    if not EARLY:
        await_and_trigger(PDL)
    blocks = tl.load(block_ptr, cache_modifier=".cg")
    slabs = tiles_n * 4
    count = _chunks(blocks, slabs, tl.num_programs(0), SPLITS, SLABS) if BT <= 32 else tl.cdiv(slabs, SLABS)
    total = blocks * count * SPLITS
    program, programs = tl.program_id(0), tl.num_programs(0)
    expert, start, end = _block(block_ptr, program, total, count, SPLITS)
    later = _block(block_ptr, program + programs, total, count, SPLITS)
    if program < total:
        first, stop, split = _rows(program, count, slabs, SPLITS)
        k, _ = _first_k(split, tiles_k, SPLITS, BK // 64)
        _ask(word_ptr, scale_ptr, expert, first, stop, k, tiles_n, tiles_k, SLABS, AHEAD, SCALES)
    if EARLY:
        await_and_trigger(PDL)
    for index in tl.range(program, total, programs, num_stages=1):
        # While a tile is computed the next one's first weights are on their way, and what the one behind it is.
        if index + programs < total:
            first, stop, split = _rows(index + programs, count, slabs, SPLITS)
            k, _ = _first_k(split, tiles_k, SPLITS, BK // 64)
            _ask(word_ptr, scale_ptr, later[0], first, stop, k, tiles_n, tiles_k, SLABS, AHEAD, SCALES)
        last = _block(block_ptr, index + 2 * programs, total, count, SPLITS)
        first, stop, split = _rows(index, count, slabs, SPLITS)
        base = expert.to(tl.int64) * tiles_n * tiles_k
        words, scales = word_ptr + base * 512, scale_ptr + base * SCALES
        if SHORT > 0 and end - start <= SHORT:
            _tile(
                x_ptr, words, scales, bias_ptr, out_ptr, sorted_ptr, factor_ptr, routing_ptr, alpha, limit, pairs,
                columns, out_rows, tiles_n, tiles_k, stride_x, expert, start, end, first, stop, split,
                TOP_K, ACT, WEIGHT_IN, BN, SHORT, 0, BK, SPLITS, FORMAT, EVEN_K, STAGES, INTERPRET, ASYNC,
            )  # fmt: skip
        else:
            _tile(
                x_ptr, words, scales, bias_ptr, out_ptr, sorted_ptr, factor_ptr, routing_ptr, alpha, limit, pairs,
                columns, out_rows, tiles_n, tiles_k, stride_x, expert, start, end, first, stop, split,
                TOP_K, ACT, WEIGHT_IN, BN, BT, SIDE, BK, SPLITS, FORMAT, EVEN_K, STAGES, INTERPRET, ASYNC,
            )  # fmt: skip
        expert, start, end = later
        later = last
