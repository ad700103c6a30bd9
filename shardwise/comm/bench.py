"""Time collectives inside started ranks. `job` and the `peer_*` functions are what the CLI runs on every rank.

A row holds medians over calls of the slowest rank. bytes is the larger of a rank's input and output. Bus bandwidth
is algorithm bandwidth times what the operation must send for each byte: 2(W-1)/W for a sum, (W-1)/W for the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardwise.comm.base import STRATEGIES
from shardwise.comm.bench_cases import HIDDEN, Case, make_case, moved_bytes, shared_elements
from shardwise.comm.names import UNUSABLE

if TYPE_CHECKING:
    from shardwise.comm.bench_peers import Peers

WARMUP = 10
GRAPH_WARMUP, REPLAYS = 3, 15


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


def bus_factor(op: str, world: int) -> float:
    """Bytes that a rank must send (or take) for each byte of payload."""
    if op == "broadcast":
        return 1.0
    share = (world - 1) / world
    return 2 * share if op.startswith("all_reduce") else share


def calls(size: int) -> int:
    """How often a size is timed: a function of the size alone, so that all ranks and peers agree."""
    return max(20, min(2000, (512 << 20) // max(size, 1)))


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


def time_graph(call: Callable[[int], Any], calls: int, meet: Callable[[], Any]) -> list[float]:
    """Microseconds of a call on the device, a figure a replay of a CUDA graph of `calls` of them, the i-th `call(i)`.

    `meet` brings the ranks together before each replay, when the one before is done, and raises what waits have found.
    """
    call(0)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(GRAPH_WARMUP + REPLAYS):
        meet()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record()
            graph.replay()
            end.record()
        stream.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    meet()
    return times[GRAPH_WARMUP:]


def graph_calls(size: int) -> int:
    """Ranks start a replay some 20 us apart, and the earlier one's time includes that: many calls make it small."""
    return 200 if size <= 1 << 20 else 40 if size <= 16 << 20 else 8


def slowest(times: list[float], gather: Callable[[Any], list]) -> list[float]:
    """The slowest rank's time of each replay, in ascending order, on every rank."""
    return sorted(max(each) for each in zip(*gather(times), strict=True))


def measure(case: Case, op: str, size: int, dtype: torch.dtype, group, transport: str, strategy: str) -> Row:
    """One row of this rank; on CUDA the slowest rank's times already."""
    if case.expected.is_cuda:
        times = slowest(time_graph(lambda _: case.call(), graph_calls(size), group.barrier), group.all_gather_object)
    else:
        times = sorted(time_host(case.call, calls(size)))
    wrong = int((case.verify() != case.expected).sum())
    return row(op, size, dtype, group.size, transport, strategy, times, wrong)


