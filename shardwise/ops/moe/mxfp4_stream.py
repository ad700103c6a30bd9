"""Grouped GEMM with MXFP4 weights for blocks of 8 or 16 tokens: codes stream through shared memory.

A program takes some slabs of 16 rows. A thread copies the codes that it will unpack into a ring, rounds ahead and also
beyond the end of its rows: bytes on their way cost no registers and wait for no arithmetic. The matrix unit reads the
unpacked weights from registers; tokens are the columns of its products.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import async_copy, gl, jit, mma_v2
from shardwise.ops.moe.mxfp4_pieces import await_before, block_of, decode_tile, rows_of, store_results
from shardwise.ops.triton_support import tl


@jit
def _unpack(words, scales, WORDS: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [W, S, 8, 4, 4] and scales [W, S, 8] of W tiles to their weights [W, 16 S, 64]."""
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS))))
    shift = gl.arange(0, 4, layout=STEPS) // 2 * 8
    shift = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(shift, 0), 1), 2), 3)
    bits = decode_tile(words, gl.expand_dims(gl.expand_dims(scales, 3), 4), shift, INTERPRET)
    tile = gl.reshape(gl.permute(bits, (0, 1, 6, 2, 4, 7, 3, 5)), (words.shape[0], words.shape[1] * 16, 64))
    if INTERPRET:
        return tile
    return gl.convert_layout(tile.to(gl.bfloat16, bitcast=True), LEFT, assert_trivial=True)


@jit
def _tokens(x_at, tile, step: tl.constexpr, last, SURE: tl.constexpr, INTERPRET: tl.constexpr):
    """Turned columns of all tokens, [W, BT, 64], or [W, BT, 32] pairs: of the tile `step` beyond each of W, which is at
    x_at, or of the last one.

    SURE   there is such a tile
    """
    beyond = step if SURE else gl.minimum(last - tile, step)
    return gl.load(x_at + beyond * (64 if INTERPRET else 32))


@jit
def _columns(x, RIGHT: tl.constexpr, INTERPRET: tl.constexpr):
    """What `_tokens` gave, [W, 64 columns, BT]."""
    if not INTERPRET:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        x = gl.join(low, high).to(gl.bfloat16, bitcast=True)
    x = gl.permute(gl.reshape(x, (x.shape[0], x.shape[1], 2, 4, 4, 2)), (0, 2, 4, 3, 5, 1))
    x = gl.reshape(x, (x.shape[0], 64, x.shape[5]))
    if INTERPRET:
        return x
    return gl.convert_layout(x, RIGHT, assert_trivial=True)


@jit
def _places(W: tl.constexpr, SLABS: tl.constexpr, WORDS: tl.constexpr):
    """(warp [W, 1, 1], scales [W, SLABS, 8], words [W, SLABS, 8, 4, 4]): places of W tiles' from the first one's on."""
    SCALES: tl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, WORDS))
    LANES: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, WORDS))))
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS))))
    slabs = gl.arange(0, SLABS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SCALES)))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, SCALES)))
    warp = gl.expand_dims(gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, SCALES))), 1), 2)
    row = warp * 32 + gl.expand_dims(gl.expand_dims(slabs, 0), 2) * 8 + gl.expand_dims(gl.expand_dims(eight, 0), 1)
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=LANES), 0), 1), 2)
    step = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=STEPS), 0), 1), 2)
    word = gl.expand_dims(gl.expand_dims(row, 3), 4) * 16 + gl.expand_dims(lane, 4) * 4 + gl.expand_dims(step, 3)
    return warp, row, word


