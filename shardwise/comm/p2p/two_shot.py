"""Two-shot all-reduce over peer memory as a stream: some blocks push, others sum and finish, at the same time.

Each rank sums its part of the rows (`partition.extent`) and pushes the sums to every peer. A *turn* is one row of
every part. The first blocks of a launch push contributions, turn by turn, and wait for nothing while they do. The
others deal the turns out among themselves: each awaits the contributions to this rank's row of a turn, pushes the
sum, and finishes that row and the peers' rows of the turn. So early turns are finished while later ones are under
way, and the link does not idle between the two steps. At the end, when the pushing blocks have nothing left to push,
they finish the peers' rows of the last turns.

Why not every block does everything: a multiprocessor's accesses leave it in order, so its looks at what has arrived
queue behind its own pushes. All rows would arrive at about the same late moment, in either step.

Nobody waits in a circle. Turns are dealt in ascending order on every rank, whatever its number of blocks. The
earliest turn that some rank has not summed waits only for pushes, which wait for nothing; the earliest that is not
finished waits only for sums of its own turn. How slots are used, and why the sums' bits are those of one-shot:
one_shot.py.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p import bulk, memory, workspace
from shardwise.comm.p2p.asm import INTERPRET
from shardwise.comm.p2p.one_shot import RUNTIME
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

REDUCE = tl.constexpr(workspace.TWO_SHOT_REDUCE)
GATHER = tl.constexpr(workspace.TWO_SHOT_GATHER)
_RUNTIME = [*RUNTIME, "pushers", "late"]


@triton.jit
def _part_start(rows, part, WORLD: tl.constexpr):
    """First row of a rank's part: `partition.extent`, which `_part_start(part + 1)` ends."""
    return (rows // WORLD) * part + tl.minimum(rows % WORLD, part)


@triton.jit
def _row_of(part, turn, rows, width, total_elements, WORLD: tl.constexpr):
    """(the row of a part that is next in `turn`, its elements: none where the part has no such row)."""
    row = _part_start(rows, part, WORLD) + turn
    return row, row_length(row, _part_start(rows, part + 1, WORLD), width, total_elements)


@triton.jit
def _region_of(slots, peer, parity, region_bytes, WORLD: tl.constexpr, RANK: tl.constexpr):
    """Where this rank pushes in the workspace of a peer that is known only when the kernel runs (`rows.region`)."""
    start = slots[0]
    for owner in tl.static_range(1, WORLD):
        start = tl.where(peer == owner, slots[owner], start)
    index = tl.where(peer < RANK, RANK - 1, RANK)
    return (start + (parity * (WORLD - 1) + index) * region_bytes).to(tl.pointer_type(tl.int32))


@triton.jit
def _parity(call):
    """The slot of a call, by code that the compiler does not see through: else it would keep the addresses of all
    regions in registers from turn to turn, more than there are."""
    if INTERPRET:
        return (call & 1).to(tl.int64)
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 1;", "=r,r", [call], dtype=tl.int32, is_pure=False, pack=1
        ).to(tl.int64)


