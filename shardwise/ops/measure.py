"""Timing of operators: device time by events, launches inside a graph; host time of an eager call."""

import statistics
import time
from collections.abc import Callable

import torch


def device_microseconds(
    call: Callable[[], object], *, calls: int = 20, repeats: int = 15, captured: bool = True
) -> float:
    """Median time of one call on the current CUDA device, launched `calls` times in a graph.

    A call that cannot be captured (it synchronises) is timed by events around single calls. `captured` False: known to
    be such a call; trying would leave torch's random generator waiting for the end of a capture.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = _capture(call, calls) if captured else None
    run, inner = (graph.replay, calls) if graph is not None else (call, 1)
    run()
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / inner)
    return statistics.median(samples)


def _capture(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def host_microseconds(call: Callable[[], object], *, calls: int = 500, repeats: int = 5) -> float:
    """Lowest mean host time of an eager call, the device working behind it; for calls with little device work."""
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


def copy_microseconds(total_bytes: int, device: torch.device | str = "cuda") -> float:
    """Device time of a plain copy that reads and writes `total_bytes` together."""
    source = torch.empty(max(total_bytes // 2, 16), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return device_microseconds(lambda: target.copy_(source))
