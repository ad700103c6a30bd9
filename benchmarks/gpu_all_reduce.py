"""All-reduce on GPUs of one host, plain and fused with residual add and RMSNorm, beside its peers in the same run.

    NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 \
        python3 -m torch.distributed.run --nproc-per-node 2 benchmarks/gpu_all_reduce.py --json FILE

Each time is that of one call among many captured in a CUDA graph: the median over replays, the slowest rank's.
Random bf16 data, several input sets in turn. NCCL reduces in place with AVG instead of SUM, so that its data stays
finite over the replays. Every own row is checked first: against a float64 sum of the same inputs, and bitwise
between ranks. The floor in the last column: bytes over the link's rate, which the copy engines measure in this run
with both directions busy, plus the time of a graph node that does nothing.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from datetime import timedelta

for _name, _value in (
    ("NCCL_NVLS_ENABLE", "0"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from shardwise.comm.p2p import cuda, table  # noqa: E402
from shardwise.comm.p2p.launch import Launcher  # noqa: E402
from shardwise.comm.p2p.workspace import Workspace  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
PLAIN_BYTES = [KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
FUSED_SHAPES = [(t, h) for h in (2880, 4096, 7168) for t in (1, 4, 16, 64, 256, 1024)] + [(4096, 7168)]
REPLAYS, WARM_UP = 15, 3
FOOTPRINT = 256 * MIB
"""Input sets together are at most this large, and at most eight."""
EPS = 1e-5
DTYPE = torch.bfloat16


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
        self.rows: list[dict] = []
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

    def time(self, call: Callable[[int], object], calls: int) -> tuple[float, float]:
        """(median, 99th percentile) microseconds of a call, of the slowest rank. `call(i)` is the i-th of a graph."""
        call(0)
        torch.cuda.synchronize()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i)
        times = []
        for replay in range(WARM_UP + REPLAYS):
            dist.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream):
                begin.record()
                graph.replay()
                end.record()
            stream.synchronize()
            self.workspace.check()
            if replay >= WARM_UP:
                times.append(begin.elapsed_time(end) * 1e3 / calls)
        times.sort()
        worst = [max(values) for values in zip(*self.all_gather_object(times), strict=True)]
        return statistics.median(worst), worst[-1]

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

    def peer(self, op: str, nbytes: int, shape, name: str, make, calls: int) -> str:
        """Time a peer; '-' where it cannot run. `make()` returns the call, or None for a size it does not take."""
        runs = False
        try:
            call = make()
            if call is not None:
                call(0)
                torch.cuda.synchronize()
                runs = True
        except Exception as error:  # a peer that is missing or fails must not end the run
            self.say(f"  {name}: {type(error).__name__}: {str(error)[:160]}")
        if not all(self.all_gather_object(runs)):
            return "-"
        return f"{self.add(op, nbytes, shape, 'peer:' + name, '', self.time(call, calls)):.2f}"


def sets(nbytes: int) -> int:
    return max(1, min(8, FOOTPRINT // nbytes))


def calls_for(nbytes: int) -> int:
    """Ranks start a replay some 20 us apart, and the earlier one's time includes that: many calls make it small."""
    return 200 if nbytes <= MIB else 40 if nbytes <= 16 * MIB else 8


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
    n, calls = nbytes // DTYPE.itemsize, calls_for(nbytes)
    data = [(bench.tensor(n), torch.empty(n, dtype=DTYPE, device="cuda")) for _ in range(sets(nbytes))]
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
    peers = {
        "nccl": lambda: nccl_plain(bench, data),
        "symm_mem one-shot": lambda: symmetric(bench, n, "one_shot_all_reduce") if nbytes <= MIB else None,
        "symm_mem two-shot": lambda: symmetric(bench, n, "two_shot_all_reduce_") if nbytes <= 64 * MIB else None,
    }
    for name, make in peers.items():
        cells.append(f"{name} {bench.peer('all_reduce', nbytes, (n,), name, make, calls)}")
    bench.say(f"plain {nbytes / KIB:>8g} KiB  {' | '.join(cells)} | floor {bench.floor_us(nbytes):.2f}")


def nccl_plain(bench: Bench, data):
    return lambda i: dist.all_reduce(data[i % len(data)][1], op=dist.ReduceOp.AVG, group=bench.nccl)


def symmetric(bench: Bench, n: int, op: str):
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(n, dtype=DTYPE, device=torch.device("cuda", bench.device))
    name = bench.nccl.group_name
    symm_mem.rendezvous(buffer, name)
    buffer.copy_(bench.tensor(n))
    function = getattr(torch.ops.symm_mem, op)
    return lambda i: function(buffer, "sum", name)


