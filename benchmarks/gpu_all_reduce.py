"""All-reduce on GPUs of one host, plain and fused with residual add and RMSNorm, beside its peers in the same run.

    python3 -m torch.distributed.run --nproc-per-node WORLD benchmarks/gpu_all_reduce.py --json FILE

Each time is that of one call among many captured in a CUDA graph: the median over replays, the slowest rank's (the
loop of `shardwise bench comm`). Random bf16 data, several input sets in turn, and for some sizes one set. NCCL reduces
in place with AVG instead of SUM, so that its data stays finite over the replays. Every own row is checked first:
against a float64 sum of the same inputs, and bitwise between ranks. The floor in the last column: bytes over the link's
rate, which the copy engines measure in this run with both directions busy, plus the time of a graph node that does
nothing.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from datetime import timedelta

from shardwise.launch import env

os.environ.update(env.NO_MULTICAST)

import torch
import torch.distributed as dist

from shardwise.comm import bench as measure
from shardwise.comm.bench_peers import Peers, made
from shardwise.comm.p2p import cuda, table
from shardwise.comm.p2p.launch import Launcher
from shardwise.comm.p2p.workspace import Workspace
from shardwise.launch.machine import machine_facts

KIB, MIB = 1 << 10, 1 << 20
PLAIN_BYTES = [KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
FUSED_SHAPES = [(t, h) for h in (2880, 4096, 7168) for t in (1, 4, 16, 64, 256, 1024)] + [(4096, 7168)]
FOOTPRINT = 256 * MIB
"""Input sets together are at most this large, and at most eight."""
EPS = 1e-5
DTYPE = torch.bfloat16
CACHED_SHAPES = [(64, 7168), (256, 7168), (1024, 2880), (1024, 7168)]
"""Timed with one input set too: in a model the kernel before has just written x, so it lies in the cache."""


class Bench:
    """One rank's end of the run."""

    def __init__(self):
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.ranks, self.size = tuple(range(self.world)), self.world
        self.device = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(self.device)
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        self.nccl = dist.new_group(backend="nccl", timeout=timedelta(seconds=120))
        self.workspace = Workspace(self, self.device)
        self.launcher = Launcher(self.workspace, 20.0)
        self.random = torch.Generator(device="cuda").manual_seed(self.rank)
        self.beside = Peers(self.nccl)
        self.rows: list[dict] = []
        self.sets = 0
        """Input sets of the rows that come next."""
        self.said: set[tuple[str, str]] = set()
        self.link_rate = self._link_rate()
        self.node_us = self.time(self._nothing(), 100)[0]

    def all_gather_object(self, value):
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=self.random).to(DTYPE)

    def shared(self, *shape: int) -> torch.Tensor:
        """The same on all ranks, as residual and weight are in a model."""
        tensor = self.tensor(*shape)
        dist.broadcast(tensor, 0, group=self.nccl)
        return tensor

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor, group=self.nccl)
        return parts

    def meet(self) -> None:
        dist.barrier()
        self.workspace.check()

    def time(self, call: Callable[[int], object], calls: int) -> tuple[float, float]:
        """(median, 99th percentile) microseconds of a call, of the slowest rank. `call(i)` is the i-th of a graph."""
        times = measure.slowest(measure.time_graph(call, calls, self.meet), self.all_gather_object)
        return statistics.median(times), times[-1]

    def _nothing(self) -> Callable[[int], object]:
        word = torch.zeros(1, device="cuda")
        return lambda i: word.add_(1)

    def _link_rate(self) -> float:
        """GB/s of each direction while all ranks copy to their neighbour."""
        size = 64 * MIB
        source, stream = self.tensor(size // 2), torch.cuda.Stream()
        peer = self.workspace.slots[(self.rank + 1) % self.world]
        torch.cuda.synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for i in range(12):
                if i == 2:
                    begin.record()
                cuda.copy(peer, source.data_ptr(), size, stream)
            end.record()
        stream.synchronize()
        slowest = max(self.all_gather_object(begin.elapsed_time(end) / 10))
        cuda.fill(
            self.workspace.slots[self.rank], 0xFF, 2 * (self.world - 1) * self.workspace.region_bytes, self.device
        )
        dist.barrier()
        return size / slowest / 1e6

    def floor_us(self, nbytes: int) -> float:
        """World 2 sends N bytes each way; larger worlds 2 (W - 1) / W of N in two steps."""
        traffic = nbytes if self.world == 2 else 2 * (self.world - 1) / self.world * nbytes
        return self.node_us + traffic / self.link_rate / 1e3

    def write(self, path: str | None) -> None:
        """All rows so far, so that a run that is cut short has them."""
        if self.rank or not path:
            return
        machine = machine_facts() | {
            "gpus": self.world,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "link_gbps": round(self.link_rate, 1),
            "empty_node_us": round(self.node_us, 2),
        }
        with open(path, "w") as file:
            json.dump({"machine": machine, "rows": self.rows}, file, indent=1)

    def add(self, op: str, nbytes: int, shape, transport: str, strategy: str, times, wrong=None) -> float:
        p50, p99 = times
        bus = nbytes * 2 * (self.world - 1) / self.world / p50 / 1e3
        self.rows.append(
            {
                "op": op,
                "bytes": nbytes,
                "shape": list(shape),
                "dtype": "bfloat16",
                "world": self.world,
                "sets": self.sets,
                "transport": transport,
                "strategy": strategy,
                "p50_us": round(p50, 2),
                "p99_us": round(p99, 2),
                "busbw_gbps": round(bus, 1),
                "wrong": wrong,
                "floor_us": round(self.floor_us(nbytes), 2),
            }
        )
        return p50

    def peers(self, op: str, nbytes: int, shape, makers) -> list[str]:
        """Time the peers; '-' where one cannot run, or takes no such size."""
        cells = []
        for name, maker in makers.items():
            peer, reason = made(maker, self.all_gather_object)
            if reason and (name, reason) not in self.said:
                self.said.add((name, reason))
                self.say(f"  {name}: {reason}")
            text = "-"
            if peer is not None:
                times = self.time(peer.call, measure.graph_calls(nbytes))
                text = f"{self.add(op, nbytes, shape, 'peer:' + name, '', times):.2f}"
            cells.append(f"{name} {text}")
        return cells


def sets(nbytes: int) -> int:
    return max(1, min(8, FOOTPRINT // nbytes))


def wrong_values(bench: Bench, pairs) -> int:
    """Values off by more than one rounding of bf16, or different between ranks. `pairs`: (found, exact in float64)."""
    wrong = 0
    for found, exact in pairs:
        limit = 2**-8 * exact.abs() + 1e-6
        wrong += int((~((found.double() - exact).abs() <= limit)).sum())
        wrong += sum(int((found.view(torch.int16) != other.view(torch.int16)).sum()) for other in bench.gathered(found))
    return sum(bench.all_gather_object(wrong))


def exact_sum(bench: Bench, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.double() for part in bench.gathered(x)]).sum(0)


def plain(bench: Bench, nbytes: int, strategies: list[str]) -> None:
    n, calls = nbytes // DTYPE.itemsize, measure.graph_calls(nbytes)
    data = [(bench.tensor(n), torch.empty(n, dtype=DTYPE, device="cuda")) for _ in range(sets(nbytes))]
    bench.sets = len(data)
    cells = []
    for strategy in strategies:
        choice = table.choose(bench.world, nbytes, False, strategy)
        if choice.tuning is None:
            cells.append(f"{strategy} -> NCCL")
            continue
        x, out = data[0]
        out.fill_(float("nan"))
        bench.launcher.all_reduce(x, out, choice.tuning)
        wrong = wrong_values(bench, [(out, exact_sum(bench, x))])
        times = bench.time(lambda i, t=choice.tuning: bench.launcher.all_reduce(*data[i % len(data)], t), calls)
        cells.append(
            f"{strategy} {bench.add('all_reduce', nbytes, (n,), 'p2p', strategy, times, wrong):.2f} wrong {wrong}"
        )
    cells += bench.peers("all_reduce", nbytes, (n,), bench.beside.plain([out for _, out in data]))
    bench.say(f"plain {nbytes / KIB:>8g} KiB  {' | '.join(cells)} | floor {bench.floor_us(nbytes):.2f}")


def fused(bench: Bench, shape: tuple[int, int], strategies: list[str], most_sets: int = 8) -> None:
    tokens, hidden = shape
    nbytes = tokens * hidden * DTYPE.itemsize
    calls = measure.graph_calls(nbytes)
    weight = bench.shared(hidden)
    data = [(bench.tensor(*shape), bench.shared(*shape)) for _ in range(min(most_sets, sets(2 * nbytes)))]
    bench.sets = len(data)
    out, total = torch.empty_like(data[0][0]), torch.empty_like(data[0][0])
    cells = []
    for strategy in strategies:
        tuning = table.choose(bench.world, nbytes, True, strategy).tuning
        if tuning is None:
            cells.append(f"{strategy} -> NCCL")
            continue

        def call(i: int, tuning=tuning) -> None:
            bench.launcher.fused(*data[i % len(data)], weight, EPS, 0.0, out, total, tuning)

        out.fill_(float("nan"))
        call(0)
        wrong = wrong_values(bench, fused_pairs(bench, data[0], weight, out, total))
        times = bench.time(call, calls)
        cells.append(f"{strategy} {bench.add('fused', nbytes, shape, 'p2p', strategy, times, wrong):.2f} wrong {wrong}")
    cells += bench.peers("fused", nbytes, shape, bench.beside.fused(data, weight))
    where = f"{bench.sets} input sets"
    bench.say(f"fused {tokens:>5} x {hidden}, {where}  {' | '.join(cells)} | floor {bench.floor_us(nbytes):.2f}")


def fused_pairs(bench: Bench, pair, weight, out, total):
    """Both results against float64, rounded where the operation rounds: after the sum, and after the residual."""
    summed = exact_sum(bench, pair[0]).to(DTYPE).double()
    stream = summed + pair[1].double()
    rounded = total.double()
    normed = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + EPS) * weight.double()
    return [(total, stream), (out, normed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows and the machine to this file")
    parser.add_argument("--strategies", default="AUTO,TWOSHOT", help="own strategies, separated by commas")
    arguments = parser.parse_args()
    bench, strategies = Bench(), arguments.strategies.split(",")
    bench.say(f"link {bench.link_rate:.0f} GB/s each way, empty graph node {bench.node_us:.2f} us; times in us")
    for nbytes in PLAIN_BYTES:
        plain(bench, nbytes, strategies)
        bench.write(arguments.json)
    for shape in FUSED_SHAPES:
        fused(bench, shape, strategies)
        bench.write(arguments.json)
    for shape in CACHED_SHAPES:
        fused(bench, shape, strategies, most_sets=1)
        bench.write(arguments.json)
    bench.meet()
    bench.workspace.close()
    os._exit(0)  # peers' own teardown order is not part of the measurement


if __name__ == "__main__":
    main()
