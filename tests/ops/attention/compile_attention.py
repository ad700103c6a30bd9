"""Compile the Triton attention kernels for compute capability 9.0, which needs no GPU, and print what they take.

Run as a program: this process must not have Triton's interpreter on. One JSON line a kernel.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.ops.attention import tiles
from shardwise.ops.attention.kernels.append import append_kernel
from shardwise.ops.attention.kernels.decode import flattened_decode_kernel, reduce_kernel
from shardwise.ops.attention.kernels.prefill import prefill_kernel

KV_HEADS, SEQUENCE = 8, 32768
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NUMBERS = {"scale": "fp32", "partial_ptr": "*fp32", "sinks_ptr": "*fp32", "slot_ptr": "*i64"}


def compile_kernel(kernel, dtype, cache_dtype, constants, warps, stages):
    """Shared memory in bytes, registers and bytes spilled to local memory."""
    names = kernel.arg_names
    types = {n: "*i32" if n in ("seq_len_ptr", "input_pos_ptr") else f"*{dtype}" for n in names if n.endswith("_ptr")}
    types |= {n: f"*{cache_dtype}" for n in ("k_cache_ptr", "v_cache_ptr")}
    signature = {n: "constexpr" if n in constants else NUMBERS.get(n) or types.get(n) or "i32" for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(part.split(":") for part in usage.split() if ":" in part and part.split(":")[1].isdigit())
    return {"shared": compiled.metadata.shared, "registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}


def constants(group, size, value_size, **more):
    """The constexprs of all kernels for one model; each takes its own."""
    width = KV_HEADS * size, KV_HEADS * value_size
    return {
        "Q_STRIDES": (width[0] * group, size), "K_STRIDES": (width[0], size), "V_STRIDES": (width[1], value_size),
        "K_CACHE": (SEQUENCE * width[0], width[0], size), "V_CACHE": (SEQUENCE * width[1], width[1], value_size),
        "KV_HEADS": KV_HEADS, "HEADS": KV_HEADS * group, "GROUP": group, "D": size, "DV": value_size,
        "BLOCK_D": tiles.power_of_two(size), "BLOCK_DV": tiles.power_of_two(value_size), "SEQUENCES": 16, "TOKENS": 16,
        "SPLIT": True, "BLOCK_SPLITS": 32, "WINDOW": 0, "HAS_SINKS": False, "CAP": 0.0, "PDL": True,
    } | more  # fmt: skip


def report(name, kernel, dtype, cache_dtype, values, tile):
    mine = {n: value for n, value in values.items() if n in kernel.arg_names}
    mine |= {n: value for n, value in (("BLOCK_M", tile.rows), ("BLOCK_N", tile.keys)) if n in kernel.arg_names}
    print(json.dumps({"kernel": name, **compile_kernel(kernel, dtype, cache_dtype, mine, tile.warps, tile.stages)}))


def main():
    for group, size, value_size, dtype, cache, more in (
        (8, 128, 128, "bf16", "bf16", {}),
        (8, 64, 64, "bf16", "bf16", {"WINDOW": 128, "HAS_SINKS": True}),
        (8, 128, 128, "bf16", "fp8e4nv", {}),
        (2, 256, 256, "bf16", "bf16", {}),
        (2, 256, 256, "bf16", "bf16", {"CAP": 72.1}),
        (2, 256, 256, "fp16", "fp16", {"CAP": 72.1, "WINDOW": 4096}),
        (5, 80, 48, "fp16", "fp16", {"HAS_SINKS": True}),
        (4, 128, 128, "fp32", "fp32", {}),
    ):
        values, itemsize = constants(group, size, value_size, **more), 4 if dtype == "fp32" else 2
        name = f"{size}/{value_size} {dtype} {cache}"
        decode = tiles.decode_tile(group, size, value_size, itemsize)
        report(f"decode {name}", flattened_decode_kernel, dtype, cache, values, decode)
        report(f"prefill {name}", prefill_kernel, dtype, cache, values,
               tiles.prefill_tile(10**6, size, value_size, itemsize))  # fmt: skip
    plain = tiles.Tile(rows=16, keys=64, warps=4, stages=2)
    report("append", append_kernel, "bf16", "bf16", constants(8, 128, 128), plain)
    report("reduce", reduce_kernel, "bf16", "bf16", constants(8, 128, 128), plain)


if __name__ == "__main__":
    main()
