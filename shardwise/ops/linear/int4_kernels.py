"""Kernel of `int4.py`: products with 4-bit weights of a token or a few, on the matrix unit.

A program takes some slabs of 16 rows; its warps take tiles of K in turn and add up at the end. A warp's codes come from
memory straight into the registers from which the matrix unit reads them: no shared memory, no barrier before the sum.
Code less zero point is exact in 16-bit floats; a tile's sums are scaled in float32. Tokens are the columns of the
products.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit, mma_v2
from shardwise.ops.ptx import silu
from shardwise.ops.quantization.int4_weight import scale_of
from shardwise.ops.triton_support import tl, triton

_UNPACK = """
    .reg .b32 a, one, r0, r1, r2, r3;
    mov.b32 one, {one};
    lop3.b32 r0, $8, 0x000F000F, {magic}, 0xEA;
    shr.u32 a, $8, 4;
    lop3.b32 r1, a, 0x000F000F, {magic}, 0xEA;
    shr.u32 a, $8, 8;
    lop3.b32 r2, a, 0x000F000F, {magic}, 0xEA;
    shr.u32 a, $8, 12;
    lop3.b32 r3, a, 0x000F000F, {magic}, 0xEA;
    fma.rn.{kind} r0, r0, one, $9;
    fma.rn.{kind} r1, r1, one, $10;
    fma.rn.{kind} r2, r2, one, $9;
    fma.rn.{kind} r3, r3, one, $10;
    mov.b32 {{$0, $1}}, r0;
    mov.b32 {{$2, $3}}, r1;
    mov.b32 {{$4, $5}}, r2;
    mov.b32 {{$6, $7}}, r3;
"""
UNPACK_BFLOAT = tl.constexpr("{" + _UNPACK.format(magic="0x43004300", one="0x3F803F80", kind="bf16x2") + "}")
"""A code in the last bits of 128.0, less 128 and the zero point."""
UNPACK_HALF = tl.constexpr("{" + _UNPACK.format(magic="0x64006400", one="0x3C003C00", kind="f16x2") + "}")
"""The same of 1024.0."""
UNPACKED = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")


@triton.jit
def plain_values(words, near, far):
    """Twin of the instructions: the values of each word, less the zero points of its two rows, in float32."""
    return (
        ((words & 15) - near).to(tl.float32),
        ((words >> 16 & 15) - near).to(tl.float32),
        ((words >> 4 & 15) - far).to(tl.float32),
        ((words >> 20 & 15) - far).to(tl.float32),
        ((words >> 8 & 15) - near).to(tl.float32),
        ((words >> 24 & 15) - near).to(tl.float32),
        ((words >> 12 & 15) - far).to(tl.float32),
        ((words >> 28 & 15) - far).to(tl.float32),
    )


@jit
def _unpacked(words, near, far, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """The eight values of each word, code less zero point, in the order (k-half, row half, pair); `near` and `far` have
    the zero points of its two rows in their high halves."""
    if INTERPRET:
        return plain_values(words, near >> 16, far >> 16)
    HALF: tl.constexpr = gl.float16 == DTYPE
    NEGATIVE: tl.constexpr = -0x1BFF1C00 if HALF else -0x3CFF3D00  # twice the bits of -1024.0 or -128.0
    near = (near >> 16) * 0x10001 + NEGATIVE
    far = (far >> 16) * 0x10001 + NEGATIVE
    return gl.inline_asm_elementwise(
        UNPACK_HALF if HALF else UNPACK_BFLOAT,
        UNPACKED,
        [words, near, far],
        dtype=(gl.int16,) * 8,
        is_pure=True,
        pack=1,
    )


@jit
def tile_values(
    words, beside, DTYPE: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """Words [W, S, 8, 4, STEPS] and [W, 16 S], of rows, to code less zero point, [W, 16 S, TILE]."""
    pairs = gl.permute(gl.reshape(beside, (words.shape[0], words.shape[1], 2, 8)), (0, 1, 3, 2))
    near, far = gl.split(pairs)
    if not INTERPRET:
        ROWS: tl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, WORDS))
        near = gl.convert_layout(near, ROWS, assert_trivial=True)
        far = gl.convert_layout(far, ROWS, assert_trivial=True)
    near, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(near, 3), 4), words)
    far, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(far, 3), 4), words)
    a0, a1, b0, b1, c0, c1, d0, d1 = _unpacked(words, near, far, DTYPE, INTERPRET)
    bits = gl.join(gl.join(gl.join(a0, a1), gl.join(b0, b1)), gl.join(gl.join(c0, c1), gl.join(d0, d1)))
    tile = gl.permute(bits, (0, 1, 6, 2, 4, 7, 3, 5))
    tile = gl.reshape(tile, (words.shape[0], words.shape[1] * 16, words.shape[4] * 16))
    if INTERPRET:
        return tile
    return gl.convert_layout(tile.to(DTYPE, bitcast=True), LEFT, assert_trivial=True)


@triton.constexpr_function
def sum_layout(warps):
    """Of [W, rows, BT], a warp's products."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@triton.constexpr_function
