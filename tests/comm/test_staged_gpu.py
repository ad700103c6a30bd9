"""Strategies of NCCL groups that copy tensors into memory of their own, on two GPUs: SYMM_MEM, NCCL_SYMMETRIC."""

import os
import re
from pathlib import Path

import pytest
import torch
from conformance import assert_sum
from p2p_checks import everyones, rounded_sum

from shardwise.comm.base import CommError
from shardwise.comm.rank import RankInfo
from shardwise.testing import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}


def refusal(group, tensor, strategy: str) -> str:
    try:
        group.all_reduce(tensor, strategy=strategy)
    except CommError as error:
        return str(error)
    return "nothing was refused"


def symmetric_memory(info: RankInfo, store) -> str:
    """SYMM_MEM on the NCCL group and through the peer-to-peer group; what it cannot sum it says."""
    from shardwise.comm.strategy import create

    group = create(info, store=store, device="cuda", transport="p2p")
    for count, dtype in (
        (8, torch.bfloat16),
        (5_000, torch.bfloat16),
        (300_001, torch.float32),
        (9_000_000, torch.float32),
    ):
        parts = [part.round() for part in everyones(2, (count,), dtype, 40)]
        x = parts[group.rank].cuda()
        for each in (group, group.fallback):
            found = each.all_reduce(x, strategy="SYMM_MEM")
            assert torch.equal(found.cpu(), rounded_sum(parts)), (count, dtype, each)
    told = refusal(group, x.half(), "SYMM_MEM")
    group.barrier()
    group.close()
    return told


def test_torchs_symmetric_memory_by_name():
    for told in run_processes(2, "test_staged_gpu:symmetric_memory", timeout=60, env=NO_MULTICAST):
        assert "bfloat16 and float32, not torch.float16" in told


def check_window_graph(group) -> None:
    """A call of two pieces among small ones, replayed with new data."""
    shapes = ((1, 4096), (3, 2880), (9_000_000,))
    inputs = [torch.empty(shape, device="cuda") for shape in shapes]
    outputs = [torch.empty_like(x) for x in inputs]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for x, out in zip(inputs, outputs, strict=True):
            group.all_reduce(x, out=out, strategy="NCCL_SYMMETRIC")
    for turn in range(3):
        parts = [everyones(2, shape, torch.float32, 10 * turn + i) for i, shape in enumerate(shapes)]
        for x, out, values in zip(inputs, outputs, parts, strict=True):
            x.copy_(values[group.rank])
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for out, values in zip(outputs, parts, strict=True):
            assert_sum(out.cpu(), values)


def window(info: RankInfo, store, logs: str) -> tuple[str, str]:
    """NCCL_SYMMETRIC through both groups and in a graph: (what is refused, NCCL's log). No window if NVLS is on."""
    from shardwise.comm.strategy import create

    group = create(info, store=store, device="cuda", transport="p2p")
    group.fallback.all_reduce(torch.ones(8, device="cuda"))
    torch.cuda.synchronize()
    log = Path(logs) / f"nccl.{os.getpid()}"
    assert " 0 nvls channels" in log.read_text(), log.read_text()[-4000:]
    for count, dtype in (
        (8, torch.bfloat16),
        (5_001, torch.float16),
        (300_001, torch.bfloat16),
        (9_000_000, torch.float32),
    ):
        parts = everyones(2, (count,), dtype, 40)
        x = parts[group.rank].cuda()
        for each in (group, group.fallback):
            assert_sum(each.all_reduce(x, strategy="NCCL_SYMMETRIC").cpu(), parts)
        assert_sum(group.all_reduce(x, out=x, strategy="NCCL_SYMMETRIC").cpu(), parts)
    check_window_graph(group)
    told = refusal(group, torch.ones(8, dtype=torch.int32, device="cuda"), "NCCL_SYMMETRIC")
    group.barrier()
    group.close()
    return told, log.read_text()


def test_nccls_windows_by_name_reduce_without_multicast(tmp_path):
    debug = {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NVLS,REG,TUNING",
        "NCCL_DEBUG_FILE": f"{tmp_path}/nccl.%p",
    }
    results = run_processes(2, "test_staged_gpu:window", str(tmp_path), timeout=60, env=NO_MULTICAST | debug)
    logs = "".join(log for _, log in results)
    kernels = set(re.findall(r"\[Symmetric\].*Kernel (\w+)", logs))  # told by the group's first rank
    assert kernels and all("MC" not in kernel for kernel in kernels), kernels
    assert not re.search(r"(Creating|Created|Binding) Multicast", logs, re.IGNORECASE)
    assert all("bfloat16, float16 and float32, not torch.int32" in told for told, _ in results)
