"""Program: compile products with 4-bit weights for sm_90 without a GPU.

Prints one JSON list: for each kernel what its PTX has of products, whether weights or tokens pass through shared memory
before them, and whether anything lies in local memory; and what failed.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import compile_kernels
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from shardwise.ops.linear import int4, int4_many
from shardwise.ops.moe.decode import Choice, Gate, expert_down, expert_up
from shardwise.ops.quantization.int4_weight import Int4Stack, Int4Weight, tile_columns

ROWS, COLUMNS = 4096, 14336
EXPERTS, HIDDEN, INNER = 8, 2048, 768


def weight(group: int, scale_dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS) -> Int4Weight:
    tile = tile_columns(group)
    words = torch.empty(rows // 16, columns // tile, 8, 4, tile // 16, dtype=torch.int32)
    scales = torch.empty(rows // 16, columns // group, 16, dtype=torch.int32)
    return Int4Weight(words, scales, (rows, columns), group, scale_dtype)


def experts() -> None:
    """As the decode step has them."""
    up_gate = Int4Stack(weight(128, torch.float16, EXPERTS * 2 * INNER, HIDDEN), EXPERTS)
    down = Int4Stack(weight(128, torch.float16, EXPERTS * HIDDEN, INNER), EXPERTS)
    x, logits = torch.empty(1, HIDDEN, dtype=torch.bfloat16), torch.empty(1, EXPERTS)
    slots = torch.empty(EXPERTS, dtype=torch.int32)
    expert_down(expert_up(x, logits, slots, Choice(8, True), up_gate, Gate(), pdl=True), down, pdl=True)


def describe(kernel) -> dict:
    ptx = kernel.asm["ptx"]
    first = min(ptx.find(name) for name in ("mma.sync", "wgmma.mma_async") if name in ptx)
    return {
        "name": kernel.metadata.name,
        "products": ptx.count("mma.sync.aligned.m16n8k16") + ptx.count("wgmma.mma_async"),
        "stored_before": "st.shared" in ptx[:first] or "stmatrix" in ptx[:first],
        "stack": ".local" in ptx,
    }


def main():
    compile_kernels.replace_launches()
    GluonJITFunction.run = compile_kernels.compile_launch
    int4.dependent_launch = int4_many.dependent_launch = lambda device: True
    int4_many.multiprocessors = lambda device: 132
    x = {tokens: torch.empty(tokens, COLUMNS, dtype=torch.bfloat16) for tokens in (1, 16, 64)}
    half, wide = weight(128, torch.float16), weight(32, torch.bfloat16)
    int4.few_int4(x[1], half, norm_weight=x[1][0], gated=True)
    int4.few_int4(x[1].half(), wide, residual=torch.empty(1, ROWS, dtype=torch.float16))
    int4.few_int4(x[16], half)
    int4_many.many_int4(x[64], half)
    int4_many.many_int4(x[64].half(), weight(64, torch.bfloat16))
    experts()
    made = [kernel for kernel in compile_kernels.compiled.values() if kernel and kernel.metadata.name != "turn_kernel"]
    print(json.dumps([describe(kernel) for kernel in made]))
    print(json.dumps(compile_kernels.failures))


if __name__ == "__main__":
    main()
