"""Program: compile planned shapes of the kernels with given routing for sm_90 without a GPU.

Prints one JSON list: for each its shared memory, the programs that are to share a multiprocessor, the matrix products
in the PTX, whether anything lies in local memory, and reductions over lanes with a gap (`compile_routing.py`).
"""

import json

import triton
from compile_routing import has_gap, reductions
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from shardwise.ops.gluon_support import ROLES
from shardwise.ops.moe.few_kernels import few_down, few_up
from shardwise.ops.moe.grouped_gemm import grouped_gemm
from shardwise.ops.moe.grouped_plan import choose_few, choose_mixed_plan, choose_plan
from shardwise.ops.moe.routing import power_of_two
from shardwise.ops.moe.wide_float8 import wide_float8
from shardwise.ops.moe.wide_gemm import wide_gemm

FREE = ("pairs", "sharing", "experts")
"""Numbers of which nothing is compiled in."""


def compiled(kernel, kinds, constants, warps, source=ASTSource):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    specialised = [name for name in names if name not in (*constants, *FREE) and "tensor" not in signature[name]]
    made = source(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in specialised},
    )
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def describe(name, kernel, programs):
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    return {
        "kernel": name,
        "gaps": [found for found in reductions(ttgir) if has_gap(*found, ttgir)],
        "shared_bytes": kernel.metadata.shared,
        "programs": programs,
        "products": ptx.count("wgmma.mma_async"),
        "tiles_by_tensor_memory": ptx.count("cp.async.bulk.tensor"),
        "stack": ".local" in ptx,
    }


def grouped(name, plan, up, itemsize):
    shape, kind = plan.up if up else plan.down, {1: "fp8e4nv", 2: "bf16"}[itemsize]
    fp8 = itemsize == 1
    kinds = {
        "x": "*" + kind if up and not plan.copied else f"tensordesc<{kind}[{plan.bt}, {shape.bk}]>",
        "w": f"tensordesc<{kind}[{shape.bn}, {shape.bk}]>",
        "out_ptr": "*" + (kind if up else "bf16"),
        **dict.fromkeys(("sorted_ptr", "block_ptr"), "*i32"),
        **dict.fromkeys(("pairs", "sharing", "columns", "out_rows", "stride_x"), "i32"),
    }
    constants = dict(
        GATHER=up and not plan.copied, BY_PAIR=not up, ACT="silu" if up else "none", SCALED="expert" if fp8 else "",
        FACTORED=fp8, QUANTIZE="divide" if fp8 and up else "", WEIGHT_IN=False, BN=shape.bn, BT=plan.bt, BK=shape.bk,
        SPLITS=shape.splits, GROUP=shape.group, TOKENS_LEFT=shape.tokens_left, TMA=True, EVEN_K=True,
        STAGES=shape.stages, INTERPRET=False, PDL=True,
    )  # fmt: skip
    return describe(name, compiled(grouped_gemm, kinds, constants, shape.warps), shape.per_sm)


def few(name, top_k, itemsize):
    """Both launches for one token."""
    plan, kind, fp8 = (
        choose_few(top_k, 128, top_k, itemsize, 2048 * itemsize),
        {1: "*fp8e4nv", 2: "*bf16"}[itemsize],
        itemsize == 1,
    )
    kinds = {
        **dict.fromkeys(("w_ptr", "inner_ptr"), kind),
        "x_ptr": "*bf16",
        "id_ptr": "*i64",
        **dict.fromkeys(("experts", "columns", "out_rows"), "i32"),
    }

    def sized(shape):
        return dict(ROWS=shape.rows, BK=shape.step // itemsize, STAGES=shape.stages)

    common = dict(
        TOP_K=top_k, GRAIN="", SCALED=fp8, FACTORED=fp8, VECTOR=16 // itemsize, EVEN_K=True, INTERPRET=False, PDL=True,
    )  # fmt: skip
    up = dict(ACT="silu", QUANTIZE="divide" if fp8 else "", WEIGHT_IN=False)
    down = dict(K_BLOCK=power_of_two(top_k), WEIGHTED=True, AHEAD=8)
    return [
        describe(
            f"{name} {half}", compiled(kernel, {**kinds, "out_ptr": out}, common | own | sized(shape), shape.warps), 2
        )
        for half, kernel, out, own, shape in (
            ("up", few_up, kind, up, plan.up),
            ("down", few_down, "*bf16", down, plan.down),
        )
    ]


def specialised(name, up, itemsize):
    """A product of `wide_gemm`."""
    kind, bk, bn = {1: "fp8e4nv", 2: "bf16"}[itemsize], 128 // itemsize, 128 if up else 256
    fp8 = itemsize == 1
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * itemsize, rank=2)
    kinds = {
        "x": f"tensordesc<{kind}[128, {bk}],{layout!r}>",
        "w": f"tensordesc<{kind}[{bn}, {bk}],{layout!r}>",
        "out_ptr": "*" + (kind if up else "bf16"),
        **dict.fromkeys(("sorted_ptr", "block_ptr"), "*i32"),
        **dict.fromkeys(("columns", "out_rows"), "i32"),
    }
    constants = dict(
        GATED=up, BY_PAIR=not up, SCALED=fp8, FACTORED=fp8, DIVIDE=fp8 and up, MULTIPLY=False, BN=bn, BT=128, BK=bk,
        STAGES=4, GROUP=8, SHORT=64 if up else 0, HALVES=not up, PDL=True,
    )  # fmt: skip
    return describe(name, compiled(wide_gemm, kinds, constants, 8, GluonASTSource), 1)


def turned(name, up, tiled):
    """A product of `wide_float8`."""
    plan = choose_mixed_plan(1000, 1, True)
    shape = plan.up if up else plan.down
    left, right = (
        gl.NVMMASharedLayout(swizzle_byte_width=shape.bk * itemsize, element_bitwidth=8 * itemsize, rank=2)
        for itemsize in (2, 1)
    )
    kinds = {
        "x": f"tensordesc<bf16[{plan.bt}, {shape.bk}],{left!r}>",
        "w": f"tensordesc<fp8e4nv[{shape.bn}, {shape.bk}],{right!r}>",
        "out_ptr": "*bf16",
        **dict.fromkeys(("sorted_ptr", "block_ptr"), "*i32"),
        **dict.fromkeys(("columns", "out_rows"), "i32"),
    }
    constants = dict(
        GATED=up, BY_PAIR=not up, TILED=tiled, BN=shape.bn, BT=plan.bt, BK=shape.bk, STAGES=shape.stages,
        GROUP=shape.group, SHORT=shape.short, HALVES=shape.halves, PDL=True,
    )  # fmt: skip
    return describe(name, compiled(wide_float8, kinds, constants, shape.warps, GluonASTSource), 1)


def main():
    narrow, wide = choose_plan(8 * 16, 128, 2), choose_plan(8 * 8192, 128, 2)
    rows = [
        *few("few fp8", 8, 1),
        *few("few", 1, 2),
        grouped("narrow up", narrow, True, 2),
        grouped("wide up", wide, True, 2),
        grouped("wide down", wide, False, 2),
        grouped("wide up fp8", choose_plan(8 * 8192, 128, 1), True, 1),
    ]
    if ROLES:
        rows += [specialised("specialised up", True, 2), specialised("specialised down fp8", False, 1)]
        rows += [turned("turned up", True, True), turned("turned down", False, False)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
