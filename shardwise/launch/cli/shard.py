"""`shardwise shard MODEL --tp N --out DIR`: per-rank files that load sequentially; `--merge` takes them back."""

import argparse
import sys
import time
from pathlib import Path

from shardwise.launch.cli import DONE, UsageError
from shardwise.launch.cli.layout import SIZES, add_layout, layout_of
from shardwise.launch.cli.output import add_json, require_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="safetensors folder or hub id; with --merge a per-rank folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--merge", action="store_true", help="write the original files back, bit for bit")
    add_layout(parser)
    add_json(parser, "what was written")


def run(args: argparse.Namespace) -> int:
    """0; IllegalLayout for one that the model does not allow, UsageError for one beside --merge or none at all."""
    require_writable(args.json)
    if not args.out:
        raise UsageError("--out is empty: name a folder")
    out = Path(args.out)
    started = time.perf_counter()
    files = _merge(args, out) if args.merge else _shard(args, out)
    seconds = time.perf_counter() - started
    size = sum(f.stat().st_size for f in files)
    result = {"folder": str(out), "files": [f.name for f in files], "bytes": size, "seconds": seconds}
    write_json(result, args.json)
    if args.json != "-":
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        print(f"{count}, {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s): {out}")
    return DONE


def _merge(args: argparse.Namespace, out: Path) -> list[Path]:
    from shardwise.sharding.checkpoint.merge import merge_shards

    for name in SIZES:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --merge: drop one of them")
    return merge_shards(Path(args.model), out)


def _shard(args: argparse.Namespace, out: Path) -> list[Path]:
    from shardwise.sharding.checkpoint.resolve import open_checkpoint
    from shardwise.sharding.checkpoint.shard import write_shards
    from shardwise.sharding.plan import plan

    planned = plan(args.model, layout_of(args))
    return write_shards(planned, open_checkpoint(args.model), out, progress=_Progress())


class _Progress:
    """One line per 10 % on standard error."""

    def __init__(self):
        self._next = 10

    def __call__(self, written: int, total: int) -> None:
        while total and written * 100 >= self._next * total:
            print(f"{self._next:3d} %  {written / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)
            self._next += 10
