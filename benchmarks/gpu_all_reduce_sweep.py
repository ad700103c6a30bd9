"""Time the launches that shardwise/comm/p2p/table.py may choose from, and print the best of each size.

    python3 -m torch.distributed.run --nproc-per-node 2 benchmarks/gpu_all_reduce_sweep.py --json FILE

Timing as in gpu_all_reduce.py. The result does not depend on the launch, only its time does.
"""

import argparse
import json
import os

import gpu_all_reduce as measure
import torch

from shardwise.comm.p2p.table import Tuning

MIB = 1 << 20


def candidates(fused: bool, nbytes: int) -> list[Tuning]:
    warps_lanes = [(8, 512), (16, 512), (32, 512)] if fused else [(4, 128), (8, 256), (8, 512), (16, 512), (16, 1024)]
    aheads = (0, 1, 2) if nbytes >= MIB else (0,)
    found = [
        Tuning("ONESHOT", warps, ahead=ahead, blocks_per_sm=blocks, lanes=lanes)
        for warps, lanes in warps_lanes
        for ahead in aheads
        for blocks in ((1, 2, 4) if nbytes >= MIB else (4,))
    ]
    return [*found, Tuning("TWOSHOT", 8, ahead=2, blocks_per_sm=2), Tuning("TWOSHOT", 16, ahead=2, blocks_per_sm=2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write every time to this file")
    arguments = parser.parse_args()
    bench = measure.Bench()
    rows: list[dict] = []
    for nbytes in measure.PLAIN_BYTES:
        rows += sweep(bench, nbytes, None)
    for shape in measure.FUSED_SHAPES:
        rows += sweep(bench, shape[0] * shape[1] * measure.DTYPE.itemsize, shape)
    if bench.rank == 0 and arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "world": bench.world, "rows": rows}, file, indent=1)
    bench.all_gather_object(None)
    bench.workspace.close()
    os._exit(0)


def sweep(bench: measure.Bench, nbytes: int, shape: tuple[int, int] | None) -> list[dict]:
    fused = shape is not None
    sizes = shape or (nbytes // measure.DTYPE.itemsize,)
    weight = bench.shared(sizes[-1]) if fused else None
    data = [(bench.tensor(*sizes), bench.tensor(*sizes)) for _ in range(measure.sets(2 * nbytes))]
    out, total = torch.empty_like(data[0][0]), torch.empty_like(data[0][0])
    rows = []
    for tuning in candidates(fused, nbytes):

        def call(i: int, tuning=tuning) -> None:
            x, residual = data[i % len(data)]
            if fused:
                bench.launcher.fused(x, residual, weight, measure.EPS, 0.0, out, total, tuning)
            else:
                bench.launcher.all_reduce(x, out, tuning)

        p50, _ = bench.time(call, measure.calls_for(nbytes))
        rows.append({"op": "fused" if fused else "all_reduce", "shape": list(sizes), "p50_us": p50, **vars(tuning)})
    best = sorted(rows, key=lambda row: row["p50_us"])[:5]
    text = " | ".join(
        f"{row['p50_us']:.2f} {row['strategy']} warps {row['warps']} lanes {row['lanes']} ahead {row['ahead']} "
        f"blocks {row['blocks_per_sm']}"
        for row in best
    )
    bench.say(f"{'x'.join(map(str, sizes))}: {text}")
    return rows


if __name__ == "__main__":
    main()
