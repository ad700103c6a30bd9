"""Read index ranges of stored tensors, in bounded pieces, dequantised where the file is quantised. Free of torch.

Files are mapped, so only the pages of the wanted rows and blocks are read; a piece holds at most PIECE_ELEMENTS.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from shardwise.sharding.axes import Range, span
from shardwise.sharding.checkpoint.gguf_model import StoredTensor
from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError, TensorEntry

PIECE_ELEMENTS = 1 << 20
"""Bounds the temporaries of the dequantisers; smaller pieces cost more calls than they save cache misses."""

NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Array type of plain storage types; bfloat16 and float8 come as their bits. All others are dequantised to float32."""


class Reader:
    """Maps each file once; `close` (or the last reference) unmaps."""

    def __init__(self):
        self._files: dict[Path, np.ndarray] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def pieces(self, stored: StoredTensor, ranges: Sequence[Sequence[Range]]) -> Iterator[tuple[Range, np.ndarray]]:
        """The part of a tensor that `ranges` select, piece by piece along the first dimension.

        ranges   for each dimension, disjoint ascending index ranges, joined
        Yields ((start, stop) in the selected part's first dimension, array [stop - start, ...]). An array may be a
        view of the file: copy it, do not write it.
        """
        for place, inside in self.cut(stored, ranges, PIECE_ELEMENTS):
            yield place, self._part(stored, inside) if inside else self._data(stored).reshape(1)

    def cut(
        self, stored: StoredTensor, ranges: Sequence[Sequence[Range]], elements: int
    ) -> Iterator[tuple[Range, list[Sequence[Range]]]]:
        """Pieces of about `elements`, whole rows: (place in the selected part's first dimension, ranges)."""
        if not stored.entry.shape:
            yield (0, 1), []
            return
        rest = prod(span(r) for r in ranges[1:])
        rows = max(1, elements // max(1, rest))
        # A one-dimensional quantised tensor is read whole blocks at a time by `_part`, not cut here.
        whole = len(ranges) == 1 and stored.entry.dtype not in NUMPY
        done = 0
        for start, stop in ranges[0]:
            step = stop - start if whole else rows
            for first in range(start, stop, step):
                last = min(first + step, stop)
                yield (done, done + last - first), [[(first, last)], *ranges[1:]]
                done += last - first

    def array_type(self, stored: StoredTensor) -> np.dtype:
        """Of the arrays that `pieces` gives."""
        return np.dtype(NUMPY.get(stored.entry.dtype, np.float32))

    def read(self, stored: StoredTensor, ranges: Sequence[Sequence[Range]], into: np.ndarray) -> None:
        """One piece of `cut` into uint8 memory of its size. Threads may call this at once.

        Rows that lie together are read without mapping them: mapped pages cost faults, which threads wait for in turn.
        """
        entry = stored.entry
        width = entry.nbytes // entry.shape[0] if entry.shape else entry.nbytes
        whole_rows = all(tuple(r) == ((0, n),) for r, n in zip(ranges[1:], entry.shape[1:], strict=False))
        if entry.dtype in NUMPY and whole_rows and not stored.interleaved_head:
            first = ranges[0][0][0] if ranges else 0
            _read_exactly(self._descriptor(entry.path), into, entry.offset + first * width, entry)
            return
        part = self._part(stored, ranges)
        np.copyto(into.view(part.dtype).reshape(part.shape), part)

    def release(self, stored: StoredTensor) -> None:
        """Drop the mapped pages of a tensor that has been read: they would count as this process's memory."""
        mapped, entry = self._maps.get(stored.entry.path), stored.entry
        first = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if mapped is not None and entry.nbytes:
            mapped.madvise(mmap.MADV_DONTNEED, first, entry.offset + entry.nbytes - first)

    def blocks(self, stored: StoredTensor, ranges: Sequence[Sequence[Range]]) -> np.ndarray:
        """The selected part of a block-quantised matrix as it is stored: uint8 [rows, blocks, bytes of a block].

        Ranges of the last dimension must be whole blocks, or ValueError.
        """
        per = STORAGE[stored.entry.dtype][0]
        if any(a % per or b % per for a, b in ranges[-1]):
            raise ValueError(f"{stored.entry.name}: columns {ranges[-1]} are not whole blocks of {per}")
        data = self._data(stored)
        rows = [
            _interleaved_rows(r, stored.interleaved_head) if stored.interleaved_head else slice(*r) for r in ranges[0]
        ]
        data = np.concatenate([data[r] for r in rows]) if len(rows) > 1 else data[rows[0]]
        return _select(data, 1, [(a // per, b // per) for a, b in ranges[-1]])

    def _part(self, stored: StoredTensor, ranges: Sequence[Sequence[Range]]) -> np.ndarray:
        quantised = stored.entry.dtype not in NUMPY
        data, lead = self._data(stored), len(ranges) - 1 if quantised else len(ranges)
        for dim in range(lead):
            if dim == 0 and stored.interleaved_head:
                data = data[_interleaved_rows(ranges[0][0], stored.interleaved_head)]
            else:
                data = _select(data, dim, ranges[dim])
        return _dequantised(data, stored.entry.dtype, ranges[-1]) if quantised else data

    def _data(self, stored: StoredTensor) -> np.ndarray:
        """The whole tensor as a view of its file; quantised ones as bytes [..., blocks, bytes of a block]."""
        entry = stored.entry
        raw = self._file(entry.path)[entry.offset : entry.offset + entry.nbytes]
        if entry.dtype in NUMPY:
            return raw.view(NUMPY[entry.dtype]).reshape(entry.shape)
        elements, size = STORAGE[entry.dtype]
        return raw.reshape(*entry.shape[:-1], entry.shape[-1] // elements, size)

    def _file(self, path: Path) -> np.ndarray:
        with self._opening:
            if path not in self._files:
                with path.open("rb") as file:
                    # A private writable mapping: torch warns about read-only arrays that it shares memory with.
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._files[path] = np.frombuffer(self._maps[path], np.uint8)
            return self._files[path]

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def close(self) -> None:
        self._files.clear()
        self._maps.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self):
        self.close()


def _read_exactly(descriptor: int, into: np.ndarray, offset: int, entry: TensorEntry) -> None:
    view, done = memoryview(into.data), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise CheckpointError(f"{entry.path}: the file ends inside tensor {entry.name}")
        done += count


def _select(data: np.ndarray, dim: int, ranges: Sequence[Range]) -> np.ndarray:
    parts = [data[(slice(None),) * dim + (slice(a, b),)] for a, b in ranges or [(0, 0)]]  # none: all is padding
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)


def _interleaved_rows(rows: Range, head: int) -> np.ndarray:
    """Stored rows of `rows`: within a head, row `half * head/2 + j` lies at `2j + half`."""
    index = np.arange(*rows)
    inside = index % head
    return index - inside + 2 * (inside % (head // 2)) + inside // (head // 2)


def _dequantised(blocks: np.ndarray, dtype: str, ranges: Sequence[Range]) -> np.ndarray:
    """Elements `ranges` of the last dimension, from the blocks that enclose them."""
    from gguf.quants import dequantize

    per, kind = STORAGE[dtype][0], _kind(dtype)
    parts = []
    for start, stop in ranges:
        low, high = start // per, -(-stop // per)
        wanted = np.ascontiguousarray(blocks[..., low:high, :]).reshape(*blocks.shape[:-2], -1)
        values = dequantize(wanted.reshape(1, -1) if wanted.ndim == 1 else wanted, kind)
        parts.append(values.reshape(*blocks.shape[:-2], -1)[..., start - low * per : stop - low * per])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


@cache
def _kind(dtype: str):
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType[dtype]
    except KeyError:
        raise CheckpointError(f"storage type {dtype} cannot be dequantised by the installed gguf package") from None
