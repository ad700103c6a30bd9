"""`shardwise plan MODEL`: what every rank holds, reads and sends, without weights."""

import argparse
import json
import sys
from pathlib import Path

from shardwise.sharding.axes import Axis
from shardwise.sharding.cutting import IllegalLayout
from shardwise.sharding.layout import ParallelLayout

DONE, USAGE = 0, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="config.json, model folder, GGUF file, hub id or a known name")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks (default 1)")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallel ranks (default 1)")
    parser.add_argument(
        "--moe-tp", type=int, default=0, metavar="N", help="ranks that share an expert (default world / ep)"
    )
    parser.add_argument(
        "--attn-dp", type=int, default=1, metavar="N", help="attention data parallel groups (default 1)"
    )
    parser.add_argument(
        "--pad", action="append", default=[], choices=[str(a) for a in Axis], help="pad this axis to equal lengths"
    )
    parser.add_argument("--per-tensor", action="store_true", help="list every tensor instead of patterns (with --json)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="the plan as JSON, to FILE or standard output"
    )


def run(args: argparse.Namespace) -> int:
    """0; 2 for a layout that the model does not allow."""
    from shardwise.sharding.plan import plan

    try:
        layout = ParallelLayout(args.tp, args.attn_dp, args.moe_tp, args.ep)
        planned = plan(args.model, layout, pad=args.pad)
    except (IllegalLayout, ValueError) as error:
        if type(error) not in (IllegalLayout, ValueError):
            raise
        print(f"shardwise: error: {error}", file=sys.stderr)
        return USAGE
    if args.json:
        from shardwise.sharding.document import document

        _write(json.dumps(document(planned, per_tensor=args.per_tensor), indent=1), args.json)
    if args.json != "-":
        from shardwise.sharding.report import text_report

        print(text_report(planned))
    return DONE


def _write(text: str, target: str) -> None:
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n")
