"""One wait for several sources: the looks at what has not arrived are under way at once, whoever it is from."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from shardwise.comm.p2p import ptx


@triton.constexpr_function
def wait_code(sources, chunks, pausing):
    """`ptx.wait_code` for chunks of several sources, each with its record."""
    outputs = 4 * sources
    words = [[[f"${(4 * s + word) * chunks + i}" for word in range(4)] for i in range(chunks)] for s in range(sources)]

    def operand(k, i=0):
        return f"${(outputs + k) * chunks + i}"

    abort, deadline, what = operand(sources), operand(2 * sources + 1), operand(6 * sources + 2)
    records = [operand(sources + 1 + s) for s in range(sources)]
    pieces = [(s, i, f"p{s}_{i}") for s in range(sources) for i in range(chunks)]
    copy, judge, again = [], [], []
    for s, i, p in pieces:
        seen = [operand(2 * sources + 2 + 4 * s + word, i) for word in range(4)]
        copy += [f"mov.b32 {here}, {there};" for here, there in zip(words[s][i], seen, strict=True)]
        first, *others = words[s][i]
        judge += [f"setp.eq.s32 {p}, {first}, -1;"] + [f"setp.eq.or.s32 {p}, {w}, -1, {p};" for w in others]
        again.append(f"@{p} ld.relaxed.sys.global.v4.b32 {{{', '.join(words[s][i])}}}, [{operand(s, i)}];")
    names = [p for _, _, p in pieces]
    any_of = " ".join([f"mov.pred p, {names[0]};"] + [f"or.pred p, p, {each};" for each in names[1:]])

    def report(offset):
        return " ".join(f"@{p} st.relaxed.sys.global.b64 [{records[s]} + {offset}], {what};" for s, _, p in pieces)

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
    {any_of}
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
    {report(0)}
    st.relaxed.sys.global.b32 [{abort}], 1;
    bra LEAVE;
ENDED:
    {report(64)}
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
def wait_for_all(looks, places, lane, abort, records, what, deadline_ns, PAUSING: tl.constexpr):
    """`ptx.wait_chunk` of several sources at once: their first looks, places of their rows, and addresses of records.

    Returns the chunks' words, four a source, one source after the other.
    """
    SOURCES: tl.constexpr = len(places)
    if ptx.INTERPRET:
        words = ()
        for s in tl.static_range(SOURCES):
            words = words + ptx.wait_chunk(looks[s], places[s], lane, abort, records[s], what, deadline_ns, PAUSING)
        return words
    else:
        CHUNKS: tl.constexpr = looks[0][0].numel // (32 * tl_cuda.num_warps())
        inputs = ()
        for s in tl.static_range(SOURCES):
            inputs = inputs + (places[s] + lane * 4,)
        inputs = inputs + (abort,)
        for s in tl.static_range(SOURCES):
            inputs = inputs + (records[s],)
        inputs = inputs + (deadline_ns,)
        for s in tl.static_range(SOURCES):
            inputs = inputs + looks[s]
        inputs = inputs + (what,)
        return tl.inline_asm_elementwise(
            wait_code(SOURCES, CHUNKS, PAUSING),
            ptx.constraints("r" * (4 * SOURCES), "l" * (2 * SOURCES + 2) + "r" * (4 * SOURCES) + "l", CHUNKS),
            inputs,
            dtype=words_of(SOURCES),
            is_pure=False,
            pack=CHUNKS,
        )
