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
    .reg .b16 n, f;
    .reg .b32 near, far;
    mov.b32 {n, f}, $9;
    mov.b32 near, {n, n};
    mov.b32 far, {f, f};
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
    mul.rn.bf16x2 r0, r0, near;
    mul.rn.bf16x2 r1, r1, far;
    mul.rn.bf16x2 r2, r2, near;
    mul.rn.bf16x2 r3, r3, far;
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
    mul.rn.bf16x2 r0, r0, near;
    mul.rn.bf16x2 r1, r1, far;
    mul.rn.bf16x2 r2, r2, near;
    mul.rn.bf16x2 r3, r3, far;
"""
    + _OUT
)
_SHAPE = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")


@triton.jit
def narrow_factors(scales):
    """Of a word's bytes 0 and 2, scales up to 128: two bfloat16 2**126 * 2**(scale - 127)."""
    return (scales & 0x00FF00FF) * 0x80 + 0x3F003F00


@triton.jit
def _factor(scale, FORMAT: tl.constexpr):
    """Bits of a bfloat16, the scale."""
    if FORMAT == "wide":  # e8m0: 0 is the subnormal 2**-127, 255 is NaN
        return tl.where(scale == 0, 0x40, tl.where(scale == 255, 0x7FC0, scale << 7))
    # e4m3, whose exponent and mantissa in a float's bits are the value times 2**-120
    value = ((scale & 0x7F) << 20).to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where((scale & 0x7F) == 0x7F, 0x7FC0, value.to(tl.int32, bitcast=True) >> 16)


@triton.jit
def _factors(scale, CHUNKS: tl.constexpr, SLABS: tl.constexpr, FORMAT: tl.constexpr):
    """Factors of rows r (low half) and r + 8 (high half) for the four k-steps, [C, S, 8, 1, 4]."""
    step = tl.arange(0, 4)[None, None, None, None, :]
    if FORMAT == "nvfp4":  # two words a row pair, a byte a k-step
        near, far = tl.split(tl.reshape(scale, (CHUNKS, SLABS, 8, 2)))
        near = near[:, :, :, None, None] >> (step * 8)
        far = far[:, :, :, None, None] >> (step * 8)
    else:  # one word a row pair: two blocks of r, two of r + 8
        near = tl.reshape(scale, (CHUNKS, SLABS, 8))[:, :, :, None, None] >> (step // 2 * 8)
        far = near >> 16
    if FORMAT == "narrow":
        return narrow_factors(near)
    return _factor(near & 0xFF, FORMAT) | (_factor(far & 0xFF, FORMAT) << 16)


@triton.jit
def _plain_value(bits, factor, unit):
    """Twin of the instructions: `unit` times the code in the low half of `bits`, times the high half of `factor`."""
    exponent = (bits >> 7) & 3
    mantissa = (bits >> 6) & 1
    magnitude = tl.where(exponent == 0, mantissa * 0.5, (1 + 0.5 * mantissa) * tl.exp2((exponent - 1).to(tl.float32)))
    value = tl.where(((bits >> 15) & 1) == 1, -magnitude, magnitude)
    return value * unit * (factor & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _plain(word, factors, FORMAT: tl.constexpr):
    """The eight values in float32; a narrow factor carries 2**126 of the instructions' detour through subnormals."""
    low, high = factors << 16, factors
    unit = 2.0**-126 if FORMAT == "narrow" else 1.0
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
def dequantize_tile(word, scale, CHUNKS: tl.constexpr, FORMAT: tl.constexpr, INTERPRET: tl.constexpr):
    """word int32 [C * S, 128] or [2 * C * S, 64] and scale int32 [C * S, 8] (NVFP4: 16), chunk-major, to a bfloat16
    tile [16 S, 64 C]; float32 when interpreted.

    Lines of 128 or 64 words make the compiler deal 16 bytes to each lane and slabs to warps, which is how the
    fragment wants them: nothing moves between threads.
    """
    SLABS: tl.constexpr = scale.shape[0] // CHUNKS
    word = tl.reshape(word, (CHUNKS, SLABS, 8, 4, 4))
    factors, _ = tl.broadcast(_factors(scale, CHUNKS, SLABS, FORMAT), word)
    if INTERPRET:
        a0, a1, b0, b1, c0, c1, d0, d1 = _plain(word, factors, FORMAT)
    else:
        if FORMAT != "narrow":
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _WIDE, _SHAPE, [word, factors], dtype=(tl.int16,) * 8, is_pure=True, pack=1
            )
        else:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                _NARROW, _SHAPE, [word, factors], dtype=(tl.int16,) * 8, is_pure=True, pack=1
            )
    near = tl.join(tl.join(a0, a1), tl.join(b0, b1))  # [.., pair, row half] of k-half 0
    far = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    both = tl.join(near, far)  # [chunk, slab, row, lane, step, pair, row half, k-half]
    tile = tl.permute(both, (1, 6, 2, 0, 4, 7, 3, 5))
    tile = tl.reshape(tile, (SLABS * 16, CHUNKS * 64))
    if INTERPRET:
        return tile
    return tile.to(tl.bfloat16, bitcast=True)
