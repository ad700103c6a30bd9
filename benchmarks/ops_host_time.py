"""Host time of one eager call on a GPU, at sizes of one token or of one short prompt.

    python benchmarks/ops_host_time.py [--only GROUP ...] [--json FILE]

µs, the least of many rounds of some calls with the device behind, in turns over all rows, so that a host that is busy
for seconds spoils no row; in every round an operator, what calls the same foreign kernels without us, and an empty
kernel launched our way follow one another. `beyond` is what an operator takes on top of its kernels: its time less that
of the direct call, less one bare launch for each kernel of ours. `views` is a direct call that begins with the
operator's own tensors, whose views it makes, and its results; `fla` is fla's function, whose kernels count as ours,
since we launch them. All calls are prepared (`functools.partial`), so that names looked up and arguments unpacked by
this program count nowhere. A row that raises is left out; the exit code is then 1, after all others are measured and
written. Floors of the machine: PyTorch's operators, those that do nothing, an empty kernel launched Triton's way, by
the driver alone, and, as `launch` beside every row, ours.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from host_time import Failures, Later, Row, bare_launch, idle_kernel, launches, least_times, made, show, write
from host_time_experts import expert_rows
from host_time_formulas import formula_rows
from ops_attention import (
    HEADS,
    KV_HEADS,
    MLA,
    PAGE,
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
from shardwise.ops.bench.cases import EPS, Case, norm_cases, rope_cases
from shardwise.ops.bench.states import CHUNK, NEMOTRON_H, conv_cases, delta_cases, ssm_decode_cases, ssm_prefill_cases
from shardwise.ops.mla.checks import LatentHeads, split_weight
from shardwise.ops.quantization.fp8 import quantize_fp8
from shardwise.ops.registry import _LIBRARIES, _define, _describe

OPS = torch.ops.auto_deploy
TURNS, ROUNDS = 6, 10


def idle(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """An operator that does nothing."""


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


def attention_rows() -> Iterator[Row | Later]:
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
    yield Later("flashinfer_mla_with_cache, prefill", partial(_latent_prompt, 64))


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


def _latent_prompt(tokens: int) -> Row:
    """A prompt of latent attention, beside the same by PyTorch and FlashInfer, whose joins one kernel of ours does;
    `unjoined` are append, product and attention alone, of queries and keys that are joined already."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper
    from flashinfer.page import append_paged_mla_kv_cache

    heads, nope, rope, value, rank = MLA
    arguments, inputs = Batch(1, tokens, tokens).paged()
    metadata = OPS.flashinfer_mla_prepare_metadata(*inputs)
    _, bounds, indptr, _, indices, last, _, _ = arguments
    q_nope, q_pe, latent = random(1, tokens, heads, nope), random(1, tokens, heads, rope), random(1, tokens, rank)
    kpe, weight = random(1, tokens, 1, rope), random(heads * (nope + value), rank)
    caches = random(len(indices), PAGE, rank), random(len(indices), PAGE, rope)
    tensors = q_nope, q_pe, latent, kpe, weight
    call = partial(OPS.flashinfer_mla_with_cache, *tensors, *arguments, *metadata, *caches, None, rank)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
    )
    wrapper.plan(
        bounds, bounds, heads, heads, nope + rope, head_dim_vo=value, causal=True, use_fp16_qk_reduction=False,
        sm_scale=MLA.scale(None), q_data_type=q_nope.dtype,
    )  # fmt: skip
    rows, rotated = latent[0], kpe[0].expand(-1, heads, -1)
    append = partial(append_paged_mla_kv_cache, rows, kpe[0, :, 0], *metadata, *caches, indices, indptr, last)
    queries, turned, out = q_nope[0], weight.t(), random(tokens, heads, value)
    ready = *(random(tokens, heads, nope + rope) for _ in range(2)), random(tokens, heads, nope + value)[..., nope:]

    def direct() -> None:
        append()
        keys, values = (rows @ turned).view(-1, heads, nope + value).split((nope, value), -1)
        key, query = torch.cat((keys, rotated), -1), torch.cat((queries, q_pe[0]), -1)
        wrapper.run(query, key, values, out=out)

    def unjoined() -> None:
        append()
        torch.matmul(rows, turned)
        wrapper.run(*ready, out=out)

    return Row("flashinfer_mla_with_cache, prefill", call, 0, {"direct": direct, "unjoined": unjoined})


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


def state_rows() -> Iterator[Row | Later]:
    """State-space, convolution and delta-rule operators."""
    for case in ssm_decode_cases((1,), {"Nemotron-H": NEMOTRON_H}):
        foreign = case.operator.startswith("flashinfer")
        beside = {"direct": case.peers["flashinfer"], "views": _step_with_views(case)} if foreign else {}
        yield Row(f"{case.operator}, {case.size}", prepared(case), 1, beside)
    for case in conv_cases((1,), (64,)):
        yield Row(f"{case.operator}, {case.size}", prepared(case), 1 if case.size.startswith("decode") else 2)
    prefill = next(ssm_prefill_cases((64,)))
    yield Row(f"{prefill.operator}, {prefill.size}", prepared(prefill), 3)
    for case in delta_cases((64,), (1,)):
        yield Later(f"{case.operator}, {case.size}", partial(_delta_row, case))


def _delta_row(case: Case) -> Row:
    """Of decode tokens by our own step; of a prompt by fla's kernels, which we launch as ours and count with them, and
    beside it fla's function, which launches them as Triton does; without a gate that has other kernels."""
    name, call = f"{case.operator}, {case.size}", prepared(case)
    if case.size.startswith("decode"):
        return Row(name, call, 1)
    return Row(name, call, launches(call), {"fla": case.peers["fla"]} if "gated" in case.operator else {})


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
    inputs = rows.to(torch.float8_e4m3fn), codes.t(), scale_in, scale
    product = partial(torch._scaled_mm, *inputs, out_dtype=rows.dtype, use_fast_accum=True)
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


GROUPS = {
    "basics": basic_rows,
    "attention": attention_rows,
    "metadata": metadata_rows,
    "states": state_rows,
    "experts": expert_rows,
    "linears": linear_rows,
    "formulas": formula_rows,
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, weight = (torch.randn(4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    failures: Failures = {}
    rows = made({"floors": partial(floors, x, weight)} | {name: GROUPS[name] for name in args.only}, failures)
    save = partial(write, args.json, failures=failures)
    show(least_times(rows, bare_launch(x), TURNS, ROUNDS, save, failures))
    if failures:
        sys.exit("\n".join(("failed:", *(f"{name}: {error}" for name, error in failures.items()))))


if __name__ == "__main__":
    main()
