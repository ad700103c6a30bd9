"""Time collectives inside started ranks. `job` and the `peer_*` functions are what the CLI runs on every rank.

A row holds medians over calls of the slowest rank. bytes is the larger of a rank's input and output. Bus bandwidth
is algorithm bandwidth times what the operation must send for each byte: 2(W-1)/W for a sum, (W-1)/W for the others.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "all_reduce_residual_rms_norm")
HIDDEN = 4096
WARMUP = 10
CAPTURED = 16
"""Calls in one CUDA graph: its launch costs as much as a small collective."""


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds, rates in 10^9 bytes per second."""

    op: str
    bytes: int
    dtype: str
    world: int
    transport: str
    strategy: str
    p50_us: float
    p99_us: float
    algbw_gbps: float
    busbw_gbps: float
    wrong: int
    """Elements of the result that are not the expected numbers, over all ranks."""


@dataclass(frozen=True)
class Case:
    """A call to time, one whose result is looked at, and what that must be."""

    call: Callable[[], Any]
    verify: Callable[[], Tensor]
    expected: Tensor


def bus_factor(op: str, world: int) -> float:
    """Bytes that a rank must send (or take) for each byte of payload."""
    if op == "broadcast":
        return 1.0
    share = (world - 1) / world
    return 2 * share if op.startswith("all_reduce") else share


def calls(size: int) -> int:
    """How often a size is timed: a function of the size alone, so that all ranks and peers agree."""
    return max(20, min(2000, (512 << 20) // max(size, 1)))


def make_case(op: str, size: int, dtype: torch.dtype, group, device: str, strategy: str) -> Case:
    """`op` on `size` bytes. Inputs are small integers, so that sums are exact in every dtype."""
    world, rank = group.size, group.rank
    count = max(world, size // dtype.itemsize // world * world)
    pattern = torch.arange(count, device=device) % 5
    mine = (pattern + rank).to(dtype)
    total = (pattern * world + world * (world - 1) // 2).to(dtype)
    part = count // world
    if op == "all_reduce":
        zeros = torch.zeros_like(mine)  # in place, as layers call it: zeros stay small however often they are added
        return Case(
            lambda: group.all_reduce(zeros, out=zeros, strategy=strategy),
            lambda: group.all_reduce(mine, strategy=strategy),
            total,
        )
    if op == "all_gather":
        everyone = torch.cat([(pattern[:part] + r).to(dtype) for r in range(world)])
        source = mine[:part].clone()
        return _repeated(lambda: group.all_gather(source), everyone)
    if op == "reduce_scatter":
        return _repeated(lambda: group.reduce_scatter(mine), total[rank * part : (rank + 1) * part])
    if op == "all_to_all":
        received = torch.cat([(pattern[rank * part : (rank + 1) * part] + r).to(dtype) for r in range(world)])
        return _repeated(lambda: group.all_to_all(mine), received)
    if op == "broadcast":
        return _repeated(lambda: group.broadcast(mine, 0), pattern.to(dtype))
    return _norm_case(count, dtype, group, device, strategy)


def _repeated(call: Callable[[], Tensor], expected: Tensor) -> Case:
    return Case(call, call, expected)


def _norm_case(count: int, dtype: torch.dtype, group, device: str, strategy: str) -> Case:
    tokens = max(1, count // HIDDEN)
    x = torch.ones((tokens, HIDDEN), dtype=dtype, device=device)
    residual, weight = torch.ones_like(x), torch.ones(HIDDEN, dtype=dtype, device=device)

    def call():
        return group.all_reduce_residual_rms_norm(x, residual, weight, 0.0, strategy=strategy)[0]

    return _repeated(call, torch.ones_like(x))


def time_host(call: Callable[[], Any], count: int) -> list[float]:
    """Microseconds of each of `count` calls."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return times


def time_graph(call: Callable[[], Any], count: int) -> list[float]:
    """Microseconds per call on the device: CUDA graphs of `CAPTURED` calls, timed by events."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(20, count // CAPTURED) + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 / CAPTURED for a, b in zip(marks, marks[1:], strict=False)]


def measure(case: Case, op: str, size: int, dtype: torch.dtype, world: int, transport: str, strategy: str) -> Row:
    """One row of this rank."""
    timer = time_graph if case.expected.is_cuda else time_host
    times = sorted(timer(case.call, calls(size)))
    result = case.verify()
    middle = times[len(times) // 2]
    rate = size / middle / 1e3
    return Row(
        op=op,
        bytes=size,
        dtype=str(dtype).removeprefix("torch."),
        world=world,
        transport=transport,
        strategy=strategy,
        p50_us=middle,
        p99_us=times[int(len(times) * 0.99)],
        algbw_gbps=rate,
        busbw_gbps=rate * bus_factor(op, world),
        wrong=int((result != case.expected).sum()),
    )


def job(context) -> dict:
    """Our own transport: {"rows": [...], "why": [...]}. Payload: transport, device, sizes, ops, dtype, strategy."""
    wanted = context.payload
    torch.set_num_threads(1)
    group = context.communicator(device=wanted["device"], transport=wanted["transport"])
    dtype = getattr(torch, wanted["dtype"])
    rows, why = [], [group.why()]
    with torch.inference_mode():
        for op in wanted["ops"]:
            for size in wanted["sizes"]:
                case = make_case(op, size, dtype, group, wanted["device"], wanted["strategy"])
                group.barrier()
                row = measure(case, op, size, dtype, group.size, group.transport, wanted["strategy"])
                rows.append(asdict(row))
                why.append(f"{op} of {size} bytes: {group.explain(op, size)}")
    group.barrier()
    group.close()
    return {"rows": rows, "why": why}


@dataclass(frozen=True)
class _Bare:
    """A library's own in-place all-reduce in the place of a group."""

    rank: int
    size: int
    reduce: Callable[[Tensor], Any]

    def all_reduce(self, tensor: Tensor, *, out: Tensor | None = None, strategy: str = "AUTO") -> Tensor:
        result = tensor.clone() if out is None else out
        self.reduce(result)
        return result


def _peer_rows(context, name: str, device: str, reduce: Callable[[Tensor], Any]) -> dict:
    wanted = context.payload
    dtype = getattr(torch, wanted["dtype"])
    bare = _Bare(context.info.rank, context.info.world, reduce)
    rows = []
    for size in wanted["sizes"]:
        case = make_case("all_reduce", size, dtype, bare, device, "AUTO")
        rows.append(asdict(measure(case, "all_reduce", size, dtype, bare.size, name, "AUTO")))
    return {"rows": rows, "why": []}


def peer_gloo(context) -> dict:
    """torch.distributed's gloo, called directly."""
    return _peer_torch(context, "gloo", "cpu")


def peer_nccl(context) -> dict:
    """torch.distributed's NCCL, called directly."""
    return _peer_torch(context, "nccl", "cuda")


def _peer_torch(context, backend: str, device: str) -> dict:
    import torch.distributed as dist

    torch.set_num_threads(1)
    group = context.communicator(device=device, transport=backend)  # for its rendezvous only
    result = _peer_rows(context, f"peer:{backend}", device, lambda tensor: dist.all_reduce(tensor, group=group.group))
    group.close()
    return result


def peer_mpi(context) -> dict:
    """mpi4py's Allreduce on the buffer, called directly."""
    from shardwise.comm.mpi import library

    MPI = library()
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    return _peer_rows(context, "peer:mpi", "cpu", lambda tensor: world.Allreduce(MPI.IN_PLACE, tensor.numpy()))
