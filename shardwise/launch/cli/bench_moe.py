"""`shardwise bench moe`: mixture-of-experts layers on one GPU, beside their peers and the device's floors."""

import argparse
import gc
from dataclasses import asdict, replace
from functools import partial

from shardwise.launch.cli import DONE, UsageError, positive
from shardwise.launch.cli.output import add_json, require_writable, table_stream, write_json
from shardwise.launch.machine import machine_facts
from shardwise.parallel.options import NotOffered

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--layer", metavar="NAME", action="append", help="only this layer, such as gpt-oss-120b; may be repeated"
    )
    parser.add_argument(
        "--experts",
        type=positive,
        metavar="N",
        help="experts on this rank, as under expert parallelism (default: all of the layer)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="T",
        action="append",
        help=f"token count; may be repeated (default {', '.join(map(str, TOKENS))})",
    )
    add_json(parser, "machine and rows")


def run(args: argparse.Namespace) -> int:
    """Measure and print; NotOffered without a CUDA device, UsageError for an unknown layer or too few experts."""
    require_writable(args.json)
    import torch

    from shardwise.ops.moe.bench import LAYERS, measure_ceilings, measure_layer

    _check(args, LAYERS)
    if not torch.cuda.is_available():
        raise NotOffered("no CUDA device; `shardwise ops` tells what runs here")
    from shardwise.ops.bench.measure import alternating_microseconds, device_microseconds

    gc.freeze()  # every capture collects garbage, which what is imported by now is not
    table = table_stream(args.json)
    ceilings = measure_ceilings(partial(device_microseconds, calls=16, repeats=9))
    time = partial(alternating_microseconds, repeats=15)
    print(
        f"copy {ceilings.copy / 1e6:.2f} TB/s, read {ceilings.read / 1e6:.2f} TB/s, "
        f"bf16 product {ceilings.operations / 1e6:.0f} TFLOP/s",
        file=table,
    )
    print(f"{'layer':18} {'experts':>7} {'tokens':>6} {'µs':>9} {'memory':>8} {'matrix':>8}  peers µs", file=table)
    rows = []
    for name in args.layer or LAYERS:
        layer = replace(LAYERS[name], experts=args.experts) if args.experts else LAYERS[name]
        for row in measure_layer(name, layer, tuple(args.tokens or TOKENS), time, ceilings):
            rows.append(asdict(row))
            print(_line(row), file=table, flush=True)
        torch.cuda.empty_cache()
    if args.json is not None:
        write_json({"machine": machine_facts(), "ceilings": asdict(ceilings), "rows": rows}, args.json)
    return DONE


def _check(args, layers) -> None:
    unknown = [name for name in args.layer or () if name not in layers]
    if unknown:
        raise UsageError(f"unknown layer {unknown[0]!r}; legal: {', '.join(layers)}")
    if args.experts is not None and args.experts < max(layers[name].top_k for name in args.layer or layers):
        raise UsageError(f"--experts {args.experts} is fewer than a token chooses; give at least the layer's top-k")


def _line(row) -> str:
    peers = "  ".join(f"{name} {time:.1f}" for name, time in row.peers_us.items())
    return (
        f"{row.layer:18} {row.experts:7} {row.tokens:6} {row.us:9.1f} {row.memory_floor_us:8.1f} "
        f"{row.matrix_floor_us:8.1f}  {peers}"
    )
