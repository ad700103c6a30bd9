"""Every PTX instruction that the peer-to-peer kernels use, each with a plain-Triton twin for the interpreter.

A *chunk* is 16 bytes: four 32-bit words. Kernels hold one chunk a lane as four int32 tensors of one shape, so a
warp's access to 32 neighbouring chunks is one 512-byte burst. Words that travel to a peer carry their own
validity: a word that still equals ARMED has not arrived. PTX gives atomicity for each element of a vector access
only, therefore a reader checks all four words; with that, `relaxed.sys` accesses are all the ordering that the
protocol needs, since nothing but the words themselves is read after they are seen.

ARMED is the all-ones word. As data it is a NaN in every supported type (float32, or a pair of bfloat16 or float16),
and `disarm` turns it into another NaN before it is sent: sums are unchanged.

The twin of `wait_chunk` is Python: interpreted.py.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.knobs import runtime as _runtime
from triton.language.extra import cuda as tl_cuda

from shardwise.comm.p2p import interpreted

INTERPRET = tl.constexpr(_runtime.interpret)
ARMED = tl.constexpr(-1)

_LOAD = """
{
    .reg .pred p;
    setp.ne.b32 p, $5, 0;
    mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
    @p ld.%s.v4.b32 {$0, $1, $2, $3}, [$4];
}
"""
LOAD = tl.constexpr(_LOAD % "global")
PEEK = tl.constexpr(_LOAD % "relaxed.sys.global")

_STORE = """
{
    .reg .pred p;
    setp.ne.b32 p, $2, 0;
    @p st.%s.v4.b32 [$1], {$3, $4, $5, $6};
    mov.b32 $0, 0;
}
"""
STORE = tl.constexpr(_STORE % "global")
PUSH = tl.constexpr(_STORE % "relaxed.sys.global")


@triton.constexpr_function
def wait_code(chunks, pausing):
    """Looks at all chunks of a thread that have not arrived, until they have: one trip to the memory for all.
    Between looks it sleeps about `pausing` nanoseconds.

    The clock is read, and the abort word looked at, once in 1024 looks (about 0.5 ms): the fast path pays nothing.
    """
    words = [[f"${word * chunks + i}" for word in range(4)] for i in range(chunks)]
    inputs = [[f"${(4 + k) * chunks + i}" for i in range(chunks)] for k in range(9)]
    place, abort, record, deadline, *seen, what = inputs
    copy = [f"mov.b32 {words[i][word]}, {seen[word][i]};" for i in range(chunks) for word in range(4)]
    judge, again = [], []
    for i in range(chunks):
        first, *others = words[i]
        judge += [f"setp.eq.s32 p{i}, {first}, -1;"] + [f"setp.eq.or.s32 p{i}, {w}, -1, p{i};" for w in others]
        again.append(f"@p{i} ld.relaxed.sys.global.v4.b32 {{{', '.join(words[i])}}}, [{place[i]}];")
    judge += ["mov.pred p, p0;"] + [f"or.pred p, p, p{i};" for i in range(1, chunks)]
    return f"""
{{
    .reg .pred p, q, {", ".join(f"p{i}" for i in range(chunks))};
    .reg .b32 n, a;
    .reg .b64 begun, now;
    {" ".join(copy)}
    mov.b32 n, 0;
    mov.b64 begun, 0;
LOOK:
    {" ".join(judge)}
    @!p bra LEAVE;
    add.u32 n, n, 1;
    and.b32 a, n, 1023;
    setp.ne.u32 q, a, 0;
    @q bra AGAIN;
    ld.relaxed.sys.global.b32 a, [{abort[0]}];
    setp.ne.s32 q, a, 0;
    @q bra ENDED;
    mov.u64 now, %globaltimer;
    setp.eq.u64 q, begun, 0;
    @q mov.b64 begun, now;
    sub.u64 now, now, begun;
    setp.lt.u64 q, now, {deadline[0]};
    @q bra AGAIN;
    st.relaxed.sys.global.b64 [{record[0]}], {what[0]};
    st.relaxed.sys.global.b32 [{abort[0]}], 1;
    bra LEAVE;
ENDED:
    st.relaxed.sys.global.b64 [{record[0]} + 64], {what[0]};
    bra LEAVE;
AGAIN:
    {f"nanosleep.u32 {pausing};" if pausing else ""}
    {" ".join(again)}
    bra LOOK;
LEAVE:
}}
"""


@triton.constexpr_function
def constraints(outputs, kinds, chunks):
    """Of `outputs` registers and of inputs of these kinds (r, l, f), each of `chunks` elements of a thread."""
    return ",".join(["=&" + outputs[0]] * (len(outputs) * chunks) + [kind for kind in kinds for _ in range(chunks)])


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


# Bulk copies leave from shared memory through an engine of their own: the warp's loads and stores do not queue behind
# them where the link is busy. A warp's 32 chunks are one copy; lane 0 issues it. PTX calls the writes of a copy weak
# and promises no order among them; the protocol asks only that a 4-byte word never arrives in parts.
_STAGE = """
{
    .shared .align 128 .b8 stage[%d];
    mov.u32 $0, stage;
}
"""
STAGE_16K, STAGE_32K = (tl.constexpr(_STAGE % (kib << 10)) for kib in (16, 32))
STAGE_BYTES = 32 << 10
"""The larger stage. A kernel may have 48 KiB of shared memory unasked, and sums across warps need some of it."""
STAGE_CHUNK = tl.constexpr("""
{
    .reg .pred p;
    setp.ne.b32 p, $2, 0;
    @p st.shared.v4.b32 [$1], {$3, $4, $5, $6};
    fence.proxy.async.shared::cta;
    bar.warp.sync 0xffffffff;
    mov.b32 $0, 0;
}
""")
BULK_PUSH = tl.constexpr("""
{
    .reg .pred p, q;
    .reg .b32 bytes, lane;
    setp.ne.b32 p, $3, 0;
    vote.sync.ballot.b32 bytes, p, 0xffffffff;
    popc.b32 bytes, bytes;
    shl.b32 bytes, bytes, 4;
    mov.u32 lane, %laneid;
    setp.eq.u32 q, lane, 0;
    setp.ne.and.b32 q, bytes, 0, q;
    @q cp.async.bulk.global.shared::cta.bulk_group [$1], [$2], bytes;
    mov.b32 $0, 0;
}
""")
BULK_COMMIT = tl.constexpr("cp.async.bulk.commit_group; mov.b32 $0, $1;")
_BULK_SENT = "cp.async.bulk.wait_group.read %d; bar.warp.sync 0xffffffff; mov.b32 $0, $1;"
BULK_SENT_0, BULK_SENT_1, BULK_SENT_2 = (tl.constexpr(_BULK_SENT % rows) for rows in range(3))


@triton.jit
def load_chunk(words, lane, mask, CODE: tl.constexpr = LOAD):
    """Four words of chunk `lane` of ordinary memory; zero where masked. `words`: int32 pointer, 16-byte aligned."""
    if INTERPRET:
        at = words + lane * 4
        return (
            tl.load(at, mask, 0),
            tl.load(at + 1, mask, 0),
            tl.load(at + 2, mask, 0),
            tl.load(at + 3, mask, 0),
        )
    else:
        return tl.inline_asm_elementwise(
            CODE,
            "=&r,=&r,=&r,=&r,l,r",
            [words + lane * 4, mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def peek_chunk(words, lane, mask):
    """As load_chunk, of memory that a peer is writing: one look, which may find ARMED words."""
    return load_chunk(words, lane, mask, PEEK)


@triton.jit
def wait_chunk(seen, words, lane, abort, record, what, deadline_ns, PAUSING: tl.constexpr):
    """Look at chunk `lane` until none of its words is ARMED. `seen`: what the first look found (masked lanes: zero).

    After `deadline_ns`, or once another lane has given up, ARMED words are returned: NaN in every type. The lane
    that gives up stores the int64 `what` at `record` (pinned host memory) and sets the int32 at `abort` (this device);
    a lane that was waiting when another, or a peer, had set it stores `what` 64 bytes behind `record`.
    """
    CHUNKS: tl.constexpr = seen[0].shape[0] // (32 * tl_cuda.num_warps())
    return tl.inline_asm_elementwise(
        wait_code(CHUNKS, PAUSING),
        constraints("rrrr", "llllrrrrl", CHUNKS),
        [words + lane * 4, abort, record, deadline_ns, seen[0], seen[1], seen[2], seen[3], what],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=CHUNKS,
    )


if INTERPRET.value:  # here and not inside the kernel, which may name no Python function
    wait_chunk = interpreted.wait_chunk


@triton.jit
def store_chunk(words, lane, mask, chunk, CODE: tl.constexpr = STORE):
    """Write a chunk to ordinary memory of this device."""
    if INTERPRET:
        for i in tl.static_range(4):
            tl.store(words + lane * 4 + i, chunk[i], mask)
    else:
        tl.inline_asm_elementwise(
            CODE,
            "=r,l,r,r,r,r,r",
            [words + lane * 4, mask.to(tl.int32), chunk[0], chunk[1], chunk[2], chunk[3]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def push_chunk(words, lane, mask, chunk):
    """Write a chunk where another device, or another kernel's peer, will look for it."""
    store_chunk(words, lane, mask, chunk, PUSH)


