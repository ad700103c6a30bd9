"""Program: compile products with float8 weights for sm_90 without a GPU.

Prints one JSON list: for each kernel what its PTX has of products and conversions, and whether anything lies in local
memory; and what failed.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import compile_kernels
import torch
from triton.runtime.jit import JITFunction

from shardwise.ops.linear import float8
from shardwise.ops.quantization.float8 import Float8Weight

ROWS, COLUMNS = 4096, 7168


def compile_launch(self, *args, grid, warmup, **options):
    chosen = {key: options.pop(key) for key in ("num_warps", "launch_pdl") if key in options}
    compile_kernels.compile_for_target(self, [*args, *(options[n] for n in self.arg_names[len(args) :])], chosen)


def weight(tiled: bool) -> Float8Weight:
    scales = torch.empty(ROWS // 128, COLUMNS // 128) if tiled else torch.empty(ROWS)
    return Float8Weight(torch.empty(ROWS, COLUMNS, dtype=torch.float8_e4m3fn), scales)


def describe(kernel) -> dict:
    ptx = kernel.asm["ptx"]
    return {
        "products": ptx.count("wgmma.mma_async"),
        "pairs_from_e4m3": ptx.count("cvt.rn.f16x2.e4m3x2"),
        "pairs_to_bf16": ptx.count("cvt.rn.bf16x2.f32"),
        "single_to_bf16": ptx.count("cvt.rn.bf16.f16"),
        "stack": ".local" in ptx,
    }


def main():
    compile_kernels.replace_launches()
    JITFunction.run = compile_launch
    float8.multiprocessors = lambda device: 132
    x = {tokens: torch.empty(tokens, COLUMNS, dtype=torch.bfloat16) for tokens in (1, 16, 64)}
    norm = x[1][0]
    float8.skinny_float8(x[1], weight(True), norm_weight=norm, gated=True, pdl=True)
    float8.skinny_float8(x[1], weight(False), residual=torch.empty(1, ROWS, dtype=torch.bfloat16), pdl=True)
    float8.few_float8(x[16], weight(True))
    float8.few_float8(x[64], weight(False), gated=True)
    print(json.dumps([describe(made) for made in compile_kernels.compiled.values() if made]))
    print(json.dumps(compile_kernels.failures))


if __name__ == "__main__":
    main()
