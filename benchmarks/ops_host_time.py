"""Host time of one eager call on a GPU, at sizes of one token or of one short prompt.

    python benchmarks/ops_host_time.py [--json FILE]

µs, the least of many rounds of some calls with the device behind, in turns over all rows, so that a host that is busy
for seconds spoils no row; in every round an operator, what calls the same foreign kernels without us, and an empty
kernel launched our way follow one another. `beyond` is what an operator takes on top of its kernels: its time less that
of the direct call, less one bare launch for each kernel of ours. `views` is a direct call that begins with the
operator's own tensors, whose views it makes, and its results. All calls are prepared (`functools.partial`), so that
names looked up and arguments unpacked by this program count nowhere. Floors of the machine: PyTorch's operators, those
that do nothing, an empty kernel launched Triton's way, by the driver alone, and, as `launch` beside every row, ours.
"""

import argparse
import ctypes
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from ops_attention import (
    HEADS,
    KV_HEADS,
    SIZE,
    Batch,
    Pool,
    flashinfer_calls,
    in_order,
    mla_calls,
    qkv,
    random,
    triton_calls,
)

from shardwise.kernel_start import start_of
from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.cases import EPS, Case, norm_cases, rope_cases
from shardwise.ops.bench.measure import alternating_host_microseconds
from shardwise.ops.bench.states import CHUNK, NEMOTRON_H, conv_cases, delta_cases, ssm_decode_cases, ssm_prefill_cases
from shardwise.ops.mla.checks import LatentHeads, split_weight
from shardwise.ops.moe.contract import SILU
from shardwise.ops.quantization.fp8 import quantize_fp8
from shardwise.ops.registry import _LIBRARIES, _define, _describe
from shardwise.ops.triton_support import Kernel, triton

OPS = torch.ops.auto_deploy
TURNS, ROUNDS = 6, 10


@triton.jit
def idle_kernel(x_ptr):
    pass


def idle(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """An operator that does nothing."""


@dataclass(frozen=True)
class Row:
    """`kernels` launches of ours stand in the call; `beside` are other ways to the same, `direct` first."""

    name: str
    call: Callable[[], object]
    kernels: int = 0
    beside: dict[str, Callable[[], object]] = field(default_factory=dict)


def floors(x: torch.Tensor, weight: torch.Tensor) -> Iterator[Row]:
    """What the machine takes at least."""
    idle.__name__, idle.__module__ = "torch_idle", "shardwise.ops.utils.reference"
    _define(_describe(idle, (), (), None, "shardwise_bench"), idle, lambda x, weight, eps: None)
    yield Row("torch.add", partial(torch.add, x, x))
    yield Row("torch.empty_like", partial(torch.empty_like, x))
    yield Row("torch.rms_norm", partial(torch.rms_norm, x, (4096,), weight, EPS))
    library, tensors = _LIBRARIES["shardwise_bench"], [torch.empty_like(x) for _ in range(14)]
    library.define(f"wide({', '.join(f'Tensor t{i}' for i in range(14))}, float a, float b, float c) -> ()")
    library.impl("wide", lambda *args: None, "CUDA")
    yield Row("a view", partial(x.view, 32, 128))
    yield Row("idle operator of 14 tensors", partial(torch.ops.shardwise_bench.wide, *tensors, 1.0, 1.0, 1.0))
    yield Row("idle operator", partial(torch.ops.shardwise_bench.torch_idle, x, weight, EPS))
    yield Row("idle kernel, Triton's launch", partial(idle_kernel[(1,)], x, num_warps=1))
    start, stream_of, rest = start_of(idle_kernel[(1,)](x, num_warps=1))
    yield Row("idle kernel, driver alone", partial(start, 1, 1, 1, stream_of(x.device.index), *rest, x.data_ptr()))


def prepared(case: Case) -> Callable[[], object]:
    return partial(getattr(OPS, case.operator), *case.args)


def basic_rows() -> Iterator[Row]:
    """Norms, rope and utilities, and FlashInfer's functions for the same."""
    for case in (*norm_cases((1,), (4096,)), *rope_cases((1,))):
        foreign = case.operator.startswith("flashinfer")
        yield Row(case.operator, prepared(case), 0 if foreign else 1,
                  {"direct": case.peers["flashinfer"]} if foreign else {})  # fmt: skip
    source, ids, out = torch.randn(64, device="cuda"), torch.arange(16, device="cuda"), torch.zeros(64, device="cuda")
    call = partial(OPS.triton_utils_fused_gather_scatter, source, ids, ids, out)
    yield Row("triton_utils_fused_gather_scatter", call, 1)


def attention_rows() -> Iterator[Row]:
    """One step of four sequences or one short prompt."""
    pool = Pool(1 << 26)
    for name, shape, kernels in (("decode", Batch(4, 256, 1), 1), ("prefill", Batch(1, 64, 64), 2)):
        direct, _, operator = flashinfer_calls(shape, pool, 1)
        yield Row(f"triton_attention_flattened_mha_with_cache, {name}", triton_calls(shape, pool, 1)[0], kernels)
        views = partial(_attention_views, *qkv(shape.tokens))
        beside = {"direct": direct[0], "views": in_order(views, direct[0])}
        yield Row(f"flashinfer_attention_mha_with_cache, {name}", operator[0], 0, beside)
    mla = mla_calls(Batch(4, 256, 1), pool, 1)
    tensors = [random(1, 4, 128, 128), random(1, 4, 128, 64), random(1, 4, 512), random(1, 4, 1, 64)]
    views = partial(_mla_views, *tensors, random(128 * 256, 512))
    beside = {"direct": mla["fi"][0], "views": in_order(views, mla["fi"][0])}
    yield Row("flashinfer_mla_with_cache, decode", mla["fi_operator"][0], 0, beside)


def _attention_views(q, k, v) -> None:
    """What FlashInfer's append and attention need of the operator's tensors, and a result like the operator's."""
    q.view(-1, HEADS, SIZE), k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE)
    torch.empty_like(q).view(-1, HEADS, SIZE)


