"""Operators of several kernels whose host side is recorded once for each layout of their tensors.

Checks, choices and arguments of such a call take the host 50 to 200 µs, and follow from its numbers and from the
layout of its tensors alone. The first call of a layout runs as it is written; during the second each launch is written
down: kernel, grid and numbers, and for each pointer where it leads: into a tensor that was given, into the result, into
memory that the call made for itself or that a `Workspace` keeps. Later calls look up addresses and go to the driver.

Nothing is taken on trust: what was recorded is run once more, on memory filled with other bytes, and kept only if the
result is the same, bit by bit, for which the second call waits for the device. A call of which that cannot be said runs
on as it is written, and so does one that used PyTorch's kernels, products apart; calls inside of a graph's capture
always do.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from threading import get_ident
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.kernel_start import Start, current_device, raw_stream, unfold
from shardwise.ops import triton_support
from shardwise.ops.plan_cache import PlanCache, Tensors, allocator
from shardwise.ops.scratch import capturing
from shardwise.ops.tape import Launch, Product, Slot, Tape
from shardwise.ops.triton_support import interpreting, odd_addresses
from shardwise.ops.workspace import Workspace

_address = torch.Tensor.data_ptr
Operator = Callable[..., torch.Tensor]
Beside = Callable[..., tuple[Tensors, Hashable]]
_UNTRIED = object()
_ALIGNED = 256
"""Bytes at multiples of which memory of a call's own begins, as an allocation does"""
_POISON = 0xFF  # NaN in every format of floating point


def recorded(*, unread: Collection[str] = (), beside: Beside | None = None) -> Callable[[Operator], Operator]:
    """Record calls of an operator that writes nothing but its result, one tensor of new memory.

    unread  tensors that it does not look at
    beside  from its arguments, which an earlier call has found right: other tensors that it reads, and what beside the
            layout its launches follow from
    """

    def decorate(function: Operator) -> Operator:
        split = _splitter(function, unread)
        layouts: PlanCache[dict[Hashable, Tape | None]] = PlanCache()

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> torch.Tensor:
            stream = _stream(args[0]) if args and not named else None
            if stream is None:
                return function(*args, **named)
            tensors, numbers = split(args)
            addresses, kind = [*map(_address, tensors)], None
            key = get_ident(), stream, odd_addresses(addresses), *numbers
            layout = layouts.get(key, tensors)
            if layout is None:
                result = function(*args)
                if len({*map(id, tensors)}) == len(tensors):  # else they would never compare
                    layouts.keep(key, tensors, {})
                return result
            if beside is not None:
                more, kind = beside(*args)
                tensors += more
                addresses += map(_address, more)
            tape = layout.get(kind, _UNTRIED)
            if isinstance(tape, Tape):
                return tape(tensors, addresses, stream)
            if tape is None:
                return function(*args)
            layout[kind] = None
            result, layout[kind] = _record(functools.partial(function, *args), tensors, addresses, stream)
            return result

        call.layouts = layouts  # type: ignore[attr-defined]
        return call

    return decorate


def _splitter(function: Operator, unread: Collection[str]) -> Callable[[tuple], tuple[Tensors, tuple]]:
    """What parts a call's arguments, defaults left out at the end, into tensors and what can stand in a key."""
    parameters = inspect.signature(function).parameters.values()
    optional = [at for at, each in enumerate(parameters) if each.annotation == torch.Tensor | None]
    others = [at for at, each in enumerate(parameters) if each.annotation not in (torch.Tensor, torch.Tensor | None)]
    given = [at for at, each in enumerate(parameters) if at not in others and each.name not in unread]
    if not optional:
        pick = itemgetter(*given)
        rest = [itemgetter(slice(0, 0), *(at for at in others if at < count)) for count in range(len(parameters) + 1)]
        return lambda args: (pick(args), rest[len(args)](args))

    def split(args: tuple) -> tuple[Tensors, tuple]:
        tensors = tuple(args[at] for at in given if at < len(args) and args[at] is not None)
        absent = tuple(at for at in optional if at >= len(args) or args[at] is None)
        return tensors, (absent, *(args[at] for at in others if at < len(args)))

    return split


def _stream(tensor: torch.Tensor) -> int | None:
    """Handle of the current stream of a tensor's GPU; None where calls run as they are written: on another device than
    the current one, inside of a call that is being recorded, in the capture of a graph."""
    if interpreting() or tensor.get_device() != current_device() or get_ident() in triton_support.recorders:
        return None
    stream = raw_stream()(tensor.get_device())
    return None if stream and capturing() else stream


class _Unrecordable(Exception):
    """Something of a call cannot be replayed."""


