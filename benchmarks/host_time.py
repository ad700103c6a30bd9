"""Rows of host times: an eager call beside what calls the same kernels without us. Shared by `ops_host_*.py`."""

import contextlib
import ctypes
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench.measure import alternating_host_microseconds
from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import triton

Call = Callable[[], object]


@triton.jit
def idle_kernel(x_ptr):
    pass


@dataclass(frozen=True)
class Row:
    """`kernels` launches of ours stand in the call; `beside` are other ways to the same, `direct` first."""

    name: str
    call: Call
    kernels: int = 0
    beside: Mapping[str, Call] = field(default_factory=dict)
    calls: int = 20
    """In a round, one after another"""


class Later(NamedTuple):
    """A row that may fail to be made, and then alone."""

    name: str
    make: Callable[[], Row]


Failures = dict[str, str]
"""What raised instead of being measured: its name and error"""


def bare_launch(x: torch.Tensor) -> Call:
    """An empty kernel launched as our operators launch theirs."""
    return partial(Kernel(idle_kernel), x.device, (1, 1, 1), (x,), (), (), warps=1)


def launches(call: Call) -> int:
    """Kernels of a call, as a graph counts them."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    count = ctypes.c_size_t()
    error = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if error:
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {error}")
    return count.value


@contextlib.contextmanager
def noting(name: str, failures: Failures | None) -> Iterator[None]:
    """Notes and prints what raises, where there are `failures` to note it in."""
    try:
        yield
    except Exception as error:
        if failures is None:
            raise
        failures[name] = f"{type(error).__name__}: {error}"
        print(f"failed: {name}", flush=True)
        traceback.print_exc()


def made(groups: Mapping[str, Callable[[], Iterable[Row | Later]]], failures: Failures | None = None) -> list[Row]:
    """The rows of all groups, but for those that raise."""
    rows: list[Row] = []
    for name, group in groups.items():
        with noting(f"the rest of group {name}", failures):
            for row in group():
                with noting(row.name, failures):
                    rows.append(row.make() if isinstance(row, Later) else row)
    return rows


def least_times(
    rows: Sequence[Row], launch: Call | None, turns: int, rounds: int,
    after: Callable[[list[dict]], None] | None = None, failures: Failures | None = None,
) -> list[dict]:  # fmt: skip
    """`told` of all rows, which are measured in turns; `after` is called with those so far at the end of each.

    With `failures` a row that raises is noted there and called no more; its turns before stay.
    """
    best: list[dict[str, float]] = [{} for _ in rows]
    table: list[dict] = []
    for _ in range(turns):
        for row, least in zip(rows, best, strict=True):
            if failures and row.name in failures:
                continue
            variants = {"call": row.call} | ({"launch": launch} if launch else {}) | dict(row.beside)
            times: dict[str, float] = {}
            with noting(row.name, failures):
                times = alternating_host_microseconds(variants, calls=row.calls, rounds=rounds)
            least |= {name: min(time, least.get(name, time)) for name, time in times.items()}
        table = [told(row, least) for row, least in zip(rows, best, strict=True) if least]
        if after:
            after(table)
    return table


def told(row: Row, least: Mapping[str, float]) -> dict[str, Any]:
    """A row of the JSON."""
    known = {"call": row.name, "kernels": row.kernels, "host_us": dict(least)}
    if not row.kernels and "direct" not in row.beside:
        return known
    return known | {"beyond_us": least["call"] - least.get("direct", 0.0) - row.kernels * least.get("launch", 0.0)}


def write(path: Path | None, table: list[dict], **more: Any) -> None:
    """The rows with machine and versions, where a file is asked for."""
    if path:
        path.write_text(json.dumps({"machine": machine_facts(), **more, "rows": table}, indent=1) + "\n")


def show(table: list[dict]) -> None:
    for row in table:
        beyond = row.get("beyond_us")
        print(f"{row['call']:62}", *(f"{name} {time:7.2f}" for name, time in row["host_us"].items()),
              "" if beyond is None else f"beyond {beyond:7.2f}", flush=True)  # fmt: skip
