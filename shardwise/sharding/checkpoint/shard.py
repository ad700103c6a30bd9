"""Writing per-rank files: streaming, resumable, renamed into place when whole.

Tensors are taken one after another in the order of the source files, and each rank's part is copied to its place;
nothing larger than a chunk of one part is ever held in memory. A journal notes how far all files are on disk, so an
interrupted job goes on from there. Free of torch.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

from shardwise.sharding.checkpoint.copying import Source, copy_part, write_all
from shardwise.sharding.checkpoint.header import STORAGE, CheckpointError, TensorEntry
from shardwise.sharding.checkpoint.per_rank import (
    JOURNAL,
    PARTIAL,
    PLAN,
    REST,
    SOURCE,
    Cut,
    RankTensor,
    copy_small_files,
    file_name,
    header_of,
    is_per_rank,
    make_folder,
    writing_into,
)
from shardwise.sharding.checkpoint.resolve import Checkpoint
from shardwise.sharding.document import document
from shardwise.sharding.plan import Plan

SYNC_BYTES = 1 << 30
"""Data written between two notes in the journal."""

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True, slots=True)
class _Target:
    rank: int
    tensor: RankTensor
    offset: int


def write_shards(plan: Plan, checkpoint: Checkpoint, out: Path, *, progress: Progress | None = None) -> list[Path]:
    """Write one file a rank and one for the rest, `plan.json`, `source.json` and the model's small files into `out`.

    Returns the safetensors files. Goes on where an interrupted call with the same plan stopped. CheckpointError when
    the source is a GGUF file or has one file a rank already, when `out` is the source itself, or holds another plan's
    files.
    """
    if checkpoint.gguf is not None:
        raise CheckpointError(f"{checkpoint.path}: GGUF types have no safetensors form; shard a safetensors folder")
    make_folder(out)
    if out.resolve() == checkpoint.path.resolve():
        raise CheckpointError(f"{out} is the model's own folder; give another --out")
    if is_per_rank(checkpoint.path):
        raise CheckpointError(
            f"{checkpoint.path} holds one file a rank already; for another layout take the original files back first: "
            f"shardwise shard {checkpoint.path} --merge --out DIR"
        )
    with writing_into(out):
        return _write(plan, checkpoint, out, progress)


def _write(plan: Plan, checkpoint: Checkpoint, out: Path, progress: Progress | None) -> list[Path]:
    described = document(plan)
    plan_hash = described["hash"]
    finals = [*(out / file_name(r, plan.layout.world) for r in range(plan.layout.world)), out / REST]
    done = _journal(out, plan_hash)
    if done is None and all(f.is_file() for f in finals) and _same_plan(out, plan_hash):
        return finals
    _refuse_foreign(out, plan_hash)
    _write_json(out / PLAN, described)
    entries = _source_order(checkpoint)
    _write_json(out / SOURCE, _source_headers(entries))
    copy_small_files(checkpoint.path, out)
    if done != len(entries):
        _stream(plan, entries, finals, plan_hash, done or 0, progress)
    for final in finals:
        partial = final.with_name(final.name + PARTIAL)
        if partial.exists():  # else renamed before an interruption
            os.replace(partial, final)
    (out / JOURNAL).unlink(missing_ok=True)
    return finals


def rank_tensors(plan: Plan, rank: int, stored: dict[str, TensorEntry]) -> list[RankTensor]:
    """What goes into one rank's file, in loading order: the ends, then layer by layer."""
    found = []
    for shard in sorted(plan.shards(rank), key=lambda s: _layer(s.name)):
        if shard.name not in stored or not all(shard.local_shape):
            continue
        cut = None if shard.whole else Cut(shard.global_shape, shard.ranges)
        nbytes = prod(shard.local_shape) // STORAGE[shard.dtype][0] * STORAGE[shard.dtype][1]
        found.append(RankTensor(shard.name, shard.dtype, shard.local_shape, nbytes, cut))
    return found