def word_layout(warps, tile):
    """Of [W, S, 8, 4, STEPS]: neighbouring words of a lane."""
    return gl.BlockedLayout([1, 1, 1, 1, tile // 16], [1, 1, 8, 4, 1], [warps, 1, 1, 1, 1], [4, 3, 2, 1, 0])


@triton.constexpr_function
def token_layout(warps, tokens, tile):
    """Of [W, BT, TILE]: eight columns of a token a lane, and the next ones of 32."""
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
        + ([[0, 0, 32]] if tile == 64 else [])
        + [[0, many, 0] for many in (8, 16, 32) if many < tokens],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[warp, 0, 0] for warp in (1, 2, 4, 8) if warp < warps],
        [],
        [warps, tokens, tile],
    )


@jit
def turned(x, RIGHT: tl.constexpr, INTERPRET: tl.constexpr):
    """Columns [W, BT, TILE] of tokens in the order of the weights' fragments, [W, TILE, BT]."""
    # half of 4 steps, lane, step, k-half, pair
    x = gl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 32, 4, 2, 2, 2))
    x = gl.permute(x, (0, 2, 4, 5, 3, 6, 1))
    x = gl.reshape(x, (x.shape[0], x.shape[1] * 32, x.shape[6]))
    if INTERPRET:
        return x
    return gl.convert_layout(x, RIGHT, assert_trivial=True)


@jit
def words_of(slab, tiles, STEPS: tl.constexpr, WORDS: tl.constexpr):
    """Where the words of slabs' first tile lie: [W, S] to [W, S, 8, 4, STEPS]."""
    AT_ROWS: tl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, WORDS))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, AT_ROWS)))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, WORDS)))))
    step = gl.arange(0, STEPS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WORDS)))))
    rows = gl.expand_dims(slab, 2) * (tiles * 32)
    rows += gl.expand_dims(gl.expand_dims(eight, 0), 1) * 4
    word = gl.expand_dims(gl.expand_dims(rows, 3), 4)
    word += gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 2), 4)
    return word * STEPS + gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(step, 0), 1), 2), 3)


