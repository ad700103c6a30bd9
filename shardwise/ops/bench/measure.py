"""Timing of operators: device time by events, launches inside a graph; host time of an eager call."""

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


def device_microseconds(
    call: Callable[[], object], *, calls: int = 20, repeats: int = 15, captured: bool = True
) -> float:
    """Median time of one call on the current CUDA device, launched `calls` times in a graph.

    captured  False for a call that synchronises: timed by events around single calls, no capture tried
    """
    return statistics.median(_samples(_runner([call] * calls, captured), repeats))


def alternating_microseconds(
    variants: Mapping[str, Sequence[Callable[[], object]]], *, repeats: int = 25, eager: Collection[str] = ()
) -> dict[str, float]:
    """Median time of one call of every variant, the variants' graphs replayed in turn.

    What slows the device for a while (its power limit, other work) then meets all of them alike. A variant is a list of
    calls that follow one another in its graph.

    eager   variants that synchronise: their calls are made and timed one by one, no capture tried
    """
    runners = {name: _runner(calls, name not in eager) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            samples[name] += _samples(runner, 1)
    return {name: statistics.median(times) for name, times in samples.items()}


@dataclass(frozen=True)
class _Runner:
    """`run` does `count` calls."""

    run: Callable[[], object]
    count: int


def _runner(calls: Sequence[Callable[[], object]], captured: bool = True) -> _Runner:
    """The calls as one graph, or one by one where they cannot be captured; warmed up."""
    for call in list(calls[:2]) + [calls[0]]:
        call()
    torch.cuda.synchronize()
    turn = itertools.cycle(calls)
    one_by_one = _Runner(lambda: next(turn)(), 1)
    if not captured:
        return one_by_one
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return one_by_one
    graph.replay()
    return _Runner(graph.replay, len(calls))


def _samples(runner: _Runner, repeats: int) -> list[float]:
    """Microseconds of one call, measured `repeats` times."""
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        runner.run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / runner.count)
    return samples


def host_microseconds(call: Callable[[], object], *, calls: int = 500, repeats: int = 5) -> float:
    """Lowest mean host time of an eager call, the device working asynchronously; for calls with little device work."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
    wait()
    return best * 1e6


def several_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median device time of one call among all of them in a graph: of weights that together do not fit the L2 cache."""
    return device_microseconds(lambda: [call() for call in calls], calls=2, repeats=7) / len(calls)


def alternating_host_microseconds(
    variants: Mapping[str, Callable[[], object]], *, calls: int = 20, rounds: int = 40
) -> dict[str, float]:
    """Lowest mean host time of eager calls, a few of every variant in turn: what keeps the host busy for a while then
    meets all of them alike. On the core that is quickest when the function is called."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = dict.fromkeys(variants, float("inf"))
    with _quickest_core():
        for each in range(rounds + 1):
            for name, call in variants.items():
                wait()
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                if each:  # the first round warms up
                    best[name] = min(best[name], (time.perf_counter() - begin) / calls * 1e6)
        wait()
    return best


@contextlib.contextmanager
def _quickest_core() -> Iterator[None]:
    """Keeps this thread on one core. Work of others beside it, on a virtual machine also of unseen neighbours, slows a
    core by up to a half, for seconds, and not all cores at once."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed, key=_loop_seconds)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _loop_seconds(core: int) -> float:
    """Least time of a short loop on that core, where this thread stays."""
    os.sched_setaffinity(0, {core})
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        sum(map(abs, range(4000)))
        times.append(time.perf_counter() - begin)
    return min(times)


def copy_microseconds(total_bytes: int) -> float:
    """Device time of the quicker of two copies that read and write `total_bytes` together.

    PyTorch's `copy_` leaves a contiguous copy to the driver; an addition of zero goes through its elementwise kernel.
    """
    source = torch.empty(max(total_bytes // 8, 4), dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copies = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.add(source, 0, out=target)}
    return min(device_microseconds(copy) for copy in copies.values())
