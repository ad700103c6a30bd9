"""Pieces that the MXFP4 kernels for few tokens share: unpacking, the places of a program's work, and its results.

Token rows are turned for them: of 32 columns, those of one lane of the matrix unit come together.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.moe.mxfp4_convert import _NARROW, _SHAPE, _plain, narrow_factors
from shardwise.ops.triton_support import tl


@jit
def decode_words(words, factors, INTERPRET: tl.constexpr):
    """The eight values of each word, in `mxfp4_convert`'s order; `factors` have the words' shape."""
    if INTERPRET:
        return _plain(words, factors, "narrow")
    else:
        return gl.inline_asm_elementwise(_NARROW, _SHAPE, [words, factors], dtype=(gl.int16,) * 8, is_pure=True, pack=1)


@jit
def decode_tile(words, scales, shift, INTERPRET: tl.constexpr):
    """The bits of a tile's weights, [.., row, lane, step, pair, row half, k-half], from words [.., 8 rows, 4 lanes,
    4 steps], scales [.., 8, 1, 1] and `shift`, 0, 0, 8, 8 along the steps; see `mxfp4_layout`."""
    factors, _ = gl.broadcast(narrow_factors(scales >> shift), words)
    a0, a1, b0, b1, c0, c1, d0, d1 = decode_words(words, factors, INTERPRET)
    return gl.join(gl.join(gl.join(a0, a1), gl.join(b0, b1)), gl.join(gl.join(c0, c1), gl.join(d0, d1)))


@jit
def unpack_slabs(words, scales, SHAPE: tl.constexpr, WORDS: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [W, 8, 4, 4], in layout WORDS, and scales [W, 8] of a slab each to their weights in SHAPE, [16 W, 64] or
    [W, 16, 64], as the left operand of the matrix unit."""
    STEPS: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))
    shift = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=STEPS) // 2 * 8, 0), 1), 2)
    bits = decode_tile(words, gl.expand_dims(gl.expand_dims(scales, 2), 3), shift, INTERPRET)
    tile = gl.reshape(gl.permute(bits, (0, 5, 1, 3, 6, 2, 4)), SHAPE)
    if INTERPRET:
        return tile
    return gl.convert_layout(tile.to(gl.bfloat16, bitcast=True), LEFT, assert_trivial=True)


@jit
def turned(column):
    """Where a column stands in a turned row, and the other way round: of 32 columns, those of a lane come together."""
    return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2


@jit
def rows_of(index, tiles_n, tiles_k, SPLITS: tl.constexpr, SLABS: tl.constexpr):
    """(slab, first k-tile, end of k-tiles, split) of a program's tile."""
    split, each = index % SPLITS, gl.cdiv(tiles_k, SPLITS)
    k = split * each
    return index // SPLITS % (tiles_n * 4 // SLABS) * SLABS, k, gl.minimum(k + each, tiles_k), split


@jit
def block_of(block_ptr, index, most, tiles_n, SPLITS: tl.constexpr, SLABS: tl.constexpr):
    """As in `mxfp4_gemm`, of a tile that the table has room for, or the last one; without a look at its count."""
    number = gl.minimum(index // SPLITS // (tiles_n * 4 // SLABS), most - 1)
    entry = block_ptr + 1 + 3 * number
    expert = gl.load(entry, cache_modifier=".cg")
    return expert, gl.load(entry + 1, cache_modifier=".cg"), gl.load(entry + 2, cache_modifier=".cg")


@jit
def store_results(
    acc, out_ptr, sorted_ptr, alpha, limit, pairs, out_rows, tiles_n, slab, split, start, end,
    ACT: tl.constexpr, BT: tl.constexpr, SLABS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 16 * SLABS, layout=gl.SliceLayout(1, SUM))
    position = start + gl.arange(0, BT, layout=gl.SliceLayout(0, SUM))
    valid = position < end
    if ACT == "none":
        pair = gl.load(sorted_ptr + position, mask=valid, other=0)
        n = slab * 16 + row
        out = out_ptr + (split * pairs + pair).to(gl.int64)[None, :] * out_rows + n[:, None]
        gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < out_rows)[:, None] & valid[None, :])
    else:
        gate, up = gl.split(gl.permute(gl.reshape(acc, (SLABS, 2, 8, BT)), (0, 2, 3, 1)))
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate / (1.0 + gl.exp(-alpha * gate))
        n = turned(slab * 8 + row // 16 * 8 + row % 8)
        # What a gate's element needs to know goes the gate's way, and so has its layout.
        at = gl.where((n < out_rows)[:, None] & valid[None, :], position[None, :] * out_rows + n[:, None], -1)
        at, _ = gl.split(gl.permute(gl.reshape(at, (SLABS, 2, 8, BT)), (0, 2, 3, 1)))
        gl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at >= 0)
        if (tiles_n % 2 == 1) & (slab + max(SLABS, 2) >= tiles_n * 4):  # half a tile of the next product is missing
            missing = position[None, :] * out_rows + (tiles_n * 32 + (slab * 16 + row) % 32)[:, None]
            zeros = gl.zeros([16 * SLABS, BT], out_ptr.dtype.element_ty, SUM)
            gl.store(out_ptr + missing, zeros, mask=valid[None, :])


@jit
def await_before(PDL: tl.constexpr):
    """`await_and_trigger` of `triton_support.py`, in Gluon."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
