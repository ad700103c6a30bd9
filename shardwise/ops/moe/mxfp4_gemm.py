"""Grouped GEMM over routed token rows with MXFP4 weights, transposed: out^T [N, tokens] = W [N, K] x^T [K, tokens].

With the weights on the left their fragments stay in registers from unpacking to the matrix unit, and a block of as
few as 16 tokens wastes nothing but the matrix unit's time.
"""

from shardwise.ops.moe.mxfp4_convert import dequantize_tile
from shardwise.ops.triton_support import await_predecessor, tl, triton


@triton.jit
def _tile_product(
    x_ptr, word_ptr, scale_ptr, rows, row_mask, first_slab, k_start, k_stop, tiles_k, columns, stride_x,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BN, BT] float32 sum over the k-tiles of 64 in [k_start, k_stop); pointers at the expert's weights."""
    CHUNKS: tl.constexpr = BK // 64
    SLABS: tl.constexpr = BN // 16
    chunk = tl.arange(0, CHUNKS)
    slab = first_slab + tl.arange(0, SLABS)
    tile = ((slab // 4)[:, None] * tiles_k + chunk[None, :]) * 4 + (slab % 4)[:, None]  # [S, C]
    row = tl.arange(0, 8)
    lane = tl.arange(0, 4)[:, None, None, None, None]
    scale_at = tile[None, :, :] * 8 + row[:, None, None]
    word_at = tile[None, None, :, :, None] * 128 + row[None, :, None, None, None] * 16 + lane * 4
    word_at += tl.arange(0, 4)[None, None, None, None, :]
    column = tl.arange(0, BK)
    x_at = rows[:, None] * stride_x + column[None, :]
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    for k in tl.range(k_start, k_stop, CHUNKS, num_stages=STAGES):
        if EVEN_K:
            words = tl.load(word_ptr + word_at + k * 512)
            scales = tl.load(scale_ptr + scale_at + k * 32)
            x = tl.load(x_ptr + x_at + k * 64, mask=row_mask[:, None], other=0.0)
        else:
            inside = (chunk + k) < k_stop
            words = tl.load(word_ptr + word_at + k * 512, mask=inside[None, None, None, :, None], other=0)
            scales = tl.load(scale_ptr + scale_at + k * 32, mask=inside[None, None, :], other=0)
            within = (column + k * 64) < columns
            x = tl.load(x_ptr + x_at + k * 64, mask=row_mask[:, None] & within[None, :], other=0.0)
        weights = dequantize_tile(words, scales, WIDE, INTERPRET)
        if INTERPRET:
            acc += tl.dot(weights, tl.trans(x).to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(weights, tl.trans(x), acc)
    return acc


@triton.jit
def _swiglu(acc, alpha, limit, BN: tl.constexpr, BT: tl.constexpr):
    """Gate in rows 0..7 and up in rows 8..15 of each slab: [BN, BT] to [BN / 2, BT]."""
    halves = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BT)), (0, 2, 3, 1))
    gate, up = tl.split(halves)
    gate = tl.reshape(tl.minimum(gate, limit), (BN // 2, BT))
    up = tl.reshape(tl.minimum(tl.maximum(up, -limit), limit), (BN // 2, BT))
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit(do_not_specialize=["alpha", "limit", "pairs"])
def mxfp4_gemm(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, alpha, limit, pairs, columns,
    out_rows, tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (token block, n tile, k split).

    GATED       x rows are tokens, gathered by pair // TOP_K; writes the activation at the sorted position, [pairs, N/2]
    otherwise   x rows are sorted positions; writes partial sums at the pair, [SPLITS, pairs, N]
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
        rows = pair // TOP_K if GATED else position
        k_start = split * per_split
        k_stop = tl.minimum(k_start + per_split, tiles_k)
        tile_base = expert.to(tl.int64) * tiles_n * tiles_k
        acc = _tile_product(
            x_ptr, word_ptr + tile_base * 512, scale_ptr + tile_base * 32, rows, valid,
            n_tile * (BN // 16), k_start, k_stop, tiles_k, columns, stride_x,
            BN, BT, BK, WIDE, INTERPRET, STAGES, EVEN_K,
        )  # fmt: skip
        n = n_tile * BN + tl.arange(0, BN)
        bias = tl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n < tiles_n * 64) & (split == 0), other=0.0)
        acc += bias[:, None]
        if GATED:
            value = _swiglu(acc, alpha, limit, BN, BT)
            i = n_tile * (BN // 2) + tl.arange(0, BN // 2)
            out = out_ptr + position.to(tl.int64)[None, :] * out_rows + i[:, None]
            tl.store(out, value.to(out_ptr.dtype.element_ty), mask=(i < out_rows)[:, None] & valid[None, :])
        else:
            out = out_ptr + (split * pairs + pair).to(tl.int64)[None, :] * out_rows + n[:, None]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < out_rows)[:, None] & valid[None, :])
