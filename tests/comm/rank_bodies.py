"""What the ranks do that the tests start as processes. Importable, so that worker processes find it by name."""

import importlib
import os
import time
import traceback

import conformance
import random_calls
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.comm import arrival, mpi, mpi_library, sharing
from shardwise.comm.arrival import MessageArrivals
from shardwise.comm.base import CommError
from shardwise.comm.bootstrap import FolderStore, GroupRendezvous
from shardwise.comm.rank import RankInfo
from shardwise.comm.strategy import create
from shardwise.comm.torch_dist import TorchDistCommunicator
from shardwise.comm.watch import Deadlines


def conform(info, store, transport, options):
    """All cases on one transport: (names of the cases, why)."""
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, **options)
    fixed = conformance.FIXED_ORDER_CASES if transport != "gloo" or options.get("deterministic") else ()
    passed = conformance.run(group, conformance.CASES + fixed)
    why = group.why()
    group.barrier()
    group.close()
    return passed, why


def conform_shared_memory(info, store):
    """All cases with reading out of the peers' tensors, and again in chunks, as where the kernel forbids it."""
    torch.set_num_threads(1)
    group = create(info, transport="shm", store=store)
    runs = []
    for reads_peers in (group.reads_peers, False):
        group.reads_peers = reads_peers
        passed = conformance.run(group, conformance.CASES + conformance.FIXED_ORDER_CASES)
        runs.append((passed, group.explain("all_reduce", 1 << 24)))
    return runs


def conform_without_shared_memory(info, store):
    torch.set_num_threads(1)
    comm = mpi_library.world_communicator()
    group = mpi.MpiCommunicator(comm, arrivals=MessageArrivals(comm), deadlines=Deadlines())
    return conformance.run(group)


def conform_cuda(info, store, transports):
    """All cases on CUDA tensors for each transport: {name: (cases, why), or (error, None)}."""
    results = {}
    for name in transports:
        transport, _, mode = name.partition(" ")
        options = {"check": mode == "checked", "deterministic": mode == "deterministic"}
        place = store and FolderStore(store.folder / name.replace(" ", "-"))
        try:
            results[name] = _conform_cuda(info, place, transport, options)
        except Exception:
            results[name] = traceback.format_exc(), None
    return results


def _conform_cuda(info, store, transport, options):
    group = create(info, transport=transport, store=store, device="cuda", **options)
    fixed = conformance.FIXED_ORDER_CASES if transport == "p2p" else ()
    torch.set_default_device("cuda")
    try:
        passed, why = conformance.run(group, conformance.CASES + fixed), group.why()
        if transport == "p2p":
            assert group.split(0, key=-group.rank).transport == "p2p", "sub-groups have kernels of their own"
    finally:
        torch.set_default_device("cpu")
    group.barrier()
    group.close()
    return passed, why


def adopt_process_group(info, store):
    """A program that has its own torch.distributed."""
    importlib.import_module("shardwise.ops")  # registers the operators
    dist.init_process_group("gloo", init_method=f"file://{store.folder}/torch", rank=info.rank, world_size=info.world)
    x = torch.tensor([info.rank + 1.0])
    result = {}
    sums = []
    for transport in ("gloo", "auto"):
        group = create(info, transport=transport, process_group=dist.group.WORLD)
        sums.append(group.all_reduce(x).item())
        result[transport] = group.why()
        group.close()
    sums.append(torch.ops.auto_deploy.torch_dist_all_reduce(x, "AUTO").item())
    expert = [torch.eye(2)], [torch.eye(2) * (info.rank + 1)], []
    routing, mapping = torch.tensor([[1.0, 10.0]]), '{"enable_attention_dp": true, "moe_ep_size": 2}'
    ids = torch.tensor([[0, 1]])
    routed = torch.ops.auto_deploy.torch_moe(torch.ones(1, 2), ids, routing, *expert, False, 8, mapping)
    with FakeTensorMode() as mode:
        fake = torch.ops.auto_deploy.torch_dist_all_gather(mode.from_tensor(torch.ones(1, 2)))
    dist.barrier()
    result |= {"sums": sums, "routed": routed.tolist(), "fake": tuple(fake.shape)}
    return {**result, "still there": dist.is_initialized()}


