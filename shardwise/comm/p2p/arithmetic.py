"""Arithmetic that Triton's language lacks, or compiles to more than one instruction."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from shardwise.comm.p2p.asm import INTERPRET, constraints


@triton.jit
def round_to_bfloat16(value):
    """Bits of the nearest bfloat16, ties to even: the interpreter's own conversion truncates."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(value != value, 0x7FFF, rounded)


@triton.jit
def round_pair(low, high, HALF: tl.constexpr):
    """Two float32 rounded to nearest even and packed in a word, `low` in the low half. HALF: float16, else bfloat16."""
    if INTERPRET:
        if HALF:
            low_bits = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            return low_bits | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
        else:
            return round_to_bfloat16(low) | (round_to_bfloat16(high) << 16)
    else:
        if HALF:
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )


@triton.jit
def add_pair(left, right, HALF: tl.constexpr):
    """Sum of two words of two 16-bit floats each. The float32 sum rounded to them has the same bits: float32 has
    twice their precision and two bits more."""
    if HALF:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.constexpr_function
def block_sum_code(elements, warps):
    """Sum over a block, to all its threads: over every 32 lanes, then over those sums, which lie in shared memory.

    So the order does not depend on the number of warps: lane 32 (warps * i + warp) + thread is a thread's i-th element.
    One barrier a sum: the sums of two calls that follow each other lie in different places.
    """
    parts, groups = [f"s{i}" for i in range(elements)], elements * warps
    inside = [
        f"shfl.sync.bfly.b32 t, {part}, {step}, 31, 0xffffffff; add.f32 {part}, {part}, t;"
        for step in (16, 8, 4, 2, 1)
        for part in parts
    ]
    across = [f"ld.shared.f32 t, [a + {4 * i}]; add.f32 s, s, t;" for i in range(groups)]
    if groups % 4 == 0:
        across = [
            f"ld.shared.v4.f32 {{t, u, v, w}}, [a + {16 * i}]; add.f32 t, t, u; add.f32 v, v, w; add.f32 t, t, v; "
            "add.f32 s, s, t;"
            for i in range(groups // 4)
        ]
    return f"""
{{
    .reg .f32 s, t, u, v, w, {", ".join(parts)};
    .reg .b32 a, b, c;
    .reg .pred q;
    .shared .align 16 .b8 sums[{8 * groups}];
    {" ".join(f"mov.f32 {part}, ${elements + i};" for i, part in enumerate(parts))}
    {" ".join(inside)}
    and.b32 a, ${2 * elements}, 1;
    mov.u32 b, sums;
    mad.lo.u32 a, a, {4 * groups}, b;
    mov.u32 b, %tid.x;
    and.b32 c, b, 31;
    setp.eq.u32 q, c, 0;
    shr.u32 b, b, 5;
    mad.lo.u32 b, b, 4, a;
    {" ".join(f"@q st.shared.f32 [b + {4 * warps * i}], {part};" for i, part in enumerate(parts))}
    bar.sync 0;
    mov.f32 s, 0f00000000;
    {" ".join(across)}
    {" ".join(f"mov.f32 ${i}, s;" for i in range(elements))}
}}
"""


@triton.jit
def block_sum(values, turn):
    """Sum of a float32 tensor over the block, in every lane. `turn`: in sums that follow each other even and odd."""
    if INTERPRET:
        return tl.sum(values)
    else:
        WARPS: tl.constexpr = tl_cuda.num_warps()
        ELEMENTS: tl.constexpr = values.shape[0] // (32 * WARPS)
        return tl.inline_asm_elementwise(
            block_sum_code(ELEMENTS, WARPS),
            constraints("f", "fr", ELEMENTS),
            [values, tl.cast(turn, tl.int32)],
            dtype=tl.float32,
            is_pure=False,
            pack=ELEMENTS,
        )
