"""Eight e2m1 codes of a packed word to bfloat16 in registers: exact, 13 instructions.

A code's bits s e e m at bits 15, 8, 7, 6 of a bfloat16 are that code's value times 2**-126, subnormals included, so
one multiplication with 2**126 * 2**(scale - 127) finishes element and block scale together.
"""

from shardwise.ops.triton_support import tl, triton

_MASKED = """
    .reg .b32 a, b, r0, r1, r2, r3;
    and.b32 r0, $8, 0x81C081C0;
    shf.r.wrap.b32 a, $8, $8, 6;
    and.b32 r1, a, 0x81C081C0;
    shl.b32 a, $8, 6;
    and.b32 r2, a, 0x81C081C0;
    shl.b32 a, $8, 4;
    shr.b32 b, $8, 4;
    and.b32 a, a, 0x81808180;
    lop3.b32 r3, b, 0x00400040, a, 0xEA;
"""
_OUT = """
    mov.b32 {$0, $1}, r0;
    mov.b32 {$2, $3}, r1;
    mov.b32 {$4, $5}, r2;
    mov.b32 {$6, $7}, r3;
}
"""
_NARROW = tl.constexpr(
    "{"
    + _MASKED
    + """
    mul.rn.bf16x2 r0, r0, $9;
    mul.rn.bf16x2 r1, r1, $10;
    mul.rn.bf16x2 r2, r2, $9;
    mul.rn.bf16x2 r3, r3, $10;
"""
    + _OUT
)
_WIDE = tl.constexpr(
    "{"
    + _MASKED
    + """
    .reg .b32 big;
    mov.b32 big, 0x7E807E80;
    mul.rn.bf16x2 r0, r0, big;
    mul.rn.bf16x2 r1, r1, big;
    mul.rn.bf16x2 r2, r2, big;
    mul.rn.bf16x2 r3, r3, big;
    mul.rn.bf16x2 r0, r0, $9;
    mul.rn.bf16x2 r1, r1, $10;
    mul.rn.bf16x2 r2, r2, $9;
    mul.rn.bf16x2 r3, r3, $10;
"""
    + _OUT
)
_SHAPE = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")


@triton.jit
def _factor(scale, WIDE: tl.constexpr):
    """Two equal bfloat16 in one word: 2**(scale - 127), times 2**126 unless WIDE."""
    if WIDE:  # 0 is the subnormal 2**-127, 255 is NaN
        bits = tl.where(scale == 0, 0x40, tl.where(scale == 255, 0x7FC0, scale << 7))
        return bits | (bits << 16)
    return scale * 0x00800080 + 0x3F003F00


@triton.jit
def _plain_value(bits, factor, unit):
    """Twin of the instructions: `unit` times the code in the low half of `bits`, times the low half of `factor`."""
    exponent = (bits >> 7) & 3
    mantissa = (bits >> 6) & 1
    magnitude = tl.where(exponent == 0, mantissa * 0.5, (1 + 0.5 * mantissa) * tl.exp2((exponent - 1).to(tl.float32)))
    value = tl.where(((bits >> 15) & 1) == 1, -magnitude, magnitude)
    return value * unit * ((factor & 0xFFFF) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _plain(word, low, high, WIDE: tl.constexpr):
    """The eight values in float32; a narrow factor carries 2**126 of the instructions' detour through subnormals."""
    unit = 1.0 if WIDE else 2.0**-126
    turned = ((word >> 6) & 0x03FFFFFF) | (word << 26)
    fourth = ((word << 4) & -0x7E7F7E80) | ((word >> 4) & 0x00400040)
    third = word << 6
    return (
        _plain_value(word, low, unit),
        _plain_value(word >> 16, low, unit),
        _plain_value(turned, high, unit),
        _plain_value(turned >> 16, high, unit),
        _plain_value(third, low, unit),
        _plain_value(third >> 16, low, unit),
        _plain_value(fourth, high, unit),
        _plain_value(fourth >> 16, high, unit),
    )


@triton.jit
def dequantize_tile(word, scale, WIDE: tl.constexpr, INTERPRET: tl.constexpr):
    """word int32 [4 lanes, 8 rows, S, C, 4 steps], scale int32 [8, S, C] to a bfloat16 tile [16 S, 64 C].

    The order of the dimensions makes the compiler deal words to threads as the fragment wants them, so that nothing
    moves between threads. Float32 when interpreted.
    """
    SLABS: tl.constexpr = word.shape[2]
    CHUNKS: tl.constexpr = word.shape[3]
    step = tl.arange(0, 4)[None, None, None, None, :]
    block = scale[None, :, :, :, None] >> (step // 2 * 8)
    low = _factor(block & 0xFF, WIDE)
    high = _factor((block >> 16) & 0xFF, WIDE)
    low, _ = tl.broadcast(low, word)
    high, _ = tl.broadcast(high, word)
    if INTERPRET:
        a0, a1, b0, b1, c0, c1, d0, d1 = _plain(word, low, high, WIDE)
    else:
        if WIDE:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _WIDE, _SHAPE, [word, low, high], dtype=(tl.int16,) * 8, is_pure=True, pack=1
            )
        else:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _NARROW, _SHAPE, [word, low, high], dtype=(tl.int16,) * 8, is_pure=True, pack=1
            )
    near = tl.join(tl.join(a0, a1), tl.join(b0, b1))  # [.., pair, row half] of k-half 0
    far = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    both = tl.join(near, far)  # [lane, row, slab, chunk, step, pair, row half, k-half]
    tile = tl.permute(both, (2, 6, 1, 3, 4, 7, 0, 5))
    tile = tl.reshape(tile, (SLABS * 16, CHUNKS * 64))
    if INTERPRET:
        return tile
    return tile.to(tl.bfloat16, bitcast=True)
