"""Program: compile the MXFP4 GEMM's planned shapes for sm_90 without a GPU and look at the machine-level main loop.

Prints one JSON list: for each shape its shared memory and what the PTX loop around the matrix products holds.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.ops.moe.mxfp4 import choose_plan
from shardwise.ops.moe.mxfp4_gemm import mxfp4_gemm

POINTERS = {
    "x_ptr": "*bf16", "word_ptr": "*i32", "scale_ptr": "*i32", "bias_ptr": "*fp32", "out_ptr": "*bf16",
    "sorted_ptr": "*i32", "block_ptr": "*i32", "factor_ptr": "*fp32", "routing_ptr": "*fp32",
}  # fmt: skip
MULTIPLES = {*POINTERS, "columns", "out_rows", "stride_x"}


def compiled(tiles, bt, act, form="narrow"):
    """One shape at gpt-oss' sizes."""
    constants = {
        "TOP_K": 4, "ACT": act, "WEIGHT_IN": False, "BN": tiles.bn, "BT": bt, "BK": tiles.bk, "SPLITS": tiles.splits,
        "FORMAT": form, "EVEN_K": 2880 % tiles.bk == 0 and tiles.splits == 1, "STAGES": tiles.stages,
        "INTERPRET": False, "PDL": True,
    }  # fmt: skip
    names = mxfp4_gemm.arg_names
    signature = {name: POINTERS.get(name, "fp32" if name in ("alpha", "limit") else "i32") for name in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in MULTIPLES}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(mxfp4_gemm, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})


def main_loop(ptx: str) -> str:
    """The shortest stretch from a label to a branch back to it that holds matrix products."""
    best = None
    for label in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE):
        for branch in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx):
            body = ptx[label.end() : branch.start()]
            if "wgmma.mma_async" in body and (best is None or len(body) < len(best)):
                best = body
    return best or ""


def describe(tiles, bt, act, form="narrow"):
    kernel = compiled(tiles, bt, act, form)
    loop = main_loop(kernel.asm["ptx"])
    return {
        "shape": [tiles.bn, bt, tiles.bk, act, form],
        "shared_bytes": kernel.metadata.shared,
        "programs": tiles.per_sm,
        "products": loop.count("wgmma.mma_async"),
        "wide_loads": loop.count("ld.shared.v4"),
        "asynchronous_copies": loop.count("cp.async.cg.shared"),
        "between_threads": len(re.findall(r"st\.shared|shfl\.sync|stmatrix", loop)),
        "stack": ".local" in kernel.asm["ptx"],
    }


def main():
    plans = [choose_plan(4 * tokens, 128) for tokens in (1, 64, 256, 1024, 8192)]
    rows = {(plan.up, plan.bt, "swiglu") for plan in plans} | {(plan.down, plan.bt, "none") for plan in plans}
    described = [describe(*row) for row in sorted(rows, key=str)]
    described.append(describe(plans[1].up, 16, "silu", "nvfp4"))
    print(json.dumps(described))


if __name__ == "__main__":
    main()
