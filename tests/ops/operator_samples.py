"""The form of the operator table: every `samples_<category>.py` beside this file contributes a list `SAMPLES`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call of one operator.

    build   device -> positional arguments; random draws come from torch's generator, which the table seeds
    oracle  the same arguments (before the call) -> the returned tensors, then the mutated arguments in schema order,
            in any dtype; None where another sample or test proves the values
    atol    largest allowed |difference| to the oracle, scaled by max(1, |oracle|)
    bound   the lengths of the result depend on data: the fake's shape is an upper bound
    traced  also exported and compiled (a second or so each): one sample of every operator
    """

    op: str
    build: Callable[[str], tuple]
    oracle: Callable[..., tuple] | None = None
    atol: float = 1e-5
    bound: bool = False
    traced: bool = False
    note: str = ""

    @property
    def overload(self):
        namespace, name = self.op.split("::") if "::" in self.op else ("auto_deploy", self.op)
        return getattr(getattr(torch.ops, namespace), name).default

    @property
    def qualified_name(self) -> str:
        return self.op if "::" in self.op else f"auto_deploy::{self.op}"

    def __str__(self):
        return f"{self.op}-{self.note}" if self.note else self.op


def all_samples() -> list[Sample]:
    """Samples of every category, in order of file name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("samples_*.py"))
    return [sample for name in names for sample in importlib.import_module(name).SAMPLES]


def flat(outputs) -> list[torch.Tensor]:
    """The tensors an operator returned, as a list."""
    if outputs is None:
        return []
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def written(overload) -> list[int]:
    """Positions of the arguments that the schema declares as written."""
    arguments = overload._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def mutated(overload, args: tuple) -> list[torch.Tensor]:
    """The written arguments, in schema order."""
    return [args[i] for i in written(overload)]
