"""`shardwise bench ops`: operators timed on one GPU beside their peers and a plain copy of the same bytes."""

import argparse
import importlib.util

from shardwise.launch.cli import DONE, UsageError
from shardwise.launch.cli.output import add_json, require_writable, table_stream, write_json
from shardwise.launch.machine import machine_facts
from shardwise.parallel.options import NotOffered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--category", metavar="NAME", action="append", help="only this category, such as rope; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="the whole sweep of sizes instead of a few")
    add_json(parser, "machine and rows")


def run(args: argparse.Namespace) -> int:
    """Measure and print; NotOffered without Triton or a CUDA device, UsageError for an unknown category."""
    require_writable(args.json)
    import torch

    from shardwise.ops.bench.categories import CATEGORIES

    unknown = [name for name in args.category or () if name not in CATEGORIES]
    if unknown:
        raise UsageError(f"unknown category {unknown[0]!r}; legal: {', '.join(CATEGORIES)}")
    if importlib.util.find_spec("triton") is None:
        raise NotOffered("the package triton is not installed; `shardwise ops` tells what runs here")
    if not torch.cuda.is_available():
        raise NotOffered("no CUDA device; `shardwise ops` tells what runs here")
    table = table_stream(args.json)
    rows = [row for name in args.category or CATEGORIES for row in _measure(CATEGORIES[name](args.full), name, table)]
    if args.json is not None:
        write_json({"machine": machine_facts(), "rows": rows}, args.json)
    return DONE


def _measure(cases, category: str, table) -> list[dict]:
    from shardwise.ops.bench.measure import copy_microseconds, device_microseconds, host_microseconds

    rows = []
    print(f"{'operator':42} {'size':28} {'µs':>9} {'host µs':>8} {'copy µs':>9} {'GB/s':>7}  peers µs", file=table)
    for case in cases:
        row = {
            "category": category,
            "operator": case.operator,
            "size": case.size,
            "bytes": case.moved_bytes,
            "us": device_microseconds(case.call),
            "host_us": host_microseconds(case.call, calls=200, repeats=3),
            "copy_us": copy_microseconds(case.moved_bytes),
            "peers_us": {name: device_microseconds(call) for name, call in case.peers.items()},
        }
        row["gb_per_s"] = row["bytes"] / row["us"] / 1e3
        rows.append(row)
        peers = "  ".join(f"{name} {time:.2f}" for name, time in row["peers_us"].items())
        print(
            f"{case.operator:42} {case.size:28} {row['us']:9.2f} {row['host_us']:8.2f} {row['copy_us']:9.2f} "
            f"{row['gb_per_s']:7.0f}  {peers}",
            file=table,
            flush=True,
        )
    return rows
