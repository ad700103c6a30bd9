"""Grouped GEMM with MXFP4 weights for blocks of 8 or 16 tokens: a warp for 16 rows of weights.

Warps share nothing and wait for nobody. A warp's codes come from memory straight into the registers from which the
matrix unit reads the unpacked weights, DEEP tiles of 64 columns ahead, also beyond the end of its rows; tokens are the
columns of its products. Token rows are turned: of 32 columns, those of one lane of the matrix unit come together.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.moe.mxfp4_pieces import await_before, block_of, store_results, turned, unpack_slabs
from shardwise.ops.triton_support import tl


@jit
def _tokens(x_at, k, stop, columns, X: tl.constexpr, RIGHT: tl.constexpr, EVEN: tl.constexpr):
    """64 columns of all tokens from turned rows, [64, BT]."""
    if EVEN:
        x = gl.load(x_at)
    else:
        column = k * 64 + turned(gl.arange(0, 64, layout=gl.SliceLayout(0, X)))
        x = gl.load(x_at, mask=((column < columns) & (k < stop))[None, :], other=0.0)
    x = gl.permute(gl.reshape(x, (x_at.shape[0], 2, 4, 4, 2)), (1, 3, 2, 4, 0))  # columns in their order, token
    return gl.convert_layout(gl.reshape(x, (64, x_at.shape[0])), RIGHT)


@jit
def _load(word_at, scale_at, ahead, there, word, row):
    """Words and scales of a k-tile; if it is not there, anything and zeros."""
    words = gl.load(word_at + (word + ahead * 512), mask=there, eviction_policy="evict_first")
    return words, gl.load(scale_at + (row + ahead * 32), mask=there, other=0)


@jit
def _share(units, rounds):
    """(first round, end of rounds, first unit) of this program: as many rounds as every other has, at least a unit's.

    A unit of the grid's work, some slabs of a block, takes `rounds`; where a share ends inside of it, the next program
    goes on.
    """
    each = gl.maximum(gl.cdiv(units * rounds, gl.num_programs(0)), rounds)
    begin = gl.program_id(0) * each
    return begin, gl.minimum(begin + each, units * rounds), begin // rounds


@jit
def _part(
    unit, begin, finish, rounds, tiles_n, tiles_k, SPLITS: tl.constexpr, WARPS: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """(slab, first k-tile, end of k-tiles, split) of what a share has of a unit with rounds of DEEP tiles; no tiles
    where it has nothing."""
    split, each = unit % SPLITS, gl.cdiv(tiles_k, SPLITS)
    k = split * each
    first = k + gl.maximum(begin - unit * rounds, 0) * DEEP
    stop = gl.minimum(gl.minimum(k + each, tiles_k), k + (finish - unit * rounds) * DEEP)
    return unit // SPLITS % (tiles_n * 4 // WARPS) * WARPS, first, gl.maximum(stop, first), split


@jit
def _begin(
    word_ptr, scale_ptr, expert, part, tiles_n, tiles_k, word, row, DEEP: tl.constexpr
):  # fmt: skip
    """The first DEEP k-tiles of a part's words and scales; of none where it has no tiles."""
    slab, first, stop, _ = part
    tile = (expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k + first
    word_at, scale_at = word_ptr + slab % 4 * 128 + tile * 512, scale_ptr + slab % 4 * 8 + tile * 32
    words, scales = (), ()
    for ahead in gl.static_range(DEEP):
        w, s = _load(word_at, scale_at, ahead, first + ahead < stop, word, row)
        words = words + (w,)
        scales = scales + (s,)
    return words, scales


@jit
def _complete(
    acc, part_ptr, counter_ptr, unit, begin, finish, rounds, ROWS: tl.constexpr, BT: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """(whether this program has the whole sums of a unit, these sums).

    Of two programs that share a unit the later one adds what the earlier one stored; the order of two does not matter.

    part_ptr      float32 [programs, 2, ROWS, BT]: of the unit that a share ends in, both parts
    counter_ptr   int32 [programs] zeros, which stay zeros
    """
    continues = unit * rounds < begin
    ready = (unit * rounds >= begin) & ((unit + 1) * rounds <= finish)
    if not ready:
        half = continues.to(gl.int32)
        owner = gl.program_id(0) - half
        place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUM))[:, None] * BT
        place += gl.arange(0, BT, layout=gl.SliceLayout(0, SUM))[None, :]
        parts = part_ptr + owner * (2 * ROWS * BT)
        gl.store(parts + half * (ROWS * BT) + place, acc)
        tl.debug_barrier()
        ready = gl.atomic_add(counter_ptr + owner, 1, sem="acq_rel") == 1
        if ready:
            gl.store(counter_ptr + owner, 0)
            acc += gl.load(parts + (1 - half) * (ROWS * BT) + place, cache_modifier=".cg")
    return ready, acc