def _layer(name: str) -> int:
    """The first number in a tensor's name, which is its layer's; -1 outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _rest(entries: list[TensorEntry], targets: dict[str, list[_Target]]) -> list[RankTensor]:
    return [RankTensor(e.name, e.dtype, e.shape, e.nbytes, None) for e in entries if e.name not in targets]


def _stream(plan: Plan, entries: list[TensorEntry], finals: list[Path], plan_hash: str, done: int, progress) -> None:
    """Copy every tensor from number `done` on to all files that hold part of it."""
    out = finals[0].parent
    with ExitStack() as stack:
        files, targets = _lay_out(plan, entries, finals, plan_hash, stack, fresh=done == 0)
        total = sum(t.tensor.nbytes for each in targets.values() for t in each)
        written = sum(t.tensor.nbytes for e in entries[:done] for t in targets.get(e.name, ()))
        unsynced = 0
        for path, group in groupby(enumerate(entries[done:], done + 1), key=lambda item: item[1].path):
            with Source(path) as source:
                for number, entry in group:
                    for target in targets.get(entry.name, ()):
                        copy_part(source, entry, files[target.rank], target.tensor, target.offset)
                        unsynced += target.tensor.nbytes
                        written += target.tensor.nbytes
                    if unsynced >= SYNC_BYTES:
                        _note(out, plan_hash, number, files)
                        unsynced = 0
                    if progress:
                        progress(written, total)
        _note(out, plan_hash, len(entries), files)


def _lay_out(
    plan: Plan, entries: list[TensorEntry], finals: list[Path], plan_hash: str, stack: ExitStack, fresh: bool
) -> tuple[list[int], dict[str, list[_Target]]]:
    """Open every file at its final size with its header; where each tensor's parts go."""
    stored = {e.name: e for e in entries}
    files: list[int] = []
    targets: dict[str, list[_Target]] = {}
    for rank, final in enumerate(finals):
        tensors = rank_tensors(plan, rank, stored) if final.name != REST else _rest(entries, targets)
        header = header_of(tensors, plan_hash, rank, plan.layout.world)
        size = len(header) + sum(t.nbytes for t in tensors)
        files.append(_open(final.with_name(final.name + PARTIAL), header, size, fresh))
        stack.callback(os.close, files[-1])
        offset = len(header)
        for tensor in tensors:
            targets.setdefault(tensor.name, []).append(_Target(rank, tensor, offset))
            offset += tensor.nbytes
    return files, targets


def _open(path: Path, header: bytes, size: int, fresh: bool) -> int:
    if not fresh and (not path.is_file() or path.stat().st_size != size):
        raise CheckpointError(f"{path}: missing or not {size} bytes, though {JOURNAL} notes it: delete the folder")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
    os.truncate(descriptor, size)  # what padding leaves unwritten reads as zeros
    write_all(descriptor, header, 0)
    return descriptor


def _note(out: Path, plan_hash: str, done: int, files: Iterable[int]) -> None:
    for descriptor in files:
        os.fdatasync(descriptor)
    _write_json(out / JOURNAL, {"plan": plan_hash, "tensors": done})


def _journal(out: Path, plan_hash: str) -> int | None:
    """Tensors that are on disk already; None where no interrupted job is noted."""
    path = out / JOURNAL
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text())
        if noted["plan"] != plan_hash:
            raise CheckpointError(f"{path}: an interrupted job with another plan; delete {out} or give another --out")
        return int(noted["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: unreadable ({error!r}): delete the folder") from None


def _same_plan(out: Path, plan_hash: str) -> bool:
    try:
        return json.loads((out / PLAN).read_text())["hash"] == plan_hash
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_foreign(out: Path, plan_hash: str) -> None:
    if any(out.glob("rank-*-of-*.safetensors")) and not _same_plan(out, plan_hash):
        raise CheckpointError(f"{out}: holds the files of another plan; delete them or give another --out")


def _source_order(checkpoint: Checkpoint) -> list[TensorEntry]:
    """All stored tensors as they lie on disk."""
    return sorted((s.entry for s in checkpoint.tensors.values()), key=lambda e: (e.path.name, e.offset))


def _source_headers(entries: list[TensorEntry]) -> dict[str, str]:
    """Original file name to header text."""
    headers = {}
    for path in sorted({e.path for e in entries}):
        with path.open("rb") as file:
            headers[path.name] = file.read(int.from_bytes(file.read(8), "little")).decode()
    return headers


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + PARTIAL)
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)
