"""Time the launches that shardwise/comm/p2p/table.py may choose from, and print the best of each size.

    python3 -m torch.distributed.run --nproc-per-node WORLD benchmarks/gpu_all_reduce_sweep.py --json FILE
    python3 benchmarks/gpu_all_reduce_sweep.py --compile 0/16 --world WORLD   # beforehand, 16 of them side by side

Timing as in gpu_all_reduce.py. The result does not depend on the launch, only its time does; it is checked once a
launch against NCCL's sum and the norm of the result, to a rounding.
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
FUSED = [
    *((256, 7168), (1024, 7168), (256, 4096), (256, 2880), (64, 7168), (1, 4096), (4, 4096), (1, 2880), (1, 7168)),
    *((16, 7168), (64, 4096), (1024, 2880), (4096, 7168)),
]
PLAIN = [16 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
WIDE_FUSED = [(1, 4096), (16, 7168), (64, 7168), (256, 7168), (1024, 7168), (1024, 2880)]
WIDE_PLAIN = [16 * KIB, 256 * KIB, 512 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
SHAPES = ((8, 512, 2), (16, 512, 2), (32, 1024, 1))
"""Warps, chunks of a row where the call may choose, blocks on a multiprocessor."""
AGAIN = 5
"""So many of a size's best launches are timed a second time: the best of many is partly luck."""


def small(fused: bool) -> list[Tuning]:
    if not fused:
        return [Tuning("ONESHOT", warps, blocks_per_sm=4, lanes=32 * warps) for warps in (4, 8, 16)]
    plain = [Tuning("ONESHOT", warps, blocks_per_sm=2) for warps in (4, 8, 16, 32)]
    return plain + [Tuning("ONESHOT", warps, ahead=1, bulk=True) for warps in (16, 32)]


def candidates(fused: bool, nbytes: int) -> list[Tuning]:
    if nbytes < MIB // 2:
        return small(fused)
    full = [Tuning("ONESHOT", 32, 0, 4, registers=32, pausing=pausing) for pausing in (0, 64)] if fused else []
    return full + [
        Tuning("ONESHOT", warps, ahead, blocks, lanes, bulk=bulk, pausing=pausing)
        for warps, lanes, blocks in SHAPES
        for ahead, bulk, pausing in ((0, False, 0), (1, False, 64), (1, False, 250), (1, True, 64))
    ]


def wide_candidates(fused: bool, nbytes: int) -> list[Tuning]:
    """For more than two ranks, where one-shot sends more bytes than two-shot."""
    two = [
        Tuning("TWOSHOT", warps, 0, blocks, lanes, bulk=bulk, registers=64, pushers=pushers, pausing=64)
        for warps, lanes, blocks in ((16, 512, 2), (32, 1024, 1))
        for pushers in (32, 48, 64, 96)
        for bulk in (False, True)
    ]
    if nbytes < 128 * KIB:
        return small(fused) + two[:1]
    one = [Tuning("ONESHOT", warps, 0, blocks, lanes) for warps, lanes, blocks in SHAPES]
    one += [Tuning("ONESHOT", 16, blocks_per_sm=2, pausing=64), Tuning("ONESHOT", 32, ahead=1, bulk=True)]
    return two + (one if nbytes <= 4 * MIB else [])


def cases(world: int) -> list[tuple[tuple[int, ...], bool, Tuning]]:
    """(shape, fused, launch), the sizes that matter first."""
    wide = world > 2
    shapes = [(shape, True) for shape in (WIDE_FUSED if wide else FUSED)]
    shapes += [((size // 2,), False) for size in (WIDE_PLAIN if wide else PLAIN)]
    return [
        (shape, fused, tuning)
        for shape, fused in shapes
        for tuning in (wide_candidates if wide else candidates)(fused, 2 * torch.Size(shape).numel())
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


class Case:
    """Inputs of one size, and what every launch must make of them."""

    def __init__(self, bench: program.Bench, shape: tuple[int, ...], fused: bool):
        self.bench, self.fused = bench, fused
        self.nbytes = 2 * torch.Size(shape).numel()
        self.weight = bench.shared(shape[-1]) if fused else None
        self.data = [(bench.tensor(*shape), bench.shared(*shape)) for _ in range(program.sets(2 * self.nbytes))]
        self.out, self.total = torch.empty_like(self.data[0][0]), torch.empty_like(self.data[0][0])
        summed = self.data[0][0].float()
        dist.all_reduce(summed, group=bench.nccl)
        if fused:
            summed = summed.to(program.DTYPE).float() + self.data[0][1].float()
        self.summed = summed

    def call(self, tuning: Tuning, i: int) -> None:
        x, residual = self.data[i % len(self.data)]
        if self.fused:
            self.bench.launcher.fused(x, residual, self.weight, program.EPS, 0.0, self.out, self.total, tuning)
        else:
            self.bench.launcher.all_reduce(x, self.total, tuning)

    def wrong(self, tuning: Tuning) -> int:
        """Values off by more than a rounding."""
        self.out.fill_(float("nan"))
        self.total.fill_(float("nan"))
        self.bench.meet()
        self.call(tuning, 0)
        torch.cuda.synchronize()
        wrong = _off(self.total, self.summed)
        if self.fused:
            found = self.total.float()
            normed = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + program.EPS) * self.weight.float()
            wrong += _off(self.out, normed)
        return wrong

    def time(self, tuning: Tuning, sets: int | None = None) -> float:
        """`sets`: of inputs, in turn; None: all. One is in the cache, as what the kernel before wrote."""
        calls = measure.graph_calls(self.nbytes) if self.nbytes > MIB else 100
        return self.bench.time(lambda i: self.call(tuning, i % (sets or len(self.data))), calls)[0]


def _off(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((~((found.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-6)).sum())


def sweep(bench: program.Bench, shape: tuple[int, ...], fused: bool, tunings: list[Tuning]) -> list[dict]:
    case = Case(bench, shape, fused)
    first = {"op": "fused" if fused else "all_reduce", "shape": list(shape)}
    rows = [
        first
        | {"p50_us": case.time(tuning), "wrong": case.wrong(tuning), "again_us": None, "cached_us": None}
        | vars(tuning)
        for tuning in tunings
    ]
    best = sorted(range(len(rows)), key=lambda i: rows[i]["p50_us"])[:AGAIN]
    for i in best:
        rows[i]["again_us"] = case.time(tunings[i])
        rows[i]["cached_us"] = case.time(tunings[i], sets=1)
    for i in sorted(best, key=lambda i: rows[i]["p50_us"] + rows[i]["again_us"]):
        text = " ".join(f"{name} {value}" for name, value in vars(tunings[i]).items())
        name, row = "x".join(map(str, shape)), rows[i]
        times = f"{row['p50_us']:.2f} again {row['again_us']:.2f} cached {row['cached_us']:.2f}"
        bench.say(f"{name}: {times} us wrong {row['wrong']} {text}")
    bench.say(f"{shape}: {sum(row['wrong'] for row in rows)} wrong in {len(rows)} launches")
    return rows


if __name__ == "__main__":
    main()
