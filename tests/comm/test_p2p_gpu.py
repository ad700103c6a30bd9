"""The peer-to-peer kernels on GPUs: against float64, bitwise between ranks, in graphs, when ranks are missing.

Ranks are threads that share the GPUs of this machine (one is enough, whatever the world), and, with two GPUs,
processes in both modes.
"""

import threading
import time

import pytest
import torch

pytest.importorskip("triton")
from p2p_checks import FEW_CASES, check_fused, check_pieces, check_sums, everyones, rounded_sum, warm

from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.watch import Deadlines
from shardwise.testing import run_processes, run_threads

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
pytestmark = [pytest.mark.gpu, needs_gpu]

REGION = 1 << 20


def p2p(beyond, deadline=20.0, region_bytes=REGION):
    from shardwise.comm.p2p.communicator import P2PCommunicator

    group = P2PCommunicator.connect(beyond, region_bytes=region_bytes)
    group.deadlines = Deadlines(collective=deadline)
    return group


def check_graph(group) -> None:
    """Several shapes through one workspace, replayed with new data, eager calls between the replays."""
    shapes = ((1, 4096), (40, 1024), (5, 2880), (1, 64))
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    outputs = [torch.empty_like(x) for x in inputs]

    def calls():
        for x, out, strategy in zip(inputs, outputs, ("ONESHOT", "TWOSHOT", "AUTO", "ONESHOT"), strict=True):
            group.all_reduce(x, out=out, strategy=strategy)

    warm(group, calls)
    calls()
    group.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        calls()
        calls()
    for turn in range(7):
        parts = [everyones(group.size, shape, torch.bfloat16, 10 * turn + i) for i, shape in enumerate(shapes)]
        for x, out, values in zip(inputs, outputs, parts, strict=True):
            x.copy_(values[group.rank])
            out.fill_(float("nan"))
        graph.replay()
        if turn % 3 == 1:
            group.all_reduce(inputs[1], strategy="ONESHOT")
        group.synchronize()
        for out, values in zip(outputs, parts, strict=True):
            assert torch.equal(out.cpu(), rounded_sum(values))


CHECKS = {"sums": check_sums, "fused": check_fused, "graph": check_graph, "pieces": check_pieces}


def on_own_stream(body):
    """Ranks that are threads share the GPUs; each takes a stream of its own, as kernels wait for each other."""
    beyond = current_groups().world
    torch.cuda.set_device(beyond.rank % torch.cuda.device_count())
    with torch.cuda.stream(torch.cuda.Stream()):
        return body(beyond)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_as_threads(world):
    def body(beyond):
        group = p2p(beyond)
        check_sums(group, FEW_CASES)
        check_fused(group, FEW_CASES)
        check_pieces(group)
        beyond.all_gather_object(None)
        group.workspace.close()

    run_threads(world, on_own_stream, body)


def test_a_rank_that_never_calls_is_named_and_the_kernel_ends():
    def body(beyond):
        group = p2p(beyond, deadline=0.5)
        x = torch.ones(4096, device="cuda")
        warm(group, lambda: group.all_reduce(x, strategy="ONESHOT"))
        if group.rank == 0:
            begun = time.monotonic()
            out = group.all_reduce(x, strategy="ONESHOT")
            with pytest.raises(CollectiveTimeout, match="never received rank 1's data") as caught:
                group.synchronize()
            assert time.monotonic() - begun < 5
            assert caught.value.missing == (1,)
            assert out.isnan().all(), "what did not arrive is no number"
            with pytest.raises(CommError):
                group.all_reduce(x)
        beyond.all_gather_object(None)
        group.workspace.close()

    run_threads(2, on_own_stream, body)


def test_abort_ends_a_wait_on_the_device():
    def body(beyond):
        group = p2p(beyond, deadline=60)
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
        beyond.all_gather_object(None)
        group.workspace.close()

    run_threads(2, on_own_stream, body)


def test_one_workspace_serves_one_thread_at_a_time():
    def body(beyond):
        group = p2p(beyond)
        with group._flight():
            caught = []

            def intrude():
                try:
                    group.all_reduce(torch.ones(8, device="cuda"))
                except CommError as error:
                    caught.append(str(error))

            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        assert "two threads" in caught[0]
        beyond.all_gather_object(None)
        group.workspace.close()

    run_threads(2, on_own_stream, body)


def test_another_number_of_ranks_is_refused_with_the_reason():
    from shardwise.comm.p2p.workspace import P2PUnavailable

    def body(beyond):
        with pytest.raises(P2PUnavailable, match="group of 3 ranks"):
            p2p(beyond)

    run_threads(3, on_own_stream, body)


def run_checks(info: RankInfo, store, names: list[str]) -> str:
    """One rank of a job with a GPU for each rank."""
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    beyond = create(info, store=store)
    group = p2p(beyond)
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in names:
            CHECKS[name](group)
    beyond.barrier()
    group.close()
    return group.transport


@needs_two_gpus
@pytest.mark.parametrize("mpi", [False, True], ids=["demo mode", "MPI mode"])
def test_ranks_as_processes(mpi):
    names = list(CHECKS)
    env = {"SHARDWISE_LAUNCHED_BY": "tests"}
    assert run_processes(2, "test_p2p_gpu:run_checks", names, timeout=200, env=env, mpi=mpi) == ["p2p", "p2p"]


def rank_that_misses_replays(info: RankInfo, store) -> str:
    from shardwise.comm.strategy import create

    torch.cuda.set_device(info.local_rank)
    beyond = create(info, store=store)
    group = p2p(beyond, deadline=1.0)
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
            return "done"
        except CollectiveTimeout as error:
            return f"{error.missing} {error}"


@needs_two_gpus
def test_a_graph_replayed_once_more_than_the_peer_ends_and_names_it():
    results = run_processes(2, "test_p2p_gpu:rank_that_misses_replays", timeout=120)
    assert results[1] == "done"
    assert results[0].startswith("(1,)"), results[0]
