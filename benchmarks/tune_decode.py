"""Sweep of tiles for the decode kernels: matrix-vector products, and experts with plain weights.

    python benchmarks/tune_decode.py compile            # all kernels, by several processes, into Triton's cache
    python benchmarks/tune_decode.py time --json FILE   # alone on the device

Each time is that of one launch among several in a graph with dependent launch, over as many weights as do not fit the
L2 cache. Beside every shape: cuBLAS without norm and activation, and the bytes over a plain copy's rate in that run.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import several_microseconds
from shardwise.ops.linear.decode import Tile, skinny_linear
from shardwise.ops.moe import decode
from shardwise.ops.moe.decode import Choice, Gate, expert_down, expert_up
from shardwise.parallel.traffic import copy_bandwidth

FOOTPRINT = 256 << 20
WORKERS = 12


@dataclass(frozen=True)
class Shape:
    """One product of a model."""

    name: str
    rows: int
    columns: int
    norm: bool = False
    gated: bool = False
    kept: bool = False
    """The normed input is written down (the router's)."""


SHAPES = [
    Shape("llama-8b qkv", 6144, 4096, norm=True),
    Shape("llama-8b out", 4096, 4096),
    Shape("llama-8b gate and up", 14336, 4096, norm=True, gated=True),
    Shape("llama-8b down", 4096, 14336),
    Shape("llama-8b head", 128256, 4096, norm=True),
    Shape("llama-8b gate and up, tp 2", 7168, 4096, gated=True),
    Shape("llama-8b qkv, tp 2", 3072, 4096),
    Shape("llama-8b out, tp 2", 4096, 2048),
    Shape("llama-8b down, tp 2", 4096, 7168),
    Shape("gpt-oss qkv", 5120, 2880, norm=True),
    Shape("gpt-oss out", 2880, 4096),
    Shape("gpt-oss-120b router", 128, 2880, norm=True, kept=True),
    Shape("gpt-oss head", 201088, 2880, norm=True),
    Shape("gpt-oss qkv, tp 2", 2560, 2880),
    Shape("gpt-oss out, tp 2", 2880, 2048),
    Shape("qwen3-30b qkv, tp 2", 2560, 2048),
    Shape("qwen3-30b out, tp 2", 2048, 2048),
    Shape("qwen3-30b router", 128, 2048, kept=True),
    Shape("starcoder2-7b up", 18432, 4608),
    Shape("starcoder2-7b down", 4608, 18432),
    Shape("starcoder2-7b qkv", 5632, 4608),
    Shape("starcoder2-7b out", 4608, 4608),
    Shape("starcoder2-7b head", 49152, 4608),
    Shape("glm-4-9b down", 4096, 13696),
    Shape("gemma-2-9b down", 3584, 14336),
    Shape("gemma-2-9b qkv", 8192, 3584),
]


def tiles(shape: Shape) -> list[Tile]:
    heights = (2, 4) if shape.gated else (1, 2, 4, 8)
    plain = [Tile(rows, warps) for rows, warps in product(heights, (1, 2, 4, 8))]
    staged = [Tile(rows, warps, stages) for rows, warps, stages in product(heights, (2, 4), (3, 5))]
    whole = [Tile(rows, 4, whole=True) for rows in heights if shape.columns <= 5120]
    return [tile for tile in plain + staged + whole if tile.columns <= shape.columns]


def weights_of(shape: Shape, footprint: int) -> list[torch.Tensor]:
    rows = shape.rows * (2 if shape.gated else 1)
    count = max(2, min(12, -(-footprint // (rows * shape.columns * 2))))
    return [torch.randn(rows, shape.columns, device="cuda").bfloat16() for _ in range(count)]


def call(shape: Shape, tile: Tile, x: torch.Tensor, weight: torch.Tensor):
    normed = torch.empty_like(x) if shape.kept else None
    norm = x[0].contiguous() if shape.norm else None
    dtype = torch.float32 if shape.kept or shape.rows > 65536 else None
    return lambda: skinny_linear(
        x, weight, norm_weight=norm, gated=shape.gated, normed=normed, out_dtype=dtype, tile=tile, pdl=True
    )


def compile_all(worker: int) -> None:
    """This worker's share of all (shape, tile) pairs, each launched once on a narrow weight."""
    todo = [(shape, tile) for shape in SHAPES for tile in tiles(shape)]
    for shape, tile in todo[worker::WORKERS]:
        # Kernels depend on the divisibility of rows and columns only.
        small = replace(shape, rows=min(shape.rows, 4096) if shape.rows <= 65536 else shape.rows)
        attempt(call(small, tile, torch.randn(1, shape.columns, device="cuda").bfloat16(), weights_of(small, 0)[0]))
    for number, options in enumerate(expert_options()):
        if number % WORKERS == worker:
            attempt(expert_calls(options, 8, 1)[0])


def attempt(run) -> str:
    try:
        run()
        torch.cuda.synchronize()
        return ""
    except Exception as error:  # a tile that does not compile is not the fastest
        return str(error)[:80]


def expert_options() -> list[tuple[int, int, int, int]]:
    """(rows of up, rows of down, warps, programs a multiprocessor)."""
    return list(product((2, 4, 8), (2, 4, 8), (1, 2, 4), (4, 8)))


def expert_calls(options: tuple[int, int, int, int], experts: int, count: int):
    """Calls of Qwen3-30B-A3B's experts, half of them on this rank, with different routings."""
    up_rows, down_rows, warps, per_sm = options
    hidden, size = 2048, 768
    decode.UP_TILE = decode.Tile(up_rows, warps)
    decode.DOWN_TILE = decode.Tile(down_rows, warps if size % (256 * warps) == 0 else 1, stages=4)
    decode.PLAIN_PER_SM = per_sm
    up = torch.randn(experts // 2, 2 * size, hidden, device="cuda").bfloat16()
    down = torch.randn(experts // 2, hidden, size, device="cuda").bfloat16()
    slots = torch.arange(experts, device="cuda", dtype=torch.int32)
    slots = torch.where(slots < experts // 2, slots, -1).int()
    x = torch.randn(1, hidden, device="cuda")

    def run(logits):
        routed = expert_up(x, logits, slots, Choice(min(8, experts), True), up, Gate(), pdl=True)
        return expert_down(routed, down, pdl=True)

    sets = [torch.randn(1, experts, device="cuda") for _ in range(count)]
    return [lambda logits=logits: run(logits) for logits in sets]


def time_products(report, bandwidth: float) -> None:
    for shape in SHAPES:
        weights, x = weights_of(shape, FOOTPRINT), torch.randn(1, shape.columns, device="cuda").bfloat16()
        nbytes = weights[0].nbytes
        found = []
        for tile in tiles(shape):
            calls = [call(shape, tile, x, weight) for weight in weights]
            failed = attempt(calls[0])
            if not failed:
                found.append((several_microseconds(calls), tile))
        found.sort(key=lambda row: row[0])
        library = several_microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])
        report(
            {
                "shape": shape.name,
                "copy_us": nbytes / bandwidth * 1e6,
                "cublas_us": library,
                "best": [{"us": us, **asdict(tile)} for us, tile in found[:6]],
                "worst_us": found[-1][0],
            }
        )
        del weights


def time_experts(report, bandwidth: float) -> None:
    found = []
    for options in expert_options():
        calls = expert_calls(options, 128, 8)
        if not attempt(calls[0]):
            found.append((several_microseconds(calls), options))
    found.sort()
    names = ("up_rows", "down_rows", "warps", "per_sm")
    floor = 4 * 3 * 768 * 2048 * 2 / bandwidth * 1e6
    rows = [{"us": us, **dict(zip(names, options, strict=True))} for us, options in found[:8]]
    report({"shape": "qwen3-30b experts, ep 2, up and down", "copy_us_of_four_experts": floor, "best": rows})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("compile", "worker", "time"))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.mode == "compile":
        command = [sys.executable, __file__, "worker", "--worker"]
        workers = [subprocess.Popen([*command, str(number)]) for number in range(WORKERS)]
        print("exit codes", [worker.wait() for worker in workers])
        return
    if args.mode == "worker":
        compile_all(args.worker)
        return
    rows: list[dict] = []

    def report(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(
                    {"machine": machine_facts(), "copy_bytes_per_second": bandwidth, "rows": rows}, file, indent=1
                )

    bandwidth = copy_bandwidth(torch.device("cuda:0"))
    report({"copy_bytes_per_second": bandwidth})
    time_products(report, bandwidth)
    time_experts(report, bandwidth)


if __name__ == "__main__":
    main()
