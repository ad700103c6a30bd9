"""Which transport serves a group, and why. `create()` makes the world group, `make_groups()` the mesh axes' groups.

The choice is made from facts that all ranks share, so every rank comes to the same one; `why()` of the result says
what was chosen and for what reason.
"""

import platform
import sys
from typing import TYPE_CHECKING

from shardwise.comm.base import TRANSPORTS, Communicator, CommError
from shardwise.comm.bootstrap import Rendezvous, Store, StoreRendezvous, store_from_environment
from shardwise.comm.rank import Groups, RankInfo
from shardwise.comm.watch import Deadlines

if TYPE_CHECKING:
    from shardwise.sharding.layout import ParallelLayout

MPI_SOURCES = ("Open MPI", "MPICH")


def shared_memory_usable() -> tuple[bool, str]:
    """(usable, reason) of the shared-memory transport on this machine, not regarding where the peers are."""
    if not sys.platform.startswith("linux"):
        return False, f"shared memory needs Linux (memfd), this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return False, (
            f"shared memory needs x86-64, where plain stores become visible in program order; this is "
            f"{platform.machine()}"
        )
    return True, "Linux on x86-64"


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
    Raises CommError with the reason when a transport asked for by name cannot run here.
    """
    if transport != "auto" and transport not in TRANSPORTS:
        raise ValueError(f"unknown transport {transport!r}; legal: auto, {', '.join(TRANSPORTS)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; legal: cpu, cuda")
    options = {"deadlines": deadlines or Deadlines.from_environment(), "check": check, "deterministic": deterministic}
    if transport == "fake" or (info.world == 1 and transport == "auto"):
        from shardwise.comm.fake import FakeCommunicator

        return FakeCommunicator(info.rank, range(info.world), **options)
    if transport == "threads":
        raise CommError("transport threads has no processes to join: use shardwise.testing.run_threads")
    from shardwise.comm.choose import Factory

    return Factory(info, device, store, process_group, mpi_comm, options).make(transport)


def rendezvous(info: RankInfo, store: Store | None, deadlines: Deadlines) -> Rendezvous:
    """Through `store`, or through the one that the environment names."""
    store = store or store_from_environment(info, deadlines.rendezvous)
    return StoreRendezvous(store, info.rank, range(info.world))


def make_groups(world: Communicator, layout: "ParallelLayout | None" = None) -> Groups:
    """One communicator a mesh axis. Every rank of `world` calls it; None means tensor parallelism over all ranks.

    tp runs fastest inside attn_dp, moe_ep fastest inside moe_tp. Axes with the same members share a communicator.
    """
    size = world.size
    tp, moe_ep = (layout.tp, layout.moe_ep) if layout is not None else (size, 1)
    for name, axis in (("tp x attn_dp", tp), ("moe_tp x moe_ep", moe_ep)):
        if axis < 1 or size % axis:
            raise ValueError(f"layout does not fit: {name} must be the world of {size}, but one axis is {axis}")
    made: dict[tuple[int, ...], Communicator] = {tuple(range(size)): world}

    def group(colors: list[int]) -> Communicator:
        members = tuple(i for i in range(size) if colors[i] == colors[world.rank])
        if len(set(colors)) == 1:
            return world
        if members not in made:
            made[members] = world.split_known(colors)  # type: ignore[attr-defined]
        return made[members]

    return Groups(
        world=world,
        tp=group([rank // tp for rank in range(size)]),
        attn_dp=group([rank % tp for rank in range(size)]),
        moe_tp=group([rank % moe_ep for rank in range(size)]),
        moe_ep=group([rank // moe_ep for rank in range(size)]),
    )
