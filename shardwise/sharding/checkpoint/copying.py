"""Copying parts of stored tensors between files: whole rows inside the kernel, columns by strided chunks."""

import mmap
import os
from math import prod
from pathlib import Path

from shardwise.sharding.axes import Range
from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry
from shardwise.sharding.checkpoint.per_rank import RankTensor, in_blocks, ranges_in_blocks

CHUNK_BYTES = 2 << 20
"""Of a strided copy: what is gathered is still in the cache when it is written."""
FALLBACK_BYTES = 32 << 20


class Source:
    """A file that is read from, open and mapped. Close it, or use it as a context."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        self.map.close()
        os.close(self.descriptor)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def copy_part(source: Source, entry: TensorEntry, target: int, part: RankTensor, offset: int) -> None:
    """Write `part` of the tensor `entry`, which lies in `source`, at `offset` of the descriptor `target`."""
    if part.cut is None:
        copy_bytes(source.descriptor, entry.offset, target, offset, entry.nbytes)
        return
    if not all(part.cut.ranges):
        return  # all is padding
    shape, local = in_blocks(entry.shape, entry.dtype), in_blocks(part.shape, part.dtype)
    ranges = ranges_in_blocks(part.cut.ranges, entry.dtype)
    if rows_only(shape, ranges) and shape[1:] == local[1:]:
        row = prod(shape[1:])
        for start, stop in ranges[0]:
            copy_bytes(source.descriptor, entry.offset + start * row, target, offset, (stop - start) * row)
            offset += (stop - start) * row
        return
    _copy_strided(source, entry.offset, shape, ranges, target, local, offset)


def rows_only(shape: tuple[int, ...], ranges: tuple[tuple[Range, ...], ...]) -> bool:
    """Whether only the first dim is cut."""
    return all(r == ((0, n),) for r, n in zip(ranges[1:], shape[1:], strict=False))


def copy_bytes(source: int, start: int, target: int, offset: int, count: int) -> None:
    """Copy `count` bytes between descriptors; inside the kernel where it can."""
    while count > 0:
        try:
            moved = os.copy_file_range(source, target, count, start, offset)
        except OSError:
            moved = os.pwrite(target, os.pread(source, min(count, FALLBACK_BYTES), start), offset)
        if not moved:
            raise CheckpointError(f"the file that is read ends {count} bytes early: it was changed meanwhile")
        start, offset, count = start + moved, offset + moved, count - moved


def write_all(target: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`. One pwrite may write less: 2 GiB at most, or what a nearly full disk takes."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(target, left, offset)
        left, offset = left[written:], offset + written


def _copy_strided(source: Source, start: int, shape, ranges, target: int, local, offset: int) -> None:
    """Chunks of rows: select along the other dims, write."""
    import numpy as np

    whole = np.frombuffer(source.map, np.uint8, prod(shape), start).reshape(shape)
    local_row = prod(local[1:])
    step = max(1, CHUNK_BYTES // max(1, local_row))
    for first, last in ranges[0]:
        for begin in range(first, last, step):
            chunk = whole[begin : min(begin + step, last)]
            for dim, kept in enumerate(ranges[1:], 1):
                pieces = [chunk[(slice(None),) * dim + (slice(a, b),)] for a, b in kept]
                chunk = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, dim)
            if chunk.shape[1:] != local[1:]:
                padded = np.zeros((chunk.shape[0], *local[1:]), np.uint8)
                padded[tuple(slice(n) for n in chunk.shape)] = chunk
                chunk = padded
            write_all(target, np.ascontiguousarray(chunk).data, offset)
            offset += chunk.shape[0] * local_row
