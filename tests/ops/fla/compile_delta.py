"""Compile the kernels of gated delta layers for compute capability 9.0, which needs no GPU, and print what they take.

Run as a program: this process must not have Triton's interpreter on. One JSON line a kernel: shared memory in bytes,
registers, bytes spilled, and descriptors of matrix products that are made of other than zero registers.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.ops.fla import decode, prefill
from shardwise.ops.fla.decode import delta_decode_kernel
from shardwise.ops.fla.prefill_kernels import chunk_kernel, walk_kernel

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLOATS = {"decay_ptr", "bias_ptr", "total_ptr", "cache_ptr"}
TYPES = {"slot_ptr": "*i64", "bounds_ptr": "*i32", "resume_ptr": "*i1", "scale": "fp32", "eps": "fp32"}
STRIDES = ("row_stride", "cache_slot")
HEADS = {"KEYS": 16, "VALUES": 32, "K": 128, "V": 128, "BLOCK_K": 128, "CHUNK": 64, "SEQUENCES": 2, "PDL": True}
"""Of Qwen3-Next."""
UPPER_HALF = re.compile(r"U?IADD3\.X\S* +U?R\d+, (U?R\d+).*0x[47][0f]{3}[0-9a-f]{4}\b")
"""A constant that says how a matrix lies in shared memory, added to the upper half of its address, which is zero."""


def compiled(kernel, dtype, constants, warps, stages):
    names = kernel.arg_names
    types = {n: "*fp32" if n in FLOATS else f"*{dtype}" for n in names if n.endswith("_ptr")} | TYPES
    mine = {n: value for n, value in constants.items() if n in names}
    signature = {n: "constexpr" if n in mine else types.get(n, "i32") for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in mine.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in STRIDES or n.endswith("_ptr")},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def tool(option, made):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout


def bad_descriptors(text: str) -> list[str]:
    """Instructions that make the upper half of a descriptor from a register that was not set to zero before."""
    instructions = [re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines() if "/*0" in line]
    found = []
    for place, instruction in enumerate(instructions):
        made = UPPER_HALF.match(instruction)
        if made is None:
            continue
        register = re.compile(rf"(@!?U?P\d+ )?\S+ +{made[1]}\b")
        last = next((each for each in reversed(instructions[:place]) if register.match(each)), "")
        if not re.search(r"(MOV|CS2R)\S* .*\b[US]?RZ ?;", last):
            found.append(f"{last} {instruction}")
    return found


def report(name, kernel, dtype, constants, warps, stages):
    made = compiled(kernel, dtype, HEADS | constants, warps, stages)
    numbers = dict(re.findall(r"(\w+):(\d+)", tool("-res-usage", made)))
    row = {"shared": made.metadata.shared, "registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}
    print(json.dumps({"kernel": name, **row, "bad": bad_descriptors(tool("-sass", made))}))


def main():
    report("step", delta_decode_kernel, "bf16", {"BLOCK_V": 128}, decode.warps_for(128, 128), 3)
    report("chunk", chunk_kernel, "bf16", {"BLOCK_V": 128, "EXACT": False}, prefill.chunk_warps(128, 128), 1)
    small = {"K": 32, "V": 64, "BLOCK_K": 32, "BLOCK_V": 64, "EXACT": False}
    report("chunk of small heads", chunk_kernel, "bf16", small, prefill.chunk_warps(32, 64), 1)
    report("walk", walk_kernel, "bf16", {"BLOCK_V": prefill.COLUMNS}, prefill.WALK_WARPS, prefill.WALK_STAGES)


if __name__ == "__main__":
    main()
