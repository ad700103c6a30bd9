"""`shardwise bench moe`: mixture-of-experts layers on one GPU, beside their peers and the device's floors."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from shardwise.launch.machine import machine_facts

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--layer", metavar="NAME", action="append", help="a model's layer; may be repeated")
    parser.add_argument("--experts", type=int, metavar="N", help="experts on this rank, as under expert parallelism")
    parser.add_argument("--tokens", type=int, metavar="T", action="append", help="token count; may be repeated")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE or standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 without a CUDA device, 2 for an unknown layer or a size below 1."""
    import torch

    from shardwise.ops.moe.bench import LAYERS, measure_ceilings, measure_layer

    complaint = _complaint(args, LAYERS)
    if complaint:
        print(f"shardwise bench moe: {complaint}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("shardwise bench moe: no CUDA device; `shardwise ops` tells what runs here", file=sys.stderr)
        return 1
    from shardwise.ops.measure import device_microseconds

    table = sys.stderr if args.json == "-" else sys.stdout
    time = partial(device_microseconds, calls=16, repeats=9)  # a layer's largest call takes 10 ms
    ceilings = measure_ceilings(time)
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
        text = json.dumps({"machine": machine_facts(), "ceilings": asdict(ceilings), "rows": rows}, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")
    return 0


def _complaint(args, layers) -> str | None:
    unknown = [name for name in args.layer or () if name not in layers]
    if unknown:
        return f"unknown layer {unknown[0]}: choose of {', '.join(layers)}"
    if args.experts is not None and args.experts < max(layers[name].top_k for name in args.layer or layers):
        return f"--experts {args.experts} is fewer than a token chooses; give at least the layer's top-k"
    if any(tokens < 1 for tokens in args.tokens or ()):
        return f"--tokens {min(args.tokens)}: give 1 or more"
    return None


def _line(row) -> str:
    peers = "  ".join(f"{name} {time:.1f}" for name, time in row.peers_us.items())
    return (
        f"{row.layer:18} {row.experts:7} {row.tokens:6} {row.us:9.1f} {row.memory_floor_us:8.1f} "
        f"{row.matrix_floor_us:8.1f}  {peers}"
    )
