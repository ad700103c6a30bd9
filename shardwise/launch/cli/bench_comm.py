"""`shardwise bench comm`: collectives of a transport, beside its peers in the same run."""

import argparse
import re
import sys

from shardwise.launch.cli import UsageError, positive
from shardwise.launch.cli.output import add_json, require_writable, table_stream, write_json
from shardwise.launch.interrupt import interruptible
from shardwise.launch.machine import machine_facts
from shardwise.parallel.host_memory import host_memory, require_bytes, require_ranks
from shardwise.parallel.options import RUN_TRANSPORTS

BODY = "shardwise.comm.bench:"
ON_CUDA, ON_CPU = ("nccl", "symm_mem", "flashinfer"), ("gloo", "mpi")
"""Peers: those on CUDA run in our own ranks, the others in a job each."""
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
SWEEP = "1KiB,4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--transport", default="auto", metavar="NAME", help="shm, gloo, mpi, nccl, p2p, flashinfer (default auto)"
    )
    parser.add_argument("-n", "--world", type=positive, default=2, metavar="N", help="ranks to start (default 2)")
    parser.add_argument("--sizes", type=sizes, default=sizes(SWEEP), metavar="LIST", help=f"payloads, default {SWEEP}")
    parser.add_argument(
        "--op", default="all_reduce", metavar="LIST", help="operations, comma separated, or all (default all_reduce)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"], help="default float32"
    )
    parser.add_argument(
        "--strategy", default="AUTO", metavar="NAME", help="of all-reduce: AUTO, ONESHOT, TWOSHOT, NCCL, ..."
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: GPUs where there are enough"
    )
    parser.add_argument(
        "--peers",
        default="auto",
        metavar="LIST",
        help="gloo, mpi, nccl, symm_mem, flashinfer, none; default: all that run here",
    )
    add_json(parser, "machine, reasons and rows")
    parser.add_argument(
        "--why", action="store_true", help="also print which transport and algorithm serve each size, and why"
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="write a topology file with this machine's memory and measured link, for plan --device",
    )


