"""Rows in the kernels: how they are read, written, pushed, awaited, summed and finished."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from shardwise.comm.p2p import arithmetic, bulk, memory, workspace
from shardwise.comm.p2p.asm import INTERPRET

_COUNTERS = tl.constexpr(workspace.COUNTERS)
TOGETHER = tl.constexpr(4)
"""Ranks whose contributions are waited for at once: with eight, rows of 1024 chunks spill registers."""


@triton.jit
def _pair(halves, element, limit):
    low = tl.load(halves + element, element < limit, 0).to(tl.int32) & 0xFFFF
    return low | (tl.load(halves + element + 1, element + 1 < limit, 0).to(tl.int32) << 16)


@triton.jit
def load_row(row, lane, limit, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """Chunk `lane` of the row of `limit` elements of WIDTH bytes at `row`; elements past the row are zero."""
    if ALIGNED:
        return memory.load_chunk(row.to(tl.pointer_type(tl.int32), bitcast=True), lane, lane * (16 // WIDTH) < limit)
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
def store_row(row, lane, limit, chunk, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    if ALIGNED:
        words = row.to(tl.pointer_type(tl.int32), bitcast=True)
        memory.store_chunk(words, lane, lane * (16 // WIDTH) < limit, chunk)
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
def unpack(chunk, kind: tl.constexpr):
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
def pack(values, kind: tl.constexpr):
    chunk = ()
    for i in tl.static_range(4):
        if kind == tl.float32:
            chunk = chunk + (values[i].to(tl.int32, bitcast=True),)
        else:
            chunk = chunk + (arithmetic.round_pair(values[2 * i], values[2 * i + 1], kind == tl.float16),)
    return chunk


@triton.jit
def add(left, right):
    """Sum of two tuples of values."""
    total = ()
    for i in tl.static_range(len(left)):
        total = total + (left[i] + right[i],)
    return total


@triton.jit
def add_chunks(left, right, kind: tl.constexpr):
    """Sum of two packed chunks, rounded to their type."""
    if kind == tl.float32 or INTERPRET:
        return pack(add(unpack(left, kind), unpack(right, kind)), kind)
    else:
        total = ()
        for i in tl.static_range(4):
            total = total + (arithmetic.add_pair(left[i], right[i], kind == tl.float16),)
        return total


@triton.jit
def gain(weight, weight_bias, kind: tl.constexpr):
    """What a normalised chunk is multiplied by. Ask for it before a wait: what follows one adds to the call's time."""
    result = ()
    for value in tl.static_range(16 // (kind.primitive_bitwidth // 8)):
        result = result + (unpack(weight, kind)[value] + weight_bias,)
    return result


@triton.jit
def _normalise(values, gains, width, eps, turn):
    squares = values[0] * values[0]
    for i in tl.static_range(1, len(values)):
        squares += values[i] * values[i]
    scale = tl.rsqrt(arithmetic.block_sum(squares, turn) * (1.0 / width) + eps)  # the quotient is ready before the sum
    result = ()
    for i in tl.static_range(len(values)):
        result = result + (values[i] * scale * gains[i],)
    return result


@triton.jit
def region(slots, owner: tl.constexpr, source: tl.constexpr, parity, region_bytes, WORLD: tl.constexpr):
    """Where rank `source` pushes in the workspace of rank `owner`, in the slot of this call."""
    index: tl.constexpr = source - 1 if source > owner else source
    start = slots[owner] + (parity * (WORLD - 1) + index) * region_bytes
    return start.to(tl.pointer_type(tl.int32))


@triton.jit
def finish(
    total, residual, gains, out_row, residual_row, lane, limit, eps, turn,
    kind: tl.constexpr, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Write a row whose sum is known: the sum, or the normalised row and the new residual. `turn`: see block_sum."""
    if FUSED:
        chunk = add_chunks(total, residual, kind)
        store_row(residual_row, lane, limit, chunk, ALIGNED, WIDTH)
        values = _normalise(unpack(chunk, kind), gains, limit, eps, turn)
        store_row(out_row, lane, limit, pack(values, kind), ALIGNED, WIDTH)
    else:
        store_row(out_row, lane, limit, total, ALIGNED, WIDTH)


@triton.jit
def contribution(own, arrived, first: tl.constexpr, source: tl.constexpr, RANK: tl.constexpr):
    """The source's chunk; `arrived` holds those of the peers from rank `first` on."""
    if source == RANK:
        return own
    else:
        at: tl.constexpr = 4 * (source - first - (1 if first <= RANK and source > RANK else 0))
        return arrived[at], arrived[at + 1], arrived[at + 2], arrived[at + 3]


@triton.jit
def take(
    slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns, first: tl.constexpr,
    WORLD: tl.constexpr, RANK: tl.constexpr, PAUSING: tl.constexpr,
):  # fmt: skip
    """The words of a row from the peers among TOGETHER ranks from `first` on: waited for, their place re-armed."""
    looks, places, addresses = (), (), ()
    for source in tl.static_range(first, min(first + TOGETHER, WORLD)):
        if source != RANK:
            words = region(slots, RANK, source, parity, region_bytes, WORLD) + row * chunks * 4
            looks = looks + (memory.peek_chunk(words, lane, mask),)
            places = places + (words,)
            addresses = addresses + (records + source * 8,)
    arrived = memory.wait(looks, places, lane, abort, addresses, what, deadline_ns, PAUSING)
    for peer in tl.static_range(len(places)):
        memory.rearm_chunk(places[peer], lane, mask)
    return arrived


@triton.jit
def sum_in_rank_order(
    own, slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns,
    WORLD: tl.constexpr, RANK: tl.constexpr, kind: tl.constexpr, PAUSING: tl.constexpr,
):  # fmt: skip
    """Sum of a row over all ranks, rounded and packed. Peers' contributions are taken."""
    total = ()
    for first in tl.static_range(0, WORLD, TOGETHER):
        arrived = take(
            slots, parity, region_bytes, row, chunks, lane, mask, abort, records, what, deadline_ns, first,
            WORLD, RANK, PAUSING,
        )  # fmt: skip
        for source in tl.static_range(first, min(first + TOGETHER, WORLD)):
            chunk = contribution(own, arrived, first, source, RANK)
            if WORLD == 2:
                total = chunk if source == 0 else add_chunks(total, chunk, kind)
            else:
                total = unpack(chunk, kind) if source == 0 else add(total, unpack(chunk, kind))
    return pack(total, kind) if WORLD > 2 else total


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernels before this one, when it was launched to overlap with their end, and let the next start.

    Nothing that an earlier kernel wrote may be read before.
    """
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()


@triton.jit
def number(counters):
    """Number of this call. Ask for it when the first loads are under way: all addresses of slots wait for it."""
    return tl.load(counters + tl.program_id(0), volatile=True)


@triton.jit
def waiting(call, PHASE: tl.constexpr):
    """What a wait of this call records when it gives up: PHASE, and the number, which goes on from 0 after 2^31."""
    return (call & 0x7FFFFFFF).to(tl.int64) | (PHASE << 32)


@triton.jit
def advance(counters, call):
    """Set the next call's number in this block's share of the copies, when all its threads have read this call's."""
    tl.debug_barrier()
    copy = tl.program_id(0) + tl.arange(0, _COUNTERS) * tl.num_programs(0)
    tl.store(counters + copy, tl.full([_COUNTERS], 1, tl.int32) + call, copy < _COUNTERS)


@triton.jit
def row_length(row, rows, width, total_elements):
    """Elements of a row that exist: fewer in the last row of a flat tensor, none past the last row."""
    return tl.where(row < rows, tl.minimum(width, total_elements - row * width), 0).to(tl.int32)


@triton.jit
def push(
    chunk, slots, parity, region_bytes, row, chunks, lane, mask, place,
    WORLD: tl.constexpr, RANK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Write a row into this rank's region of every peer; the nearest peer in the ring first.

    BULK: by copies from shared memory at `place`, which must be free.
    """
    if BULK:
        bulk.lay(place, lane, mask, chunk)
    for hop in tl.static_range(1, WORLD):
        words = region(slots, (RANK + hop) % WORLD, RANK, parity, region_bytes, WORLD) + row * chunks * 4
        if BULK:
            bulk.push(words, lane, mask, place, chunk)
        else:
            memory.push_chunk(words, lane, mask, chunk)
    if BULK:
        bulk.commit()
