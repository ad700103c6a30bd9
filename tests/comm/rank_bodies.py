"""What the ranks do that the tests start as processes. Importable, so that worker processes find it by name."""

import conformance
import torch

from shardwise.comm import mpi
from shardwise.comm.arrival import MessageArrivals
from shardwise.comm.strategy import create
from shardwise.comm.watch import Deadlines


def conform(info, store, transport, options):
    """All cases on one transport; the result lists (case, seconds)."""
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, **options)
    fixed = conformance.FIXED_ORDER_CASES if transport != "gloo" or options.get("deterministic") else ()
    passed = conformance.run(group, conformance.CASES + fixed)
    why = group.why()
    group.barrier()
    group.close()
    return passed, why


def conform_in_chunks(info, store):
    """Shared memory where the kernel does not let processes read each other."""
    torch.set_num_threads(1)
    group = create(info, transport="shm", store=store)
    group.reads_peers = False
    return conformance.run(group, conformance.CASES + conformance.FIXED_ORDER_CASES), group.explain(
        "all_reduce", 1 << 24
    )


def conform_without_shared_memory(info, store):
    torch.set_num_threads(1)
    comm = mpi.world_communicator()
    group = mpi.MpiCommunicator(comm, arrivals=MessageArrivals(comm), deadlines=Deadlines())
    return conformance.run(group)


def conform_cuda(info, store, transport):
    """All cases on CUDA tensors."""
    group = create(info, transport=transport, store=store, device="cuda")
    torch.set_default_device("cuda")
    passed, why = conformance.run(group), group.why()
    group.barrier()
    group.close()
    return passed, why
