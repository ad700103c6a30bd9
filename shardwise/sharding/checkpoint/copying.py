"""Copying a part of a stored tensor from one file to another, by whole rows in the kernel or by strided chunks."""

import os
from math import prod

from shardwise.sharding.checkpoint.header import TensorEntry
from shardwise.sharding.checkpoint.per_rank import RankTensor, in_blocks, ranges_in_blocks

CHUNK_BYTES = 32 << 20


def copy_part(source: int, entry: TensorEntry, target: int, part: RankTensor, offset: int) -> None:
    """Write `part` of the tensor `entry` (in file descriptor `source`) at `offset` of `target`."""
    if part.cut is None:
        copy_bytes(source, entry.offset, target, offset, entry.nbytes)
        return
    shape, local = in_blocks(entry.shape, entry.dtype), in_blocks(part.shape, part.dtype)
    ranges = ranges_in_blocks(part.cut.ranges, entry.dtype)
    if all(r == ((0, n),) for r, n in zip(ranges[1:], shape[1:], strict=False)) and shape[1:] == local[1:]:
        row = prod(shape[1:])
        for start, stop in ranges[0]:
            copy_bytes(source, entry.offset + start * row, target, offset, (stop - start) * row)
            offset += (stop - start) * row
        return
    _copy_strided(source, entry.offset, shape, ranges, target, local, offset)


def copy_bytes(source: int, start: int, target: int, offset: int, count: int) -> None:
    """Copy `count` bytes between descriptors; inside the kernel where it can."""
    while count > 0:
        try:
            moved = os.copy_file_range(source, target, count, start, offset)
        except OSError:
            moved = os.pwrite(target, os.pread(source, min(count, CHUNK_BYTES), start), offset)
        if not moved:
            raise OSError(f"the source ends {count} bytes early")
        start, offset, count = start + moved, offset + moved, count - moved


def _copy_strided(source, start, shape, ranges, target, local, offset) -> None:
    """Rows of the first dim in chunks: read whole, select along the other dims, write."""
    import numpy as np

    row, local_row = prod(shape[1:]), prod(local[1:])
    step = max(1, CHUNK_BYTES // row)
    for first, last in ranges[0]:
        for begin in range(first, last, step):
            rows = min(step, last - begin)
            chunk = np.frombuffer(_read(source, rows * row, start + begin * row), np.uint8).reshape(rows, *shape[1:])
            for dim, kept in enumerate(ranges[1:], 1):
                pieces = [chunk[(slice(None),) * dim + (slice(a, b),)] for a, b in kept]
                chunk = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, dim)
            if chunk.shape[1:] != local[1:]:
                padded = np.zeros((rows, *local[1:]), np.uint8)
                padded[tuple(slice(n) for n in chunk.shape)] = chunk
                chunk = padded
            os.pwrite(target, np.ascontiguousarray(chunk).data, offset)
            offset += rows * local_row


def _read(source: int, count: int, start: int) -> bytes:
    data = os.pread(source, count, start)
    if len(data) != count:
        raise OSError(f"the source ends {count - len(data)} bytes early")
    return data