def _mla_views(q_nope, q_pe, compressed_kv, kpe, weight) -> None:
    """What the four direct calls need of the operator's tensors, and the two results that they are given."""
    rows = q_nope.flatten(0, 1)
    rows.transpose(0, 1), q_pe.flatten(0, 1), compressed_kv.flatten(0, 1), kpe.flatten(0, 2)
    split_weight(weight, LatentHeads(128, 128, 64, 128, 512))
    rows.new_empty(rows.shape[0], 128, 512), torch.empty_like(q_nope).flatten(0, 1)


def metadata_rows() -> Iterator[Row]:
    """What a step's operators need to know of its sequences, for few and many of them."""
    steps = {
        "4 of 1 token": (4, 256, 1),
        "128 of 1": (128, 256, 1),
        "1 of 64": (1, 64, 64),
        "16 of 512": (16, 512, 512),
    }
    for name, sizes in steps.items():
        ids, info, bounds, lengths = Batch(*sizes).paged()[1]
        for family in ("attention", "mla"):
            operator = getattr(OPS, f"flashinfer_{family}_prepare_metadata")
            yield Row(f"{operator.__name__}, {name}", partial(operator, ids, info, bounds, lengths), 1)
        if sizes[2] > 1:
            call = partial(OPS.mamba_ssm_prepare_metadata, ids, info, lengths, bounds, CHUNK)
            yield Row(f"mamba_ssm_prepare_metadata, {name}", call, 1)


def state_rows() -> Iterator[Row]:
    """State-space, convolution and delta-rule operators."""
    for case in ssm_decode_cases((1,), {"Nemotron-H": NEMOTRON_H}):
        foreign = case.operator.startswith("flashinfer")
        beside = {"direct": case.peers["flashinfer"], "views": _step_with_views(case)} if foreign else {}
        yield Row(f"{case.operator}, {case.size}", prepared(case), 1, beside)
    for case in conv_cases((1,), (64,)):
        yield Row(f"{case.operator}, {case.size}", prepared(case), 1 if case.size.startswith("decode") else 2)
    prefill = next(ssm_prefill_cases((64,)))
    yield Row(f"{prefill.operator}, {prefill.size}", prepared(prefill), 3)
    for case in delta_cases((), (1,)):
        yield Row(f"{case.operator}, {case.size}", prepared(case), 1)


