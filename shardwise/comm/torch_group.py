"""Groups of torch.distributed: rendezvous through one, its store, what it can move, making and destroying one."""

import atexit
import faulthandler
import functools
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardwise.comm.bootstrap import Rendezvous, TorchStore, own_address, require_reachable


class ProcessGroupRendezvous(Rendezvous):
    """Through a torch.distributed group that somebody else made."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(dist.get_rank(group), dist.get_process_group_ranks(group))
        self.group = group

    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def served_store(meeting: Rendezvous, limit: float) -> TorchStore:
    """A TCPStore that rank 0 serves on a port of the system's choice, announced to the others by `meeting`."""
    store = None
    place = None
    if meeting.rank == 0:
        store = _tcp_store(_announced_address(meeting), 0, meeting.size, limit, serve=True)
        place = (store.host, store.port, f"{os.getpid()}-{time.time_ns()}")
    facts = meeting.gather("tcp-store", (place, socket.gethostname()), limit)
    (host, port, mark), _ = facts[0]
    require_reachable(host, [name for _, name in facts])
    return TorchStore(store or _tcp_store(host, port, meeting.size, limit, serve=False), mark)


def _tcp_store(host: str, port: int, world: int, limit: float, *, serve: bool) -> dist.TCPStore:
    return dist.TCPStore(host, port, world, serve, timeout=timedelta(seconds=limit), wait_for_workers=False)


def _announced_address(meeting: Rendezvous) -> str:
    """Where the first rank of `meeting` is reached: MASTER_ADDR, which is that of rank 0 of the world, else its own."""
    given = os.environ.get("MASTER_ADDR") if meeting.ranks[0] == 0 else None
    return given or own_address()


def serves(group: dist.ProcessGroup, backend: str) -> bool:
    """True where `group` moves the tensors of `backend`'s device by `backend`: a group may have one for each device."""
    device = "cuda" if backend == "nccl" else "cpu"
    return f"{device}:{backend}" in dist.get_backend_config(group).split(",")


_making = threading.local()
"""`name`: of the group that this thread is making."""
_named_by_torch: Any = getattr(distributed_c10d, "_process_group_name", None)
"""Torch takes no name as an argument, but asks this function of its own for one (2.11 to 2.13 do)."""


def _process_group_name(*arguments, **options):
    return getattr(_making, "name", None) or _named_by_torch(*arguments, **options)


if _named_by_torch is not None:  # a torch that names groups in another way keeps it
    distributed_c10d._process_group_name = _process_group_name  # for good: all but `new_group` get torch's own names


def new_group(ranks: Sequence[int], backend: str, name: str) -> dist.ProcessGroup:
    """Called by its members alone, with a name that no group before it had.

    Torch names a group by its members and the number of groups, so that one made after another of the same members was
    closed has that one's name, finds what that one left in the store, and waits for it for ever. Other threads may make
    groups meanwhile, in any order: under a lock those of two threads could wait for each other.
    """
    _making.name = name
    try:
        return dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
    finally:
        _making.name = None


def leave(limit: float, group: dist.ProcessGroup | None = None) -> bool:
    """End `group`, or all: gloo aborts a process that ends with its threads running. False if not within `limit`: a
    broken one may never end, nor one of NCCL while a CUDA graph holds calls of it."""
    if not dist.is_initialized():
        return True
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def end() -> None:
        if device is not None:  # a new thread's would be device 0
            torch.cuda.set_device(device)
        dist.destroy_process_group(group)

    leaving = threading.Thread(target=end, daemon=True)
    leaving.start()
    leaving.join(limit)
    return not leaving.is_alive()


@functools.cache
def bound_end(seconds: float) -> None:
    """Have this process end within `seconds` of its program's end, with code 1 then: a group of gloo is broken, and its
    destructor waits for calls that peers may never answer, until torch's own limit, which is that of loading."""
    atexit.register(faulthandler.dump_traceback_later, seconds, exit=True)
    os.register_at_fork(after_in_child=lambda: atexit.unregister(faulthandler.dump_traceback_later))
