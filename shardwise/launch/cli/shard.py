"""`shardwise shard MODEL --tp N --out DIR`: per-rank files that load sequentially; `--merge` takes them back."""

import argparse
import sys
import time
from pathlib import Path

from shardwise.sharding.layout import ParallelLayout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="safetensors folder or hub id; with --merge a per-rank folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--merge", action="store_true", help="write the original files back, bit for bit")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks (default 1)")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallel ranks (default 1)")
    parser.add_argument("--moe-tp", type=int, default=0, metavar="N", help="ranks that share an expert")
    parser.add_argument("--attn-dp", type=int, default=1, metavar="N", help="attention data parallel groups")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    started = time.perf_counter()
    if args.merge:
        from shardwise.sharding.checkpoint.merge import merge_shards

        files = merge_shards(Path(args.model), out)
    else:
        from shardwise.sharding.checkpoint.resolve import open_checkpoint
        from shardwise.sharding.checkpoint.shard import write_shards
        from shardwise.sharding.plan import plan

        planned = plan(args.model, ParallelLayout(args.tp, args.attn_dp, args.moe_tp, args.ep))
        files = write_shards(planned, open_checkpoint(args.model), out, progress=_Progress())
    seconds = time.perf_counter() - started
    size = sum(f.stat().st_size for f in files)
    print(f"{len(files)} files, {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s): {out}")
    return 0


class _Progress:
    """One line per 10 % on standard error."""

    def __init__(self):
        self._next = 10

    def __call__(self, written: int, total: int) -> None:
        while total and written * 100 >= self._next * total:
            print(f"{self._next:3d} %  {written / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)
            self._next += 10
