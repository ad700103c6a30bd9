"""Chunks in memory: how they are read, written, pushed to a peer and awaited.

A *chunk* is 16 bytes: four 32-bit words. Kernels hold one chunk a lane as four int32 tensors of one shape, so a
warp's access to 32 neighbouring chunks is one 512-byte burst. Words that travel to a peer carry their own
validity: a word that still equals ARMED has not arrived. PTX gives atomicity for each element of a vector access
only, therefore a reader checks all four words; with that, `relaxed.sys` accesses are all the ordering that the
protocol needs, since nothing but the words themselves is read after they are seen.

ARMED is the all-ones word. As data it is a NaN in every supported type (float32, or a pair of bfloat16 or float16),
and `disarm` turns it into another NaN before it is sent: sums are unchanged.

The twin of `wait` is Python: interpreted.py.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from shardwise.comm.p2p import interpreted
from shardwise.comm.p2p.asm import INTERPRET, constraints

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
def wait_code(sources, chunks, pausing):
    """Looks at all chunks of a thread that have not arrived, whoever they are from, until they have: one trip to the
    memory for all. Between looks it sleeps about `pausing` nanoseconds.

    The clock is read, and the abort word looked at, once in 1024 looks (about 0.5 ms): the fast path pays nothing.
    """
    # As `wait` gives them: an operand is a list of registers, one for each of the thread's chunks.
    operands = iter([f"${k * chunks + i}" for i in range(chunks)] for k in range(10 * sources + 3))
    words = [[next(operands) for _ in range(4)] for _ in range(sources)]
    abort, deadline, what = (next(operands)[0] for _ in range(3))
    places, records = ([next(operands) for _ in range(sources)] for _ in range(2))
    seen = [[next(operands) for _ in range(4)] for _ in range(sources)]
    copy, judge, again, late, ended = [], [], [], [], []
    pieces = [(s, i, f"p{s}_{i}") for s in range(sources) for i in range(chunks)]
    for s, i, p in pieces:
        found = [word[i] for word in words[s]]
        copy += [f"mov.b32 {word}, {look[i]};" for word, look in zip(found, seen[s], strict=True)]
        judge += [f"setp.eq.s32 {p}, {found[0]}, -1;"] + [f"setp.eq.or.s32 {p}, {word}, -1, {p};" for word in found[1:]]
        again.append(f"@{p} ld.relaxed.sys.global.v4.b32 {{{', '.join(found)}}}, [{places[s][i]}];")
        late.append(f"@{p} st.relaxed.sys.global.b64 [{records[s][0]}], {what};")
        ended.append(f"@{p} st.relaxed.sys.global.b64 [{records[s][0]} + 64], {what};")
    names = [p for *_, p in pieces]
    judge += [f"mov.pred p, {names[0]};"] + [f"or.pred p, p, {each};" for each in names[1:]]
    return f"""
{{
    .reg .pred p, q, {", ".join(names)};
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
    ld.relaxed.sys.global.b32 a, [{abort}];
    setp.ne.s32 q, a, 0;
    @q bra ENDED;
    mov.u64 now, %globaltimer;
    setp.eq.u64 q, begun, 0;
    @q mov.b64 begun, now;
    sub.u64 now, now, begun;
    setp.lt.u64 q, now, {deadline};
    @q bra AGAIN;
    {" ".join(late)}
    st.relaxed.sys.global.b32 [{abort}], 1;
    bra LEAVE;
ENDED:
    {" ".join(ended)}
    bra LEAVE;
AGAIN:
    {f"nanosleep.u32 {pausing};" if pausing else ""}
    {" ".join(again)}
    bra LOOK;
LEAVE:
}}
"""


@triton.constexpr_function
def words_of(sources):
    return (tl.int32,) * (4 * sources)


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
def wait(looks, places, lane, abort, records, what, deadline_ns, PAUSING: tl.constexpr):
    """Look at chunk `lane` of each place until none of its words is ARMED; the words, four a place.

    Tuples hold a value for each of some sources: `looks` what the first look found (masked lanes: zero), `places`
    where its row begins, `records` an address in pinned host memory. After `deadline_ns`, or once another lane has
    given up, ARMED words are returned: NaN in every type. A lane that gives up stores the int64 `what` at the record
    of each source that it misses, and sets the int32 at `abort` (this device); a lane that was waiting when another,
    or a peer, had set it stores `what` 64 bytes behind the record.
    """
    SOURCES: tl.constexpr = len(places)
    CHUNKS: tl.constexpr = looks[0][0].shape[0] // (32 * tl_cuda.num_warps())
    operands = (abort, deadline_ns, what)
    for source in tl.static_range(SOURCES):
        operands = operands + (places[source] + lane * 4,)
    operands = operands + records
    for source in tl.static_range(SOURCES):
        operands = operands + looks[source]
    return tl.inline_asm_elementwise(
        wait_code(SOURCES, CHUNKS, PAUSING),
        constraints("rrrr" * SOURCES, "lll" + "ll" * SOURCES + "rrrr" * SOURCES, CHUNKS),
        operands,
        dtype=words_of(SOURCES),
        is_pure=False,
        pack=CHUNKS,
    )


if INTERPRET.value:  # here and not inside the kernel, which may name no Python function
    wait = interpreted.wait


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
def disarm_word(word):
    return tl.where(word == ARMED, 0x7FFFFFFF, word)


@triton.jit
def disarm(chunk):
    """The chunk as it may be sent: no word equals ARMED (one NaN becomes another)."""
    return disarm_word(chunk[0]), disarm_word(chunk[1]), disarm_word(chunk[2]), disarm_word(chunk[3])