@jit
def _beginning(expert, slab, first, tiles_n, tiles_k):
    """Place of a slab's k-tile among all, in pieces of 128 words and 8 scales."""
    return ((expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k + first) * 4 + slab % 4


@jit
def _there(left, warp, ahead: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr):
    """Whether each warp has a tile `ahead` steps on, where `left` are. EVEN: all but a round's last W come together."""
    if EVEN and (ahead < DEEP - 1 or W == 1):
        return left > 0
    else:
        return warp < left - ahead * W


@jit
def _copy(
    ring, slot, words, word, warp, left, W: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Begin to copy a round's words from `words` on to a slot of the ring. Zeros stand for what is not there."""
    if not INTERPRET:
        for ahead in gl.static_range(DEEP):
            at = words + (word + ahead * W * 512)
            async_copy.async_copy_global_to_shared(
                ring[ahead].index(slot), at, mask=_there(left, warp, ahead, W, EVEN, DEEP)
            )
        async_copy.commit_group()


@jit
def _scales(scale_ptr, row, warp, left, W: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr):
    """A round's scales."""
    scales = ()
    for ahead in gl.static_range(DEEP):
        there = _there(left, warp, ahead, W, EVEN, DEEP)
        scales = scales + (gl.load(scale_ptr + (row + ahead * W * 32), mask=there, other=0),)
    return scales


@jit
def _round(
    acc, x, ring, slot, words_at, warp, left, scales, x_at, k, last,
    W: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(sums with a round's products added, the next round's first columns of x); `x` are this round's first.

    words_at, left   where the interpreter, which has no ring, reads the words, and how many tiles there are
    """
    for ahead in gl.static_range(DEEP):
        if INTERPRET:
            words = gl.load(words_at + ahead * W * 512, mask=warp < left - ahead * W, other=0)
        else:
            words = ring[ahead].index(slot).load(WORDS)
        now = x
        x = _tokens(
            x_at, k, (ahead + 1) * W, last, EVEN and (ahead + 2 < DEEP or (ahead + 2 == DEEP and W == 1)), INTERPRET
        )  # fmt: skip
        weights = _unpack(words, scales[ahead], WORDS, LEFT, INTERPRET)
        acc = mma_v2(weights, _columns(now, RIGHT, INTERPRET), acc)
    return acc, x


@jit(do_not_specialize=["alpha", "limit", "pairs", "most"])
def mxfp4_stream(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, alpha, limit, pairs, most, out_rows,
    tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    DEEP: tl.constexpr, RING: tl.constexpr, SLABS: tl.constexpr, ROW_WARPS: tl.constexpr, W: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over (block, SLABS slabs, k split); arguments as of `mxfp4_gemm`.

    most    blocks that the table has room for
    x_ptr   turned rows of whole tiles, see `turned`
    ACT     "swiglu", which writes turned rows of out_rows columns with zeros behind the last, or "none"
    EVEN    splits are whole rounds but for less than W tiles
    DEEP    tiles of a round, for each of the W sets of ROW_WARPS warps, which take tiles of K in turn
    RING    rounds that are there or on their way, at most one more than a split has
    EARLY   weights are loaded while the kernel before still runs, which must not be the one that made the blocks
    """
    ACC: tl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, ROW_WARPS, 1], instr_shape=[1, 16, 8]
    )  # fmt: skip
    SUM: tl.constexpr = gl.SliceLayout(0, ACC)
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    WORDS: tl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 1, 8, 4, 1], [W, ROW_WARPS, 1, 1, 1], [4, 3, 2, 1, 0])
    # Pairs of columns of a token, four of 32 columns a lane, as the matrix unit wants them.
    X: tl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 16]] + ([[0, 8, 0]] if BT == 16 else []),
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 0]] * (ROW_WARPS // 2) + ([[1, 0, 0], [2, 0, 0]] if W == 4 else [[1, 0, 0]] if W == 2 else []),
        [], [W, BT, 32],
    )  # fmt: skip
    STRIDE: tl.constexpr = DEEP * W  # tiles of a round
    WIDTH: tl.constexpr = 64 if INTERPRET else 32  # of what is loaded of 64 columns
    x_rows = x_ptr if INTERPRET else x_ptr.to(gl.pointer_type(gl.int32))
    if not EARLY:
        await_before(PDL)
    ring = ()  # a buffer for each tile of a round, as the compiler lets copies to the same one wait for each other
    if not INTERPRET:
        PLAIN: tl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [4, 3, 2, 1, 0])
        for _buffer in gl.static_range(DEEP):
            ring = ring + (gl.allocate_shared_memory(gl.int32, [RING, W, SLABS, 8, 4, 4], PLAIN),)
    total = gl.load(block_ptr, cache_modifier=".cg") * (tiles_n * 4 // SLABS) * SPLITS
    program, programs = gl.program_id(0), gl.num_programs(0)
    expert, start, end = block_of(block_ptr, program, most, tiles_n, SPLITS, SLABS)
    warp, row, word = _places(W, SLABS, WORDS)
    word_warp = gl.expand_dims(gl.expand_dims(warp, 3), 4)
    token = gl.arange(0, BT, layout=gl.SliceLayout(0, gl.SliceLayout(2, X)))
    place = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, X)))
    place = gl.expand_dims(gl.expand_dims(place, 0), 1)
    warp_x = gl.expand_dims(gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, X))), 1), 2)
    slab, first, stop, split = rows_of(program, tiles_n, tiles_k, SPLITS, SLABS)
    here = _beginning(expert, slab, first, tiles_n, tiles_k)
    left = gl.where(program < total, stop - first, 0)
    for ahead in gl.static_range(RING - 1):
        at = word_ptr + (here * 128 + ahead * STRIDE * 512)
        _copy(ring, ahead, at, word, word_warp, left - ahead * STRIDE, W, EVEN, DEEP, INTERPRET)
    words_at, words_left = word_ptr + (here * 128 + (RING - 1) * STRIDE * 512), left - (RING - 1) * STRIDE
    scales_at, scales_left = scale_ptr + here * 8, left
    scales = _scales(scales_at, row, warp, left, W, EVEN, DEEP)
    slot, rounds = 0, gl.cdiv(gl.cdiv(tiles_k, SPLITS), STRIDE)
    if EARLY:
        await_before(PDL)
    for index in range(program, total, programs):
        later = block_of(block_ptr, index + programs, most, tiles_n, SPLITS, SLABS)
        slab, first, stop, split = rows_of(index, tiles_n, tiles_k, SPLITS, SLABS)
        next_slab, next_first, next_stop, _ = rows_of(index + programs, tiles_n, tiles_k, SPLITS, SLABS)
        there = _beginning(later[0], next_slab, next_first, tiles_n, tiles_k)
        next_left = gl.where(index + programs < total, next_stop - next_first, 0)
        # Columns of absent tokens hold the last one's, so that nothing is masked.
        position = gl.minimum(start + token, end - 1)
        rows = position if ACT == "none" else gl.load(sorted_ptr + position) // TOP_K
        x_at = x_rows + (gl.expand_dims(gl.expand_dims(rows, 0), 2) * (stride_x * WIDTH // 64) + place)
        x_at += (first + warp_x) * WIDTH
        x = _tokens(x_at, first + warp_x, 0, stop - 1, EVEN and (DEEP > 1 or W == 1), INTERPRET)
        acc = gl.zeros([W, 16 * SLABS, BT], gl.float32, ACC)
        for number in range(rounds):
            k = first + number * STRIDE
            if not INTERPRET:
                async_copy.wait_group(RING - 2)
            scales_at += STRIDE * 32
            scales_left -= STRIDE
            if number == rounds - 1:
                scales_at, scales_left = scale_ptr + there * 8, next_left
            if number == rounds - (RING - 1):
                words_at, words_left = word_ptr + there * 128, next_left
            next_scales = _scales(scales_at, row, warp, scales_left, W, EVEN, DEEP)
            free = gl.where(slot == 0, RING - 1, slot - 1)
            _copy(ring, free, words_at, word, word_warp, words_left, W, EVEN, DEEP, INTERPRET)
            words_at += STRIDE * 512
            words_left -= STRIDE
            words = word_ptr + (here * 128 + number * STRIDE * 512) + word
            acc, x = _round(
                acc, x, ring, slot, words, word_warp, stop - k, scales, x_at, k + warp_x, stop - 1,
                W, EVEN, DEEP, WORDS, LEFT, RIGHT, INTERPRET,
            )  # fmt: skip
            x_at += STRIDE * WIDTH
            slot = gl.where(slot == RING - 1, 0, slot + 1)
            scales = next_scales
        n = slab * 16 + gl.arange(0, 16 * SLABS, layout=gl.SliceLayout(1, SUM))
        bias = gl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n >= 0) & (split == 0), other=0.0)
        sums = gl.sum(acc, 0) + bias[:, None]
        store_results(
            sums, out_ptr, sorted_ptr, alpha, limit, pairs, out_rows, tiles_n, slab, split, start, end,
            ACT, BT, SLABS, SUM,
        )  # fmt: skip
        here = there
        expert, start, end = later
