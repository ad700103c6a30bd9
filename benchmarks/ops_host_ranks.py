"""Host time of one eager call of the operators of several ranks, beside their group's own method.

    python benchmarks/ops_host_ranks.py [--device cuda] [--transport NAME] [-n 2] [--json FILE]

Starts the ranks, one a GPU or all on this machine's CPU, and times on each of them as `ops_host_time.py` does, at sizes
of one token; ranks make the same calls in the same order, each on cores of its own. A row is that of the rank that
takes longer beyond its kernels: on GPUs a bare launch for an operator that is a kernel of ours, the library's own call
where NCCL moves the bytes, and PyTorch's operators with the group's sum for the sharded norm. `NCCL` is the library's
call beside a kernel of ours, `group` the method of the communicator, which the operator finds and calls. On CPUs, where
a call waits for the other ranks, that method stands for the kernel.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from host_time import Row, bare_launch, least_times, show, write

import shardwise.ops  # noqa: F401  registers the operators
from shardwise.comm.base import Communicator
from shardwise.comm.rank import use_groups
from shardwise.comm.strategy import make_groups
from shardwise.launch.start import run_job

OPS = torch.ops.auto_deploy
HIDDEN, EPS = 4096, 1e-5


def rank_rows(group: Communicator, device: str) -> Iterator[Row]:
    """Of the distributed operators and the sharded norm, on one token in bfloat16."""
    on_gpu, kernels = device == "cuda", int(group.transport == "p2p")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    def row(operator: str, call: Callable, direct: Callable, method: Callable) -> Row:
        """Of one kernel of transport p2p; `direct` is what else it is."""
        library = "NCCL" if kernels else "direct"
        return Row(operator, call, kernels, {library: direct if on_gpu else method, "group": method})

    x, residual, weight = draw(1, HIDDEN), draw(1, HIDDEN), draw(HIDDEN)
    summed = partial(torch.distributed.all_reduce, x.clone(), group=_library_group(group)) if on_gpu else None
    for name in ("torch_dist_all_reduce", "trtllm_dist_all_reduce"):
        yield row(name, partial(getattr(OPS, name), x, "AUTO"), summed, partial(group.all_reduce, x))
    fused = torch.ops.dist.trtllm_fused_allreduce_residual_rmsnorm
    method = partial(group.all_reduce_residual_rms_norm, x, residual, weight, EPS)
    yield row("trtllm_fused_allreduce_residual_rmsnorm", partial(fused, x, residual, weight, EPS, "AUTO"),
              partial(_sum_and_norm, summed, x, residual, weight), method)  # fmt: skip
    for dim in (0, -1):
        method = partial(group.all_gather, x, dim)
        direct = partial(_gathered, x, _library_group(group), dim) if on_gpu else method
        for name in ("torch_dist_all_gather", "trtllm_dist_all_gather"):
            yield row(f"{name}, dim {dim}", partial(getattr(OPS, name), x, dim), direct, method)
    part, gain = draw(1, HIDDEN // group.size), draw(HIDDEN // group.size)
    direct = partial(_sharded_norm, group, part, gain)
    yield Row("sharded_rmsnorm", partial(OPS.sharded_rmsnorm, part, gain, EPS, group.size), 0, {"direct": direct})


def _library_group(group: Communicator) -> torch.distributed.ProcessGroup:
    """NCCL's, on which a group on GPUs rides."""
    return getattr(group, "fallback", group).group


def _gathered(x: torch.Tensor, group: torch.distributed.ProcessGroup, dim: int) -> torch.Tensor:
    """NCCL's gather of rows, and what puts their parts side by side."""
    rows = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(rows, x, group=group)
    return rows if dim == 0 else torch.cat(rows.chunk(group.size()), dim)


def _sum_and_norm(summed: Callable, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What transport nccl makes of the fused operator."""
    summed()
    return torch.rms_norm(x + residual, (HIDDEN,), weight, EPS)


def _sharded_norm(group: Communicator, part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The formula of the sharded norm, its group given."""
    wide = part.float()
    squares = wide.square().sum(-1, keepdim=True)
    sums = group.all_reduce(torch.cat((squares.flatten(), squares.new_full((1,), part.shape[-1]))))
    mean = (sums[:-1] / sums[-1]).view(squares.shape)
    return torch.empty_like(part).copy_((wide * torch.rsqrt(mean + EPS)).to(part.dtype) * weight)


def job(context) -> dict:
    """What each rank does; payload: device, transport, turns, rounds."""
    wanted, rank, world = context.payload, context.info.local_rank, context.info.local_world
    torch.set_num_threads(1)
    group = context.communicator(device=wanted["device"], transport=wanted["transport"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[rank::world] or cores)  # of which the measuring loops pick the quickest
    with torch.inference_mode(), use_groups(make_groups(group)):
        rows = list(rank_rows(group, wanted["device"]))
        launch = bare_launch(torch.zeros(8, device="cuda")) if wanted["device"] == "cuda" else None
        group.barrier()
        table = least_times(rows, launch, wanted["turns"], wanted["rounds"])
        group.barrier()
    why = group.why()
    group.close()
    return {"rows": table, "why": why}


def main() -> None:
    """Start the ranks, print and write the slower one's rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--transport", default="auto", metavar="NAME", help="p2p, nccl, shm, gloo (default: auto)")
    parser.add_argument("-n", "--world", type=int, default=2, metavar="N", help="ranks to start (default 2)")
    parser.add_argument("--turns", type=int, default=6, help="over all rows (default 6)")
    parser.add_argument("--rounds", type=int, default=10, help="of a row in each turn (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    here = Path(__file__).parent
    search = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    payload = {name: getattr(args, name) for name in ("device", "transport", "turns", "rounds")}
    ranks = run_job("ops_host_ranks:job", payload, world=args.world, environment={"PYTHONPATH": search})
    measured = zip(*(rank["rows"] for rank in ranks), strict=True)
    table = [max(of_ranks, key=lambda row: row["beyond_us"]) for of_ranks in measured]
    print(ranks[0]["why"])
    show(table)
    write(args.json, table, group=ranks[0]["why"], ranks=args.world)


if __name__ == "__main__":
    main()
