"""A program of a user's own, without any guard: `ending_ranks.py HOW TRANSPORT`, on every rank."""

import sys
import time

import torch

from shardwise.comm.arrival import MessageArrivals
from shardwise.comm.base import CollectiveMismatch
from shardwise.comm.strategy import create
from shardwise.launch.env import detect

HANG_SECONDS = 100
"""Longer than any test waits."""


def group_of(transport):
    if transport != "messages":
        return create(detect(), transport=transport)
    from shardwise.comm import mpi, mpi_library
    from shardwise.comm.watch import Deadlines

    comm = mpi_library.world_communicator()
    return mpi.MpiCommunicator(comm, arrivals=MessageArrivals(comm), deadlines=Deadlines())


how, transport = sys.argv[1:]
torch.set_num_threads(1)
group = group_of(transport)
group.all_reduce(torch.ones(4))
if how == "exit" and group.rank == 1:
    sys.exit(3)
if how == "hang" and group.rank == 1:
    time.sleep(HANG_SECONDS)
if how == "caught":
    try:
        group.all_reduce(torch.ones(4 + group.rank))
    except CollectiveMismatch:
        sys.exit()
if how == "work":
    if group.rank == 0:
        time.sleep(1.5)
        print("rank 0 is done")
    sys.exit()
try:
    group.all_reduce(torch.ones(4))
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(7)