@triton.jit
def _piece(item, WORLD: tl.constexpr, RANK: tl.constexpr):
    """(turn, peer) of the item-th contribution: turn by turn, the nearest peer in the ring first."""
    turn = tl.cast(item // (WORLD - 1), tl.int64)
    return turn, ((item % (WORLD - 1) + 1 + RANK) % WORLD).to(tl.int32)


@triton.jit
def _scatter(
    x, slots, parity, region_bytes, rows, width, total_elements, chunks, lane, first, step, items,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    BULK: tl.constexpr, stage,
):  # fmt: skip
    """Push the contributions first, first + step, ...; the next is asked for before one is pushed."""
    turn, peer = _piece(first, WORLD, RANK)
    row, limit = _row_of(peer, turn, rows, width, total_elements, WORLD)
    chunk = load_row(x + row * width, lane, limit, ALIGNED, WIDTH)
    place = stage
    for item in range(first, items, step):
        later_turn, later_peer = _piece(item + step, WORLD, RANK)
        row, later_limit = _row_of(later_peer, later_turn, rows, width, total_elements, WORLD)
        later = load_row(x + row * width, lane, later_limit, ALIGNED, WIDTH)
        words = _region_of(slots, peer, parity, region_bytes, WORLD, RANK) + turn * chunks * 4
        mask = lane * (16 // WIDTH) < limit
        chunk = memory.disarm(chunk)
        if BULK:
            bulk.sent(1)
            bulk.lay(place, lane, mask, chunk)
            bulk.push(words, lane, mask, place, chunk)
            bulk.commit()
            place = 2 * stage + LANES * 16 - place
        else:
            memory.push_chunk(words, lane, mask, chunk)
        turn, peer, limit, chunk = later_turn, later_peer, later_limit, later
    if BULK:
        bulk.sent(0)  # the stage is free for sums


@triton.jit
def _gather(
    residual, weight, out, residual_out, slots, parity, region_bytes, turn, hop, rows, width, total_elements, chunks,
    lane, eps, weight_bias, abort, records, what, deadline_ns, sums,
    kind: tl.constexpr, WORLD: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    FUSED: tl.constexpr, PAUSING: tl.constexpr,
):  # fmt: skip
    """Take a turn's row of the rank `hop` places before, summed there, and finish it. Sums lie behind contributions."""
    owner = (RANK + WORLD - hop) % WORLD
    row, limit = _row_of(owner, turn, rows, width, total_elements, WORLD)
    mask = lane * (16 // WIDTH) < limit
    index = parity * (WORLD - 1) + tl.where(owner > RANK, owner - 1, owner)
    words = (slots[RANK] + index * region_bytes).to(tl.pointer_type(tl.int32))
    words += (tl.cdiv(rows, WORLD) + turn) * chunks * 4
    look = memory.peek_chunk(words, lane, mask)
    carried, packed = (), ()
    if FUSED:
        carried = load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
        packed = load_row(weight, lane, width, ALIGNED, WIDTH)
    total = memory.wait((look,), (words,), lane, abort, (records + owner * 8,), what, deadline_ns, PAUSING)
    memory.rearm_chunk(words, lane, mask)
    gains = gain(packed, weight_bias, kind) if FUSED else ()
    finish(
        total, carried, gains, out + row * width, residual_out + row * width, lane, limit, eps, sums, kind, ALIGNED,
        WIDTH, FUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def two_shot(
    x, residual, weight, out, residual_out,  # rows of `width` elements; the middle ones only when FUSED
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int64, width: tl.int32, total_elements: tl.int64, chunks: tl.int64, pushers: tl.int32, late: tl.int64,
    eps: tl.float32, weight_bias: tl.float32,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, FUSED: tl.constexpr,
    BULK: tl.constexpr, PAUSING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = sum of x over the ranks, or the fused operation. Arguments as in `one_shot`.

    pushers: blocks that push contributions, the first of the launch; where it is all of them, the last one sums too.
    late: from this turn on they also take the peers' sums, `pushers // (WORLD - 1)` turns at a time.
    A region must hold 2 * cdiv(rows, WORLD) rows.
    """
    kind: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = kind.primitive_bitwidth // 8
    lane = tl.arange(0, LANES)
    stage = 0
    if BULK:
        stage = bulk.stage(triton.cdiv(2 * LANES * 16, 16384) * 16384)
    begin(PDL)
    call = number(counters)
    program, blocks = tl.program_id(0), tl.num_programs(0)
    adders = tl.maximum(blocks - pushers, 1)
    turns = tl.cdiv(rows, WORLD)
    adds = program >= blocks - adders
    first, step, hop, hops = program + adders - blocks + turns * 0, tl.cast(adders, tl.int64), 1, WORLD
    if program < pushers:
        _scatter(
            x, slots, _parity(call), region_bytes, rows, width, total_elements, chunks, lane, program, pushers,
            turns * (WORLD - 1), WORLD, RANK, LANES, ALIGNED, WIDTH, BULK, stage,
        )  # fmt: skip
    if not adds:
        first, step = late + program // (WORLD - 1), tl.cast(tl.maximum(pushers // (WORLD - 1), 1), tl.int64)
        first = tl.where(program // (WORLD - 1) < step, first, turns)
        hop = program % (WORLD - 1) + 1
        hops = hop + 1
    place, sums = stage, 0
    for turn in range(first, turns, step):
        parity = _parity(call)
        if adds:
            row, limit = _row_of(RANK, turn, rows, width, total_elements, WORLD)
            mask = lane * (16 // WIDTH) < limit
            own = memory.disarm(load_row(x + row * width, lane, limit, ALIGNED, WIDTH))
            total = sum_in_rank_order(
                own, slots, parity, region_bytes, turn, chunks, lane, mask, abort, records, waiting(call, REDUCE),
                deadline_ns, WORLD, RANK, kind, PAUSING,
            )  # fmt: skip
            total = memory.disarm(total)
            if BULK:
                bulk.sent(1)
            push(total, slots, parity, region_bytes, turns + turn, chunks, lane, mask, place, WORLD, RANK, BULK)
            if BULK:
                place = 2 * stage + LANES * 16 - place
            carried, gains = (), ()
            if FUSED:
                carried = load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
                gains = gain(load_row(weight, lane, width, ALIGNED, WIDTH), weight_bias, kind)
            finish(
                total, carried, gains, out + row * width, residual_out + row * width, lane, limit, eps, sums, kind,
                ALIGNED, WIDTH, FUSED,
            )  # fmt: skip
            sums += 1
            hops = tl.where(turn < late, WORLD, 1)
        for each in range(hop, hops):
            _gather(
                residual, weight, out, residual_out, slots, parity, region_bytes, turn, each, rows, width,
                total_elements, chunks, lane, eps, weight_bias, abort, records, waiting(call, GATHER), deadline_ns,
                sums, kind, WORLD, RANK, ALIGNED, WIDTH, FUSED, PAUSING,
            )  # fmt: skip
            sums += 1
    if BULK:
        bulk.sent(0)  # the block's shared memory is given away when it ends
    advance(counters, call)