def row(
    op: str, size: int, dtype: torch.dtype, world: int, transport: str, strategy: str, times: list[float], wrong: int
) -> Row:
    """The row of these times, which ascend."""
    middle, payload = times[len(times) // 2], moved_bytes(op, size, dtype, world)
    rate = payload / middle / 1e3
    return Row(
        op=op,
        bytes=payload,
        dtype=str(dtype).removeprefix("torch."),
        world=world,
        transport=transport,
        strategy=strategy,
        p50_us=middle,
        p99_us=times[int(len(times) * 0.99)],
        algbw_gbps=rate,
        busbw_gbps=rate * bus_factor(op, world),
        wrong=wrong,
    )


def job(context) -> dict:
    """Our own transport and, on CUDA, its peers: {"rows": [...], "why": [...], "notes": [...]}.

    Payload: transport, device, sizes, ops, dtype, strategy, peers.
    """
    wanted = context.payload
    torch.set_num_threads(1)
    group = context.communicator(device=wanted["device"], transport=wanted["transport"])
    dtype = getattr(torch, wanted["dtype"])
    beside = _beside(group, wanted)
    rows, why, notes = [], [group.why(), *_strategies(group)], []
    with torch.inference_mode():
        for op in wanted["ops"]:
            for size in wanted["sizes"]:
                case = make_case(op, size, dtype, group, wanted["device"], wanted["strategy"])
                group.barrier()
                rows.append(asdict(measure(case, op, size, dtype, group, group.transport, wanted["strategy"])))
                named = wanted["strategy"] != "AUTO" and op.startswith("all_reduce")
                payload = rows[-1]["bytes"]
                reason = f"{wanted['strategy']}, asked for by name" if named else group.explain(op, payload)
                why.append(f"{op} of {payload} bytes: {reason}")
                if beside is not None:
                    found, reasons = _peers_on_cuda(beside, group, op, size, dtype, wanted["peers"])
                    rows += [asdict(each) for each in found]
                    notes += [reason for reason in reasons if reason not in notes]
    group.barrier()
    group.close()
    return {"rows": rows, "why": why, "notes": notes}


def _strategies(group) -> list[str]:
    """A line for each strategy's name: that it runs on this group, or why not, those that run first."""
    lines = []
    for name in sorted(STRATEGIES, key=lambda name: name not in group.strategies):
        legal = f"not on transport {group.transport}, which has {', '.join(group.strategies)}"
        lines.append(f"strategy {name}: {'runs' if name in group.strategies else UNUSABLE.get(name, legal)}")
    return lines


def _beside(group, wanted) -> "Peers | None":
    """Peers of a group on CUDA that has NCCL beneath it, where any are wanted."""
    nccl = getattr(group, "fallback", group)
    if wanted["device"] != "cuda" or nccl.transport != "nccl" or not wanted.get("peers"):
        return None
    from shardwise.comm.bench_peers import Peers

    return Peers(nccl.group)


def _peers_on_cuda(beside: "Peers", group, op: str, size: int, dtype, names: Sequence[str]) -> tuple[list[Row], list]:
    """Rows of the peers whose names begin with one of `names`, and why others have none."""
    from shardwise.comm.bench_peers import made

    makers, expected = _peer_makers(beside, group, op, size, dtype)
    rows, notes = [], []
    for name, maker in makers.items():
        if not name.startswith(tuple(names)):
            continue
        peer, reason = made(maker, group.all_gather_object)
        if peer is None:
            notes += [f"peer:{name}: {reason}"] if reason else []
            continue
        times = slowest(time_graph(peer.call, graph_calls(size), group.barrier), group.all_gather_object)
        wrong = int((peer.result() != expected).sum())
        rows.append(row(op, size, dtype, group.size, f"peer:{name}", "", times, wrong))
    return rows, notes


def _peer_makers(beside: "Peers", group, op: str, size: int, dtype: torch.dtype):
    """(makers by name, what must come out of their first inputs); none for what our kernels do not do either."""
    count = shared_elements(size, dtype, group.size)
    if op == "all_reduce":
        pattern = torch.arange(count, device="cuda") % 5
        total = pattern * group.size + group.size * (group.size - 1) // 2
        return beside.plain([(pattern + group.rank).to(dtype)]), total.to(dtype)
    if op == "all_gather":
        everyone = (torch.arange(count, device="cuda") % 5).to(dtype)
        return beside.gathered(everyone.chunk(group.size)[group.rank]), everyone
    if op == "all_reduce_residual_rms_norm":
        x = torch.ones((max(1, count // HIDDEN), HIDDEN), dtype=dtype, device="cuda")
        weight = torch.ones(HIDDEN, dtype=dtype, device="cuda")
        return beside.fused([(x, x.clone())], weight), x * (group.size + 1)
    return {}, torch.empty(0)


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


def _peer_rows(context, name: str, reduce: Callable[[Tensor], Any]) -> dict:
    wanted = context.payload
    dtype = getattr(torch, wanted["dtype"])
    bare = _Bare(context.info.rank, context.info.world, reduce)
    rows = []
    for size in wanted["sizes"]:
        case = make_case("all_reduce", size, dtype, bare, "cpu", "AUTO")
        rows.append(asdict(measure(case, "all_reduce", size, dtype, bare, name, "AUTO")))
    return {"rows": rows, "why": [], "notes": []}


def peer_gloo(context) -> dict:
    """torch.distributed's gloo, called directly."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    group = context.communicator(device="cpu", transport="gloo")  # for its rendezvous only
    result = _peer_rows(context, "peer:gloo", lambda tensor: dist.all_reduce(tensor, group=group.group))
    group.close()
    return result


def peer_mpi(context) -> dict:
    """mpi4py's Allreduce on the buffer, called directly."""
    from shardwise.comm.mpi_library import load

    MPI = load()
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    return _peer_rows(context, "peer:mpi", lambda tensor: world.Allreduce(MPI.IN_PLACE, tensor.numpy()))