@triton.jit
def rearm_chunk(words, lane, mask):
    """Mark a chunk of this device's workspace as not arrived."""
    armed = tl.full(lane.shape, ARMED, tl.int32)
    push_chunk(words, lane, mask, (armed, armed, armed, armed))


@triton.jit
def stage(BYTES: tl.constexpr):
    """Address of BYTES (16 or 32 KiB) of shared memory. Ask once a kernel."""
    if INTERPRET:
        return 0
    else:
        asm: tl.constexpr = STAGE_16K if BYTES == 16384 else STAGE_32K
        return tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def stage_chunk(place, lane, mask, chunk):
    """Lay a chunk where `bulk_push` of the same lane takes it. `place`: of this row in the stage."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            STAGE_CHUNK,
            "=r,r,r,r,r,r,r",
            [place + lane * 16, mask.to(tl.int32), chunk[0], chunk[1], chunk[2], chunk[3]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def bulk_push(words, lane, mask, place, chunk):
    """As push_chunk, of chunks that lie in the stage. `mask` holds for the first chunks of a row, a warp's lanes for
    32 chunks in a row: so it is with chunks that no ordinary load or store has laid out otherwise."""
    if INTERPRET:
        store_chunk(words, lane, mask, chunk)
    else:
        tl.inline_asm_elementwise(
            BULK_PUSH,
            "=r,l,r,r",
            [words + lane * 4, place + lane * 16, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def bulk_commit():
    """End of a row's bulk copies."""
    if not INTERPRET:
        tl.inline_asm_elementwise(BULK_COMMIT, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def bulk_sent(ROWS: tl.constexpr):
    """Wait until all but the last ROWS (0, 1 or 2) rows have left the stage."""
    if not INTERPRET:
        asm: tl.constexpr = BULK_SENT_0 if ROWS == 0 else BULK_SENT_1 if ROWS == 1 else BULK_SENT_2
        tl.inline_asm_elementwise(asm, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def disarm_word(word):
    return tl.where(word == ARMED, 0x7FFFFFFF, word)


@triton.jit
def disarm(chunk):
    """The chunk as it may be sent: no word equals ARMED (one NaN becomes another)."""
    return disarm_word(chunk[0]), disarm_word(chunk[1]), disarm_word(chunk[2]), disarm_word(chunk[3])


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


@triton.jit
def block_sum(values, turn):
    """Sum of a float32 tensor over the block, in every lane. `turn`: 0, 1, 0, 1, ... in sums that follow each other."""
    if INTERPRET:
        return tl.sum(values)
    else:
        WARPS: tl.constexpr = tl_cuda.num_warps()
        ELEMENTS: tl.constexpr = values.shape[0] // (32 * WARPS)
        return tl.inline_asm_elementwise(
            block_sum_code(ELEMENTS, WARPS),
            constraints("f", "fr", ELEMENTS),
            [values, turn.to(tl.int32)],
            dtype=tl.float32,
            is_pure=False,
            pack=ELEMENTS,
        )


@triton.jit
def dependency_wait(PDL: tl.constexpr):
    """Wait for the kernels before this one, when it was launched to overlap with their end."""
    if PDL:
        tl_cuda.gdc_wait()


@triton.jit
def dependency_launch(PDL: tl.constexpr):
    """Let the next kernel of the stream start its prologue."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
