"""Grouped GEMM with MXFP4 weights for blocks of 8 or 16 tokens: a warp for 16 rows of weights.

Warps share nothing and wait for nobody. A warp's codes come from memory straight into the registers from which the
matrix unit reads the unpacked weights, DEPTH tiles of 64 columns ahead; tokens are the columns of its products.
"""

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.moe.mxfp4_convert import _NARROW, _SHAPE, _plain
from shardwise.ops.ptx import prefetch_to_l2
from shardwise.ops.triton_support import tl

DEPTH = tl.constexpr(5)  # tiles of K in flight


@jit
def decode_words(words, near, far, INTERPRET: tl.constexpr):
    """The eight values of each word, in `mxfp4_convert`'s order; `near` and `far` are factors of the words' shape."""
    if INTERPRET:
        return _plain(words, near, far, "narrow")
    else:
        return gl.inline_asm_elementwise(
            _NARROW, _SHAPE, [words, near, far], dtype=(gl.int16,) * 8, is_pure=True, pack=1
        )


@jit
def _unpack(words, scales, STEPS: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [8 rows, 4 lanes, 4 steps] and scales [8] of a tile to [16, 64] weights, see `mxfp4_layout`."""
    shift = gl.arange(0, 4, layout=STEPS) // 2 * 8
    scale = gl.expand_dims(gl.expand_dims(scales, 1), 2)
    near = ((scale >> shift[None, None, :]) & 0xFF) * 0x00800080 + 0x3F003F00
    far = ((scale >> (shift + 16)[None, None, :]) & 0xFF) * 0x00800080 + 0x3F003F00
    near, _ = gl.broadcast(near, words)
    far, _ = gl.broadcast(far, words)
    a0, a1, b0, b1, c0, c1, d0, d1 = decode_words(words, near, far, INTERPRET)
    low = gl.join(gl.join(a0, a1), gl.join(b0, b1))  # [row, lane, step, pair, row half] of k-half 0
    high = gl.join(gl.join(c0, c1), gl.join(d0, d1))
    tile = gl.reshape(gl.permute(gl.join(low, high), (4, 0, 2, 5, 1, 3)), (16, 64))
    if INTERPRET:
        return tile
    return gl.convert_layout(tile.to(gl.bfloat16, bitcast=True), LEFT, assert_trivial=True)


@jit
def _columns(at, column, inside, columns, EVEN: tl.constexpr):
    """Some columns of all tokens, [64, BT]."""
    if EVEN:
        return gl.load(at)
    return gl.load(at, mask=inside & (column < columns)[:, None], other=0.0)


@jit
def _step(
    acc, words, scales, word_at, scale_at, x_at, column, k, stop, columns,
    AHEAD: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the products of tile k + AHEAD, whose weights are here, and load those DEPTH tiles behind it.

    Pointers stand at tile k. Where there is no such tile any more, EVEN: it is never used; otherwise x and scales
    become zeros.
    """
    later = k + DEPTH < stop if EVEN else k + AHEAD + DEPTH < stop
    x = _columns(x_at + AHEAD * 64, column + (k + AHEAD) * 64, k + AHEAD < stop, columns, EVEN)
    weights = _unpack(words, scales, STEPS, LEFT, INTERPRET)
    words = gl.load(word_at + (AHEAD + DEPTH) * 512, mask=later, eviction_policy="evict_first")
    if EVEN:
        scales = gl.load(scale_at + (AHEAD + DEPTH) * 32, mask=later)
    else:
        scales = gl.load(scale_at + (AHEAD + DEPTH) * 32, mask=later, other=0)
    return mma_v2(weights, x, acc), words, scales


@jit
def _store(
    acc, out_ptr, sorted_ptr, alpha, limit, pairs, out_rows, slab, split, start, end, ACT: tl.constexpr,
    BT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, ACC))
    position = start + gl.arange(0, BT, layout=gl.SliceLayout(0, ACC))
    valid = position < end
    if ACT == "none":
        pair = gl.load(sorted_ptr + position, mask=valid, other=0)
        n = slab * 16 + row
        out = out_ptr + (split * pairs + pair).to(gl.int64)[None, :] * out_rows + n[:, None]
        gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < out_rows)[:, None] & valid[None, :])
    else:
        gate, up = gl.split(gl.permute(gl.reshape(acc, (2, 8, BT)), (1, 2, 0)))
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate / (1.0 + gl.exp(-alpha * gate))
        n = slab * 8 + row % 8
        # What a gate's element needs to know goes the gate's way, and so has its layout.
        at = gl.where((n < out_rows)[:, None] & valid[None, :], position[None, :] * out_rows + n[:, None], -1)
        at, _ = gl.split(gl.permute(gl.reshape(at, (2, 8, BT)), (1, 2, 0)))
        gl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at >= 0)


@jit
def _rows(index, tiles_n, tiles_k, SPLITS: tl.constexpr):
    """(slab, first k-tile, end of k-tiles, split) of a tile."""
    split, each = index % SPLITS, gl.cdiv(tiles_k, SPLITS)
    k = split * each
    return index // SPLITS % (tiles_n * 4), k, gl.minimum(k + each, tiles_k), split


