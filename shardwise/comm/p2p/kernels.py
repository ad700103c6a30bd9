"""One-shot and two-shot all-reduce over peer memory, plain and fused with residual add and RMSNorm.

A call works on *rows*: tokens when fused, equal stretches of the flat tensor when plain. Each rank's workspace has
two slots, used in turn; a slot has one region for each other rank, where that rank pushes rows. A reader waits
until the words of a chunk have arrived (see ptx.py), takes them, and at once writes ARMED back, so the region is
ready when it is used again.

Why two slots are enough: a peer pushes into a slot again two calls later. It can only have finished the call
between after it received words that this rank pushed in that call, and this rank pushed them after its kernel of
the first call, with the writing back, had ended. With one slot the argument fails. `model.py` shows both.

Which slot is next is counted in device memory, so that a captured graph may be replayed: every block reads its own
copy of the counter, and advances the copies b, b + grid, b + 2 grid, ..., of which no other block reads any. No
atomics, and calls with different grids follow each other.

Rows are dealt to blocks alike on all ranks, and blocks take them in the same order; all blocks of a launch must be
resident together (launch.py bounds the grid). Sums run in float32 over ranks 0..W-1 and are rounded once to the
input's type; then the residual is added, and the norm is that of the rounded result. So one-shot, two-shot and an
all-reduce followed by these steps give the same bits, on every rank and for every size.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p import ptx, workspace

ONE_SHOT = tl.constexpr(workspace.ONE_SHOT)
TWO_SHOT_REDUCE = tl.constexpr(workspace.TWO_SHOT_REDUCE)
TWO_SHOT_GATHER = tl.constexpr(workspace.TWO_SHOT_GATHER)
_COUNTERS = tl.constexpr(workspace.COUNTERS)
# One compiled kernel for all sizes: the time to compile is longer than a deadline may be.
_RUNTIME = ["abort", "records", "region_bytes", "deadline_ns", "rows", "width", "total_elements", "chunks"]


@triton.jit
def _pair(halves, element, limit):
    low = tl.load(halves + element, element < limit, 0).to(tl.int32) & 0xFFFF
    return low | (tl.load(halves + element + 1, element + 1 < limit, 0).to(tl.int32) << 16)


@triton.jit
def _load_row(row, lane, limit, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """Chunk `lane` of the row of `limit` elements of WIDTH bytes at `row`; elements past the row are zero."""
    if ALIGNED:
        return ptx.load_chunk(row.to(tl.pointer_type(tl.int32), bitcast=True), lane, lane * (16 // WIDTH) < limit)
    elif WIDTH == 4:
        words = row.to(tl.pointer_type(tl.int32), bitcast=True)
        e = lane * 4
        return (
            tl.load(words + e, e < limit, 0),
            tl.load(words + e + 1, e + 1 < limit, 0),
            tl.load(words + e + 2, e + 2 < limit, 0),
            tl.load(words + e + 3, e + 3 < limit, 0),
        )
    else:
        halves = row.to(tl.pointer_type(tl.int16), bitcast=True)
        e = lane * 8
        return (
            _pair(halves, e, limit),
            _pair(halves, e + 2, limit),
            _pair(halves, e + 4, limit),
            _pair(halves, e + 6, limit),
        )


@triton.jit
def _store_row(row, lane, limit, chunk, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    if ALIGNED:
        words = row.to(tl.pointer_type(tl.int32), bitcast=True)
        ptx.store_chunk(words, lane, lane * (16 // WIDTH) < limit, chunk)
    elif WIDTH == 4:
        words = row.to(tl.pointer_type(tl.int32), bitcast=True)
        for i in tl.static_range(4):
            tl.store(words + lane * 4 + i, chunk[i], lane * 4 + i < limit)
    else:
        halves = row.to(tl.pointer_type(tl.int16), bitcast=True)
        for i in tl.static_range(4):
            e = lane * 8 + 2 * i
            tl.store(halves + e, chunk[i].to(tl.int16), e < limit)
            tl.store(halves + e + 1, (chunk[i] >> 16).to(tl.int16), e + 1 < limit)


@triton.jit
def _unpack(chunk, kind: tl.constexpr):
    """A chunk's 4 or 8 values in order, as a tuple of float32 tensors: one a register, so no data changes threads."""
    values = ()
    for i in tl.static_range(4):
        word = chunk[i]
        if kind == tl.float32:
            values = values + (word.to(tl.float32, bitcast=True),)
        elif kind == tl.bfloat16:
            values = values + ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
        else:
            low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            values = values + (low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    return values


@triton.jit
def _pack(values, kind: tl.constexpr):
    chunk = ()
    for i in tl.static_range(4):
        if kind == tl.float32:
            chunk = chunk + (values[i].to(tl.int32, bitcast=True),)
        else:
            chunk = chunk + (ptx.round_pair(values[2 * i], values[2 * i + 1], kind == tl.float16),)
    return chunk


@triton.jit
def _add(left, right):
    total = ()
    for i in tl.static_range(len(left)):
        total = total + (left[i] + right[i],)
    return total


@triton.jit
def _normalise(values, gain, weight_bias, width, eps):
    squares = values[0] * values[0]
    for i in tl.static_range(1, len(values)):
        squares += values[i] * values[i]
    scale = tl.rsqrt(tl.sum(squares) / width + eps)
    result = ()
    for i in tl.static_range(len(values)):
        result = result + (values[i] * scale * (gain[i] + weight_bias),)
    return result


@triton.jit
def _region(slots, owner: tl.constexpr, source: tl.constexpr, parity, region_bytes, WORLD: tl.constexpr):
    """Where rank `source` pushes in the workspace of rank `owner`, in the slot of this call."""
    index: tl.constexpr = source - 1 if source > owner else source
    start = slots[owner] + (parity * (WORLD - 1) + index) * region_bytes
    return start.to(tl.pointer_type(tl.int32))


@triton.jit
def _finish(
    total, residual, weight, out_row, residual_row, lane, limit, eps, weight_bias,
    kind: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Write a row whose sum is known: the sum, or the normalised row and the new residual."""
    if FUSED:
        chunk = _pack(_add(_unpack(total, kind), _unpack(residual, kind)), kind)
        _store_row(residual_row, lane, limit, chunk, ALIGNED, WIDTH)
        values = _normalise(_unpack(chunk, kind), _unpack(weight, kind), weight_bias, limit, eps)
        _store_row(out_row, lane, limit, _pack(values, kind), ALIGNED, WIDTH)
    else:
        _store_row(out_row, lane, limit, total, ALIGNED, WIDTH)


@triton.jit
def _sum_in_rank_order(
    own, slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns,
    WORLD: tl.constexpr, RANK: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Sum of a row over all ranks, rounded and packed. Peers' contributions are waited for and their place re-armed."""
    seen = ()
    for source in tl.static_range(WORLD):
        if source == RANK:
            seen = seen + (own,)
        else:
            words = _region(slots, RANK, source, parity, region_bytes, WORLD) + row * chunks * 4
            seen = seen + (ptx.peek_chunk(words, lane, mask),)
    total = ()
    for source in tl.static_range(WORLD):
        chunk = seen[source]
        if source != RANK:
            words = _region(slots, RANK, source, parity, region_bytes, WORLD) + row * chunks * 4
            chunk = ptx.wait_chunk(chunk, words, lane, abort, records + source * 8, what, deadline_ns)
            ptx.rearm_chunk(words, lane, mask)
        if source == 0:
            total = _unpack(chunk, kind)
        else:
            total = _add(total, _unpack(chunk, kind))
    return _pack(total, kind)


@triton.jit
def _begin(counters, PDL: tl.constexpr):
    """Number of this call. Nothing that an earlier kernel wrote may be read before it returns."""
    ptx.dependency_wait(PDL)
    ptx.dependency_launch(PDL)
    return tl.load(counters + tl.program_id(0), volatile=True)


@triton.jit
def _advance(counters, call):
    """Set the next call's number in this block's share of the copies."""
    copy = tl.program_id(0) + tl.arange(0, _COUNTERS) * tl.num_programs(0)
    tl.store(counters + copy, tl.full([_COUNTERS], 1, tl.int32) + call, copy < _COUNTERS)


@triton.jit
def _limit(row, rows, width, total_elements):
    """Elements of a row that exist: fewer in the last row of a flat tensor, none past the last row."""
    return tl.where(row < rows, tl.minimum(width, total_elements - row * width), 0).to(tl.int32)


@triton.jit
def _push(chunk, slots, parity, region_bytes, place, chunks, lane, mask, WORLD: tl.constexpr, RANK: tl.constexpr):
    """Write a row into this rank's region of every peer, at row `place`; the nearest peer in the ring first."""
    for hop in tl.static_range(1, WORLD):
        words = _region(slots, (RANK + hop) % WORLD, RANK, parity, region_bytes, WORLD) + place * chunks * 4
        ptx.push_chunk(words, lane, mask, chunk)


@triton.jit(do_not_specialize=_RUNTIME)
def one_shot(
    x, residual, weight, out, residual_out,  # rows of `width` elements; the middle ones only when FUSED
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int64, width: tl.int32, total_elements: tl.int64, chunks: tl.int64,
    eps: tl.float32, weight_bias: tl.float32,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, FUSED: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every rank pushes every row to every peer, and sums what it received.

    A block pushes AHEAD rows before it awaits its first. `chunks`: 16-byte chunks that a row takes, at most LANES.
    """
    kind: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = kind.primitive_bitwidth // 8
    lane = tl.arange(0, LANES)
    step = tl.num_programs(0)
    call = _begin(counters, PDL)
    parity = (call & 1).to(tl.int64)
    what = call.to(tl.int64) | (ONE_SHOT << 32)
    for ahead in tl.static_range(AHEAD):
        row = (tl.program_id(0) + ahead * step).to(tl.int64)
        limit = _limit(row, rows, width, total_elements)
        chunk = ptx.disarm(_load_row(x + row * width, lane, limit, ALIGNED, WIDTH))
        _push(chunk, slots, parity, region_bytes, row, chunks, lane, lane * (16 // WIDTH) < limit, WORLD, RANK)
    for index in range(tl.program_id(0), rows, step):
        row = tl.cast(index, tl.int64)
        limit = _limit(row, rows, width, total_elements)
        mask = lane * (16 // WIDTH) < limit
        own = ptx.disarm(_load_row(x + row * width, lane, limit, ALIGNED, WIDTH))
        if AHEAD == 0:
            _push(own, slots, parity, region_bytes, row, chunks, lane, mask, WORLD, RANK)
        else:
            later = row + AHEAD * step
            later_limit = _limit(later, rows, width, total_elements)
            chunk = ptx.disarm(_load_row(x + later * width, lane, later_limit, ALIGNED, WIDTH))
            later_mask = lane * (16 // WIDTH) < later_limit
            _push(chunk, slots, parity, region_bytes, later, chunks, lane, later_mask, WORLD, RANK)
        residual_chunk = own
        weight_chunk = own
        if FUSED:
            residual_chunk = _load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
            weight_chunk = _load_row(weight, lane, limit, ALIGNED, WIDTH)
        total = _sum_in_rank_order(
            own, slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns,
            WORLD, RANK, kind,
        )  # fmt: skip
        _finish(
            total, residual_chunk, weight_chunk, out + row * width, residual_out + row * width, lane, limit, eps,
            weight_bias, kind, ALIGNED, WIDTH, FUSED,
        )  # fmt: skip
    _advance(counters, call)


@triton.jit
def _part_start(rows, part: tl.constexpr, WORLD: tl.constexpr):
    """First row of a rank's part: `partition.extent`, which `_part_start(part + 1)` ends."""
    return (rows // WORLD) * part + tl.minimum(rows % WORLD, part)


@triton.jit
def _scatter(
    x, slots, parity, region_bytes, index, rows, width, total_elements, chunks, lane,
    peer: tl.constexpr, WORLD: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Push row `index` of the peer's part to that peer."""
    row = _part_start(rows, peer, WORLD) + index
    limit = _limit(row, _part_start(rows, peer + 1, WORLD), width, total_elements)
    chunk = ptx.disarm(_load_row(x + row * width, lane, limit, ALIGNED, WIDTH))
    words = _region(slots, peer, RANK, parity, region_bytes, WORLD) + index * chunks * 4
    ptx.push_chunk(words, lane, lane * (16 // WIDTH) < limit, chunk)


@triton.jit
def _gather(
    residual, weight, out, residual_out,
    slots, parity, region_bytes, index, rows, width, total_elements, chunks, lane, eps, weight_bias,
    abort, records, what, deadline_ns, kind: tl.constexpr,
    owner: tl.constexpr, WORLD: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Take row `index` of the owner's part, summed there, and finish it. Sums lie behind the contributions."""
    row = _part_start(rows, owner, WORLD) + index
    limit = tl.where(index < 0, 0, _limit(row, _part_start(rows, owner + 1, WORLD), width, total_elements))
    mask = lane * (16 // WIDTH) < limit
    place = tl.cdiv(rows, WORLD) + index
    words = _region(slots, RANK, owner, parity, region_bytes, WORLD) + place * chunks * 4
    total = ptx.peek_chunk(words, lane, mask)
    residual_chunk = total
    weight_chunk = total
    if FUSED:
        residual_chunk = _load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
        weight_chunk = _load_row(weight, lane, limit, ALIGNED, WIDTH)
    total = ptx.wait_chunk(total, words, lane, abort, records + owner * 8, what, deadline_ns)
    ptx.rearm_chunk(words, lane, mask)
    _finish(
        total, residual_chunk, weight_chunk, out + row * width, residual_out + row * width, lane, limit, eps,
        weight_bias, kind, ALIGNED, WIDTH, FUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def two_shot(
    x, residual, weight, out, residual_out,
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int64, width: tl.int32, total_elements: tl.int64, chunks: tl.int64,
    eps: tl.float32, weight_bias: tl.float32,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, FUSED: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each rank sums its part of the rows (`partition.extent`) and pushes the sums to every peer.

    A turn of a block takes one row of every part: contributions are pushed AHEAD turns before they are awaited,
    sums are taken one turn after they were pushed. Arguments as in `one_shot`; a region must hold
    2 * cdiv(rows, WORLD) rows.
    """
    kind: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = kind.primitive_bitwidth // 8
    lane = tl.arange(0, LANES)
    step = tl.num_programs(0)
    call = _begin(counters, PDL)
    parity = (call & 1).to(tl.int64)
    reduce_what = call.to(tl.int64) | (TWO_SHOT_REDUCE << 32)
    gather_what = call.to(tl.int64) | (TWO_SHOT_GATHER << 32)
    turns = tl.cdiv(rows, WORLD)
    for ahead in tl.static_range(AHEAD):
        first = (tl.program_id(0) + ahead * step).to(tl.int64)
        for hop in tl.static_range(1, WORLD):
            _scatter(
                x, slots, parity, region_bytes, first, rows, width, total_elements, chunks, lane,
                (RANK + hop) % WORLD, WORLD, RANK, ALIGNED, WIDTH,
            )  # fmt: skip
    for turn in range(tl.program_id(0), turns + step, step):
        index = tl.cast(turn, tl.int64)
        for hop in tl.static_range(1, WORLD):
            _scatter(
                x, slots, parity, region_bytes, index + AHEAD * step, rows, width, total_elements, chunks, lane,
                (RANK + hop) % WORLD, WORLD, RANK, ALIGNED, WIDTH,
            )  # fmt: skip
        row = _part_start(rows, RANK, WORLD) + index
        limit = _limit(row, _part_start(rows, RANK + 1, WORLD), width, total_elements)
        mask = lane * (16 // WIDTH) < limit
        own = ptx.disarm(_load_row(x + row * width, lane, limit, ALIGNED, WIDTH))
        residual_chunk = own
        weight_chunk = own
        if FUSED:
            residual_chunk = _load_row(residual + row * width, lane, limit, ALIGNED, WIDTH)
            weight_chunk = _load_row(weight, lane, limit, ALIGNED, WIDTH)
        total = _sum_in_rank_order(
            own, slots, parity, region_bytes, index, chunks, lane, mask, abort, records, reduce_what, deadline_ns,
            WORLD, RANK, kind,
        )  # fmt: skip
        total = ptx.disarm(total)
        _push(total, slots, parity, region_bytes, turns + index, chunks, lane, mask, WORLD, RANK)
        _finish(
            total, residual_chunk, weight_chunk, out + row * width, residual_out + row * width, lane, limit, eps,
            weight_bias, kind, ALIGNED, WIDTH, FUSED,
        )  # fmt: skip
        for hop in tl.static_range(1, WORLD):
            _gather(
                residual, weight, out, residual_out, slots, parity, region_bytes, index - step, rows, width,
                total_elements, chunks, lane, eps, weight_bias, abort, records, gather_what, deadline_ns, kind,
                (RANK + WORLD - hop) % WORLD, WORLD, RANK, ALIGNED, WIDTH, FUSED,
            )  # fmt: skip
    _advance(counters, call)
