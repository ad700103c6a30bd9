"""The per-rank folder: how its files are named and what they say of themselves.

`rank-00001-of-00008.safetensors` holds what rank 1 loads, in the order in which it loads it. The file's metadata has
the plan's hash and, for every tensor that is cut, its global shape and index ranges, so that a folder can be merged
without the model's code. `source.json` keeps the headers of the original files, byte for byte.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardwise.sharding.axes import Range
from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError, TensorEntry
from shardwise.sharding.checkpoint.safetensors import read_with_metadata

PLAN, SOURCE, JOURNAL = "plan.json", "source.json", "shard.journal"
PARTIAL = ".partial"
REST = "rest.safetensors"
"""Tensors that no rank loads (extras, leftover buffers), kept whole so that nothing is lost."""
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Small files of the model folder that go along."""
ALIGNMENT = 64
"""Data starts at a multiple of this many bytes, so that a loader can map it."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a cut tensor's part lies: ranges of every dim in the original, filling the part from its start."""

    shape: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]


@dataclass(frozen=True, slots=True)
class RankTensor:
    """One tensor of a rank's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the part, padding included."""
    nbytes: int
    cut: Cut | None
    """None: the whole tensor."""


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents; CheckpointError where a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{folder} is a file, or lies below one; give a folder as --out") from None


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the system that name nothing, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def copy_small_files(source: Path, target: Path) -> None:
    """Config, index, tokenizer and chat template, but not what `shardwise shard` itself writes."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in (PLAN, SOURCE):
                shutil.copyfile(file, target / file.name)


def file_name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def header_of(tensors: Iterable[RankTensor], plan_hash: str, rank: int, world: int) -> bytes:
    """The safetensors header, with its length in front, of a rank's file."""
    fields: dict[str, object] = {}
    cuts: dict[str, object] = {}
    end = 0
    for tensor in tensors:
        span = [end, end := end + tensor.nbytes]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        if tensor.cut:
            cuts[tensor.name] = [tensor.cut.shape, tensor.cut.ranges]
    fields["__metadata__"] = {
        "format": "pt",
        "shardwise_plan": plan_hash,
        "shardwise_rank": f"{rank}/{world}",
        "shardwise_cuts": json.dumps(cuts, separators=(",", ":")),
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Cut], str]:
    """(its tensors, the cuts of those that are cut, plan hash), by name. CheckpointError if it is no rank's file."""
    tensors, metadata = read_with_metadata(path)
    try:
        cuts = {
            name: Cut(tuple(shape), _ranges(r)) for name, (shape, r) in json.loads(metadata["shardwise_cuts"]).items()
        }
        return tensors, cuts, metadata["shardwise_plan"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a per-rank file: {error!r}") from None


def is_per_rank(folder: Path) -> bool:
    """Whether `shardwise shard` wrote the folder."""
    return (folder / SOURCE).is_file()


def source_entries(folder: Path) -> dict[str, TensorEntry]:
    """The original tensors, as the headers of the original files had them; their data is in the ranks' files."""
    try:
        headers = json.loads((folder / SOURCE).read_text())
        return {
            name: _entry(folder / file, name, fields, 8 + len(text.encode()))
            for file, text in headers.items()
            for name, fields in json.loads(text).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / SOURCE}: not what `shardwise shard` writes: {error!r}") from None


def rank_entries(folder: Path, rank: int, world: int, plan_hash: str) -> dict[str, TensorEntry]:
    """The parts in a rank's own file, in loading order; CheckpointError when the folder is another plan's."""
    path = folder / file_name(rank, world)
    if not path.is_file():
        worlds = sorted({f.stem.rsplit("-", 1)[1].lstrip("0") for f in folder.glob("rank-*-of-*.safetensors")})
        raise CheckpointError(
            f"{folder}: written for {', '.join(worlds)} ranks, this job has {world}; merge it or run those"
        )
    tensors, _, written_for = read_header(path)
    if written_for != plan_hash:
        raise CheckpointError(f"{path}: written for another layout of {world} ranks; see {folder / PLAN}, or merge it")
    return tensors


def _entry(path: Path, name: str, fields: dict, start: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    return TensorEntry(name, tuple(fields["shape"]), fields["dtype"], path, start + begin, end - begin)


def _ranges(listed: list) -> tuple[tuple[Range, ...], ...]:
    return tuple(tuple((a, b) for a, b in dim) for dim in listed)


def in_blocks(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape in stored units: the last dim counts blocks, and a dim for the bytes of one follows."""
    block, size = STORAGE[dtype]
    return (*shape[:-1], shape[-1] // block, size) if shape else (size,)


def ranges_in_blocks(ranges: tuple[tuple[Range, ...], ...], dtype: str) -> tuple[tuple[Range, ...], ...]:
    """Index ranges in stored units; the enclosing blocks along the last dim."""
    block = STORAGE[dtype][0]
    if block == 1 or not ranges:
        return ranges
    return (*ranges[:-1], tuple((a // block, -(-b // block)) for a, b in ranges[-1]))
