"""Host time of one eager call on a GPU: floors, FlashInfer called directly, and the operators, at sizes of one token.

    python benchmarks/ops_host_time.py [--json FILE]

µs, the lowest mean of many calls with the device behind. Floors of the machine, in the same run: PyTorch's own
operators, an operator of the registry that does nothing, a Triton kernel of one pointer launched Triton's way and ours.
`over` is what an operator takes beyond its kernels: its time less one bare launch of ours for each kernel, or less
FlashInfer called directly.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ops_attention import Batch, Pool, flashinfer_calls, mla_calls, triton_calls

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.cases import EPS, norm_cases, rope_cases
from shardwise.ops.bench.measure import host_microseconds
from shardwise.ops.registry import _define, _describe
from shardwise.ops.triton_support import Kernel, triton

OPS = torch.ops.auto_deploy


@triton.jit
def idle_kernel(x_ptr):
    pass


def idle(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """An operator that does nothing."""


@dataclass(frozen=True)
class Row:
    """`kernels` launches stand in the call; `direct` names the row that calls the same kernels without us."""

    name: str
    call: Callable[[], object]
    kernels: int = 0
    direct: str = ""


def floors() -> list[Row]:
    """What the machine takes at least."""
    x, weight = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (4096, 4096))
    idle.__name__, idle.__module__ = "torch_idle", "shardwise.ops.utils.reference"
    _define(_describe(idle, (), (), None, "shardwise_bench"), idle, lambda x, weight, eps: None)
    ours = Kernel(idle_kernel)
    return [
        Row("torch.add", lambda: torch.add(x, x)),
        Row("torch.empty_like", lambda: torch.empty_like(x)),
        Row("torch.rms_norm", lambda: torch.rms_norm(x, (4096,), weight, EPS)),
        Row("idle operator", lambda: torch.ops.shardwise_bench.torch_idle(x, weight, EPS)),
        Row("idle kernel, Triton's launch", lambda: idle_kernel[(1,)](x, num_warps=1)),
        Row("idle kernel, our launch", lambda: ours(x.device, (1, 1, 1), (x,), (), (), warps=1)),
    ]


def basic_rows() -> list[Row]:
    """Norms, rope and utilities, and FlashInfer's functions for the same."""
    rows = []
    for case in (*norm_cases((1,), (4096,)), *rope_cases((1,))):
        if "flashinfer" in case.peers and case.operator.startswith("flashinfer"):
            rows.append(Row(f"{case.operator}, direct", case.peers["flashinfer"]))
        direct = f"{case.operator}, direct" if case.operator.startswith("flashinfer") else ""
        rows.append(Row(case.operator, case.call, kernels=0 if direct else 1, direct=direct))
    source, ids, out = torch.randn(64, device="cuda"), torch.arange(16, device="cuda"), torch.zeros(64, device="cuda")
    call = lambda: OPS.triton_utils_fused_gather_scatter(source, ids, ids, out)  # noqa: E731
    return [*rows, Row("triton_utils_fused_gather_scatter", call, kernels=1)]


def attention_rows() -> list[Row]:
    """One step of four sequences, eager."""
    pool, rows = Pool(1 << 26), []
    for name, shape, kernels in (("decode", Batch(4, 256, 1), 2), ("prefill", Batch(1, 64, 64), 2)):
        direct, _, operator = flashinfer_calls(shape, pool, 1)
        rows += [
            Row(f"triton_attention_flattened_mha_with_cache, {name}", triton_calls(shape, pool, 1)[0], kernels=kernels),
            Row(f"flashinfer_attention_mha_with_cache, {name}, direct", direct[0]),
            Row(f"flashinfer_attention_mha_with_cache, {name}", operator[0],
                direct=f"flashinfer_attention_mha_with_cache, {name}, direct"),
        ]  # fmt: skip
    inputs = Batch(4, 256, 1).paged()[1]
    rows.append(
        Row("flashinfer_attention_prepare_metadata", lambda: OPS.flashinfer_attention_prepare_metadata(*inputs))
    )
    mla = mla_calls(Batch(4, 256, 1), pool)
    rows += [Row("flashinfer_mla_with_cache, run alone", mla["fi_run"][0]),
             Row("flashinfer_mla_with_cache, products alone", mla["products"][0]),
             Row("flashinfer_mla_with_cache, decode", mla["fi_operator"][0])]  # fmt: skip
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    torch.manual_seed(0)
    times: dict[str, float] = {}
    rows = []
    for row in (*floors(), *basic_rows(), *attention_rows()):
        times[row.name] = host_microseconds(row.call, calls=200, repeats=8)
        rows.append({"call": row.name, "host_us": times[row.name]})
        if row.kernels or row.direct:
            floor = times[row.direct] if row.direct else row.kernels * times["idle kernel, our launch"]
            rows[-1]["over_us"] = times[row.name] - floor
        over = f"{rows[-1]['over_us']:8.2f}" if "over_us" in rows[-1] else ""
        print(f"{row.name:60} {times[row.name]:8.2f} {over}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
