"""Grouped GEMM over routed token rows with MXFP4 weights, transposed: out^T [N, tokens] = W [N, K] x^T [K, tokens].

With the weights on the left their fragments stay in registers from unpacking to the matrix unit, and a block of as
few as 16 tokens wastes nothing but the matrix unit's time.
"""

from shardwise.ops.moe.mxfp4_convert import dequantize_tile
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _tile_product(
    x_ptr, word_ptr, scale_ptr, rows, row_mask, first_slab, k_start, k_stop, tiles_n, tiles_k, columns,
    stride_x,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BN, BT] float32 sum over the k-tiles of 64 in [k_start, k_stop); pointers at the expert's weights."""
    CHUNKS: tl.constexpr = BK // 64
    SLABS: tl.constexpr = BN // 16
    # Slabs past the last row, where BN does not divide the rows, read the last one's weights; nothing of them is kept.
    last_slab = tiles_n * 4 - 1
    part = tl.arange(0, CHUNKS * SLABS)
    chunk = part // SLABS
    slab = tl.minimum(first_slab + part % SLABS, last_slab)
    tile = ((slab // 4) * tiles_k + chunk) * 4 + slab % 4
    # Loads of equal shape share one thread layout; these words must not get the one of an x tile of 128 columns.
    HALVES: tl.constexpr = 2 if BK == 128 else 1
    line = tl.arange(0, CHUNKS * SLABS * HALVES)
    line_slab = tl.minimum(first_slab + line // HALVES % SLABS, last_slab)
    line_tile = (line_slab // 4 * tiles_k + line // HALVES // SLABS) * 4 + line_slab % 4
    word_at = (line_tile * 128 + line % HALVES * 64)[:, None] + tl.arange(0, 128 // HALVES)[None, :]
    SCALES: tl.constexpr = 16 if FORMAT == "nvfp4" else 8
    scale_at = tile[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
    column = tl.arange(0, BK)
    x_at = rows[:, None] * stride_x + column[None, :]
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    for k in tl.range(k_start, k_stop, CHUNKS, num_stages=STAGES):
        if EVEN_K:
            words = tl.load(word_ptr + word_at + k * 512)
            scales = tl.load(scale_ptr + scale_at + k * (4 * SCALES))
            x = tl.load(x_ptr + x_at + k * 64, mask=row_mask[:, None], other=0.0)
        else:
            inside = (chunk + k) < k_stop
            line_inside = (line // HALVES // SLABS + k) < k_stop
            words = tl.load(word_ptr + word_at + k * 512, mask=line_inside[:, None], other=0)
            scales = tl.load(scale_ptr + scale_at + k * (4 * SCALES), mask=inside[:, None], other=0)
            within = (column + k * 64) < columns
            x = tl.load(x_ptr + x_at + k * 64, mask=row_mask[:, None] & within[None, :], other=0.0)
        weights = dequantize_tile(words, scales, CHUNKS, FORMAT, INTERPRET)
        if INTERPRET:
            acc += tl.dot(weights, tl.trans(x).to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(weights, tl.trans(x), acc)
    return acc


@triton.jit
def _gated(acc, alpha, limit, ACT: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """Gate in rows 0..7 and up in rows 8..15 of each slab: [BN, BT] to [BN / 2, BT]."""
    halves = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BT)), (0, 2, 3, 1))
    gate, up = tl.split(halves)
    gate = tl.reshape(gate, (BN // 2, BT))
    up = tl.reshape(up, (BN // 2, BT))
    if ACT == "silu":
        return up * gate / (1.0 + tl.exp(-gate))
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit(do_not_specialize=["alpha", "limit", "pairs"])
def mxfp4_gemm(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, factor_ptr, routing_ptr, alpha, limit, pairs,
    columns, out_rows, tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, ACT: tl.constexpr, WEIGHT_IN: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr, FORMAT: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile, k split).

    ACT         "swiglu" (gpt-oss), "silu", "relu2": x rows are tokens, gathered by pair // TOP_K; writes the activation
                at the sorted position, [pairs, N/2] or, with relu2, [pairs, N]
                "none": x rows are sorted positions; writes partial sums at the pair, [SPLITS, pairs, N]
    factor_ptr  float32 [E], multiplied on the products of NVFP4
    WEIGHT_IN   products are multiplied with routing_ptr[pair], which is the routing weight applied to the input
    block_ptr   int32 [1 + 3 * blocks]: number of blocks, then (expert, first and end of sorted positions) of each;
                only the first BT positions of a block are its own
    """
    await_predecessor(PDL)
    n_tiles = tl.cdiv(tiles_n * 64, BN)
    total = tl.load(block_ptr) * n_tiles * SPLITS
    per_split = tl.cdiv(tl.cdiv(tiles_k, SPLITS), BK // 64) * (BK // 64)
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        split = index % SPLITS
        n_tile = index // SPLITS % n_tiles
        block = index // SPLITS // n_tiles
        expert = tl.load(block_ptr + 1 + 3 * block)
        start = tl.load(block_ptr + 2 + 3 * block)
        stop = tl.load(block_ptr + 3 + 3 * block)
        position = start + tl.arange(0, BT)
        valid = position < stop
        pair = tl.load(sorted_ptr + position, mask=valid, other=0)
        rows = position if ACT == "none" else pair // TOP_K
        k_start = split * per_split
        k_stop = tl.minimum(k_start + per_split, tiles_k)
        tile_base = expert.to(tl.int64) * tiles_n * tiles_k
        acc = _tile_product(
            x_ptr, word_ptr + tile_base * 512, scale_ptr + tile_base * (64 if FORMAT == "nvfp4" else 32), rows, valid,
            n_tile * (BN // 16), k_start, k_stop, tiles_n, tiles_k, columns, stride_x,
            BN, BT, BK, FORMAT, INTERPRET, STAGES, EVEN_K,
        )  # fmt: skip
        n = n_tile * BN + tl.arange(0, BN)
        bias = tl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n < tiles_n * 64) & (split == 0), other=0.0)
        if FORMAT == "nvfp4":
            acc *= tl.load(factor_ptr + expert)
        if WEIGHT_IN:
            acc *= tl.load(routing_ptr + pair, mask=valid, other=0.0).to(tl.float32)[None, :]
        acc += bias[:, None]
        at = position if ACT != "none" else split * pairs + pair
        if (ACT == "swiglu") | (ACT == "silu"):
            value = _gated(acc, alpha, limit, ACT, BN, BT)
            n = n_tile * (BN // 2) + tl.arange(0, BN // 2)
        elif ACT == "relu2":
            value = tl.maximum(acc, 0.0) * tl.maximum(acc, 0.0)
        else:
            value = acc
        out = out_ptr + at.to(tl.int64)[None, :] * out_rows + n[:, None]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=(n < out_rows)[:, None] & valid[None, :])
