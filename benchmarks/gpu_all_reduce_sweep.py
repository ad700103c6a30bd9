"""Time the launches that shardwise/comm/p2p/table.py may choose from, and print the best of each size.

    python3 -m torch.distributed.run --nproc-per-node WORLD benchmarks/gpu_all_reduce_sweep.py --json FILE
    python3 benchmarks/gpu_all_reduce_sweep.py --compile 0/16 --world WORLD   # beforehand, 16 of them side by side

Timing as in gpu_all_reduce.py. The result does not depend on the launch, only its time does; it is checked once a
launch against NCCL's sum, to a rounding.
"""

import argparse
import itertools
import json
import os
import types

import gpu_all_reduce as program
import torch
import torch.distributed as dist

from shardwise.comm import bench as measure
from shardwise.comm.p2p.launch import Launcher
from shardwise.comm.p2p.table import Tuning

KIB, MIB = 1 << 10, 1 << 20
FUSED = [(256, 7168), (1024, 7168), (64, 7168), (1, 7168), (256, 2880), (256, 4096), (1024, 2880), (4096, 7168)]
PLAIN = [16 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]


def candidates(fused: bool, nbytes: int, world: int) -> list[Tuning]:
    small = [Tuning("ONESHOT", warps, blocks_per_sm=4, lanes=32 * warps) for warps in (4, 8, 16)]
    if nbytes < MIB // 2:
        return small + ([Tuning("ONESHOT", 32, lanes=1024)] if fused else [])
    both = [
        Tuning("ONESHOT", warps, ahead, blocks, lanes, bulk=bulk, pausing=pausing)
        for warps, lanes, blocks in ((8, 512, 2), (16, 512, 2 if fused else 4), (32, 1024, 1))
        for ahead, bulk, pausing in ((0, False, False), (1, False, True), (1, True, False), (1, True, True))
    ]
    both += [Tuning("ONESHOT", 8, 2, 4, 512), Tuning("ONESHOT", 8, 2, 4, 256, bulk=True, pausing=True)]
    divided = [
        Tuning("ONESHOT", warps, ahead, blocks, lanes, pushers=pushers, bulk=bulk, pausing=True)
        for (warps, lanes, blocks), (ahead, bulk), pushers in itertools.product(
            ((16, 512, 1), (32, 1024, 1)), ((0, False), (1, True)), (16, 32, 48)
        )
    ]
    two = [
        Tuning("TWOSHOT", 8, ahead=2, blocks_per_sm=2),
        Tuning("TWOSHOT", 16, ahead=1, blocks_per_sm=2, pausing=True),
    ]
    return (both + divided + two) if world == 2 else (both[:8] + divided[:3] + two)


def cases(world: int) -> list[tuple[tuple[int, ...], bool, Tuning]]:
    """(shape, fused, launch), the sizes that matter first."""
    shapes = [(shape, True) for shape in FUSED] + [((size // 2,), False) for size in PLAIN]
    return [
        (shape, fused, tuning)
        for shape, fused in shapes
        for tuning in candidates(fused, 2 * torch.Size(shape).numel(), world)
    ]


def compile_share(share: str, world: int) -> None:
    """Every n-th kernel of the sweep and of the table, for all ranks, into Triton's cache."""
    part, parts = map(int, share.split("/"))
    torch.cuda.set_device(0)
    mine = itertools.islice(distinct(world), part, None, parts)
    for rank, shape, fused, tuning in mine:
        launcher = Launcher(stand_in(rank, world), 1.0)
        x = torch.empty(*shape, dtype=program.DTYPE, device="cuda")
        if fused:
            out = torch.empty_like(x)
            launcher.fused(x, x, x.view(-1)[: shape[-1]], 1e-5, 0.0, out, out, tuning, launch=False)
        else:
            launcher.all_reduce(x, torch.empty_like(x), tuning, launch=False)


def distinct(world: int):
    """One small shape for each kernel that the sweep needs."""
    seen = set()
    for rank in range(world):
        for shape, fused, tuning in cases(world):
            key = (rank, shape[-1] if fused else 0, tuning)
            if key not in seen:
                seen.add(key)
                yield rank, (1, shape[-1]) if fused else (1 << 16,), fused, tuning


def stand_in(rank: int, world: int):
    """What a Launcher asks of a workspace, without peers: nothing is launched."""
    return types.SimpleNamespace(
        rank=rank, size=world, device=0, sharers=1, region_bytes=64 << 20, abort=1 << 21,
        slots=tuple((1 << 46) + (i << 30) + 4096 for i in range(world)),  # of an address's width and alignment
        counters=torch.zeros(1024, dtype=torch.int32, device="cuda"), records=torch.zeros(16, dtype=torch.int64),
        on_device=lambda: torch.cuda.device(0),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write every time to this file")
    parser.add_argument("--compile", metavar="PART/PARTS", help="only compile this share")
    parser.add_argument("--world", type=int, default=2, help="ranks to compile for")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_share(arguments.compile, arguments.world)
        return
    bench = program.Bench()
    rows: list[dict] = []
    for (shape, fused), group in itertools.groupby(cases(bench.world), lambda case: case[:2]):
        rows += sweep(bench, shape, fused, [tuning for *_, tuning in group])
        if bench.rank == 0 and arguments.json:
            with open(arguments.json, "w") as file:
                json.dump({"gpu": torch.cuda.get_device_name(), "world": bench.world, "rows": rows}, file, indent=1)
    bench.meet()
    bench.workspace.close()
    os._exit(0)


def sweep(bench: program.Bench, shape: tuple[int, ...], fused: bool, tunings: list[Tuning]) -> list[dict]:
    weight = bench.shared(shape[-1]) if fused else None
    nbytes = 2 * torch.Size(shape).numel()
    data = [(bench.tensor(*shape), bench.shared(*shape)) for _ in range(program.sets(2 * nbytes))]
    out, total = torch.empty_like(data[0][0]), torch.empty_like(data[0][0])
    expected = data[0][0].float()
    dist.all_reduce(expected, group=bench.nccl)
    if fused:
        expected = expected.to(program.DTYPE).float() + data[0][1].float()
    rows = []
    for tuning in tunings:

        def call(i: int, tuning=tuning) -> None:
            x, residual = data[i % len(data)]
            if fused:
                bench.launcher.fused(x, residual, weight, program.EPS, 0.0, out, total, tuning)
            else:
                bench.launcher.all_reduce(x, total, tuning)

        total.fill_(float("nan"))
        bench.meet()
        call(0)
        torch.cuda.synchronize()
        wrong = int((~((total.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-6)).sum())
        p50, _ = bench.time(call, measure.graph_calls(nbytes) if nbytes > MIB else 100)
        rows.append(
            {"op": "fused" if fused else "all_reduce", "shape": list(shape), "p50_us": p50, "wrong": wrong}
            | vars(tuning)
        )
    for row in sorted(rows, key=lambda row: row["p50_us"])[:4]:
        text = " ".join(f"{name} {row[name]}" for name in vars(tunings[0]))
        bench.say(f"{'x'.join(map(str, shape))}: {row['p50_us']:.2f} us wrong {row['wrong']} {text}")
    return rows


if __name__ == "__main__":
    main()