def mixture_rows() -> Iterator[Row]:
    """Mixtures of experts at the sizes of a rank of Qwen3-30B-A3B, and gpt-oss' form of them."""
    experts, hidden, size, top_k = 32, 2048, 768, 8
    first, second = random(experts, 2 * size, hidden), random(experts, hidden, size)
    codes = first.to(torch.float8_e4m3fn), second.to(torch.float8_e4m3fn)
    scales = [torch.ones(1, device="cuda") for _ in range(4)] + [torch.ones(experts, device="cuda") for _ in range(3)]
    for tokens in (1, 128):
        x, weights = random(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
        ids = torch.randint(0, experts, (tokens, top_k), device="cuda")
        calls = {
            "triton_moe_fused": (x, ids, weights, first, second, True, SILU),
            "trtllm_moe_fused": (x, ids, weights, first, second, True, SILU),
            "triton_quant_fp8_moe": (x, ids, weights, *codes, *scales, True, SILU),
            "triton_mxfp4_moe": (x, random(experts, hidden), random(experts), 4, *_mxfp4(2 * size, hidden, experts),
                                 1.702, 7.0, *_mxfp4(hidden, size, experts)),
            "trtllm_quant_nvfp4_moe_fused": (
                x, ids, weights, _bytes(experts, 2 * size, hidden // 2), _bytes(experts, hidden, size // 2),
                _bytes(experts, 2 * size, hidden // 16), _bytes(experts, hidden, size // 16), *scales[:2], *scales[4:6],
            ),
        }  # fmt: skip
        for name, args in calls.items():
            call = partial(getattr(OPS, name), *args)
            yield Row(f"{name}, {tokens} tokens", call, launches(call))


def _mxfp4(rows: int, columns: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks, bias and scales."""
    scales = torch.randint(117, 122, (experts, rows, columns // 32), dtype=torch.uint8, device="cuda")
    return _bytes(experts, rows, columns // 32, 16), random(experts, rows), scales


def _bytes(*shape: int) -> torch.Tensor:
    """Four-bit codes, or scales in e4m3 below 2."""
    return torch.randint(0, 64, shape, dtype=torch.uint8, device="cuda")


def launches(call: Callable[[], object]) -> int:
    """Kernels of a call, as a graph counts them."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    count = ctypes.c_size_t()
    error = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if error:
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {error}")
    return count.value


def linear_rows() -> Iterator[Row]:
    """Operators around PyTorch's products, beside these called directly, and fla's norm of vectors."""
    x, weight, router, bias = random(1, 4096), random(4096, 4096), random(32, 4096), random(32)
    yield Row("torch_linear_simple", partial(OPS.torch_linear_simple, x, weight, None), 0,
              {"direct": partial(F.linear, x, weight)})  # fmt: skip
    yield Row("torch_moe_router", partial(OPS.torch_moe_router, x, router, bias, 4), 0,
              {"direct": partial(_route, x, router, bias)})  # fmt: skip
    gate, up, down = random(8192, 4096), random(8192, 4096), random(4096, 8192)
    first, second, third = (partial(F.linear, x, w) for x, w in ((x, gate), (x, up), (random(1, 8192), down)))
    both = in_order(first, in_order(second, third))
    yield Row("triton_swiglu_mlp", partial(OPS.triton_swiglu_mlp, x, gate, up, down), 1, {"direct": both})
    codes, scale = quantize_fp8(weight)
    scale_in, scale = torch.full((1,), 5 / 448, device="cuda"), scale.view(1)
    call = partial(OPS.trtllm_quant_fp8_linear, x, codes, None, scale_in, scale)
    yield Row("trtllm_quant_fp8_linear, 1 row", call, launches(call))
    rows = random(128, 4096)
    product = partial(torch._scaled_mm, rows.to(torch.float8_e4m3fn), codes.t(), scale_in, scale, out_dtype=rows.dtype)
    call = partial(OPS.trtllm_quant_fp8_linear, rows, codes, None, scale_in, scale)
    yield Row("trtllm_quant_fp8_linear, 128 rows", call, 1, {"direct": product})
    l2norm = importlib.import_module("fla.modules.l2norm").l2norm
    vectors = random(1, 16, 128)
    yield Row("fla_l2norm", partial(OPS.fla_l2norm, vectors, EPS), 0, {"direct": partial(l2norm, vectors, EPS)})


def _route(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight, bias)
    values, ids = logits.topk(4, dim=-1)
    return torch.zeros_like(logits).scatter_(1, ids, values.softmax(-1))


def _step_with_views(case: Case) -> Callable[[], object]:
    """FlashInfer's step from the operator's tensors [b, 1, ...] and [H], for whoever needs no bounds on time steps."""
    from flashinfer.mamba import selective_state_update

    (x, A, B, C, D, dt, bias), slots, cache = case.args[:7], case.args[9].int(), case.args[14]
    heads, size, states = cache.shape[1:]

    def call():
        steps = dt[:, 0].float()[..., None].expand(-1, heads, size)
        wide = A[:, None, None].expand(heads, size, states), D[:, None].expand(heads, size)
        offset = bias[:, None].expand(heads, size)
        return selective_state_update(
            cache, x[:, 0], steps, wide[0], B[:, 0], C[:, 0], wide[1], None, offset, True, slots
        )

    return call


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, weight = (torch.randn(4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    launch = partial(Kernel(idle_kernel), x.device, (1, 1, 1), (x,), (), (), warps=1)
    groups = basic_rows, attention_rows, metadata_rows, state_rows, mixture_rows, linear_rows
    rows = [*floors(x, weight), *chain.from_iterable(group() for group in groups)]
    best: list[dict[str, float]] = [{} for _ in rows]
    for _ in range(TURNS):
        for row, least in zip(rows, best, strict=True):
            times = alternating_host_microseconds({"call": row.call, "launch": launch} | row.beside, rounds=ROUNDS)
            least |= {name: min(time, least.get(name, time)) for name, time in times.items()}
        if args.json:
            table = [told(row, least) for row, least in zip(rows, best, strict=True)]
            args.json.write_text(json.dumps({"machine": machine_facts(), "rows": table}, indent=1) + "\n")
    for row, least in zip(rows, best, strict=True):
        beyond = told(row, least).get("beyond_us")
        print(f"{row.name:62}", *(f"{name} {time:7.2f}" for name, time in least.items()),
              "" if beyond is None else f"beyond {beyond:7.2f}", flush=True)  # fmt: skip


def told(row: Row, least: dict[str, float]) -> dict:
    """A row of the JSON."""
    known = {"call": row.name, "kernels": row.kernels, "host_us": least}
    if not row.kernels and not row.beside:
        return known
    return known | {"beyond_us": least["call"] - least.get("direct", 0.0) - row.kernels * least["launch"]}


if __name__ == "__main__":
    main()