class _Recorder(TorchDispatchMode):
    """Notes launches and products in turn, the memory that a call makes, and what it does beside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []
        self.made: list[torch.Tensor] = []  # held, so that no address comes twice
        self.beside: list[str] = []

    def launched(self, start: Start, grid: tuple[int, int, int], args: tuple) -> None:
        """Called by launches."""
        self.steps.append((start, grid, args))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATES:
            self.made.append(result)
        elif func in _PRODUCTS:
            self.steps.append((_PRODUCTS[func], args, kwargs or {}, result))
        elif not _is_view(func):
            self.beside.append(str(func))
        return result

    def __enter__(self):
        triton_support.recorders[get_ident()] = self
        return super().__enter__()

    def __exit__(self, *error):
        del triton_support.recorders[get_ident()]
        return super().__exit__(*error)


_ATEN = torch.ops.aten
_ALLOCATES = {
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
# By PyTorch's own bindings, which cost less than calling operators.
_PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {
    _ATEN.mm.default: torch.mm,
    _ATEN.addmm.default: torch.addmm,
    _ATEN._scaled_mm.default: torch._scaled_mm,
}


def _is_view(func) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    read_only = all(alias is not None and not alias.is_write for alias in aliases)
    return func is _ATEN._unsafe_view.default or (bool(aliases) and read_only)


def _record(
    call: Callable[[], torch.Tensor], tensors: Tensors, addresses: list[int], stream: int
) -> tuple[torch.Tensor, Tape | None]:
    """The result of a call, and what it launched if that gives the same result again."""
    with _Recorder() as recorder:
        result = call()
    try:
        tape = _Writer(recorder, tensors, result).tape()
    except _Unrecordable:
        return result, None
    for tensor in tape.kept:
        if Workspace.keeps(tensor) == "scratch":
            tensor.view(-1).view(torch.uint8).fill_(_POISON)
    again = _poisoned(tape)(tensors, addresses.copy(), stream)
    same = torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (result, again)))
    return result, tape if same else None


def _poisoned(tape: Tape) -> Tape:
    """With memory of other bytes."""

    def filled(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def made() -> torch.Tensor:
            tensor = make()
            torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8).fill_(_POISON)
            return tensor

        return made

    return replace(tape, makes=tuple(make and filled(make) for make in tape.makes), ready={})


@dataclass
class _Writer:
    """Writes a tape: finds out where the pointers of a recorded call lead."""

    recorder: _Recorder
    tensors: Tensors
    result: torch.Tensor
    places: dict[int, tuple[int, torch.Tensor, int]] = field(default_factory=dict)
    """Of memory that the call made: source, the tensor, and the source's first byte in it"""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def tape(self) -> Tape:
        """Raises _Unrecordable."""
        recorder, result = self.recorder, self.result
        if recorder.beside:
            raise _Unrecordable(f"it runs {recorder.beside[0]}")
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
        if makes[0] is None:
            source, tensor, _ = self.places.get(_storage(result), (0, None, 0))
            if tensor is None or tensor.dtype != result.dtype:
                raise _Unrecordable("its result is not a tensor that it made")
            final = source, (tuple(result.shape), tuple(result.stride()), int(result.storage_offset()))
        return Tape(tuple(steps), makes, final, tuple(self.kept.values()))

    def _make(self) -> tuple[Callable[[], torch.Tensor] | None, ...]:
        """Finds places for what the call allocated."""
        first, device, result = len(self.tensors), self.result.device, self.result
        given = {_storage(tensor) for tensor in self.tensors}
        read = {
            _storage(arg)
            for noted in self.recorder.steps
            if not isinstance(noted[0], Start)
            for arg in (*noted[1], *noted[2].values())
            if isinstance(arg, torch.Tensor)
        }
        makes: list[Callable[[], torch.Tensor] | None] = [None, None]
        size = 0
        for tensor in self.recorder.made:
            storage = _storage(tensor)
            if storage in given or Workspace.keeps(tensor):
                continue
            if storage == _storage(result):
                if result.storage_offset() or result.numel() * result.element_size() != _bytes(result):
                    raise _Unrecordable("its result is a part of a tensor that it made")
                makes[0] = allocator(tuple(result.shape), result.dtype, device, tuple(result.stride()))
                self.places[storage] = first, result, 0
            elif storage in read:
                self.places[storage] = first + len(makes), tensor, 0
                makes.append(allocator(tuple(tensor.shape), tensor.dtype, device, tuple(tensor.stride())))
            else:
                self.places[storage] = first + 1, tensor, size
                size += math.ceil(_bytes(tensor) / _ALIGNED) * _ALIGNED
        if size:
            makes[1] = allocator((size,), torch.uint8, device)
        return tuple(makes)

    def _launch(self, start: Start, grid: tuple[int, int, int], args: tuple) -> Launch:
        unfolded = unfold(start, args)
        if unfolded is None:
            raise _Unrecordable("this version of Triton hides how descriptors reach the driver")
        launcher, args, forms = unfolded
        filled, slots = [*start.rest, *args], []
        for at, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            place, form = self._place(arg), forms.get(at)
            if place is not None:
                source, tensor, first = place
                slots.append(Slot(at + len(start.rest), source, first + _address(arg) - _address(tensor), form))
                filled[slots[-1].at] = None
            else:
                filled[at + len(start.rest)] = _address(arg) if form is None else form(_address(arg))
        return Launch(launcher, grid, filled, tuple(slots))

    def _product(self, function: Callable, args: tuple, named: dict, _result: torch.Tensor) -> Product:
        filled, slots = list(args), []
        if any(isinstance(arg, torch.Tensor) for arg in named.values()):
            raise _Unrecordable("a product has tensors by name")
        if any(tensor.requires_grad for tensor in self.tensors):
            raise _Unrecordable("gradients do not pass through views")
        for at, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            place = self._place(arg)
            if place is None or place[1].dtype != arg.dtype:
                raise _Unrecordable("a product reads kept memory, or bytes of another type")
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
            raise _Unrecordable("a pointer leads into no tensor that was given, or into several")
        return holding[0], self.tensors[holding[0]], 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
