"""From per-rank files back to the original files, bit for bit. Free of torch."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from shardwise.sharding.axes import Range, merge
from shardwise.sharding.checkpoint.copying import copy_bytes, rows_only
from shardwise.sharding.checkpoint.header import CheckpointError, stored_bytes
from shardwise.sharding.checkpoint.per_rank import (
    PARTIAL,
    REST,
    SOURCE,
    RankTensor,
    copy_small_files,
    in_blocks,
    make_folder,
    ranges_in_blocks,
    read_header,
)

Ranges = tuple[tuple[Range, ...], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    offset: int
    tensor: RankTensor


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
    if not isinstance(headers, dict):
        raise CheckpointError(f"{folder / SOURCE}: expected an object of file names")
    return headers


def _parts(folder: Path) -> dict[str, list[_Part]]:
    files = sorted(folder.glob("rank-*-of-*.safetensors"))
    world = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
    if not files or len(files) != world:
        raise CheckpointError(f"{folder}: {len(files)} of {world} rank files are there")
    parts: dict[str, list[_Part]] = {}
    hashes = set()
    for file in (*files, *folder.glob(REST)):
        tensors, offsets, plan_hash = read_header(file)
        hashes.add(plan_hash)
        for name, tensor in tensors.items():
            parts.setdefault(name, []).append(_Part(file, offsets[name], tensor))
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
    """Write one tensor from its parts: rows by copying, else through memory."""
    whole = next((p for p in parts if p.tensor.cut is None), None)
    if whole:
        _copy(whole, 0, target, offset, whole.tensor.nbytes)
        return
    blocks = in_blocks(shape, dtype)
    cuts = [(part, ranges_in_blocks(part.tensor.cut.ranges, dtype)) for part in parts if part.tensor.cut]
    if all(rows_only(blocks, ranges) for _, ranges in cuts):
        _join_rows(name, blocks, cuts, target, offset)
        return
    import numpy as np

    joined = np.empty(blocks, np.uint8)
    covered = np.zeros(blocks[:-1], bool)
    for part, ranges in cuts:
        _place(part, ranges, joined, covered, dtype)
    if not covered.all():
        raise CheckpointError(
            f"tensor {name}: {int((~covered).sum())} of {covered.size} elements are in no rank's file"
        )
    assert joined.nbytes == stored_bytes(shape, dtype)
    os.pwrite(target, joined.data, offset)


def _join_rows(name: str, blocks: tuple[int, ...], cuts: list[tuple[_Part, Ranges]], target: int, offset: int) -> None:
    covered = merge(r for _, ranges in cuts for r in ranges[0])
    if covered != ((0, blocks[0]),):
        raise CheckpointError(f"tensor {name}: rows {covered} of {blocks[0]} are in the ranks' files")
    row = prod(blocks[1:])
    for part, ranges in cuts:
        filled = 0
        for start, stop in ranges[0]:
            _copy(part, filled * row, target, offset + start * row, (stop - start) * row)
            filled += stop - start


def _copy(part: _Part, start: int, target: int, offset: int, count: int) -> None:
    with part.path.open("rb") as file:
        copy_bytes(file.fileno(), part.offset + start, target, offset, count)


def _place(part: _Part, ranges: Ranges, joined, covered, dtype: str) -> None:
    import numpy as np

    local = in_blocks(part.tensor.shape, dtype)
    with part.path.open("rb") as file:
        data = np.frombuffer(os.pread(file.fileno(), part.tensor.nbytes, part.offset), np.uint8).reshape(local)
    for there, here in _boxes(ranges):
        joined[there] = data[here]
        covered[there] = True


def _boxes(ranges: Ranges) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Every block of consecutive elements: its slices in the original and in the part."""
    dims = []
    for dim in ranges:
        filled, pairs = 0, []
        for start, stop in dim:
            pairs.append((slice(start, stop), slice(filled, filled := filled + stop - start)))
        dims.append(pairs)
    for box in product(*dims):
        yield tuple(there for there, _ in box), tuple(here for _, here in box)
