"""Tapes of calls: launches and products with places for what differs from call to call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from shardwise.ops.kernel_launch import address_of
from shardwise.plan_cache import Tensors, View, view

READY = 256
"""Sets of addresses for which a tape keeps the arguments of its launches, 2 KB each: a model's layers have weights of
their own, and a layer's result takes a few places in turn"""


class Slot(NamedTuple):
    """An argument that differs from call to call."""

    at: int
    source: int
    """Which of the tensors, see `Tape`"""
    part: Any
    """Of a launch: bytes behind the tensor's address; of a product: its view, None for the tensor itself"""
    form: Callable[[int], Any] | None = None
    """What a launch takes instead of an address, where it takes a descriptor"""


class Launch(NamedTuple):
    start: Callable[..., None]
    args: list
    """Grid, stream and all behind it, but for what slots fill"""
    slots: tuple[Slot, ...]

    def filled(self, addresses: list[int]) -> list:
        """Arguments for tensors at these addresses."""
        args = self.args.copy()
        for at, source, offset, form in self.slots:
            address = addresses[source] + offset
            args[at] = address if form is None else form(address)
        return args


class Product(NamedTuple):
    """A call of one of PyTorch's products between the launches."""

    function: Callable[..., torch.Tensor]
    args: list
    named: dict
    slots: tuple[Slot, ...]

    def run(self, known: list[torch.Tensor]) -> torch.Tensor:
        """The result, from the tensors by number."""
        args = self.args.copy()
        for at, source, part, _ in self.slots:
            args[at] = known[source] if part is None else view(known[source], *part)
        return self.function(*args, **self.named)


@dataclass(frozen=True, slots=True)
class Tape:
    """What calls of one layout on one stream do: launches, and products that PyTorch computes.

    They know tensors by number: those that are given, the results, a room of bytes, what else the call makes for
    products to read, and the products' results in turn.
    """

    steps: tuple[Launch | Product, ...]
    makes: tuple[Callable[[], torch.Tensor] | None, ...]
    """Allocate the results and the call's own memory, where there is some"""
    results: int
    final: tuple[int, View | None] | None
    """Where the only result is a product's, or a view of it"""
    kept: tuple[torch.Tensor, ...]
    """Of a `Workspace`, whose addresses stand in the launches"""
    alone: bool
    """Whether all steps are launches"""
    ready: dict[tuple[int, ...], list[tuple]] = field(default_factory=dict)
    """Such launches by all addresses: start and arguments"""

    def __call__(self, tensors: Tensors, addresses: list[int]) -> torch.Tensor | Tensors:
        """Run on tensors, which lie at these addresses."""
        made: list[Any] = [make and make() for make in self.makes]
        addresses += [0 if tensor is None else address_of(tensor) for tensor in made]
        if self.alone:
            for start, args in self.ready.get((*addresses,)) or self._readied(addresses):
                start(*args)
            return made[0] if self.results == 1 else tuple(made[: self.results])
        known = [*tensors, *made]
        for step in self.steps:
            if isinstance(step, Launch):
                step.start(*step.filled(addresses))
            else:
                known.append(step.run(known))
                addresses.append(address_of(known[-1]))
        if self.final is None:
            return made[0] if self.results == 1 else tuple(made[: self.results])
        source, part = self.final
        return known[source] if part is None else view(known[source], *part)

    def _readied(self, addresses: list[int]) -> list[tuple]:
        if len(self.ready) >= READY:
            self.ready.clear()
        steps = [step for step in self.steps if isinstance(step, Launch)]
        launches = [(step.start, tuple(step.filled(addresses))) for step in steps]
        self.ready[(*addresses,)] = launches
        return launches
