"""The peer-to-peer kernels on GPUs: against float64, bitwise between ranks, in graphs, when ranks are missing.

Ranks are threads that share the GPUs of this machine (one is enough, whatever the world), and, with two GPUs,
processes in both modes.
"""

import os
import signal
import threading
import time
import traceback

import pytest
import torch

pytest.importorskip("triton")
from p2p_checks import FEW_CASES, check_fused, check_low_precision, check_pieces, check_sums, warm
from p2p_gpu_checks import CHECKS

from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.watch import Deadlines
from shardwise.testing import run_processes, run_threads

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
pytestmark = [pytest.mark.gpu, needs_gpu]

REGION = 1 << 20


def p2p(fallback, deadline=20.0, region_bytes=REGION):
    from shardwise.comm.p2p.communicator import P2PCommunicator

    group = P2PCommunicator.connect(fallback, region_bytes=region_bytes)
    group.deadlines = Deadlines(collective=deadline)
    return group


def on_own_stream(body):
    """Ranks that are threads share the GPUs; each takes a stream of its own, as kernels wait for each other."""
    fallback = current_groups().world
    torch.cuda.set_device(fallback.rank % torch.cuda.device_count())
    with torch.cuda.stream(torch.cuda.Stream()):
        return body(fallback)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_as_threads(world):
    cases = FEW_CASES if world == 2 else FEW_CASES[:1]  # ranks of one process compile one after another, each its own

    def body(fallback):
        group = p2p(fallback)
        check_sums(group, cases, ("ONESHOT", "TWOSHOT"))
        check_fused(group, cases, ("ONESHOT", "TWOSHOT"))
        if world < 8:
            check_pieces(group)
            check_low_precision(group, (40_000,), (torch.bfloat16,))
        fallback.all_gather_object(None)
        group.workspace.close()

    run_threads(world, on_own_stream, body)


@pytest.mark.parametrize("world, missing", [(2, (1,)), (4, (2, 3))])
def test_ranks_that_never_call_are_named_and_the_kernel_ends(world, missing):
    def body(fallback):
        group = p2p(fallback, deadline=0.5)
        x = torch.ones(4096, device="cuda")
        warm(group, lambda: group.all_reduce(x, strategy="ONESHOT"))
        if group.rank not in missing:
            begun = time.monotonic()
            out = group.all_reduce(x, strategy="ONESHOT")
            with pytest.raises(CollectiveTimeout, match=f"never received rank {missing[0]}'s data") as caught:
                group.synchronize()
            assert time.monotonic() - begun < 5
            assert caught.value.missing == missing
            assert out.isnan().all(), "what did not arrive is not a number"
            with pytest.raises(CommError):
                group.all_reduce(x)
        fallback.all_gather_object(None)
        group.workspace.close()

    run_threads(world, on_own_stream, body)


def test_abort_ends_a_wait_on_the_device():
    def body(fallback):
        group = p2p(fallback, deadline=60)
        x = torch.ones(4096, device="cuda")
        warm(group, lambda: group.all_reduce(x, strategy="ONESHOT"))
        begun = time.monotonic()
        if group.rank == 0:
            group.all_reduce(x, strategy="ONESHOT")
            with pytest.raises(CommError, match="aborted by a rank of the group"):
                group.synchronize()
            assert time.monotonic() - begun < 10
        else:
            time.sleep(0.3)
            group.workspace.stop_waits()
        fallback.all_gather_object(None)
        group.workspace.close()

    run_threads(2, on_own_stream, body)


def test_one_workspace_serves_one_thread_at_a_time():
    def body(fallback):
        group = p2p(fallback)
        with group._flight:
            caught = []

            def intrude():
                try:
                    group.all_reduce(torch.ones(8, device=group.workspace.counters.device))
                except CommError as error:
                    caught.append(str(error))

            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        assert "two threads" in caught[0]
        fallback.all_gather_object(None)
        group.workspace.close()

    run_threads(2, on_own_stream, body)


def test_another_number_of_ranks_is_refused_with_the_reason():
    from shardwise.comm.p2p.workspace import P2PUnavailable

    def body(fallback):
        with pytest.raises(P2PUnavailable, match="group of 3 ranks"):
            p2p(fallback)

    run_threads(3, on_own_stream, body)


def run_checks(info: RankInfo, store, names: list[str]) -> dict[str, str]:
    """One rank of a job with a GPU for each rank: what failed, by name."""
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    fallback = create(info, store=store)
    group = p2p(fallback)
    failed = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in names:
            try:
                CHECKS[name](group)
            except Exception:
                failed[name] = traceback.format_exc()
            fallback.barrier()
    group.close()
    return failed


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="fewer than four CUDA devices")
def test_four_ranks_as_processes():
    results = run_processes(4, "test_p2p_gpu:run_checks", ["few", "graph", "pieces"], timeout=60)
    assert results == [{}] * 4, "\n".join(text for rank in results for text in rank.values())