def fused(bench: Bench, shape: tuple[int, int], strategies: list[str], flash) -> None:
    tokens, hidden = shape
    nbytes = tokens * hidden * DTYPE.itemsize
    calls = calls_for(nbytes)
    weight = bench.shared(hidden)
    data = [(bench.tensor(*shape), bench.shared(*shape)) for _ in range(sets(2 * nbytes))]
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
    for name, make in (
        ("flashinfer one-shot", lambda: flash(data, weight, out, total, True)),
        ("flashinfer two-shot", lambda: flash(data, weight, out, total, False) if tokens > 16 else None),
        ("nccl + norm", lambda: nccl_norm(bench, data, weight)),
    ):
        cells.append(f"{name} {bench.peer('fused', nbytes, shape, name, make, calls)}")
    bench.say(f"fused {tokens:>5} x {hidden}  {' | '.join(cells)} | floor {bench.floor_us(nbytes):.2f}")


def fused_pairs(bench: Bench, pair, weight, out, total):
    """Both results against float64, rounded where the operation rounds: after the sum, and after the residual."""
    summed = exact_sum(bench, pair[0]).to(DTYPE).double()
    stream = summed + pair[1].double()
    rounded = total.double()
    normed = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + EPS) * weight.double()
    return [(total, stream), (out, normed)]


def nccl_norm(bench: Bench, data, weight):
    from flashinfer.norm import fused_add_rmsnorm

    def call(i: int) -> None:
        x, residual = data[i % len(data)]
        dist.all_reduce(x, op=dist.ReduceOp.AVG, group=bench.nccl)
        fused_add_rmsnorm(x, residual, weight, EPS)

    return call


def flashinfer_call(bench: Bench, max_tokens: int, max_hidden: int):
    """Maker of FlashInfer calls, on its plain CUDA IPC workspace."""
    from flashinfer.comm import trtllm_ar as library

    library.get_trtllm_comm_module()
    _, workspace = library.trtllm_create_ipc_workspace_for_all_reduce_fusion(
        bench.rank, bench.world, max_tokens, max_hidden, group=bench.nccl, use_symm_dev_mem=False
    )

    def make(data, weight, out, total, one_shot: bool):
        tokens, hidden = out.shape
        if tokens * hidden > max_tokens * max_hidden:
            return None

        def call(i: int) -> None:
            x, residual = data[i % len(data)]
            library.trtllm_allreduce_fusion(
                allreduce_in=x, world_size=bench.world, world_rank=bench.rank, token_num=tokens, hidden_dim=hidden,
                workspace_ptrs=workspace, launch_with_pdl=True, trigger_completion_at_end=True, fp32_acc=True,
                pattern_code=library.AllReduceFusionPattern.kARResidualRMSNorm, use_oneshot=one_shot,
                allreduce_out=None, residual_in=residual, residual_out=total, norm_out=out, quant_out=None,
                scale_out=None, rms_gamma=weight, rms_eps=EPS, scale_factor=None, layout_code=None,
            )  # fmt: skip

        return call

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows and the machine to this file")
    parser.add_argument("--strategies", default="AUTO,TWOSHOT", help="own strategies, separated by commas")
    parser.add_argument("--no-flashinfer", action="store_true", help="do not compile FlashInfer's kernels")
    arguments = parser.parse_args()
    bench, strategies = Bench(), arguments.strategies.split(",")
    bench.say(f"link {bench.link_rate:.0f} GB/s each way, empty graph node {bench.node_us:.2f} us; times in us")

    def no_flash(*_):
        return None

    flash = no_flash
    if not arguments.no_flashinfer:
        try:
            flash = flashinfer_call(bench, 2048, 7168)
        except ImportError as error:
            bench.say(f"flashinfer: {error}")
    for nbytes in PLAIN_BYTES:
        plain(bench, nbytes, strategies)
    for shape in FUSED_SHAPES:
        fused(bench, shape, strategies, flash)
    if bench.rank == 0 and arguments.json:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": bench.world,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "link_gbps": round(bench.link_rate, 1),
            "empty_node_us": round(bench.node_us, 2),
        }
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "rows": bench.rows}, file, indent=1)
    bench.workspace.check()
    dist.barrier()
    bench.workspace.close()
    os._exit(0)  # peers' own teardown order is not part of the measurement


if __name__ == "__main__":
    main()