@jit
def _block(block_ptr, index, total, tiles_n, SPLITS: tl.constexpr):
    """As in `mxfp4_gemm`."""
    entry = block_ptr + 1 + 3 * (gl.maximum(gl.minimum(index, total - 1), 0) // SPLITS // (tiles_n * 4))
    expert = gl.load(entry, cache_modifier=".cg")
    return expert, gl.load(entry + 1, cache_modifier=".cg"), gl.load(entry + 2, cache_modifier=".cg")


@jit
def _ask(word_ptr, scale_ptr, expert, slab, k, stop, tiles_n, tiles_k, ASK: tl.constexpr):
    """Have weights brought to the L2 cache: a quarter of ASK tiles of K, of all four slabs that this one lies among."""
    if ASK > 0:
        share = gl.cdiv(gl.minimum(ASK, stop - k), 4)
        at = k + slab % 4 * share
        count = gl.minimum(share, stop - at)
        if count > 0:
            tile = (expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k + at
            prefetch_to_l2(word_ptr + tile * 512, count * 2048)
            prefetch_to_l2(scale_ptr + tile * 32, count * 128)


@jit
def _await(PDL: tl.constexpr):
    """As in `mxfp4_gemm`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit(do_not_specialize=["alpha", "limit", "pairs"])
def mxfp4_few(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, alpha, limit, pairs, columns, out_rows,
    tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    ASK: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (block, slab of 16 rows, k split); arguments as of `mxfp4_gemm`, one warp.

    ACT     "swiglu" or "none"
    EVEN    K is whole tiles, and every split whole DEPTHs of them
    ASK     k-tiles that are asked for while the tile before is computed, by all warps that work on the same 64 rows
    EARLY   the first tile's even while the kernel before still runs, which must not be the one that made the blocks
    """
    ACC: tl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    WORDS: tl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [1, 1, 1], [2, 1, 0])
    ROWS: tl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WORDS))
    LANES: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, WORDS))
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, WORDS))
    if not EARLY:
        _await(PDL)
    total = gl.load(block_ptr, cache_modifier=".cg") * tiles_n * 4 * SPLITS
    program, programs = gl.program_id(0), gl.num_programs(0)
    expert, start, end = _block(block_ptr, program, total, tiles_n, SPLITS)
    later = _block(block_ptr, program + programs, total, tiles_n, SPLITS)
    if program < total:
        slab, first, stop, split = _rows(program, tiles_n, tiles_k, SPLITS)
        _ask(word_ptr, scale_ptr, expert, slab, first, stop, tiles_n, tiles_k, ASK)
    if EARLY:
        _await(PDL)
    row = gl.arange(0, 8, layout=ROWS)
    word = row[:, None, None] * 16 + gl.arange(0, 4, layout=LANES)[None, :, None] * 4
    word += gl.arange(0, 4, layout=STEPS)[None, None, :]
    column = gl.arange(0, 64, layout=gl.SliceLayout(1, RIGHT))
    token = gl.arange(0, BT, layout=gl.SliceLayout(0, RIGHT))
    for index in range(program, total, programs):
        if index + programs < total:
            slab, first, stop, split = _rows(index + programs, tiles_n, tiles_k, SPLITS)
            _ask(word_ptr, scale_ptr, later[0], slab, first, stop, tiles_n, tiles_k, ASK)
        last = _block(block_ptr, index + 2 * programs, total, tiles_n, SPLITS)
        slab, first, stop, split = _rows(index, tiles_n, tiles_k, SPLITS)
        tile = (expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k + first
        word_at = word_ptr + tile * 512 + slab % 4 * 128 + word
        scale_at = scale_ptr + tile * 32 + slab % 4 * 8 + row
        w0 = gl.load(word_at, mask=first < stop, eviction_policy="evict_first")
        w1 = gl.load(word_at + 512, mask=first + 1 < stop, eviction_policy="evict_first")
        w2 = gl.load(word_at + 1024, mask=first + 2 < stop, eviction_policy="evict_first")
        w3 = gl.load(word_at + 1536, mask=first + 3 < stop, eviction_policy="evict_first")
        w4 = gl.load(word_at + 2048, mask=first + 4 < stop, eviction_policy="evict_first")
        s0 = gl.load(scale_at, mask=first < stop, other=0)
        s1 = gl.load(scale_at + 32, mask=first + 1 < stop, other=0)
        s2 = gl.load(scale_at + 64, mask=first + 2 < stop, other=0)
        s3 = gl.load(scale_at + 96, mask=first + 3 < stop, other=0)
        s4 = gl.load(scale_at + 128, mask=first + 4 < stop, other=0)
        # Columns of absent tokens hold the last one's, so that nothing is masked.
        position = gl.minimum(start + token, end - 1)
        rows = position if ACT == "none" else gl.load(sorted_ptr + position) // TOP_K
        x_at = x_ptr + rows[None, :] * stride_x + (first * 64 + column)[:, None]
        acc = gl.zeros([16, BT], gl.float32, ACC)
        for k in range(first, stop, DEPTH):
            words, scales, xs = word_at + (k - first) * 512, scale_at + (k - first) * 32, x_at + (k - first) * 64
            acc, w0, s0 = _step(
                acc, w0, s0, words, scales, xs, column, k, stop, columns, 0, EVEN, STEPS, LEFT, INTERPRET
            )
            acc, w1, s1 = _step(
                acc, w1, s1, words, scales, xs, column, k, stop, columns, 1, EVEN, STEPS, LEFT, INTERPRET
            )
            acc, w2, s2 = _step(
                acc, w2, s2, words, scales, xs, column, k, stop, columns, 2, EVEN, STEPS, LEFT, INTERPRET
            )
            acc, w3, s3 = _step(
                acc, w3, s3, words, scales, xs, column, k, stop, columns, 3, EVEN, STEPS, LEFT, INTERPRET
            )
            acc, w4, s4 = _step(
                acc, w4, s4, words, scales, xs, column, k, stop, columns, 4, EVEN, STEPS, LEFT, INTERPRET
            )
        n = slab * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, ACC))
        bias = gl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n >= 0) & (split == 0), other=0.0)
        acc += bias[:, None]
        _store(acc, out_ptr, sorted_ptr, alpha, limit, pairs, out_rows, slab, split, start, end, ACT, BT, ACC)
        expert, start, end = later
        later = last
