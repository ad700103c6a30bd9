"""Program: compile attention's ring kernel for sm_90 without a GPU, as a step with 16 and one with 128 heads runs it.

Prints one JSON list: for each its shared memory, the matrix products in the PTX, whether ptxas lets each of them wait
for the one before, and whether anything lies in local memory.
"""

import json
import os
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from shardwise.ops.mla.decode import ring_for
from shardwise.ops.mla.decode_ring import ring_kernel


def compiled(ring):
    def tiles(*block):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
        return f"tensordesc<bf16{list(block)},{layout!r}>"

    names = ring_kernel.arg_names
    free = names.index("C")
    constants = dict(zip(names[free:], (512, 64, 64, *ring, True), strict=True))
    kinds = {
        "query": tiles(ring.heads, 64),
        "pool": tiles(1, 64, 64),
        "out_ptr": "*bf16",
        "part_ptr": "*fp32",
        "log_ptr": "*fp32",
        "scale": "fp32",
    }
    signature = {name: kinds.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names[:free]}
    signature.update(dict.fromkeys(constants, "constexpr"))
    pointers = [i for i, name in enumerate(names) if name.endswith("_ptr")]
    source = GluonASTSource(
        ring_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def serialized(ptx: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source.name, "-o", os.devnull]
        return (
            "instructions are serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr
        )


def describe(heads):
    kernel = compiled(ring_for(heads))
    ptx = kernel.asm["ptx"]
    return {
        "heads": heads,
        "shared_bytes": kernel.metadata.shared,
        "products": ptx.count("wgmma.mma_async"),
        "tiles_by_tensor_memory": ptx.count("cp.async.bulk.tensor.3d"),
        "serialized": serialized(ptx),
        "stack": ".local" in ptx,
    }


if __name__ == "__main__":
    print(json.dumps([describe(heads) for heads in (16, 128)]))
