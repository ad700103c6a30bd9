"""Rows that leave from shared memory by bulk copies, through an engine of their own.

The warp's loads and stores do not queue behind them where the link is busy. A warp's 32 chunks are one copy; lane 0
issues it. PTX calls the writes of a copy weak and promises no order among them; the protocol asks only that a 4-byte
word never arrives in parts.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p.asm import INTERPRET
from shardwise.comm.p2p.memory import store_chunk

_STAGE = """
{
    .shared .align 128 .b8 stage[%d];
    mov.u32 $0, stage;
}
"""
_STAGE_16K, _STAGE_32K = (tl.constexpr(_STAGE % (kib << 10)) for kib in (16, 32))
STAGE_BYTES = 32 << 10
"""The larger stage. A kernel may have 48 KiB of shared memory unasked, and sums across warps need some of it."""
_LAY = tl.constexpr("""
{
    .reg .pred p;
    setp.ne.b32 p, $2, 0;
    @p st.shared.v4.b32 [$1], {$3, $4, $5, $6};
    fence.proxy.async.shared::cta;
    bar.warp.sync 0xffffffff;
    mov.b32 $0, 0;
}
""")
_PUSH = tl.constexpr("""
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
_COMMIT = tl.constexpr("cp.async.bulk.commit_group; mov.b32 $0, $1;")
_SENT = "cp.async.bulk.wait_group.read %d; bar.warp.sync 0xffffffff; mov.b32 $0, $1;"
_SENT_0, _SENT_1, _SENT_2 = (tl.constexpr(_SENT % rows) for rows in range(3))


@triton.jit
def stage(BYTES: tl.constexpr):
    """Address of BYTES (16 or 32 KiB) of shared memory. Ask once a kernel."""
    if INTERPRET:
        return 0
    else:
        asm: tl.constexpr = _STAGE_16K if BYTES == 16384 else _STAGE_32K
        return tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def lay(place, lane, mask, chunk):
    """Lay a chunk where `push` of the same lane takes it. `place`: of this row in the stage."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            _LAY,
            "=r,r,r,r,r,r,r",
            [place + lane * 16, mask.to(tl.int32), chunk[0], chunk[1], chunk[2], chunk[3]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def push(words, lane, mask, place, chunk):
    """As `memory.push_chunk`, of chunks that lie in the stage.

    `mask` holds for the first chunks of a row, a warp's lanes for 32 chunks in a row: so it is with chunks that no
    ordinary load or store has laid out otherwise.
    """
    if INTERPRET:
        store_chunk(words, lane, mask, chunk)
    else:
        tl.inline_asm_elementwise(
            _PUSH,
            "=r,l,r,r",
            [words + lane * 4, place + lane * 16, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def commit():
    """End of a row's bulk copies."""
    if not INTERPRET:
        tl.inline_asm_elementwise(_COMMIT, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sent(ROWS: tl.constexpr):
    """Wait until all but the last ROWS (0, 1 or 2) rows have left the stage."""
    if not INTERPRET:
        asm: tl.constexpr = _SENT_0 if ROWS == 0 else _SENT_1 if ROWS == 1 else _SENT_2
        tl.inline_asm_elementwise(asm, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
