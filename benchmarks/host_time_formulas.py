"""Host time of reference operators, which are formulas of PyTorch's operators, beside these.

`direct` is what PyTorch's dispatcher was given while the formula ran, called again with the same tensors one after
another. It is a little long, as Python calls an operator's overload more slowly than its usual name; what a formula
takes beyond it are its own dispatch, its checks and the Python between its calls.
Arguments are those of the tests' operator table, small and of every operator.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from host_time import Later, Row
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.ops.registry import OpInfo, operators

TABLE = Path(__file__).parents[1] / "tests" / "ops"
OF_RANKS = {"sharded_rmsnorm"}
OF_KERNELS = {"mamba_ssm_prepare_metadata"}


class _Noted(TorchDispatchMode):
    """Notes what the dispatcher is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


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
