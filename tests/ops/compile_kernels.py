"""Program: compile the Triton kernels that the operator table launches, for one GPU architecture, without a GPU.

The operators run on CPU tensors with every launch replaced by a compilation down to machine code; what they return is
not looked at. Prints one JSON object: kernels compiled, and for each failure or excess its name and the reason.
Usage: compile_kernels.py [part of an operator's name ...]
"""

import json
import sys

import flashinfer_double
import operator_samples
import pytest
import samples_mamba
import torch
import triton
from operator_samples import Sample
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

import shardwise.ops as ops
from shardwise.ops import kernel_launch, repeated
from shardwise.ops.attention import planner
from shardwise.ops.fla import fla
from shardwise.ops.mamba import flashinfer, metadata
from shardwise.ops.registry import TRITON

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # a block's limit on compute capability 9.0
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
compiled, failures = {}, []


def describe(parameter, value):
    """(type, constant or None, attributes) of one argument, as Triton's launcher would specialise it."""
    if parameter.is_constexpr or value is None:
        return "constexpr", value, None
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>", None, None
    if isinstance(value, bool):
        return "i1", None, None
    if isinstance(value, float):
        return "fp32", None, None
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", 1, None
    return ("i32" if abs(value) < 2**31 else "i64"), None, not parameter.do_not_specialize and value % 16 == 0


def compile_for_target(kernel, arguments, options):
    described = [describe(parameter, value) for parameter, value in zip(kernel.params, arguments, strict=True)]
    signature = {parameter.name: kind for parameter, (kind, _, _) in zip(kernel.params, described, strict=True)}
    constants = {(i,): value for i, (kind, value, _) in enumerate(described) if kind == "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, (_, _, even) in enumerate(described) if even}
    key = kernel.__name__, str(signature), str(constants), str(attributes), str(options)
    if key in compiled:
        return
    compiled[key] = None
    try:
        language = GluonASTSource if kernel.is_gluon() else ASTSource
        source = language(kernel, signature, constants, attributes)
        compiled[key] = triton.compile(source, target=TARGET, options=options)
    except Exception as error:
        reasons = f"{error}"[-600:]
        while error.__cause__ is not None:
            error = error.__cause__
            reasons += f"\n{error}"[-600:]
        failures.append({"kernel": kernel.__name__, "reason": reasons})
        return
    shared = compiled[key].metadata.shared
    if shared > SHARED_BYTES:
        failures.append({"kernel": kernel.__name__, "reason": f"{shared} bytes of shared memory"})


def call_form(self, grid, pointers, free, kept=kernel_launch.NONE):
    compile_for_target(self._kernel, (*pointers, *kept.tensors, *free, *self._fixed), self._options)


def call_chain(self, tensors):
    for (form, grid, free), pick in self._launches:
        form(grid, pick(tensors), free)


def call_repeated(self, pointers):
    form, grid, free = self._launch
    form(grid, pointers, free, self._shared)


def call_launcher(self, device, key, grid, args, sharing=0, **options):
    compile_for_target(self._kernel, args, options)


def compile_launch(self, *args, grid, warmup, **options):
    """Stands for the `run` of a kernel that is launched as `kernel[grid](...)`."""
    keys = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
    chosen = {key: options.pop(key) for key in keys if key in options}
    compile_for_target(self, [*args, *(options[name] for name in self.arg_names[len(args) :])], chosen)


def replace_launches():
    kernel_launch.Form.__call__ = call_form
    kernel_launch.Chain.__call__ = call_chain
    repeated.Repeated.__call__ = call_repeated
    kernel_launch.Launcher.__call__ = call_launcher
    for name, module in list(sys.modules.items()):
        if name.startswith("shardwise.ops.") and hasattr(module, "dependent_launch"):
            module.dependent_launch = lambda device: True


def replace_packages():
    """Other packages' kernels give something of the right shape; only our kernels around them are looked at."""
    fla.chunked = lambda q, k, v, g, beta, scale, tokens, state=None, *_: (
        torch.zeros_like(v) if state is None else (torch.zeros_like(v), state)
    )
    flashinfer._update = lambda: lambda *_args, **_options: None
    flashinfer_double.install(pytest.MonkeyPatch())
    planner.WORKSPACE_BYTES = 16


def real_sizes() -> list[Sample]:
    """Calls at the sizes of real models, beyond the small ones of the table."""
    return [
        Sample(
            op="triton_cached_ssm",
            build=samples_mamba.cached_ssm_args(
                "triton_cached_ssm", samples_mamba.MIXED, 8, 2, size, states, chunk, dtype, cache
            ),
        )
        for size, states, chunk, dtype, cache in (
            (64, 128, 128, torch.bfloat16, torch.float32),
            (64, 128, 256, torch.bfloat16, torch.bfloat16),
            (64, 128, 256, torch.float32, torch.float32),
            (64, 256, 256, torch.bfloat16, torch.float32),
            (128, 256, 256, torch.float16, torch.float32),
        )
    ]


def main(parts):
    replace_launches()
    replace_packages()
    infos = {info.qualified_name: info for info in ops.operators() if TRITON in info.needs}
    seen = set()
    for sample in real_sizes() + operator_samples.all_samples():
        info = infos.get(sample.qualified_name)
        if info is None or (parts and not any(part in info.name for part in parts)):
            continue
        torch.manual_seed(0)
        info.implementation(*sample.build("cpu"))
        seen.add(info.name)
    if not parts or any("ssm" in part for part in parts):
        bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
        metadata._on_device("mamba_ssm_prepare_metadata", ops_batch(2, 9), bounds, 4)
    print(json.dumps({"operators": sorted(seen), "kernels": len(compiled), "failures": failures}))


def ops_batch(prefill, tokens):
    from shardwise.ops.attention.batch import Batch

    return Batch(prefill, tokens, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
