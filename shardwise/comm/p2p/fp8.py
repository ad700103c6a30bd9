"""One-shot all-reduce that sends 16-bit floats as e4m3 with one float32 scale for 32 values: strategy LOWPRECISION.

A value v of a group whose largest magnitude is m is sent as e4m3(v / s), s the least power of two from m / 448 on, so
that what is decoded is exact. Every rank decodes every contribution, its own included, adds in float32 over ranks
0..W-1 and rounds once: all ranks get the same bits. A contribution is off by at most max(|v| / 16, s / 1024): half a
unit of e4m3's last place, normal or subnormal.

A lane takes 4 groups of 32 values, 8 values of each of 4 chunks that lie LANES chunks apart: so every load is whole.
It sends 8 chunks of values and one of scales: 144 bytes for 256. A word of values never equals ARMED, as the
conversion makes one NaN only, and no scale is that NaN: the rest of the protocol is one_shot.py's.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p import memory, workspace
from shardwise.comm.p2p.asm import INTERPRET
from shardwise.comm.p2p.rows import (
    add,
    advance,
    begin,
    load_row,
    number,
    pack,
    push,
    region,
    store_row,
    unpack,
    waiting,
)

GROUPS, GROUP_CHUNKS = 4, 4
CHUNK_VALUES = 8
LANE_VALUES = GROUPS * GROUP_CHUNKS * CHUNK_VALUES
LANE_CHUNKS = GROUPS * 2 + 1
"""16-byte chunks that a lane sends."""
_PHASE = tl.constexpr(workspace.LOW_PRECISION)
_GROUPS, _GROUP_CHUNKS = tl.constexpr(GROUPS), tl.constexpr(GROUP_CHUNKS)
_LANE_VALUES, _LANE_CHUNKS = tl.constexpr(LANE_VALUES), tl.constexpr(LANE_CHUNKS)
_LARGEST = tl.constexpr(448.0)
_PER_LARGEST = tl.constexpr(1 / 448)
_SMALLEST = tl.constexpr(2.0**-120)
"""Of scales: its reciprocal is finite."""

_ENCODE = tl.constexpr("""
{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}
""")
_DECODE = tl.constexpr("""
{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 pair;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {a, b}, pair;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {c, d}, pair;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}
""")


@triton.jit
def _encode_byte(value):
    """The twin of cvt.rn.satfinite.e4m3: nearest, ties to even, +-448 at most."""
    magnitude = tl.minimum(tl.abs(value), _LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(value != value, 0x7F, code)
    return code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _decode_byte(code):
    exponent = (code >> 3) & 0xF
    normal = (((exponent + 120) << 23) | ((code & 7) << 20)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, (code & 7).to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where((code & 0x80) != 0, -magnitude, magnitude)


@triton.jit
def _encode(a, b, c, d):
    """Four float32 as a word of e4m3, `a` in its lowest byte."""
    if INTERPRET:
        return _encode_byte(a) | (_encode_byte(b) << 8) | (_encode_byte(c) << 16) | (_encode_byte(d) << 24)
    else:
        return tl.inline_asm_elementwise(_ENCODE, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _decode(word):
    if INTERPRET:
        return _decode_byte(word), _decode_byte(word >> 8), _decode_byte(word >> 16), _decode_byte(word >> 24)
    else:
        return tl.inline_asm_elementwise(
            _DECODE,
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _quantised(x, start, total_elements, lane, group, kind, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """(8 words of e4m3, scale) of each lane's values of a group."""
    values = ()
    for part in tl.static_range(_GROUP_CHUNKS):
        first = start + (group * _GROUP_CHUNKS + part) * LANES * 8
        limit = tl.minimum(tl.maximum(total_elements - first, 0), LANES * 8).to(tl.int32)
        values = values + unpack(load_row(x + first, lane, limit, ALIGNED, 2), kind)
    largest = tl.abs(values[0])
    for i in tl.static_range(1, 32):
        largest = tl.maximum(largest, tl.abs(values[i]))
    least = tl.maximum(largest * _PER_LARGEST, _SMALLEST)
    exponent = (least.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    scale = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    words = ()
    for i in tl.static_range(8):
        word = _encode(
            values[4 * i] * inverse,
            values[4 * i + 1] * inverse,
            values[4 * i + 2] * inverse,
            values[4 * i + 3] * inverse,
        )
        words = words + (word,)
    return words, scale


@triton.jit
def _dequantised(words, scale):
    values = ()
    for i in tl.static_range(8):
        four = _decode(words[i])
        for value in tl.static_range(4):
            values = values + (four[value] * scale,)
    return values


@triton.jit
def _with_scale(scales, group, scale):
    """The chunk of four groups' scales with this group's word in place."""
    word = scale.to(tl.int32, bitcast=True)
    result = ()
    for i in tl.static_range(_GROUPS):
        result = result + (tl.where(group == i, word, scales[i]),)
    return result


@triton.jit
def _scale_of(scales, group):
    word = scales[0]
    for i in tl.static_range(1, _GROUPS):
        word = tl.where(group == i, scales[i], word)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _arrived(
    slots, source: tl.constexpr, parity, region_bytes, place, lane, everyone, abort, records, what, deadline_ns,
    WORLD: tl.constexpr, RANK: tl.constexpr, PAUSING: tl.constexpr,
):  # fmt: skip
    """The source's chunks at `place`, awaited and re-armed."""
    words = region(slots, RANK, source, parity, region_bytes, WORLD) + place * 4
    chunk = memory.peek_chunk(words, lane, everyone)
    chunk = memory.wait((chunk,), (words,), lane, abort, (records + source * 8,), what, deadline_ns, PAUSING)
    memory.rearm_chunk(words, lane, everyone)
    return chunk


@triton.jit(do_not_specialize=["x", "out", "abort", "records", "region_bytes", "deadline_ns", "rows", "total_elements"])
def one_shot_fp8(
    x, out,  # flat, the same length and 16-bit type, perhaps the same memory
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int64, total_elements: tl.int64,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, PAUSING: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row is LANES * LANE_VALUES values, and LANES * LANE_CHUNKS chunks on its way."""
    kind: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, LANES)
    everyone = lane >= 0
    begin(PDL)
    call = number(counters)
    parity = (call & 1).to(tl.int64)
    what = waiting(call, _PHASE)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        start = row * (LANES * _LANE_VALUES)
        place = row * (LANES * _LANE_CHUNKS)
        nothing = tl.zeros([LANES], tl.int32)
        scales = (nothing, nothing, nothing, nothing)
        for group in range(_GROUPS):  # not unrolled: an unaligned row's loads would take half a minute to compile
            words, scale = _quantised(x, start, total_elements, lane, group, kind, LANES, ALIGNED)
            scales = _with_scale(scales, group, scale)
            for half in tl.static_range(2):
                chunk = (words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3])
                push(
                    chunk, slots, parity, region_bytes, place + (2 * group + half) * LANES, 1, lane, everyone, 0,
                    WORLD, RANK, False,
                )  # fmt: skip
        scales_at = place + 2 * _GROUPS * LANES
        push(scales, slots, parity, region_bytes, scales_at, 1, lane, everyone, 0, WORLD, RANK, False)
        everyones = ()
        for source in tl.static_range(WORLD):
            if source == RANK:
                everyones = everyones + (scales,)
            else:
                chunk = _arrived(
                    slots, source, parity, region_bytes, scales_at, lane, everyone, abort, records, what, deadline_ns,
                    WORLD, RANK, PAUSING,
                )  # fmt: skip
                everyones = everyones + (chunk,)
        for group in range(_GROUPS):
            total = ()
            for source in tl.static_range(WORLD):
                if source == RANK:
                    words, _ = _quantised(x, start, total_elements, lane, group, kind, LANES, ALIGNED)
                else:
                    words = ()
                    for half in tl.static_range(2):
                        words = words + _arrived(
                            slots, source, parity, region_bytes, place + (2 * group + half) * LANES, lane, everyone,
                            abort, records, what, deadline_ns, WORLD, RANK, PAUSING,
                        )  # fmt: skip
                values = _dequantised(words, _scale_of(everyones[source], group))
                total = values if source == 0 else add(total, values)
            for part in tl.static_range(_GROUP_CHUNKS):
                first = start + (group * _GROUP_CHUNKS + part) * LANES * 8
                limit = tl.minimum(tl.maximum(total_elements - first, 0), LANES * 8).to(tl.int32)
                store_row(out + first, lane, limit, pack(total[8 * part : 8 * part + 8], kind), ALIGNED, 2)
    advance(counters, call)
