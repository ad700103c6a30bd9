"""Safetensors headers: one file, or the shards of an index. Free of torch, numpy and the safetensors package.

Layout (safetensors format): 8 bytes little-endian header length, a JSON object `name -> {dtype, shape, data_offsets}`
with an optional `__metadata__`, then the data, which the tensors cover without holes.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError, TensorEntry, check_ranges, stored_bytes

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
LFS_POINTER = b"version "
"""How the text begins that Git leaves where it has not fetched a large file."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_safetensors(path: str | Path) -> dict[str, TensorEntry]:
    """Tensors of one file, in header order.

    CheckpointError for a header that is truncated, too long, not JSON or names a tensor twice, for unknown dtypes,
    and for byte ranges that overlap, leave holes, lie outside or do not fit the shape. OSError when unreadable.
    """
    return read_with_metadata(Path(path))[0]


def read_with_metadata(path: Path) -> tuple[dict[str, TensorEntry], Any]:
    """As `read_safetensors`, and what the file says of itself, None where it says nothing."""
    text, start, size = _header_text(path)
    header = _parse(path, text)
    metadata = header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, fields, start) for name, fields in header.items()}
    check_ranges(tensors.values(), start, size)
    covered = start + sum(entry.nbytes for entry in tensors.values())
    if covered != size:
        raise CheckpointError(
            f"{path}: tensors cover {covered - start} of {size - start} data bytes: holes or trailing data"
        )
    return tensors, metadata


def read_safetensors_folder(folder: str | Path) -> dict[str, TensorEntry]:
    """Tensors of `model.safetensors.index.json`'s shards, listed or not, else of the folder's `.safetensors` files.

    CheckpointError, besides those of `read_safetensors`, when the folder has none, the index points outside of the
    folder or to a tensor that its shard lacks, or two files hold the same tensor.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        return _read_index(folder, index)
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle file, which is refused: convert it)" if pickles else ""
        raise CheckpointError(f"{folder}: no {SINGLE}, no {INDEX} and no other .safetensors file{hint}")
    return _merge(files)


def _merge(files: Iterable[Path]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_safetensors(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in two files: {tensors[name].path} and {file}")
            tensors[name] = entry
    return tensors


def _read_index(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _parse(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no object weight_map")
    shards: dict[str, dict[str, TensorEntry]] = {}
    tensors: dict[str, TensorEntry] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in shards:
            shards[file] = read_safetensors(_shard_path(folder, index, name, file))
        if name not in shards[file]:
            raise CheckpointError(f"{index}: tensor {name} should be in {file}, which lacks it")
        tensors[name] = shards[file][name]
    unlisted = {name: entry for shard in shards.values() for name, entry in shard.items() if name not in tensors}
    return tensors | unlisted  # which are as much of the checkpoint as the others: nothing that a file holds is lost


def _shard_path(folder: Path, index: Path, name: str, file: Any) -> Path:
    if not isinstance(file, str) or file in ("", "..") or Path(file).name != file or "\\" in file:
        raise CheckpointError(f"{index}: weight_map[{name}] is {file!r}, expected the name of a file beside the index")
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{index}: {file}, the shard of {name}, is missing from {folder}")
    return path


def _header_text(path: Path) -> tuple[bytes, int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file: fetch it again")
        if head == LFS_POINTER:
            raise CheckpointError(f"{path}: a Git LFS pointer in place of the file; to fetch the file: git lfs pull")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header length {length} exceeds the format's limit of {MAX_HEADER_BYTES}: no safetensors file"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: header length {length}, but the file has {size} bytes: it is truncated, fetch it again"
            )
        return file.read(length), 8 + length, size


def _parse(path: Path, text: bytes) -> dict:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {twice} occurs twice in the JSON")
        return fields

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, expected an object")
    return header


def _entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    try:
        dtype, dims, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        shape = tuple(dims)
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: tensor {name} is {fields!r:.200}, expected dtype, shape and data_offsets")
    if dtype not in STORAGE:
        raise CheckpointError(f"{path}: tensor {name}: unknown dtype {dtype!r}")
    try:
        nbytes = stored_bytes(shape, dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor {name}: {error}") from None
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name}: {dtype} {list(shape)} takes {nbytes} bytes, data_offsets say {end - begin}"
        )
    return TensorEntry(name, shape, dtype, path, start + begin, nbytes)