def adopt_group_of_another_backend(info, store):
    """A program whose torch.distributed has a backend of its own, as NCCL is, which gloo's part cannot be played on."""

    def other(prefix, rank, size, timeout):
        return dist.ProcessGroupGloo(prefix, rank, size, timeout=timeout)

    dist.Backend.register_backend("other", other, devices=["cpu"])
    dist.init_process_group("other", init_method=f"file://{store.folder}/torch", rank=info.rank, world_size=info.world)
    sharing.usable = lambda: (False, "not today")
    group = create(info, process_group=dist.group.WORLD)
    made = group.group
    total = group.all_reduce(torch.tensor([info.rank + 1.0])).item()
    group.barrier()
    group.close()
    left = made in dist.distributed_c10d._world.pg_map
    dist.barrier()  # the program's own group is still there
    return group.transport, total, made is dist.group.WORLD, left


def adopt_mpi_communicator(info, store):
    """A program that has its own MPI communicator."""
    comm = mpi_library.world_communicator()
    results = []
    for transport in ("mpi", "auto"):
        group = create(info, transport=transport, mpi_comm=comm)
        results.append((group.ranks, group.all_reduce(torch.tensor([info.rank + 1.0])).item()))
    part = comm.Split(int(info.rank == 0))
    place = RankInfo(part.Get_rank(), part.Get_size())
    named = [create(place, transport=name, mpi_comm=part).ranks for name in ("mpi", "shm")]
    return results, named


def create_twice(info, store):
    stores = [FolderStore(store.folder) for _ in range(3)]
    groups = [create(info, store=s, transport=t) for s, t in zip(stores, ("shm", "shm", "gloo"), strict=True)]
    inputs = [torch.tensor([factor * (info.rank + 1.0)]) for factor in (1, 10, 100)]
    return [group.all_reduce(x).item() for group, x in zip(groups, inputs, strict=True)]


def split_with_control(info, store):
    """Two parts of a group whose control messages go through another, as NCCL's do: ranks, a sum, what was told."""
    torch.set_num_threads(1)
    control = create(info, store=store, transport="shm")
    whole = TorchDistCommunicator.join(GroupRendezvous(control), "gloo", control=control, deadlines=Deadlines())
    part = whole.split_known([0, 0, 1, 1], [0, 1, 3, 2])
    result = part.ranks, part.all_reduce(torch.tensor([float(info.rank)])).item(), part.all_gather_object(info.rank)
    control.barrier()
    return result


def rank_1_fails(info, store):
    if info.rank == 1:
        raise KeyError("no such thing")
    create(info, store=store)


def random_sequence(info, store, transport, calls, seed, options=None):
    """Random calls with ranks that dawdle; how many of each kind were right."""
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, **(options or {}))
    return random_calls.Calls(random_calls.several(group), seed).run(calls)


def without_memory(info, store):
    """Shared memory that rank 0 cannot make: what serves instead, why, and whether it works."""

    def refuse(*_):
        raise OSError(28, "No space left on device")

    os.memfd_create = refuse
    group = create(info, store=store)
    total = group.all_reduce(torch.tensor([info.rank + 1.0])).item()
    group.barrier()
    group.close()
    return group.transport, group.why(), total


def split_again_and_again(info, store, transport):
    """Parts of the same members, one made when the one before is closed, by ranks that are not equally quick."""
    torch.set_num_threads(1)
    group = create(info, transport=transport, store=store, deadlines=Deadlines(collective=60))
    sums = []
    for turn in range(8):
        part = group.split_known([0, 0, 1])
        sums.append(part.all_reduce(torch.tensor([1.0])).item())
        time.sleep(0.01 * ((turn + info.rank) % 2))
        part.close()
    group.barrier()
    group.close()
    return sums


def close_parts(info, store, transport):
    """How many of the library's groups this rank holds: before two splits, one in the other, after, and when closed."""
    group = create(info, transport=transport, store=store)

    def held():
        return len(arrival._owned) if transport == "mpi" else len(dist.distributed_c10d._world.pg_map)

    counts = [held()]
    part = group.split(0)
    deeper = part.split(0, key=-info.rank)
    assert deeper.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
    counts.append(held())
    group.barrier()
    part.close()
    counts.append(held())
    assert group.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0], "the group itself stays"
    refused = None
    try:
        deeper.all_reduce(torch.ones(2))
    except CommError as error:
        refused = str(error)
    group.close()
    return counts, refused