def sizes(text: str) -> list[int]:
    """Bytes of "4KiB,1MiB". Raises ArgumentTypeError for anything else."""
    result = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", word)
        size = int(float(match[1]) * UNITS.get(match[2].lower(), 0)) if match else 0
        if size < 1:
            raise argparse.ArgumentTypeError(f"{word!r} is not a size; write for instance 4KiB,16MiB")
        result.append(size)
    return result


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files; 1 if any result was wrong."""
    from shardwise.comm.base import STRATEGIES
    from shardwise.comm.names import OPS

    ops = args.op.split(",")
    _require_known("operation", ops, ("all", *OPS))
    _require_known("transport", [args.transport], RUN_TRANSPORTS)
    _require_known("strategy", [args.strategy], STRATEGIES)
    require_writable(args.json)
    require_writable(args.calibrate, "--calibrate")
    ops = list(OPS) if "all" in ops else ops
    if args.strategy != "AUTO" and not any(op.startswith("all_reduce") for op in ops):
        raise UsageError(f"--strategy {args.strategy} is of all-reduce: add that to --op, or leave the strategy out")
    if args.calibrate and (args.world < 2 or "all_reduce" not in ops or len(set(args.sizes)) < 2):
        raise UsageError("--calibrate needs all_reduce of two ranks at two sizes at least: a small one and a large one")
    device = _device(args)
    peers = _peers(args, device)
    _require_room(args, device)
    payload = {
        "transport": args.transport,
        "device": device,
        "sizes": args.sizes,
        "ops": ops,
        "dtype": args.dtype,
        "strategy": args.strategy,
        "peers": [peer for peer in peers if peer in ON_CUDA],
    }
    launcher = "mpi" if args.transport == "mpi" else "local"
    with interruptible():
        rows, why, notes = _measure("job", payload, args.world, launcher)
        if "all_reduce" in ops and args.world > 1:
            for peer in [peer for peer in peers if peer not in ON_CUDA]:
                rows += _peer(peer, payload, args.world, notes)
    _print(rows, why if args.why else [], notes, table_stream(args.json))
    _write(args, rows, why)
    return 1 if any(row["wrong"] for row in rows) else 0


def _device(args: argparse.Namespace) -> str:
    if args.device != "auto":
        return args.device
    if args.transport in ("nccl", "p2p", "flashinfer"):
        return "cuda"
    if args.transport in ("shm", "gloo", "mpi"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.device_count() >= args.world else "cpu"


def _require_known(what: str, given: list[str], legal: tuple[str, ...]) -> None:
    for word in given:
        if word not in legal:
            raise UsageError(f"unknown {what} {word!r}; legal: {', '.join(legal)}")


def _peers(args: argparse.Namespace, device: str) -> list[str]:
    if args.peers == "none":
        return []
    here = list(ON_CUDA if device == "cuda" else ON_CPU)
    if args.peers == "auto":
        return here
    names = args.peers.split(",")
    _require_known(f"peer on {device}", names, tuple(here))
    return names


def _require_room(args: argparse.Namespace, device: str) -> None:
    """DoesNotFit where the host has no memory for the ranks, or for the largest payload where that is on the CPU."""
    require_ranks(args.world)
    largest = max(args.sizes)
    if device == "cpu":
        what = f"--sizes: {args.world} ranks with an input and an output of {largest} bytes"
        require_bytes(2 * args.world * largest, what)


def _measure(body: str, payload: dict, world: int, launcher: str) -> tuple[list[dict], list[str], list[str]]:
    from shardwise.launch.start import run_job

    threads = {"OMP_NUM_THREADS": "1"}  # one thread a rank: this measures moving, not adding in parallel
    results = run_job(BODY + body, payload, world=world, launcher=launcher, environment=threads)
    return merge([result["rows"] for result in results]), results[0]["why"], results[0]["notes"]


def merge(ranks: list[list[dict]]) -> list[dict]:
    """One row for all ranks: the slowest rank's times, everyone's wrong elements."""
    merged = []
    for same in zip(*ranks, strict=True):
        slowest = max(same, key=lambda row: row["p50_us"])
        worst = {"p99_us": max(row["p99_us"] for row in same), "wrong": sum(row["wrong"] for row in same)}
        merged.append({**slowest, **worst})
    return merged


def _peer(peer: str, payload: dict, world: int, notes: list[str]) -> list[dict]:
    try:
        return _measure(f"peer_{peer}", payload, world, "mpi" if peer == "mpi" else "local")[0]
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        notes.append(f"peer:{peer} was not measured: {str(error).splitlines()[0]}")
        return []


def _print(rows: list[dict], why: list[str], notes: list[str], out) -> None:
    header = ("size B", "type", "op", "transport", "strategy", "p50 us", "p99 us", "algbw", "busbw GB/s", "wrong")
    print("{:>11} {:>9} {:<28} {:<24} {:<8} {:>10} {:>10} {:>8} {:>10} {:>6}".format(*header), file=out)
    for row in rows:
        print(
            f"{row['bytes']:>11} {row['dtype']:>9} {row['op']:<28} {row['transport']:<24} {row['strategy']:<8} "
            f"{row['p50_us']:>10.1f} {row['p99_us']:>10.1f} {row['algbw_gbps']:>8.2f} {row['busbw_gbps']:>10.2f} "
            f"{row['wrong']:>6}",
            file=out,
        )
    for line in [*why, *notes]:
        print(line, file=out)


def _write(args: argparse.Namespace, rows: list[dict], why: list[str]) -> None:
    if args.json is not None:
        write_json({"machine": machine_facts(), "why": why, "rows": rows}, args.json)
    if args.calibrate:
        _calibrate(args, [row for row in rows if not row["transport"].startswith("peer:")])


def _calibrate(args: argparse.Namespace, rows: list[dict]) -> None:
    """A topology with the link inside the host as measured and a rank's memory as it is; the rest stays built in."""
    from dataclasses import replace

    from shardwise.sharding import topology

    sums = [row for row in rows if row["op"] == "all_reduce"]
    device = _device(args)
    base = topology.load(_built_in(device))
    link = topology.Link(
        bandwidth_bytes_per_second=max(row["busbw_gbps"] for row in sums) * 1e9,
        latency_seconds=min(row["p50_us"] for row in sums) * 1e-6,
    )
    measured = replace(
        base,
        device=replace(base.device, memory_bytes=_memory_of_a_rank(device, args.world)),
        intra=link,
        ranks_per_node=max(args.world, base.ranks_per_node),
        source=f"shardwise bench comm, {sums[0]['transport']}, world {args.world}",
    )
    topology.save(measured, args.calibrate)


def _memory_of_a_rank(device: str, world: int) -> int:
    """Bytes of its GPU, or its share of the host."""
    if device == "cpu":
        return host_memory()[1] // world
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _built_in(device: str) -> str:
    """The built-in device that this machine's accelerator is."""
    from shardwise.sharding import topology

    if device == "cpu":
        return "cpu"
    import torch

    name = torch.cuda.get_device_name()
    known = next((known for known in topology.BUILT_IN if known in name.lower()), None)
    if known is None:
        print(f"no built-in device is a {name}: memory and arithmetic rates are an H200's", file=sys.stderr)
    return known or "h200"
