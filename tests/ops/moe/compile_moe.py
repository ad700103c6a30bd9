"""Program: compile the MXFP4 GEMMs' planned shapes for sm_90 without a GPU and look at the machine-level main loop.

Prints one JSON list: for each shape its shared memory and what the PTX loop around the matrix products holds. The
kernels for few tokens, bn 16, come last; of `mxfp4_stream` also what a warp has in a round.
"""

import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from shardwise.ops.moe.mxfp4_few import mxfp4_few
from shardwise.ops.moe.mxfp4_gemm import mxfp4_gemm
from shardwise.ops.moe.mxfp4_plan import choose_plan
from shardwise.ops.moe.mxfp4_stream import mxfp4_stream
from shardwise.ops.moe.tiles import Stream

POINTERS = {
    "x_ptr": "*bf16", "word_ptr": "*i32", "scale_ptr": "*i32", "bias_ptr": "*fp32", "out_ptr": "*bf16",
    "sorted_ptr": "*i32", "block_ptr": "*i32", "part_ptr": "*fp32", "counter_ptr": "*i32",
    "factor_ptr": "*fp32", "routing_ptr": "*fp32",
}  # fmt: skip
MULTIPLES = {*POINTERS, "columns", "out_rows", "stride_x"}


def compiled(tiles, bt, act, form="narrow", short=0, side=0):
    """One shape at gpt-oss' sizes."""
    constants = {"TOP_K": 4, "ACT": act, "SPLITS": tiles.splits, "INTERPRET": False, "PDL": True}
    if isinstance(tiles, Stream):
        constants |= {
            "BT": bt, "EVEN": True, "DEEP": tiles.deep, "RING": tiles.ring, "SLABS": tiles.slabs,
            "ROW_WARPS": tiles.row_warps, "W": tiles.k_warps, "EARLY": act == "none",
        }  # fmt: skip
        return _compile(mxfp4_stream, GluonASTSource, tiles, constants)
    even = 2880 % tiles.bk == 0 and tiles.splits == 1
    if tiles.bn == 16:
        constants |= {
            "BT": bt, "EVEN": True, "DEEP": tiles.stages, "WARPS": tiles.warps, "EARLY": act == "none"
        }  # fmt: skip
        return _compile(mxfp4_few, GluonASTSource, tiles, constants)
    constants |= {
        "WEIGHT_IN": False, "BN": tiles.bn, "BT": bt, "SHORT": short, "SIDE": side, "BK": tiles.bk, "FORMAT": form,
        "EVEN_K": even, "STAGES": tiles.stages, "AHEAD": 2, "EARLY": act == "none", "ASYNC": True,
    }  # fmt: skip
    return _compile(mxfp4_gemm, ASTSource, tiles, constants)


def _compile(kernel, source, tiles, constants):
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "fp32" if name in ("alpha", "limit") else "i32") for name in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in MULTIPLES}
    values = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": tiles.warps, "maxnreg": tiles.most_registers}
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source(kernel, signature, values, attributes), target=target, options=options)


def loops(ptx: str) -> list[str]:
    """The stretches from a label to a branch back to it that hold matrix products, loops around loops left out."""
    found = []
    for label in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE):
        for branch in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx):
            body = ptx[label.end() : branch.start()]
            if re.search(r"wgmma.mma_async|mma.sync", body) and not re.search(r"^\$L__BB", body, re.MULTILINE):
                found.append(body)
    return found


def products_in_flight(loop: str) -> int:
    """Groups of asynchronous products that may still run when a round of the loop ends."""
    running = 0
    for step in re.finditer(r"wgmma\.(commit_group|wait_group)\S*\s*(\d*)", loop):
        running = running + 1 if step[1] == "commit_group" else min(running, int(step[2]))
    return running


def serialized(ptx: str) -> bool:
    """Whether ptxas lets each asynchronous product wait for the one before."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "instructions are serialized" in done.stderr


def describe(tiles, bt, act, form="narrow", short=0, side=0):
    kernel = compiled(tiles, bt, act, form, short, side)
    bodies = loops(kernel.asm["ptx"])
    loop = min(bodies, key=len)
    stream = isinstance(tiles, Stream)
    return {
        "shape": [16, bt, 64, act, form] if stream else [tiles.bn, bt, tiles.bk, act, form],
        "slabs": tiles.deep * tiles.slabs // tiles.row_warps if stream else 0,
        "steps": tiles.deep if stream else 0,
        "side": side,
        "warps": tiles.warps,
        "shared_bytes": kernel.metadata.shared,
        "programs": tiles.per_sm,
        "products": len(re.findall(r"wgmma.mma_async.sync|mma.sync.aligned", loop)),
        "wide_loads": len(re.findall(r"ld.shared.v4|ld.global.\S*v4", loop)),
        "asynchronous_copies": loop.count("cp.async.cg.shared"),
        "between_threads": len(re.findall(r"st\.shared|shfl\.sync|stmatrix", loop)),
        "barriers": loop.count("bar.sync"),
        "in_flight": max(map(products_in_flight, bodies)),
        "serialized": serialized(kernel.asm["ptx"]),
        "loops": len(bodies),
        "stack": ".local" in kernel.asm["ptx"],
    }


def main():
    plans = [choose_plan(4 * tokens, 128) for tokens in (1, 64, 512, 1024, 2048, 4096, 8192)]
    rows = {(plan.up, plan.bt, "swiglu", "narrow", plan.short, plan.side) for plan in plans}
    rows |= {(plan.down, plan.bt, "none", "narrow", plan.short, plan.side) for plan in plans}
    described = [describe(*row) for row in sorted(rows, key=str)]
    described.append(describe(plans[1].up, 16, "silu", "nvfp4"))
    for pairs in (4, 256, 1024):
        few = choose_plan(pairs, 128, few=True)
        described += [describe(few.up, few.bt, "swiglu"), describe(few.down, few.bt, "none")]
    print(json.dumps(described))


if __name__ == "__main__":
    main()
