"""What all warps of `decode_ring.py` go by: a program's share of the cache, and the rings its tiles stream through.

A ring is (tiles, full, empty): buffers in shared memory with two barriers each. Whoever brings a tile waits for
`empty`, whoever reads it for `full`. A barrier's phase changes with every round of the ring.
"""

# The languages of kernels, not Python's, where types are concerned.
# mypy: ignore-errors

from shardwise.ops.gluon_support import gl, jit
from shardwise.ops.triton_support import tl, triton

KEYS = tl.constexpr(64)
"""Of a block; also the columns of a copy: 128 bytes, the widest pattern that avoids conflicts of banks."""
COLUMNS = tl.constexpr(128)
"""Of a tile of latents"""
_MOST_SEQUENCES = tl.constexpr(128)


@jit
def _add(x, y):
    return x + y


@jit
def share_of(position_ptr, sequences, programs):
    """The program's share of all sequences' blocks: (sequence of its first block, blocks before that sequence, first
    block, end)."""
    LINE: tl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    member = gl.arange(0, _MOST_SEQUENCES, layout=LINE)
    position = gl.load(position_ptr + member, mask=member < sequences, other=-1)
    blocks = (gl.maximum(position, -1) + KEYS) // KEYS
    ends = gl.associative_scan(blocks, 0, _add)
    total = gl.sum(blocks, 0)
    share = gl.cdiv(total, programs)
    begin = gl.program_id(1) * share
    sequence = gl.sum((ends <= begin).to(gl.int32), 0)
    before = gl.sum(gl.where(member < sequence, blocks, 0), 0)
    return sequence, before, begin, gl.minimum(begin + share, total)


@jit
def part_of(position_ptr, sequence, before, begin, end):
    """(last key, blocks of the sequence, first block of the program's part of it, end of the part)."""
    last = gl.load(position_ptr + sequence)
    whole = (gl.maximum(last, -1) + KEYS) // KEYS
    return last, whole, begin - before, gl.minimum(end - before, whole)


@jit
def on(slot, phase, ahead: tl.constexpr, SLOTS: tl.constexpr):
    """(slot, phase) of the tile `ahead` of one."""
    beyond = slot + ahead >= SLOTS
    return gl.where(beyond, slot + ahead - SLOTS, slot + ahead), gl.where(beyond, phase ^ 1, phase)


@jit
def flat(tile, columns: tl.constexpr, LAYOUT: tl.constexpr):
    """A tile as [keys, columns], without the dimension of pages."""
    return tile._reinterpret(tile.dtype, [KEYS, columns], LAYOUT)


@triton.constexpr_function
def tile_column(place, C):
    """First column of a block's tile number `place`: tiles of both halves in turn, as their readers free them."""
    return place % 2 * (C // 2) + place // 2 * COLUMNS


@jit
def _copy(pool, page, row, column, full, tile, columns: tl.constexpr):
    gl.nvidia.hopper.mbarrier.expect(full, KEYS * columns * 2)
    for start in gl.static_range(0, columns, KEYS):
        gl.nvidia.hopper.tma.async_copy_global_to_shared(
            pool, [page, row, column + start], full, tile.slice(start, KEYS, 2)
        )


@jit
def bring(
    pool, table_ptr, slot_ptr, position_ptr, latents, rotated, share, max_pages,
    PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """All tiles of the program's blocks, of each the rotated columns first.

    A sequence's last block is brought so that its keys are the tile's last rows: rows in front of its page count as
    outside of the tensor and are filled with zeros, so that nothing behind the last key is ever read.
    """
    sequence, before, begin, end = share
    tiles, full, empty = latents
    turned, full_turned, empty_turned = rotated
    slot = 0
    phase = 0
    number = 0  # of blocks
    while begin < end:
        last, whole, first, stop = part_of(position_ptr, sequence, before, begin, end)
        table = table_ptr + gl.load(slot_ptr + sequence).to(gl.int64) * max_pages
        page = gl.load(table + first * KEYS // PAGE)
        for block in range(first, stop):
            next_page = gl.load(table + gl.minimum(block + 1, stop - 1) * KEYS // PAGE)
            row = block * KEYS % PAGE - gl.maximum(block * KEYS + KEYS - 1 - last, 0)
            here = number % TURNED
            gl.nvidia.hopper.mbarrier.wait(empty_turned.index(here), (number // TURNED & 1) ^ 1)
            _copy(pool, page, row, C, full_turned.index(here), turned.index(here), R)
            for place in gl.static_range(C // COLUMNS):
                gl.nvidia.hopper.mbarrier.wait(empty.index(slot), phase ^ 1)
                _copy(pool, page, row, tile_column(place, C), full.index(slot), tiles.index(slot), COLUMNS)
                slot, phase = on(slot, phase, 1, SLOTS)
            number += 1
            page = next_page
        begin = before + stop
        before += whole
        sequence += 1
