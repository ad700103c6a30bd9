"""What one GPU's memory gives: copies, reads and writes of several sizes, as ceilings for what operators reach.

    python benchmarks/memory_ceilings.py [--json FILE]

GB/s, all bytes that are read or written counted once, the best of many graph replays. A copy is measured three ways:
PyTorch's `copy_` (left to the driver), its elementwise kernel, and a Triton kernel; a read is the sum of a vector, a
write its filling. A last row is a bfloat16 product of 8192 x 8192 x 8192, in TFLOPS.
"""

import argparse
import json
from pathlib import Path

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import device_microseconds
from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import await_predecessor, tl, triton

SIZES = tuple(1 << power for power in (22, 24, 26, 28, 30, 32, 34))  # bytes read and written by a copy


@triton.jit
def copy_kernel(source_ptr, target_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    await_predecessor(PDL)
    tl.store(target_ptr + i, tl.load(source_ptr + i))


def rates(total: int) -> dict[str, float]:
    """GB/s of every way at `total` bytes."""
    source = torch.zeros(total // 8, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy, block = Kernel(copy_kernel), 4096
    grid, pdl = (source.numel() // block, 1, 1), torch.cuda.get_device_capability()[0] >= 9
    calls = {
        "copy_": (total, lambda: target.copy_(source)),
        "copy elementwise": (total, lambda: torch.add(source, 0, out=target)),
        "copy triton": (
            total,
            lambda: copy(source.device, grid, (source, target), (), (block, pdl), warps=4, pdl=pdl),
        ),
        "read": (total // 2, lambda: source.sum()),
        "write": (total // 2, lambda: target.fill_(1.0)),
    }
    few = {"calls": 20 if total < 1 << 28 else 3, "repeats": 20 if total < 1 << 32 else 6}
    return {name: moved / device_microseconds(call, **few) / 1e3 for name, (moved, call) in calls.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    rows = []
    for total in SIZES:
        rows.append({"bytes": total} | rates(total))
        print("  ".join(f"{name} {value:.0f}" for name, value in rows[-1].items()), flush=True)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    rows.append({"bf16_tflops": 2 * 8192**3 / device_microseconds(lambda: torch.mm(a, b, out=out), calls=3) / 1e6})
    print(f"bf16 product {rows[-1]['bf16_tflops']:.0f} TFLOPS")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
