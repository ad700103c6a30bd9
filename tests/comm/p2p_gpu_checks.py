"""What groups on the peer-to-peer kernels must do where ranks are processes with a GPU each: by name, in CHECKS."""

import pytest
import torch
from p2p_checks import (
    FEW_CASES,
    SHAPES,
    check_fused,
    check_gathers,
    check_low_precision,
    check_pieces,
    check_repeats,
    check_sums,
    everyones,
    rounded_sum,
    warm,
)

from shardwise.comm.base import CommError
from shardwise.comm.p2p.table import Tuning
from shardwise.comm.watch import FLIGHT

FUSED_CASES = [
    *((torch.bfloat16, shape) for shape in SHAPES),
    *((torch.float16, shape) for shape in ((3, 2880), (2, 1003))),
    *((torch.float32, shape) for shape in ((1, 7168), (2, 1003))),
]
"""A kernel for each type and length of row: what each takes to compile adds up."""
VARIANTS = (
    Tuning("ONESHOT", 16, pausing=64),
    Tuning("ONESHOT", 32, blocks_per_sm=4, registers=32),
    Tuning("ONESHOT", 8, ahead=1, bulk=True),
    Tuning("ONESHOT", 16, ahead=1, bulk=True, pausing=64),
    Tuning("TWOSHOT", 16, registers=64, pushers=200),
    Tuning("TWOSHOT", 32, lanes=1024, bulk=True, registers=64, pushers=24, pausing=64),
)


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
        everyone = [run for rank in group.fallback.all_gather_object(bits) for run in rank]
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
    "repeats": check_repeats,
    "gathers": check_gathers,
    "fp8": check_low_precision,
    "streams": check_streams,
    "bits": check_same_bits,
    "strategies": check_strategies,
}
