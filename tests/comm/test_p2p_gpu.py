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
from p2p_checks import (
    FEW_CASES,
    SHAPES,
    check_fused,
    check_low_precision,
    check_pieces,
    check_sums,
    everyones,
    rounded_sum,
    warm,
)

from shardwise.comm.base import CollectiveTimeout, CommError
from shardwise.comm.p2p.table import Tuning
from shardwise.comm.rank import RankInfo, current_groups
from shardwise.comm.watch import FLIGHT, Deadlines
from shardwise.testing import run_processes, run_threads

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
pytestmark = [pytest.mark.gpu, needs_gpu]

REGION = 1 << 20
FUSED_CASES = [
    *((torch.bfloat16, shape) for shape in SHAPES),
    *((torch.float16, shape) for shape in ((3, 2880), (2, 1003))),
    *((torch.float32, shape) for shape in ((1, 7168), (2, 1003))),
]
"""A kernel for each type and length of row: what each takes to compile adds up."""


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


def check_variants(group) -> None:
    """Launches that only the table chooses: rows ahead, bulk copies, pauses. None changes a bit."""
    for shape in ((300, 2880), (2, 1003)):
        parts = everyones(group.size, shape, torch.bfloat16, 17)
        residual = everyones(1, shape, torch.bfloat16, 18)[0]
        stream = (rounded_sum(parts).float() + residual.float()).to(torch.bfloat16)
        x, before, weight = parts[group.rank].cuda(), residual.cuda(), torch.ones(shape[1]).bfloat16().cuda()
        results = []
        for variant in VARIANTS:
            out, total, normed = (torch.full_like(x, float("nan")) for _ in range(3))

            def call(variant=variant, out=out, total=total, normed=normed, x=x, before=before, weight=weight):
                group.launcher.all_reduce(x, out, variant)
                group.launcher.fused(x, before, weight, 1e-5, 0.0, normed, total, variant)

            warm(group, call)
            call()
            group.synchronize()
            assert torch.equal(out.cpu(), rounded_sum(parts)), (shape, variant)
            assert torch.equal(total.cpu(), stream), (shape, variant)
            results.append(normed.cpu())
        assert torch.isfinite(results[0]).all()
        assert all(torch.equal(result, results[0]) for result in results), "the norm's order of summation is one"


def check_streams(group) -> None:
    """One thread that calls on two streams, not the same one on every rank: a call waits for the one before."""
    streams = torch.cuda.current_stream(), torch.cuda.Stream()
    parts = [everyones(group.size, (300 if turn % 3 else 2, 1024), torch.bfloat16, 60 + turn) for turn in range(12)]
    inputs = [values[group.rank].cuda() for values in parts]
    outputs = [torch.full_like(x, float("nan")) for x in inputs]
    for x, out in zip(inputs[:2], outputs, strict=False):
        warm(group, lambda x=x, out=out: group.all_reduce(x, out=out))
    torch.cuda.synchronize()
    for turn, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        with torch.cuda.stream(streams[(turn + group.rank) % 2]):
            group.all_reduce(x, out=out)
    torch.cuda.synchronize()
    group.check_waits()
    for values, out in zip(parts, outputs, strict=True):
        assert torch.equal(out.cpu(), rounded_sum(values))


def check_same_bits(group) -> None:
    """Deterministic mode: eager, again, and from a graph, on every rank, for small and large calls."""
    group.deterministic = True
    for shape in ((1, 4096), (9, 2880), (256, 7168)):
        x = everyones(group.size, shape, torch.bfloat16, 33)[group.rank].cuda()
        residual, weight = torch.ones_like(x), torch.ones(shape[1], dtype=x.dtype, device="cuda")

        def call(x=x, residual=residual, weight=weight):
            return group.all_reduce(x), *group.all_reduce_residual_rms_norm(x, residual, weight, 1e-5)

        warm(group, call)
        runs = [call() for _ in range(3)]
        group.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = call()
        for _ in range(2):
            graph.replay()
            group.synchronize()
            runs.append([result.clone() for result in captured])
        bits = [tuple(result.cpu().view(torch.int16).numpy().tobytes() for result in run) for run in runs]
        everyone = [run for rank in group.beyond.all_gather_object(bits) for run in rank]
        assert all(run == everyone[0] for run in everyone), shape
    group.deterministic = False


def check_strategies(group) -> None:
    """What is refused says why, and leaves the group usable."""
    x = torch.ones(8, device="cuda")
    for strategy, reason in (("UB", "multicast"), ("MNNVL", "multicast"), ("NCCL_SYMMETRIC", "transport p2p")):
        with pytest.raises(CommError, match=reason):
            group.all_reduce(x, strategy=strategy)
    with pytest.raises(CommError, match="sums bfloat16, float16, not torch.float32"):
        group.all_reduce(x, strategy="LOWPRECISION")
    group.all_reduce(x, strategy="ONESHOT")
    group.synchronize()
    last = FLIGHT.last()
    assert (last["op"], last["strategy"], last["shape"]) == ("all_reduce", "ONESHOT", [8])
    assert last["end"] >= last["begin"]


VARIANTS = (
    Tuning("ONESHOT", 16, pausing=64),
    Tuning("ONESHOT", 32, blocks_per_sm=4, registers=32),
    Tuning("ONESHOT", 8, ahead=1, bulk=True),
    Tuning("ONESHOT", 16, ahead=1, bulk=True, pausing=64),
    Tuning("TWOSHOT", 8, ahead=1, pausing=64),
)


def check_fused_cases(group) -> None:
    check_fused(group, FUSED_CASES)


def check_few(group) -> None:
    check_sums(group, FEW_CASES, ("ONESHOT", "TWOSHOT"))
    check_fused(group, FEW_CASES, ("ONESHOT", "TWOSHOT"))


CHECKS = {
    "few": check_few,
    "sums": check_sums,
    "fused": check_fused_cases,
    "graph": check_graph,
    "pieces": check_pieces,
    "variants": check_variants,
    "fp8": check_low_precision,
    "streams": check_streams,
    "bits": check_same_bits,
    "strategies": check_strategies,
}


def on_own_stream(body):
    """Ranks that are threads share the GPUs; each takes a stream of its own, as kernels wait for each other."""
    beyond = current_groups().world
    torch.cuda.set_device(beyond.rank % torch.cuda.device_count())
    with torch.cuda.stream(torch.cuda.Stream()):
        return body(beyond)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_as_threads(world):
    cases = FEW_CASES if world == 2 else FEW_CASES[:1]  # ranks of one process compile one after another, each its own

    def body(beyond):
        group = p2p(beyond)
        check_sums(group, cases, ("ONESHOT", "TWOSHOT"))
        check_fused(group, cases, ("ONESHOT", "TWOSHOT"))
        if world < 8:
            check_pieces(group)
            check_low_precision(group, (40_000,), (torch.bfloat16,))
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
            assert out.isnan().all(), "what did not arrive is not a number"
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
    failed = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in names:
            try:
                CHECKS[name](group)
            except Exception:
                failed[name] = traceback.format_exc()
            beyond.barrier()
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
            told = "done"
        except CollectiveTimeout as error:
            told = f"{error.missing} {error}"
    beyond.barrier()  # rank 1's memory must stay while rank 0 still writes into it
    return told


@needs_two_gpus
def test_a_graph_replayed_once_more_than_the_peer_ends_and_names_it():
    results = run_processes(2, "test_p2p_gpu:rank_that_misses_replays", timeout=60)
    assert results[1] == "done"
    assert results[0].startswith("(1,)"), results[0]
