"""Host time of reference operators, which are formulas of PyTorch's functions, beside these.

`direct` is each function and method of PyTorch that the formula called, called again with the same arguments one after
another, unless it gave PyTorch's dispatcher nothing to do (a size, a conversion to the dtype that is there already).
What a formula takes beyond it are its own dispatch, its checks and the Python between its calls. Copies from and to the
host, and waits for the device in them, stand on both sides.
Arguments are those of the tests' operator table, small and of every operator.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from host_time import Later, Row
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.ops.registry import OpInfo, operators

TABLE = Path(__file__).parents[1] / "tests" / "ops"
OF_RANKS = {"sharded_rmsnorm"}
OF_KERNELS = {"mamba_ssm_prepare_metadata"}


class _Dispatched(TorchDispatchMode):
    """Counts what the dispatcher is given."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Noted(TorchFunctionMode):
    """Notes the calls of PyTorch's functions and methods that give the dispatcher anything."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with _Dispatched() as dispatched:
            result = func(*args, **(kwargs or {}))
        if dispatched.count:
            self.calls.append((func, args, kwargs or {}))
        return result


def formula_rows(device: str = "cuda") -> Iterator[Later]:
    """One of each reference operator."""
    builders = _builders()
    for info in operators():
        if info.backend == "torch" and info.category != "distributed" and info.name not in OF_RANKS | OF_KERNELS:
            yield Later(info.name, partial(_row, info, builders, device))


def _row(info: OpInfo, builders: dict[str, Callable[[str], tuple]], device: str) -> Row:
    args = builders[info.qualified_name](device)
    with _Noted() as noted:
        info.implementation(*args)
    name = f"{info.name}, {len(noted.calls)} calls"
    call = partial(getattr(torch.ops.auto_deploy, info.name), *args)
    return Row(name, call, beside={"direct": partial(_repeat, noted.calls)}, calls=2)


def _builders() -> dict[str, Callable[[str], tuple]]:
    """By operator, what makes arguments on a device."""
    if str(TABLE) not in sys.path:
        sys.path.insert(0, str(TABLE))
    samples = importlib.import_module("operator_samples").all_samples()
    return {sample.qualified_name: sample.build for sample in samples if sample.traced}


def _repeat(calls: list[tuple[Callable, tuple, dict]]) -> None:
    for function, args, named in calls:
        function(*args, **named)