@jit
def _load(word_at, beside_at, ahead: tl.constexpr, there, row_there, W: tl.constexpr, TILE: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """Words [W, S, 8, 4, STEPS] and [W, 16 S] of the tiles `ahead` rounds of all warps on; scales of zero where there
    are none."""
    words = gl.load(word_at + ahead * W * 2 * TILE, mask=there, eviction_policy="evict_first")
    return words, gl.load(beside_at + ahead * W * TILE // GROUP * 16, mask=row_there, other=0)


@jit
def slab_of(slab, first, slabs, S: tl.constexpr, GATED: tl.constexpr):
    """The slab of the weight that each of a program's is; the last one where there is none.

    slabs   of the weight; GATED: of each half, and so has a program gates, then as many ups
    """
    if GATED:
        return gl.minimum(first + slab % (S // 2), slabs - 1) + slab // (S // 2) * slabs
    return gl.minimum(first + slab, slabs - 1)


@jit
def _inputs(x_at, norm_at, place, columns, NORM: tl.constexpr, EVEN: tl.constexpr):
    """Tokens' columns at `place`, zeros from `columns` on; NORM: multiplied by a norm's weights."""
    there = True if EVEN else place < columns
    x = gl.load(x_at, mask=there, other=0.0)
    return x * gl.load(norm_at, mask=there, other=0.0) if NORM else x


@jit
def _columns(x_ptr, first, columns, NORM: tl.constexpr, W: tl.constexpr):
    """[NORM] columns of one token from `first` on, zeros from `columns` on."""
    column = first + gl.arange(0, NORM, layout=gl.BlockedLayout([8], [32], [W], [0]))
    return gl.load(x_ptr + column, mask=column < columns, other=0.0)


@jit(do_not_specialize=["tokens", "eps"])
def few_int4_kernel(
    x_ptr,  # [T, K]
    word_ptr, beside_ptr,  # as `Int4Weight` has them; GATED: gate rows, then up rows
    out_ptr,  # [T, N]
    norm_ptr,  # [K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    tokens, eps, N, K,
    BT: tl.constexpr, S: tl.constexpr, W: tl.constexpr, DEEP: tl.constexpr, EARLY: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, HALF: tl.constexpr,
    EVEN: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """S slabs of the product for at most BT tokens; `int4.py` has the formula.

    S      GATED: half of them gates
    W      warps, which take tiles of K in turn; even, as two tiles may share a scale
    DEEP   tiles that each has on their way
    EARLY  tokens' columns of all of them are asked for at once
    NORM   of one token: how many of its columns are squared at once; 0: none
    HALF   scales are float16, else bfloat16
    EVEN   K is whole rounds of DEEP tiles of each warp
    """
    TILE: tl.constexpr = 64 if GROUP > 64 else GROUP
    STEPS: tl.constexpr = TILE // 16
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = sum_layout(W)
    SUM: tl.constexpr = gl.SliceLayout(0, ACC)
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    WORDS: tl.constexpr = word_layout(W, TILE)
    X: tl.constexpr = token_layout(W, BT, TILE)
    tiles = K // TILE
    slabs = gl.cdiv(N, 16)
    first = gl.program_id(0) * (S // 2 if GATED else S)
    AT_ROWS: tl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, WORDS))
    warp = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, AT_ROWS))), 1)
    tile = gl.expand_dims(gl.expand_dims(gl.expand_dims(warp, 2), 3), 4)
    slab = slab_of(gl.arange(0, S, layout=gl.SliceLayout(0, gl.SliceLayout(2, AT_ROWS))), first, slabs, S, GATED)
    word = words_of(gl.expand_dims(slab, 0), tiles, STEPS, WORDS)
    row = gl.arange(0, 16 * S, layout=gl.SliceLayout(0, gl.SliceLayout(2, ACC)))
    beside = slab_of(row // 16, first, slabs, S, GATED) * (K // GROUP * 16) + row % 16
    beside = gl.expand_dims(beside, 0)
    row_tile = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, ACC))), 1)
    word_at = word_ptr + (word + tile * (2 * TILE))
    beside_at = beside_ptr + (beside + row_tile * TILE // GROUP * 16)
    words, besides = (), ()
    for ahead in gl.static_range(DEEP):
        there, row_there = True, True
        if not EVEN:
            there, row_there = tile + ahead * W < tiles, row_tile + ahead * W < tiles
        w, b = _load(word_at, beside_at, ahead, there, row_there, W, TILE, GROUP)
        words = words + (w,)
        besides = besides + (b,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    # Columns of absent tokens hold the last one's, so that nothing is masked for them.
    token = gl.minimum(gl.arange(0, BT, layout=gl.SliceLayout(0, gl.SliceLayout(2, X))), tokens - 1)
    place = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(1, X))), 1) * TILE
    place += gl.expand_dims(gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(1, X))), 0)
    place = gl.expand_dims(place, 1)
    x_at, norm_at = x_ptr + (gl.expand_dims(gl.expand_dims(token, 0), 2) * K + place), norm_ptr + place
    whole = _columns(x_ptr, 0, K, NORM, W) if NORM else 0.0  # asked for here, looked at when sums are there
    acc = gl.zeros([W, 16 * S, BT], gl.float32, ACC)
    for k in range(0, tiles, W * DEEP):
        word_at += W * DEEP * 2 * TILE
        beside_at += W * DEEP * TILE // GROUP * 16
        inputs, next_words, next_besides = (), (), ()
        if EARLY:
            for ahead in gl.static_range(DEEP):
                column = ahead * W * TILE
                x = _inputs(x_at + column, norm_at + column, place + (k * TILE + column), K, NORM > 0, EVEN)
                inputs = inputs + (x,)
        for ahead in gl.static_range(DEEP):
            column, following = ahead * W * TILE, k + (ahead + DEEP) * W
            if EARLY:
                x = inputs[ahead]
            else:
                x = _inputs(x_at + column, norm_at + column, place + (k * TILE + column), K, NORM > 0, EVEN)
            weights = tile_values(words[ahead], besides[ahead], DTYPE, WORDS, LEFT, INTERPRET)
            scale = gl.expand_dims(scale_of(besides[ahead], HALF), 2)
            there = following < tiles if EVEN else tile + following < tiles
            row_there = following < tiles if EVEN else row_tile + following < tiles
            w, b = _load(word_at, beside_at, ahead, there, row_there, W, TILE, GROUP)
            next_words = next_words + (w,)
            next_besides = next_besides + (b,)
            none = gl.zeros([W, 16 * S, BT], gl.float32, ACC)
            acc += mma_v2(weights, turned(x, RIGHT, INTERPRET), none) * scale
        x_at += W * DEEP * TILE
        norm_at += W * DEEP * TILE
        words = next_words
        besides = next_besides

    sums = gl.sum(acc, 0)
    if NORM:
        whole = whole.to(gl.float32)
        squares = gl.sum(whole * whole, 0)
        for first_column in range(NORM, K, NORM):
            whole = _columns(x_ptr, first_column, K, NORM, W).to(gl.float32)
            squares += gl.sum(whole * whole, 0)
        sums *= 1.0 / gl.sqrt(squares / K + eps)
    t = gl.expand_dims(gl.arange(0, BT, layout=gl.SliceLayout(0, SUM)), 0)
    local = gl.arange(0, 16 * S, layout=gl.SliceLayout(1, SUM))
    n = gl.expand_dims(first * 16 + (local % (8 * S) if GATED else local), 1)
    at = gl.where((n < N) & (t < tokens), t * N + n, -1)
    if BIAS:
        sums += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    if GATED:  # what a gate's element needs to know goes the gate's way, and so has its layout
        gate, up = gl.split(gl.permute(gl.reshape(sums, (2, 8 * S, BT)), (1, 2, 0)))
        at, _ = gl.split(gl.permute(gl.reshape(at, (2, 8 * S, BT)), (1, 2, 0)))
        sums = silu(gate) * up
    if RESIDUAL:
        sums += gl.load(residual_ptr + at, mask=at >= 0, other=0.0).to(gl.float32)
    gl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=at >= 0)
