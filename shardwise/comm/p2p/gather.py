"""One-shot all-gather over peer memory, of any type and along any dimension.

A call works on the flat bytes of a rank's tensor, eight in a chunk: each word carries two of them, so that none equals
ARMED, which bytes may as well as numbers. Slots, their counting, their re-arming and the order of pushes and waits are
those of one_shot.py with no row ahead.
"""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl

from shardwise.comm.p2p import workspace
from shardwise.comm.p2p.rows import TOGETHER, advance, begin, contribution, number, push, take, waiting

GATHER = tl.constexpr(workspace.ONE_SHOT_GATHER)
DATA_BYTES = 8
"""Of a chunk."""
_RUNTIME = ["x", "out", "abort", "records", "region_bytes", "deadline_ns", "rows", "stretch", "total"]


@triton.jit
def _split(low, high):
    """Two words of four bytes as the four of a chunk."""
    return low & 0xFFFF, (low >> 16) & 0xFFFF, high & 0xFFFF, (high >> 16) & 0xFFFF


@triton.jit
def _load(x, start, total, ALIGNED: tl.constexpr):
    """The chunk of the bytes from `start` on; zero past `total`."""
    if ALIGNED:
        words = (x + start).to(tl.pointer_type(tl.int64), bitcast=True)
        both = tl.load(words, start < total, 0)
        return _split(both.to(tl.int32), (both >> 32).to(tl.int32))
    else:
        chunk = ()
        for i in tl.static_range(4):
            low = tl.load(x + start + 2 * i, start + 2 * i < total, 0).to(tl.int32) & 0xFF
            high = tl.load(x + start + 2 * i + 1, start + 2 * i + 1 < total, 0).to(tl.int32) & 0xFF
            chunk = chunk + (low | (high << 8),)
        return chunk


@triton.jit
def _place(at, source: tl.constexpr, stretch, WORLD: tl.constexpr):
    """Where byte `at` of the source's tensor lies in the result."""
    return (at // stretch * WORLD + source) * stretch + at % stretch


@triton.jit
def _store(out, chunk, start, source: tl.constexpr, stretch, total, WORLD: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        low, high = chunk[0] | (chunk[1] << 16), chunk[2] | (chunk[3] << 16)
        both = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        words = (out + _place(start, source, stretch, WORLD)).to(tl.pointer_type(tl.int64), bitcast=True)
        tl.store(words, both, start < total)
    else:
        for i in tl.static_range(8):
            byte = (chunk[i // 2] >> (i % 2 * 8)).to(tl.int8)
            tl.store(out + _place(start + i, source, stretch, WORLD), byte, start + i < total)


@triton.jit(do_not_specialize=_RUNTIME)
def gather(
    x, out,  # int8 [total], [WORLD * total]
    slots, counters, abort: tl.int64, records: tl.int64, region_bytes: tl.int64, deadline_ns: tl.int64,
    rows: tl.int32, stretch: tl.int32, total: tl.int32,
    WORLD: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr, PAUSING: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every rank pushes all it has to every peer, LANES chunks a row, and lays what it received in its place.

    stretch  bytes of a rank's tensor that stay together: out [total / stretch, WORLD, stretch]
    ALIGNED  x, stretch and with it total are multiples of eight bytes: a rank's own affair, the peers see no difference
    """
    lane = tl.arange(0, LANES)
    begin(PDL)
    call = number(counters)
    parity = (call & 1).to(tl.int64)
    what = waiting(call, GATHER)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        start = (index * LANES + lane) * 8
        mask = start < total
        own = _load(x, start, total, ALIGNED)
        push(own, slots, parity, region_bytes, row, LANES, lane, mask, 0, WORLD, RANK, False)
        for first in tl.static_range(0, WORLD, TOGETHER):
            arrived = take(
                slots, parity, region_bytes, row, LANES, lane, mask, abort, records, what, deadline_ns, first,
                WORLD, RANK, PAUSING,
            )  # fmt: skip
            for source in tl.static_range(first, min(first + TOGETHER, WORLD)):
                chunk = contribution(own, arrived, first, source, RANK)
                _store(out, chunk, start, source, stretch, total, WORLD, ALIGNED)
    advance(counters, call)
