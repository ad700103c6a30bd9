"""Compile the tuned launches for Hopper without a GPU: one JSON row a kernel. Run with TRITON_INTERPRET unset."""

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.comm.p2p import gather, one_shot, table, two_shot

INTEGERS = {"abort": "i64", "records": "i64", "region_bytes": "i64", "deadline_ns": "i64"}
SIZES = {"rows": "i64", "width": "i32", "total_elements": "i64", "chunks": "i64"}
ROLES = {"pushers": "i32", "late": "i64"}
NORM = {"eps": "fp32", "weight_bias": "fp32"}


def compiled(tuning, world: int, fused: bool, aligned: bool, dtype: str, lanes: int):
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "residual_out"), "*" + dtype)
    constants = {"WORLD": world, "RANK": world - 1, "LANES": lanes, "ALIGNED": aligned, "FUSED": fused}
    kernel, roles = two_shot.two_shot, ROLES
    if tuning.strategy == "ONESHOT":
        kernel, roles = one_shot.one_shot, {}
        constants["AHEAD"] = tuning.ahead
    constants |= {"BULK": tuning.bulk and aligned, "PAUSING": tuning.pausing, "PDL": True}
    signature = {**pointers, "slots": ("i64",) * world, "counters": "*i32", **INTEGERS, **SIZES, **roles, **NORM}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": warps(tuning, lanes), "launch_pdl": True}
    if tuning.registers and aligned and lanes == 32 * warps(tuning, lanes):
        options["maxnreg"] = tuning.registers
    return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)


def compiled_gather(world: int):
    constants = {
        "WORLD": world,
        "RANK": world - 1,
        "LANES": table.GATHER.lanes,
        "ALIGNED": True,
        "PAUSING": 0,
        "PDL": True,
    }
    signature = {"x": "*u8", "out": "*u8", "slots": ("i64",) * world, "counters": "*i32", **INTEGERS}
    signature |= dict.fromkeys(("rows", "stretch", "total"), "i32") | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": table.GATHER.warps, "launch_pdl": True}
    source = ASTSource(gather.gather, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def warps(tuning, lanes: int) -> int:
    return min(tuning.warps, lanes // 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread, which are spilled registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def main() -> None:
    cases = [
        (2, fused, True, "bf16", nbytes) for fused in (False, True) for nbytes in (1 << 14, 1 << 20, 1 << 22, 1 << 26)
    ]
    cases += [(world, True, True, "bf16", nbytes) for world in (4, 8) for nbytes in (1 << 14, 1 << 22)]
    cases += [(2, True, False, "fp16", 1 << 14), (2, False, True, "fp32", 1 << 14), (4, False, True, "bf16", 1 << 22)]
    cases += [(4, False, True, "bf16", 1 << 18), (4, True, True, "bf16", 1 << 20), (4, True, True, "bf16", 1 << 24)]
    seen = set()
    for world, fused, aligned, dtype, nbytes in cases:
        tuning = table.choose(world, nbytes, fused, "AUTO").tuning
        lanes = (1024 if nbytes >= 1 << 20 else 512) if fused else tuning.lanes
        case = (tuning, world, fused, aligned, dtype, lanes)
        if case in seen:
            continue
        seen.add(case)
        show(str(case), compiled(*case), warps(tuning, lanes))
    for world in (2, 4, 8):
        show(f"gather, world {world}", compiled_gather(world), table.GATHER.warps)


def show(case: str, code, warps: int) -> None:
    registers, stack = resources(code.asm["cubin"])
    ptx = code.asm["ptx"]
    row = {
        "case": case,
        "warps": warps,
        "registers": registers,
        "stack": stack,
        "pushes": ptx.count("st.relaxed.sys.global.v4.b32"),
        "looks": ptx.count("ld.relaxed.sys.global.v4.b32"),
        "dependent_launch": "griddepcontrol.wait" in ptx,
        "multicast": "multimem" in ptx,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
