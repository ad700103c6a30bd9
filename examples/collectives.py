"""Collectives among ranks, over the transport that serves them. Run it under a launcher:

torchrun --nproc-per-node 2 examples/collectives.py
mpirun -n 2 python examples/collectives.py

SHARDWISE_CHECK=1 compares the ranks' calls before a byte moves.
"""

import torch

from shardwise.comm.strategy import create
from shardwise.launch.env import detect
from shardwise.partition import extent, lengths

world = create(detect())
if world.rank == 0:
    print(world.why())

# Five rows dealt to the ranks by the package's split rule: the first ranks get one more.
start, stop = extent(5, world.size, world.rank)
mine = torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()

rows = world.all_gather(mine, sizes=lengths(5, world.size))
total = world.all_reduce(mine.sum(dim=0))
if world.rank == 0:
    print(rows[:, 0].tolist(), total.tolist())
    print(f"1 KiB: {world.explain('all_reduce', 1024)}")
world.barrier()
world.close()
