"""One-shot all-reduce over peer memory, plain and fused with residual add and RMSNorm; what two-shot shares with it.

A call works on *rows*: tokens when fused, equal stretches of the flat tensor when plain. Each rank's workspace has
two slots, used in turn; a slot has one region for each other rank, where that rank pushes rows. A reader waits
until the words of a chunk have arrived (memory.py), takes them, and at once writes ARMED back, so the region is
ready when it is used again.

Why two slots are enough: a peer pushes into a slot again two calls later. It can only have finished the call
between after it received words that this rank pushed in that call, and this rank pushed them after its kernel of
the first call, with the writing back, had ended. With one slot the argument fails. `model.py` shows both.

Which slot is next is counted in device memory, so that a captured graph may be replayed: every block reads its own
copy of the counter, and advances the copies b, b + grid, b + 2 grid, ..., of which no other block reads any. No
atomics, and calls with different grids follow each other.

Blocks take their rows in ascending order on all ranks, and all blocks of a launch must be resident together
(launch.py bounds the grid). Sums run in float32 over ranks 0..W-1 and are rounded once to the
input's type; then the residual is added, and the norm is that of the rounded result. So one-shot, two-shot and an
all-reduce followed by these steps give the same bits, on every rank and for every size.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p import bulk, memory, workspace
from shardwise.comm.p2p.rows import (
    advance,
    begin,
    finish,
    gain,
    load_row,
    number,
    push,
    row_length,
    sum_in_rank_order,
    waiting,
)

ONE_SHOT = tl.constexpr(workspace.ONE_SHOT)
RUNTIME = [
    *("x", "residual", "weight", "out", "residual_out"),
    *("abort", "records", "region_bytes", "deadline_ns", "rows", "width", "total_elements", "chunks"),
]
"""Arguments that make no kernel of their own: the time to compile is longer than a deadline may be."""


@triton.jit(do_not_specialize=RUNTIME)
def one_shot(
    x, residual, weight, out, residual_out,  # rows of `width` elements; the middle ones only when FUSED
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int64, width: tl.int32, total_elements: tl.int64, chunks: tl.int64,
    eps: tl.float32, weight_bias: tl.float32,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, FUSED: tl.constexpr,
    AHEAD: tl.constexpr, BULK: tl.constexpr, PAUSING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every rank pushes every row to every peer, and sums what it received.

    A block pushes each of its rows while it awaits the one AHEAD rows before. `chunks`: 16-byte chunks that a row
    takes, at most LANES.
    """
    kind: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = kind.primitive_bitwidth // 8
    lane = tl.arange(0, LANES)
    stage = 0
    if BULK:
        stage = bulk.stage(triton.cdiv((AHEAD + 1) * LANES * 16, 16384) * 16384)
    begin(PDL)
    step = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64)
    limit = row_length(first, rows, width, total_elements)
    own = load_row(x + first * width, lane, limit, ALIGNED, WIDTH)
    call = number(counters)
    parity = (call & 1).to(tl.int64)
    what = waiting(call, ONE_SHOT)
    for ahead in tl.static_range(AHEAD):
        row = first + ahead * step
        limit = row_length(row, rows, width, total_elements)
        mask = lane * (16 // WIDTH) < limit
        chunk = own if ahead == 0 else load_row(x + row * width, lane, limit, ALIGNED, WIDTH)
        place = stage + ahead * (LANES * 16)
        push(memory.disarm(chunk), slots, parity, region_bytes, row, chunks, lane, mask, place, WORLD, RANK, BULK)
    for index in range(tl.program_id(0), rows, step):
        row = tl.cast(index, tl.int64)
        limit = row_length(row, rows, width, total_elements)
        mask = lane * (16 // WIDTH) < limit
        later = row + AHEAD * step
        later_limit = row_length(later, rows, width, total_elements)
        later_mask = lane * (16 // WIDTH) < later_limit
        chunk = own if AHEAD == 0 else load_row(x + later * width, lane, later_limit, ALIGNED, WIDTH)
        carried, packed = own, own
        if FUSED:  # asked for before the push: what is asked for after one waits until the link has taken it
            carried = load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
            packed = load_row(weight, lane, limit, ALIGNED, WIDTH)
        if BULK:
            bulk.sent(AHEAD)
        place = stage + ((index // step + AHEAD) % (AHEAD + 1) * (LANES * 16)).to(tl.int32)
        chunk = memory.disarm(chunk)
        push(chunk, slots, parity, region_bytes, later, chunks, lane, later_mask, place, WORLD, RANK, BULK)
        gains = gain(packed, weight_bias, kind) if FUSED else ()
        total = sum_in_rank_order(
            memory.disarm(own), slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns,
            WORLD, RANK, kind, PAUSING,
        )  # fmt: skip
        finish(
            total, carried, gains, out + row * width, residual_out + row * width, lane, limit, eps, index // step,
            kind, ALIGNED, WIDTH, FUSED,
        )  # fmt: skip
        row += step
        own = load_row(x + row * width, lane, row_length(row, rows, width, total_elements), ALIGNED, WIDTH)
    if BULK:
        bulk.sent(0)  # the block's shared memory is given away when it ends
    advance(counters, call)
