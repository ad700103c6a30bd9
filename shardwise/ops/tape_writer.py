"""Writing a call's tape: what it launched and where its pointers lead."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.kernel_start import Start, unfold
from shardwise.ops.foreign import fill_zeros, foreign_launches
from shardwise.ops.kernel_launch import address_of, recorders
from shardwise.ops.tape import Launch, Product, Slot, Tape
from shardwise.ops.workspace import Workspace
from shardwise.plan_cache import Tensors, allocator

_ALIGNED = 256
"""Bytes at multiples of which memory of a call's own begins, as an allocation does"""


class Unrecordable(Exception):
    """Something of a call cannot be replayed."""


class Recorder(TorchDispatchMode):
    """Notes launches and products in turn, the memory that a call makes, and what it does beside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []
        self.made: list[torch.Tensor] = []  # held, so that no address comes twice
        self.beside: list[str] = []
        self._foreign = ExitStack()

    def launched(self, start: Start, grid: tuple[int, int, int], args: tuple) -> None:
        """Called by launches."""
        self.steps.append((start, grid, args))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = _ZEROS.get(func, func)(*args, **kwargs)
        if func in _ALLOCATES:
            self.made.append(result)
        elif func in _ZEROS:
            self.made.append(result)
            fill_zeros(result)
        elif func in _PRODUCTS:
            self.steps.append((_PRODUCTS[func], args, kwargs, result))
        elif not _is_view(func):
            self.beside.append(str(func))
        return result

    def __enter__(self):
        recorders[get_ident()] = self
        self._foreign.enter_context(foreign_launches(self.launched))
        return super().__enter__()

    def __exit__(self, *error):
        self._foreign.close()
        del recorders[get_ident()]
        return super().__exit__(*error)


_ATEN = torch.ops.aten
_ALLOCATES = {
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
# Allocations, with zeros written by a launch.
_ZEROS = {_ATEN.zeros.default: _ATEN.empty.memory_format, _ATEN.new_zeros.default: _ATEN.new_empty.default}
# What may stand between launches, by PyTorch's own binding, which costs less than calling the operator.
_PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {_ATEN._scaled_mm.default: torch._scaled_mm}


def _is_view(func) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    read_only = all(alias is not None and not alias.is_write for alias in aliases)
    return func is _ATEN._unsafe_view.default or (bool(aliases) and read_only)


@dataclass
class Writer:
    """Writes a tape: finds out where the pointers of a recorded call lead."""

    recorder: Recorder
    tensors: Tensors
    results: Tensors
    stream: int
    """Handle of the stream of all launches"""
    places: dict[int, tuple[int, torch.Tensor, int]] = field(default_factory=dict)
    """Of memory that the call made: source, the tensor, and the source's first byte in it"""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def tape(self) -> Tape:
        """Raises Unrecordable."""
        recorder, result = self.recorder, self.results[0]
        if recorder.beside:
            raise Unrecordable(f"it runs {recorder.beside[0]}")
        makes = self._make()
        steps: list[Launch | Product] = []
        for noted in recorder.steps:
            if isinstance(noted[0], Start):
                steps.append(self._launch(*noted))
                continue
            steps.append(self._product(*noted))
            source = len(self.tensors) + len(makes) + sum(isinstance(step, Product) for step in steps) - 1
            self.places[_storage(noted[3])] = source, noted[3], 0
        final = None
        if None in makes[: len(self.results)]:
            source, tensor, _ = self.places.get(_storage(result), (0, None, 0))
            if tensor is None or tensor.dtype != result.dtype or len(self.results) > 1:
                raise Unrecordable("its result is not a tensor that it made")
            whole = tensor.shape == result.shape and tensor.stride() == result.stride()
            part = tuple(result.shape), tuple(result.stride()), int(result.storage_offset())
            final = source, None if whole and not part[2] else part
        alone = all(isinstance(step, Launch) for step in steps)
        return Tape(tuple(steps), makes, len(self.results), final, tuple(self.kept.values()), alone)

    def _make(self) -> tuple[Callable[[], torch.Tensor] | None, ...]:
        """Finds places for what the call allocated."""
        first, count, device = len(self.tensors), len(self.results), self.results[0].device
        owned = {_storage(result): number for number, result in enumerate(self.results)}
        given = {_storage(tensor) for tensor in self.tensors}
        read = {
            _storage(arg)
            for noted in self.recorder.steps
            if not isinstance(noted[0], Start)
            for arg in (*noted[1], *noted[2].values())
            if isinstance(arg, torch.Tensor)
        }
        makes: list[Callable[[], torch.Tensor] | None] = [None] * (count + 1)
        size = 0
        for tensor in self.recorder.made:
            storage = _storage(tensor)
            if storage in given or Workspace.keeps(tensor):
                continue
            if storage in owned:
                result = self.results[owned[storage]]
                if result.storage_offset() or result.numel() * result.element_size() != _bytes(result):
                    raise Unrecordable("its result is a part of a tensor that it made")
                makes[owned[storage]] = allocator(tuple(result.shape), result.dtype, device, tuple(result.stride()))
                self.places[storage] = first + owned[storage], result, 0
            elif storage in read:
                self.places[storage] = first + len(makes), tensor, 0
                makes.append(allocator(tuple(tensor.shape), tensor.dtype, device, tuple(tensor.stride())))
            else:
                self.places[storage] = first + count, tensor, size
                size += math.ceil(_bytes(tensor) / _ALIGNED) * _ALIGNED
        if size:
            makes[count] = allocator((size,), torch.uint8, device)
        return tuple(makes)

    def _launch(self, start: Start, grid: tuple[int, int, int], args: tuple) -> Launch:
        unfolded = unfold(start, args)
        if unfolded is None:
            raise Unrecordable("this version of Triton hides how descriptors reach the driver")
        launcher, args, forms = unfolded
        lead = [*grid, self.stream, *start.rest]
        filled, slots = [*lead, *args], []
        for at, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            place, form = self._place(arg), forms.get(at)
            if place is not None:
                source, tensor, first = place
                slots.append(Slot(len(lead) + at, source, first + address_of(arg) - address_of(tensor), form))
                filled[slots[-1].at] = None
            else:
                filled[len(lead) + at] = address_of(arg) if form is None else form(address_of(arg))
        return Launch(launcher, filled, tuple(slots))

    def _product(self, function: Callable, args: tuple, named: dict, _result: torch.Tensor) -> Product:
        filled, slots = list(args), []
        if any(isinstance(arg, torch.Tensor) for arg in named.values()):
            raise Unrecordable("a product has tensors by name")
        if any(tensor.requires_grad for tensor in self.tensors):
            raise Unrecordable("gradients do not pass through views")
        for at, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            place = self._place(arg)
            if place is None or place[1].dtype != arg.dtype:
                raise Unrecordable("a product reads kept memory, or bytes of another type")
            part = tuple(arg.shape), tuple(arg.stride()), arg.storage_offset() - place[1].storage_offset()
            whole = tuple(place[1].shape), tuple(place[1].stride()), 0
            slots.append(Slot(at, place[0], None if part == whole else part))
            filled[at] = None
        return Product(function, filled, named, tuple(slots))

    def _place(self, tensor: torch.Tensor) -> tuple[int, torch.Tensor, int] | None:
        """Source of a pointer, the tensor there, and its first byte in the source; None for memory that is kept."""
        storage = _storage(tensor)
        if storage in self.places:
            return self.places[storage]
        if Workspace.keeps(tensor):
            self.kept[storage] = tensor
            return None
        holding = [number for number, given in enumerate(self.tensors) if _storage(given) == storage]
        holding = [number for number in holding if self.tensors[number] is tensor] or holding
        if len(holding) != 1:
            raise Unrecordable("a pointer leads into no tensor that was given, or into several")
        return holding[0], self.tensors[holding[0]], 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