@needs_two_gpus
@pytest.mark.parametrize("mpi", [False, True], ids=["demo mode", "MPI mode"])
def test_ranks_as_processes(mpi):
    names = ["sums", "graph", "bits"] if mpi else [name for name in CHECKS if name != "few"]
    results = run_processes(2, "test_p2p_gpu:run_checks", names, timeout=120, mpi=mpi)
    assert results == [{}, {}], "\n".join(text for rank in results for text in rank.values())


def rank_that_dies(info: RankInfo, store) -> str:
    """Rank 1 is killed with its graph half way; rank 0 replays on."""
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    group = p2p(create(info, store=store), deadline=1.0)
    x = torch.ones(1 << 14, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        out = group.all_reduce(x)
        group.synchronize()
        if info.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.0)
        group.all_reduce(x, out=out)
        try:
            group.synchronize()
        except CollectiveTimeout as error:
            return f"{error.missing} {error}"
    return "nothing was noticed"


@needs_two_gpus
def test_a_killed_rank_is_named():
    results = run_processes(2, "test_p2p_gpu:rank_that_dies", timeout=60, may_die=(1,))
    assert results[0].startswith("(1,)") and "never received rank 1's data" in results[0], results[0]


def rank_that_misses_replays(info: RankInfo, store) -> str:
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    fallback = create(info, store=store)
    group = p2p(fallback, deadline=1.0)
    x = torch.ones(1 << 14, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        out = group.all_reduce(x)
        group.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(50):
                group.all_reduce(x, out=out)
        for _ in range(1 if info.rank else 3):
            graph.replay()
        try:
            group.synchronize()
            told = "done"
        except CollectiveTimeout as error:
            told = f"{error.missing} {error}"
    fallback.barrier()  # rank 1's memory must stay while rank 0 still writes into it
    return told


@needs_two_gpus
def test_a_graph_replayed_once_more_than_the_peer_ends_and_names_it():
    results = run_processes(2, "test_p2p_gpu:rank_that_misses_replays", timeout=60)
    assert results[1] == "done"
    assert results[0].startswith("(1,)"), results[0]


def groups_inside_hosts(info: RankInfo, store) -> tuple[str, str, bool]:
    """A world of two hosts, whose groups inside a host have the kernels: why the world has none, why a group has, and
    whether both sum right in turn on two streams, and in a graph."""
    from shardwise.comm.p2p import workspace
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    real, host = workspace.host_identity, info.rank * 2 // info.world
    workspace.host_identity = lambda: f"host {host}"
    world = create(info, store=store, device="cuda", deadlines=Deadlines(collective=20.0))
    if info.world == 2:  # a host of one rank has no group: now they are on one
        workspace.host_identity, host = real, 0
    inside = world.split(host, key=-info.rank)
    streams = [torch.cuda.Stream() for _ in range(2)]
    x = torch.full((1 << 23,), info.rank + 1.0, device="cuda", dtype=torch.bfloat16)
    outputs = [torch.empty_like(x) for _ in range(2)]

    def in_turn() -> None:
        for group, out in zip((world, inside), outputs, strict=True):
            group.all_reduce(x, out=out)

    def right() -> bool:
        torch.cuda.synchronize()
        inside.check_waits()
        totals = [sum(rank + 1 for rank in group.ranks) for group in (world, inside)]
        return all(bool((out == total).all()) for out, total in zip(outputs, totals, strict=True))

    warm(inside, lambda: inside.all_reduce(x, out=outputs[1]))
    torch.cuda.synchronize()
    for turn in range(20):
        for number, (group, out) in enumerate(zip((world, inside), outputs, strict=True)):
            with torch.cuda.stream(streams[(number + turn + info.rank) % 2]):
                group.all_reduce(x, out=out)
    good = right()
    with torch.cuda.stream(streams[0]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[0]):
            in_turn()
        for out in outputs:
            out.zero_()
        graph.replay()
    good = right() and good
    told = world.why(), inside.why(), good
    del graph  # NCCL ends a group only when no graph holds calls of it
    world.barrier()
    world.close()
    return told


@pytest.mark.parametrize("world", [2, 4])
def test_groups_inside_hosts_have_the_kernels_where_the_world_spans_several(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"fewer than {world} CUDA devices")
    for why, inside, good in run_processes(world, "test_p2p_gpu:groups_inside_hosts", timeout=60):
        assert f"group world of {world}: nccl (GPU peer-to-peer is not available" in why and "another host" in why
        assert "p2p (CUDA IPC between 2 GPUs of one host, links tested)" in inside
        assert good
