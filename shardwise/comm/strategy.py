"""Which transport serves a group, and why. `create()` makes the world group, `make_groups()` the mesh axes' groups.

The choice is made from facts that all ranks share, so every rank comes to the same one; `why()` of the result says
what was chosen and for what reason.

On CUDA a group has three layers: a CPU group for control messages, NCCL, and on top the peer-to-peer kernels (`p2p/`)
with their own table of which size goes where.
"""

import os
import socket
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from shardwise.comm import sharing
from shardwise.comm.base import TRANSPORTS, CommError, Communicator, Unavailable
from shardwise.comm.bootstrap import (
    AloneRendezvous,
    GroupRendezvous,
    Rendezvous,
    Store,
    store_from_environment,
    world_rendezvous,
)
from shardwise.comm.rank import Groups, RankInfo
from shardwise.comm.watch import Deadlines

if TYPE_CHECKING:
    from shardwise.comm.collective import BaseCommunicator


class Grid(Protocol):
    """What groups are made from; `sharding.layout.ParallelLayout` is one."""

    @property
    def tp(self) -> int: ...

    @property
    def moe_ep(self) -> int: ...


MPI_SOURCES = ("Open MPI", "MPICH", "MVAPICH")


def create(
    info: RankInfo,
    *,
    transport: str = "auto",
    device: str = "cpu",
    store: Store | None = None,
    process_group=None,
    mpi_comm=None,
    deadlines: Deadlines | None = None,
    check: bool | None = None,
    deterministic: bool | None = None,
) -> Communicator:
    """The world group of the rank that `info` describes. Every rank calls it with the same arguments.

    transport      one of TRANSPORTS, or "auto": shared memory on one host, else MPI or gloo; NCCL and p2p on CUDA
    device         "cpu" or "cuda": where the tensors are that the group moves
    store          rendezvous of a local launcher; None: found in the environment
    process_group  an existing torch.distributed group to ride on
    mpi_comm       an existing mpi4py communicator to ride on
    Raises Unavailable with the reason when a transport asked for by name cannot run here.
    """
    if transport != "auto" and transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}; legal: auto, {', '.join(TRANSPORTS)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; legal: cpu, cuda")
    options: dict[str, Any] = {
        "deadlines": deadlines or Deadlines.from_environment(),
        "check": check,
        "deterministic": deterministic,
    }
    if transport == "fake" or (info.world == 1 and transport == "auto"):
        from shardwise.comm.fake import FakeCommunicator
        from shardwise.comm.member import ALONE

        group = FakeCommunicator(info.rank, range(info.world), **options)
        if transport == "auto":
            group.reason = ALONE
        return group
    if transport == "threads":
        raise Unavailable("transport threads has no processes to join: use shardwise.testing.run_threads")
    makers = {"cpu": _create_cpu, "cuda": _create_cuda}
    return makers[device](_Request(info, transport, store, process_group, mpi_comm, options))


@dataclass(frozen=True)
class _Request:
    info: RankInfo
    transport: str
    store: Store | None
    process_group: Any
    mpi_comm: Any
    options: dict[str, Any]

    @property
    def speaks_mpi(self) -> bool:
        return self.mpi_comm is not None or (self.info.source in MPI_SOURCES and self.store is None)

    def rendezvous(self) -> Rendezvous:
        """However these ranks can find each other."""
        deadlines = self.options["deadlines"]
        if self.process_group is not None:
            from shardwise.comm.torch_group import ProcessGroupRendezvous

            return ProcessGroupRendezvous(self.process_group)
        if self.info.world == 1 and not self.speaks_mpi:
            return AloneRendezvous()
        if self.speaks_mpi:
            from shardwise.comm.mpi_library import MpiRendezvous

            return MpiRendezvous(self.communicator(stays=True))
        store = self.store or store_from_environment(self.info, deadlines.rendezvous)
        return world_rendezvous(store, self.info)

    def communicator(self, stays: bool = False):
        """MPI's, over the ranks of `info`. Raises Unavailable where MPI knows other ranks than the launcher does."""
        from shardwise.comm.mpi_library import meeting_place, world_communicator
        from shardwise.comm.mpi_wait import bounded

        info = self.info
        with bounded(info.rank, range(info.world), self.options["deadlines"].rendezvous):
            comm = self.mpi_comm or (meeting_place() if stays else world_communicator())
        if (comm.Get_rank(), comm.Get_size()) != (info.rank, info.world):
            raise Unavailable(
                f"transport mpi needs ranks that the mpirun of its own MPI library started: {info.source} says rank "
                f"{info.rank} of {info.world}, MPI says rank {comm.Get_rank()} of {comm.Get_size()}"
            )
        return comm


def _create_cpu(request: _Request) -> "BaseCommunicator":
    if request.transport in ("nccl", "p2p", "flashinfer"):
        raise Unavailable(
            f"transport {request.transport} moves CUDA tensors, the group is for device cpu: give device cuda, or "
            "transport auto"
        )
    if request.transport == "mpi":
        return _mpi(request)
    if request.transport == "gloo":
        return _torch_dist(request, request.rendezvous(), "gloo")
    meeting = request.rendezvous()
    possible, reason = sharing.one_host(meeting, request.options["deadlines"].rendezvous)
    group = None
    if possible:
        try:
            group = _shared_memory(request, meeting)
        except CommError as error:  # on every rank, with the same text
            reason = str(error)
    if group is None and request.transport == "shm":
        raise Unavailable(f"transport shm cannot serve rank {request.info.rank}: {reason}")
    if group is None:
        group = _mpi(request) if request.speaks_mpi else _torch_dist(request, meeting, "gloo")
    if request.transport == "auto":
        group.reason = reason
    return group


def _shared_memory(request: _Request, meeting: Rendezvous) -> "BaseCommunicator":
    from shardwise.comm.shm import ShmCommunicator

    return ShmCommunicator.join(meeting, cores=len(os.sched_getaffinity(0)), **request.options)


def _mpi(request: _Request) -> "BaseCommunicator":
    from shardwise.comm.mpi import MpiCommunicator

    return MpiCommunicator(request.communicator(), **request.options)


def _torch_dist(request: _Request, meeting: Rendezvous, backend: str) -> "BaseCommunicator":
    from shardwise.comm.torch_dist import TorchDistCommunicator

    if request.process_group is not None:
        return TorchDistCommunicator.adopt(request.process_group, backend, **request.options)
    return TorchDistCommunicator.join(meeting, backend, **request.options)


def _create_cuda(request: _Request) -> "BaseCommunicator":
    """CPU group for control, NCCL on it, peer-to-peer kernels where the GPUs reach each other."""
    import torch

    from shardwise.comm.p2p.communicator import P2PCommunicator
    from shardwise.comm.p2p.communicator import create as create_p2p
    from shardwise.comm.p2p.workspace import P2PUnavailable
    from shardwise.comm.torch_dist import TorchDistCommunicator

    info = request.info
    if request.transport in ("gloo", "shm"):
        raise Unavailable(
            f"transport {request.transport} moves CPU tensors, the group is for device cuda: give device cpu, or "
            "transport auto"
        )
    if not torch.cuda.is_available():
        raise Unavailable(f"device cuda, rank {info.rank}: no CUDA device is available")
    if request.process_group is None:
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
    if request.transport == "mpi":
        return _mpi(request)  # which stages CUDA tensors through pinned memory
    control = _create_cpu(replace(request, transport="auto"))
    require_own_devices(control, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    if request.process_group is not None:
        nccl = TorchDistCommunicator.adopt(request.process_group, "nccl", control=control, **request.options)
    else:
        nccl = TorchDistCommunicator.join(GroupRendezvous(control), "nccl", control=control, **request.options)
    if request.transport == "nccl":
        return nccl
    if request.transport == "auto":
        return P2PCommunicator.or_fallback(nccl)
    try:
        return create_p2p(control, transport=request.transport, fallback=nccl)
    except P2PUnavailable as error:  # on every rank alike
        raise Unavailable(str(error)) from error


def require_own_devices(control: Communicator, device: str) -> None:
    """ValueError on every rank when two ranks hold the same device, named by its UUID."""
    hosts, devices = zip(*control.all_gather_object((socket.gethostname(), device)), strict=True)
    for rank, (host, each) in enumerate(zip(hosts, devices, strict=True)):
        first = devices.index(each)
        if first < rank:
            beside = {other for other, where in zip(devices, hosts, strict=True) if where == host}
            raise ValueError(
                f"ranks {control.ranks[first]} and {control.ranks[rank]} would share one CUDA device: host {host} has "
                f"{hosts.count(host)} ranks and shows them {len(beside)}; start fewer ranks (--tp), show more devices "
                "(CUDA_VISIBLE_DEVICES), or use --device cpu"
            )


_defaults: dict[str, tuple[Any, Communicator]] = {}
"""By device: torch.distributed's group, None for this rank alone, and what was made for it."""


def default_size() -> int:
    """Ranks of torch.distributed's default group, 1 where it is not initialised."""
    if "torch.distributed" not in sys.modules:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def default_group(device: str) -> Communicator:
    """The group for code that runs outside of `use_groups`: torch.distributed's default group, or this rank alone.

    Made at the first call, which every rank of the default group must reach.
    """
    info, group = RankInfo(), None
    if default_size() > 1:
        import torch.distributed as dist

        group = dist.group.WORLD
        info = RankInfo(dist.get_rank(), dist.get_world_size(), source="torch.distributed")
    kept = _defaults.get(device)
    if kept is None or kept[0] is not group:  # a group that was destroyed and made anew is another one
        kept = _defaults[device] = group, create(info, device=device, process_group=group)
    return kept[1]


def make_groups(world: Communicator, layout: "Grid | None" = None) -> Groups:
    """One communicator a mesh axis. Every rank of `world` calls it; None means tensor parallelism over all ranks.

    tp runs fastest inside attn_dp, moe_ep fastest inside moe_tp. Axes with the same members share a communicator.
    """
    size = world.size
    tp, moe_ep = (layout.tp, layout.moe_ep) if layout is not None else (size, 1)
    for name, axis, other in (("tp", tp, "attn_dp"), ("moe_ep", moe_ep, "moe_tp")):
        if axis < 1 or size % axis:
            raise ValueError(
                f"layout: {name} {axis} times {other} must be the world of {size}; legal {name}: "
                f"{' '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
            )
    made: dict[tuple[int, ...], Communicator] = {tuple(range(size)): world}

    def group(colors: list[int]) -> Communicator:
        members = tuple(i for i in range(size) if colors[i] == colors[world.rank])
        if len(set(colors)) == 1:
            return world
        if members not in made:
            made[members] = world.split_known(colors)
        return made[members]

    return Groups(
        world=world,
        tp=group([rank // tp for rank in range(size)]),
        attn_dp=group([rank % tp for rank in range(size)]),
        moe_tp=group([rank % moe_ep for rank in range(size)]),
        moe_ep=group([rank // moe_ep for rank in range(size)]),
    )
