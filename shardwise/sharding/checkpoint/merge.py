"""From per-rank files back to the original files, bit for bit. Free of torch."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.sharding.axes import Range, merge
from shardwise.sharding.checkpoint.copying import CHUNK_BYTES, copy_bytes, rows_only, write_all
from shardwise.sharding.checkpoint.header import CheckpointError, TensorEntry
from shardwise.sharding.checkpoint.per_rank import (
    PARTIAL,
    REST,
    SOURCE,
    Cut,
    copy_small_files,
    in_blocks,
    make_folder,
    ranges_in_blocks,
    read_header,
    writing_into,
)

if TYPE_CHECKING:
    import numpy as np

Ranges = tuple[tuple[Range, ...], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    entry: TensorEntry
    cut: Cut | None


def merge_shards(folder: Path, out: Path) -> list[Path]:
    """Write the original safetensors files into `out`, and the model's small files beside them.

    Returns the safetensors files. CheckpointError when a rank's file is missing or from another plan, when parts leave
    an element uncovered, or when `out` is `folder` or holds one of the files.
    """
    headers = _source_headers(folder)
    parts = _parts(folder)
    make_folder(out)
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} holds the rank files themselves; give another --out")
    written = []
    for name, text in headers.items():
        if Path(name).name != name:
            raise CheckpointError(f"{folder / SOURCE}: {name!r} is not a plain file name")
        path = out / name
        if path.exists():
            raise CheckpointError(f"{path} exists; give an empty --out")
        with writing_into(out):
            _write(path, text, parts)
        written.append(path)
    copy_small_files(folder, out)
    return written


def _source_headers(folder: Path) -> dict[str, str]:
    try:
        headers = json.loads((folder / SOURCE).read_text())
    except OSError:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder") from None
        raise CheckpointError(f"{folder}: no {SOURCE}: not a folder that `shardwise shard` wrote") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / SOURCE}: not JSON: {error}") from None
    if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
        raise CheckpointError(f"{folder / SOURCE}: expected an object of file names and the texts of their headers")
    return headers


def _parts(folder: Path) -> dict[str, list[_Part]]:
    files = sorted(folder.glob("rank-*-of-*.safetensors"))
    world = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
    if not files or len(files) != world:
        raise CheckpointError(f"{folder}: {len(files)} of {world} rank files are there")
    parts: dict[str, list[_Part]] = {}
    hashes = set()
    for file in (*files, *folder.glob(REST)):
        tensors, cuts, plan_hash = read_header(file)
        hashes.add(plan_hash)
        for name, entry in tensors.items():
            parts.setdefault(name, []).append(_Part(entry, cuts.get(name)))
    if len(hashes) > 1:
        raise CheckpointError(f"{folder}: rank files of {len(hashes)} different plans")
    return parts


def _write(path: Path, header: str, parts: dict[str, list[_Part]]) -> None:
    text = header.encode()
    fields = {n: f for n, f in json.loads(header).items() if n != "__metadata__"}
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        base = 8 + len(text)
        for name, entry in fields.items():
            if name not in parts:
                raise CheckpointError(f"tensor {name} of {path.name} is in no rank's file")
            _join(
                name, tuple(entry["shape"]), entry["dtype"], parts[name], file.fileno(), base + entry["data_offsets"][0]
            )
        os.fdatasync(file.fileno())
    os.replace(partial, path)


def _join(name: str, shape: tuple[int, ...], dtype: str, parts: list[_Part], target: int, offset: int) -> None:
    """Write one tensor from its parts: rows by copying, else a few rows at a time through memory."""
    whole = next((p.entry for p in parts if p.cut is None), None)
    if whole:
        _copy(whole, 0, target, offset, whole.nbytes)
        return
    blocks = in_blocks(shape, dtype)
    holding = [(part.entry, part.cut.ranges) for part in parts if part.cut and all(part.cut.ranges)]  # not padding only
    cuts = [(entry, ranges_in_blocks(ranges, dtype)) for entry, ranges in holding]
    if all(rows_only(blocks, ranges) for _, ranges in cuts):
        _join_rows(name, blocks, cuts, target, offset)
        return
    row = prod(blocks[1:])
    step = max(1, CHUNK_BYTES // row)
    parts_read = [(_mapped(entry), ranges) for entry, ranges in cuts]
    for first in range(0, blocks[0], step):
        joined = _joined(name, blocks, parts_read, first, min(first + step, blocks[0]))
        write_all(target, joined.data, offset + first * row)


def _mapped(entry: TensorEntry) -> "np.ndarray":
    import numpy as np

    return np.memmap(entry.path, np.uint8, "r", entry.offset, in_blocks(entry.shape, entry.dtype))


def _joined(name: str, blocks: tuple[int, ...], cuts, first: int, last: int) -> "np.ndarray":
    """The rows from `first` to `last` of a tensor."""
    import numpy as np

    joined = np.empty((last - first, *blocks[1:]), np.uint8)
    covered = np.zeros(joined.shape[:-1], bool)
    for data, ranges in cuts:
        for there, here in _boxes(ranges, first, last):
            joined[there] = data[here]
            covered[there] = True
    if not covered.all():
        raise CheckpointError(
            f"tensor {name}: {int((~covered).sum())} elements from row {first} on are in no rank's file"
        )
    return joined


def _join_rows(
    name: str, blocks: tuple[int, ...], cuts: list[tuple[TensorEntry, Ranges]], target: int, offset: int
) -> None:
    covered = merge(r for _, ranges in cuts for r in ranges[0])
    if covered != ((0, blocks[0]),):
        raise CheckpointError(f"tensor {name}: rows {covered} of {blocks[0]} are in the ranks' files")
    row = prod(blocks[1:])
    for entry, ranges in cuts:
        filled = 0
        for start, stop in ranges[0]:
            _copy(entry, filled * row, target, offset + start * row, (stop - start) * row)
            filled += stop - start


def _copy(entry: TensorEntry, start: int, target: int, offset: int, count: int) -> None:
    with entry.path.open("rb") as file:
        copy_bytes(file.fileno(), entry.offset + start, target, offset, count)


def _boxes(ranges: Ranges, first: int, last: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Every block of consecutive elements in the rows from `first` to `last`: its slices in those and in the part."""
    dims = [_slices(ranges[0], first, last), *(_slices(dim, 0, dim[-1][1]) for dim in ranges[1:])]
    for box in product(*dims):
        yield tuple(there for there, _ in box), tuple(here for _, here in box)


def _slices(dim: tuple[Range, ...], first: int, last: int) -> list[tuple[slice, slice]]:
    filled, pairs = 0, []
    for start, stop in dim:
        low, high = max(start, first), min(stop, last)
        if low < high:
            pairs.append((slice(low - first, high - first), slice(filled + low - start, filled + high - start)))
        filled += stop - start
    return pairs
