"""Program: compile routing kernels for sm_90 without a GPU and look for reductions that Triton 3.6 gets wrong.

A reduction over lanes takes a run of neighbouring lane bits. Where a layout repeats values over a bit between two that
count, which reshapes of small tiles bring about, it counts some lanes twice and leaves others out.
Prints one JSON list: for each kernel its reductions and those with such a gap.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.ops.moe.grouping_kernels import group_few_kernel, place_kernel
from shardwise.ops.moe.routing import _router_shape, power_of_two
from shardwise.ops.moe.routing_kernels import route_kernel

DTYPES = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*bf16", "logit_ptr": "*fp32", "weight_ptr": "*fp32"}


def compiled(kernel, warps, divisible=(), **constants):
    """A kernel with int32 for every pointer and number that DTYPES does not name."""
    names = kernel.arg_names
    signature = {name: DTYPES.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    multiples = {name for name in names if name.endswith("_ptr")} | set(divisible)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in multiples}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def router(tokens, experts, top_k, hidden=2880):
    """The router's launch as the host side would make it on 132 multiprocessors."""
    shape = _router_shape(tokens, hidden, experts, 132)
    rows, k_block = min(shape.tokens, power_of_two(tokens)), power_of_two(top_k)
    sizes = {"columns": hidden, "width": -(-hidden // 64) * 64 + 32, "experts": experts}
    return compiled(
        route_kernel, shape.warps, [name for name in sizes if sizes[name] % 16 == 0], BT=shape.tokens, ROWS=rows,
        BE=shape.experts, BK=128, SPLITS=shape.splits, E_BLOCK=power_of_two(experts), TOP_K=top_k, K_BLOCK=k_block,
        GROUP=tokens <= shape.tokens and rows * k_block <= 64, BLOCK=16, TURN=tokens <= 64, STAGES=shape.stages,
        INTERPRET=False, PDL=True,
    )  # fmt: skip


def reductions(ttgir):
    """(axis, layout) of every reduction."""
    found = []
    for start in re.finditer(r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}>', ttgir):
        operands = re.search(r"\}\) : \((.*?)\) -> ", ttgir[start.end() :], re.DOTALL)
        layout = re.search(r"tensor<[^#]*(#.*?)>(?:,|$)", operands[1])
        found.append((int(start[1]), layout[1]))
    return found


def has_gap(axis, layout, ttgir):
    """Whether lane bits along the axis stand on both sides of one that repeats."""
    sliced = re.match(r"#ttg\.slice<\{dim = (\d+), parent = (#\w+)", layout)
    name = sliced[2] if sliced else layout
    if sliced and int(sliced[1]) <= axis:
        axis += 1
    definition = re.search(rf"^{name} = #ttg\.linear<.*?lane = (\[\[.*?\]\])", ttgir, re.MULTILINE)
    if definition is None:  # blocked and matrix layouts deal lanes without gaps
        return False
    counts = [basis[axis] != 0 for basis in json.loads(definition[1])]
    return any(
        a < b < c for a in range(5) for b in range(a, 5) for c in range(b, 5) if counts[a] > counts[b] < counts[c]
    )


def main():
    kernels = {
        f"route {case}": router(*case)
        for case in ((5, 6, 2, 96), (16, 8, 4), (1, 128, 4), (4, 64, 4), (16, 128, 4), (8192, 128, 4))
    }
    kernels |= {f"few {pairs}": compiled(group_few_kernel, 4, COUNT=pairs, BLOCK=16, PDL=True) for pairs in (1, 8, 64)}
    for experts, part, step, counted in ((2, 512, 16, True), (128, 64, 32, True), (2, 128, 1024, False)):
        kernels[f"place {experts} {part}"] = compiled(
            place_kernel, 4, PART=part, P_BLOCK=part, E_BLOCK=experts, STEP=step, COUNTED=counted, BLOCK=16, PDL=True
        )
    rows = []
    for name, kernel in kernels.items():
        ttgir = kernel.asm["ttgir"]
        found = reductions(ttgir)
        rows.append({"kernel": name, "reductions": len(found), "gaps": [r for r in found if has_gap(*r, ttgir)]})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
