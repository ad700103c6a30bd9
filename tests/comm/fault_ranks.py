"""Ranks with something wrong: what the others see is returned as (exception's name, text, missing ranks, seconds)."""

import os
import signal
import time

import torch

from shardwise.comm import watch
from shardwise.comm.base import CommError
from shardwise.comm.strategy import create
from shardwise.comm.watch import Deadlines


def outcome(call):
    """What `call` raises, as plain values."""
    begin = time.monotonic()
    try:
        call()
    except CommError as error:
        return type(error).__name__, str(error), getattr(error, "missing", ()), time.monotonic() - begin
    return "nothing", "", (), time.monotonic() - begin


def one_rank_is_late(info, store, transport, late):
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=0.7))
    group.all_reduce(torch.ones(4))
    if info.rank == late:
        time.sleep(4)
        return None
    result = outcome(lambda: group.all_reduce(torch.ones(4)))
    again = outcome(lambda: group.all_reduce(torch.ones(4)))
    time.sleep(0.5)  # mpirun ends all ranks when the first one leaves without finalising
    return result, again, watch.FLIGHT.last()


def one_rank_is_slow(info, store, transport, slow):
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=20))
    if info.rank == slow:
        time.sleep(0.7)
    return outcome(lambda: group.all_reduce(torch.ones(4)))


def one_rank_dies(info, store, transport, victim, how):
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    group.all_reduce(torch.ones(4))
    if info.rank == victim:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    return outcome(lambda: group.all_reduce(torch.ones(4)))


def one_rank_aborts(info, store, transport, in_sub_group):
    torch.set_num_threads(1)
    world = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    part = world.split(info.rank // 2)
    world.barrier()
    if info.rank == 0:
        time.sleep(0.3)
        world.abort("rank 0 ran out of ideas")
        return outcome(world.barrier)
    if info.rank == 3 and in_sub_group:
        time.sleep(1.0)
        return None
    return outcome((part if in_sub_group else world).barrier)


def calls_differ(info, store, transport, how):
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, check=True, deadlines=Deadlines(collective=20))
    group.all_reduce(torch.ones(4))
    odd = info.rank == 1
    calls = {
        "shape": lambda: group.all_reduce(torch.ones(5 if odd else 4)),
        "dtype": lambda: group.all_reduce(torch.ones(4, dtype=torch.bfloat16 if odd else torch.float32)),
        "op": lambda: group.barrier() if odd else group.all_reduce(torch.ones(4)),
        "strategy": lambda: group.all_reduce(torch.ones(4), strategy="TWOSHOT" if odd else "AUTO"),
        "root": lambda: group.broadcast(torch.ones(4), root=int(odd)),
    }
    return outcome(calls[how])
