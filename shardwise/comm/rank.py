"""Who am I: rank identity, and the groups that the current code runs in. Free of torch."""

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.comm.base import Communicator


@dataclass(frozen=True)
class RankInfo:
    """One process of a job, as its launcher numbered it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    source: str = "single process"
    """Where the numbers come from, for messages: torchrun, Open MPI, MPICH, Slurm, Ray, local, single process."""

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise ValueError(f"{self.source}: rank {self.rank} is not in [0, world={self.world})")
        if not 0 <= self.local_rank < self.local_world <= self.world:
            raise ValueError(
                f"{self.source}: local rank {self.local_rank} of {self.local_world} does not fit in world {self.world}"
            )


@dataclass(frozen=True)
class Groups:
    """The communicators of one rank, one a mesh axis; a mesh axis of size 1 holds a one-rank communicator."""

    world: "Communicator"
    tp: "Communicator"
    attn_dp: "Communicator"
    moe_tp: "Communicator"
    moe_ep: "Communicator"

    @property
    def transports(self) -> str:
        """What moves the bytes: of tp's first, `p2p + nccl` where that of another group of several ranks differs."""
        groups = [each for each in (self.tp, self.moe_tp, self.moe_ep, self.attn_dp, self.world) if each.size > 1]
        return " + ".join(dict.fromkeys(each.transport for each in groups or [self.world]))

    def check_waits(self) -> None:
        """Raise what waits on the device have found in any group. Call it after synchronising."""
        for group in (self.world, self.tp, self.attn_dp, self.moe_tp, self.moe_ep):
            group.check_waits()


_CURRENT: ContextVar[Groups | None] = ContextVar("shardwise_groups", default=None)


def current_groups() -> Groups | None:
    """Groups of the running rank (per thread, so that ranks may be threads), or None outside of any."""
    return _CURRENT.get()


@contextlib.contextmanager
def use_groups(groups: Groups):
    """Operators without a group argument use `groups` inside this block, in its thread."""
    before = _CURRENT.get()
    _CURRENT.set(groups)
    try:
        yield groups
    finally:
        if _CURRENT.get() is groups:  # else another thread ends the block, which a token would not let it do
            _CURRENT.set(before)