@jit(do_not_specialize=["alpha", "limit", "pairs", "most"])
def mxfp4_few(
    x_ptr, word_ptr, scale_ptr, bias_ptr, out_ptr, sorted_ptr, block_ptr, part_ptr, counter_ptr, alpha, limit, pairs,
    most, columns, out_rows, tiles_n, tiles_k, stride_x,
    TOP_K: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    DEEP: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Persistent over shares of the rounds of all units (block, slab of 16 rows for each warp, k split); arguments as
    of `mxfp4_gemm`.

    most    blocks that the table has room for
    x_ptr   turned rows of whole tiles, see `turned`
    part_ptr, counter_ptr   see `_complete`
    ACT     "swiglu", which writes turned rows of out_rows columns with zeros behind the last, or "none"
    EVEN    K is whole tiles, and every split whole DEEPs of them
    DEEP    tiles of K in flight
    WARPS   1, 2 or 4, on neighbouring slabs
    EARLY   weights are loaded while the kernel before still runs, which must not be the one that made the blocks
    """
    ACC: tl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    WORDS: tl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    SCALES: tl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, WORDS))
    LANES: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WORDS)))
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    # Twice eight columns of a token a lane, as the matrix unit wants them; the same in every warp.
    X: tl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32]] + ([[8, 0]] if BT == 16 else []),
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[0, 0]] * (WARPS // 2), [], [BT, 64],
    )  # fmt: skip
    if not EARLY:
        await_before(PDL)
    rounds = gl.cdiv(gl.cdiv(tiles_k, SPLITS), DEEP)
    units = gl.load(block_ptr, cache_modifier=".cg") * (tiles_n * 4 // WARPS) * SPLITS
    begin, finish, unit = _share(units, rounds)
    expert, start, end = block_of(block_ptr, unit, most, tiles_n, SPLITS, WARPS)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, SCALES))
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, SCALES))
    lane = gl.arange(0, 4, layout=LANES)
    step = gl.arange(0, 4, layout=STEPS)
    rows_at = warp[:, None] * 8 + row[None, :]
    word = gl.expand_dims(gl.expand_dims(rows_at * 16, 2), 3) + lane[None, None, :, None] * 4
    word += step[None, None, None, :]
    token = gl.arange(0, BT, layout=gl.SliceLayout(1, X))
    place = gl.arange(0, 64, layout=gl.SliceLayout(0, X))
    part = _part(unit, begin, finish, rounds, tiles_n, tiles_k, SPLITS, WARPS, DEEP)
    words, scales = _begin(word_ptr, scale_ptr, expert, part, tiles_n, tiles_k, word, rows_at, DEEP)
    if EARLY:
        await_before(PDL)
    for index in range(unit, gl.cdiv(finish, rounds)):
        later = block_of(block_ptr, index + 1, most, tiles_n, SPLITS, WARPS)
        slab, first, stop, split = _part(index, begin, finish, rounds, tiles_n, tiles_k, SPLITS, WARPS, DEEP)
        part = _part(index + 1, begin, finish, rounds, tiles_n, tiles_k, SPLITS, WARPS, DEEP)
        tile = (expert.to(gl.int64) * tiles_n + slab // 4) * tiles_k
        word_at, scale_at = word_ptr + slab % 4 * 128 + tile * 512, scale_ptr + slab % 4 * 8 + tile * 32
        # Columns of absent tokens hold the last one's, so that nothing is masked.
        position = gl.minimum(start + token, end - 1)
        rows = position if ACT == "none" else gl.load(sorted_ptr + position) // TOP_K
        x_at = x_ptr + rows[:, None] * stride_x + place[None, :]
        acc = gl.zeros([16 * WARPS, BT], gl.float32, ACC)
        for k in range(first, stop, DEEP):
            xs, next_words, next_scales = x_at + k * 64, (), ()
            from_words, from_scales = word_at + k * 512, scale_at + k * 32
            for ahead in gl.static_range(DEEP):
                x = _tokens(xs + ahead * 64, k + ahead, stop, columns, X, RIGHT, EVEN)
                weights = unpack_slabs(words[ahead], scales[ahead], (16 * WARPS, 64), WORDS, LEFT, INTERPRET)
                there = k + DEEP < stop if EVEN else k + ahead + DEEP < stop
                w, s = _load(from_words, from_scales, ahead + DEEP, there, word, rows_at)
                next_words = next_words + (w,)
                next_scales = next_scales + (s,)
                acc = mma_v2(weights, x, acc)
            words = next_words
            scales = next_scales
        words, scales = _begin(word_ptr, scale_ptr, later[0], part, tiles_n, tiles_k, word, rows_at, DEEP)
        ready, acc = _complete(acc, part_ptr, counter_ptr, index, begin, finish, rounds, 16 * WARPS, BT, ACC)
        n = slab * 16 + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, ACC))
        if ready:
            bias = gl.load(bias_ptr + expert * tiles_n * 64 + n, mask=(n >= 0) & (split == 0), other=0.0)
            acc += bias[:, None]
            store_results(
                acc, out_ptr, sorted_ptr, alpha, limit, pairs, out_rows, tiles_n, slab, split, start, end,
                ACT, BT, WARPS, ACC,
            )  # fmt: skip
        expert, start, end = later
