"""Program: the decode step of real models, for one GPU architecture, without a GPU and without memory.

The step runs on tensors without data, with every launch replaced by a compilation down to machine code. Prints one JSON
object: for each model and batch size the launches in order, kernels compiled with what they take, and failures.
Usage: compile_decode.py CONFIG.json[:tp[:ep]] ... [--batch N ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

import compile_kernels
import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from shardwise.comm.fake import FakeCommunicator
from shardwise.comm.strategy import make_groups
from shardwise.ops.linear import decode as linear_decode
from shardwise.ops.moe.mxfp4_layout import TILE, PackedMXFP4
from shardwise.parallel import dequantise, load_experts, load_float8
from shardwise.parallel.assemble import DecoderBuilder
from shardwise.parallel.decode_step import DecodeStep
from shardwise.parallel.device_cache import DeviceCache
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.resolve import random_checkpoint
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan

META = torch.device("meta")
PROCESSORS = 132
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
launches: list[str] = []


class Nothing:
    """A source of weights without values."""

    def fill(self, out, shard, on_bytes):
        pass

    def close(self):
        pass


class Imagined(FakeCommunicator):
    devices = ("meta",)

    def _split(self, name, members, colors, keys):
        return Imagined(members.index(self.rank), [self.ranks[i] for i in members], name=name)

    def all_reduce_residual_rms_norm(self, tensor, residual, weight, eps, **options):
        launches.append("all_reduce_residual_rms_norm")
        return torch.empty_like(tensor), torch.empty_like(tensor)


def packed(blocks, scales, bias, paired):
    """`pack_mxfp4` without values."""
    experts, rows, groups, _ = blocks.shape
    shape = experts, -(-rows // TILE), -(-groups * 32 // TILE), 4, 8
    words = torch.empty(*shape, 4, 4, dtype=torch.int32, device=META)
    scales = torch.empty(shape, dtype=torch.int32, device=META)
    bias = torch.empty(experts, shape[1] * TILE, device=META)
    return PackedMXFP4(words, scales, bias, rows, groups * 32, "narrow")


def compile_launch(self, *args, **options):
    launches.append(self.__name__)
    compile_kernels.compile_launch(self, *args, **options)


def source_of(kernel, *args):
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else triton.compiler.ASTSource
    return source(kernel, *args)


def named(call):
    def launch(self, *args, **options):
        launches.append(self._kernel.__name__)
        return call(self, *args, **options)

    return launch


def replace_launches():
    compile_kernels.replace_launches()
    compile_kernels.ASTSource = source_of
    JITFunction.run = GluonJITFunction.run = compile_launch
    for kind in (compile_kernels.kernel_launch.Form, compile_kernels.kernel_launch.Launcher):
        kind.__call__ = named(kind.__call__)
    load_experts.pack_mxfp4 = packed
    dequantise.PIECE_VALUES["meta"] = 1 << 30
    load_float8._tiles_in_order = lambda order: order[:: load_float8.TILE]  # values are not there to look at
    product = torch.nn.functional.linear

    def linear(*args):
        launches.append("library product")
        return product(*args)

    torch.nn.functional.linear = linear


def step_of(config: str, tp: int, ep: int) -> DecodeStep:
    checkpoint, layout = random_checkpoint(config), ParallelLayout(tp=tp, moe_ep=ep)
    made = plan(config, layout)
    groups = make_groups(Imagined(0, range(tp)), layout)
    weights = Weights(checkpoint, made, 0, dtype=torch.bfloat16, device=META, packs_mxfp4=True, keeps_float8=True)
    weights._source = Nothing()
    builder = DecoderBuilder(weights, groups)
    decoder = builder.build()
    cache = DeviceCache(builder.cache_shapes(), pages=64, slots=64, max_length=4096, dtype=torch.bfloat16, device=META)
    cache._processors = PROCESSORS
    step = DecodeStep(decoder, cache, max_batch=64)
    step.pdl = True
    for layer in step.layers:
        if hasattr(layer.feed_forward, "pdl"):
            layer.feed_forward.pdl = True
    return step


def usage(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [DISASSEMBLER, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":") for part in text.split() if ":" in part and part.split(":")[1].isdigit())
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": compiled.metadata.shared}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    replace_launches()
    assert linear_decode.tile_for(4096, 4096, False)
    steps = {}
    with torch.inference_mode():
        for model in args.models:
            config, tp, ep = (*model.split(":"), "1", "1")[:3]
            step = step_of(config, int(tp), int(ep))
            for batch in args.batch:
                launches.clear()
                step(torch.empty(5, batch, dtype=torch.int32, device=META))
                steps[f"{Path(config).stem} tp {tp} ep {ep} batch {batch}"] = dict(Counter(launches))
    kernels = [{"kernel": key[0], **usage(compiled)} for key, compiled in compile_kernels.compiled.items() if compiled]
    print(json.dumps({"steps": steps, "kernels": kernels, "failures": compile_kernels.failures}))


if __name__ == "__main__":
    main()
