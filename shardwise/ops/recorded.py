"""Operators of several kernels whose host side is recorded once for each layout of their tensors.

Checks, choices and arguments of such a call take the host 50 to 200 µs, and follow from its numbers and from the
layout of its tensors alone. The first call of a layout runs as it is written; during the second each launch is written
down, also of other packages' Triton kernels: kernel, grid and numbers, and for each pointer where it leads: into a
tensor that was given, into the result, into memory that the call made for itself or that a `Workspace` keeps. Later
calls look up addresses and go to the driver.

Nothing is taken on trust: what was recorded is run once more, on memory filled with other bytes, and kept only if the
result is the same, bit by bit, for which the second call waits for the device. A call of which that cannot be said runs
on as it is written, and so does one that used PyTorch's kernels, products and zeros apart; calls inside of a graph's
capture always do.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from operator import itemgetter
from threading import get_ident
from typing import Any

import torch

from shardwise.kernel_start import current_device, raw_stream
from shardwise.ops.kernel_launch import Kept, address_of, odd_addresses, recorders
from shardwise.ops.scratch import capturing
from shardwise.ops.tape import Tape
from shardwise.ops.tape_writer import Recorder, Unrecordable, Writer
from shardwise.ops.triton_support import interpreting
from shardwise.ops.workspace import Workspace
from shardwise.plan_cache import PlanCache, Tensors

Operator = Callable[..., torch.Tensor | Tensors]
Beside = Callable[..., tuple[Kept, Hashable]]
LARGEST = 4 << 20
"""Bytes of results up to which calls are recorded: the kernels of larger ones take longer than the host, and a second
run would need their memory twice."""
_UNTRIED = object()
_POISON = 0xFF  # NaN in every format of floating point


def recorded(
    *,
    unread: Collection[str] = (),
    beside: Beside | None = None,
    largest: int | None = None,
    alike: Callable[..., Tensors] | None = None,
) -> Callable[[Operator], Operator]:
    """Record calls of an operator that writes nothing but its results, tensors of new memory: one, or a tuple of them.

    unread   tensors that it does not look at
    beside   from its arguments, which an earlier call has found right: other tensors that it reads, and what beside the
             layout its launches follow from
    largest  bytes, instead of `LARGEST`
    alike    from the results and the arguments, what of the results is the same at every call, if not all of them
    """

    def decorate(function: Operator) -> Operator:
        split = _splitter(function, unread)
        layouts: PlanCache[dict[Hashable, Tape | None]] = PlanCache()

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> torch.Tensor | Tensors:
            stream = _stream(args[0]) if args and not named else None
            if stream is None:
                return function(*args, **named)
            tensors, numbers = split(args)
            addresses, kind = [*map(address_of, tensors)], None
            key = get_ident(), stream, odd_addresses(addresses), *numbers
            layout = layouts.get(key, tensors)
            if layout is None:
                result = function(*args)
                compares = len({*map(id, tensors)}) == len(tensors)  # a tensor given twice never does
                limit = LARGEST if largest is None else largest
                if compares and sum(each.nbytes for each in _results(result)) <= limit:
                    layouts.keep(key, tensors, {})
                return result
            if beside is not None:
                more, kind = beside(*args)
                tensors += more.tensors
                addresses += more.addresses
            tape = layout.get(kind, _UNTRIED)
            if isinstance(tape, Tape):
                return tape(tensors, addresses)
            if tape is None:
                return function(*args)
            layout[kind] = None
            result, layout[kind] = _record(functools.partial(function, *args), tensors, addresses, stream, alike)
            return result

        call.layouts = layouts  # type: ignore[attr-defined]
        return call

    return decorate


def _splitter(function: Operator, unread: Collection[str]) -> Callable[[tuple], tuple[Tensors, tuple]]:
    """What parts a call's arguments, defaults left out at the end, into tensors and what can stand in a key."""
    parameters = list(inspect.signature(function).parameters.values())
    optional = [at for at, each in enumerate(parameters) if each.annotation == torch.Tensor | None]
    given = [at for at, each in enumerate(parameters) if each.annotation is torch.Tensor and each.name not in unread]
    others = [at for at, each in enumerate(parameters) if each.annotation is not torch.Tensor and at not in optional]

    @functools.cache
    def pickers(count: int, present: tuple[int, ...]) -> tuple[itemgetter, itemgetter]:
        # The empty slice in front makes a tuple of however few there are.
        numbers = itemgetter(slice(0, 0), *(at for at in others if at < count))
        return itemgetter(slice(0, 0), *sorted((*given, *present))), numbers

    def split(args: tuple) -> tuple[Tensors, tuple]:
        count = len(args)
        present = tuple([at for at in optional if at < count and args[at] is not None]) if optional else ()
        tensors, numbers = pickers(count, present)
        return tensors(args)[1:], (present, *numbers(args))

    return split


def _stream(tensor: torch.Tensor) -> int | None:
    """Handle of the current stream of a tensor's GPU; None where calls run as they are written: on another device than
    the current one, inside of a call that is being recorded, in the capture of a graph."""
    device = tensor.get_device()
    if device < 0 or interpreting() or device != current_device() or get_ident() in recorders:
        return None
    stream = raw_stream()(device)
    return None if stream and capturing() else stream


def _record(
    call: functools.partial[torch.Tensor | Tensors],
    tensors: Tensors,
    addresses: list[int],
    stream: int,
    alike: Callable[..., Tensors] | None,
) -> tuple[torch.Tensor | Tensors, Tape | None]:
    """The result of a call, and what it launched if that gives the same result again."""
    with Recorder() as recorder:
        result = call()
    try:
        tape = Writer(recorder, tensors, _results(result), stream).tape()
    except Unrecordable:
        return result, None
    for tensor in tape.kept:
        if Workspace.keeps(tensor) == "scratch":
            tensor.view(-1).view(torch.uint8).fill_(_POISON)
    try:
        again = _poisoned(tape)(tensors, addresses.copy())
    except torch.OutOfMemoryError:  # of a second call's memory: the result is there
        return result, None
    both = [_results(each) if alike is None else alike(_results(each), *call.args) for each in (result, again)]
    return result, tape if all(map(_same_bytes, *both)) else None


def _results(result: torch.Tensor | Tensors) -> Tensors:
    return (result,) if isinstance(result, torch.Tensor) else result


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (a, b)))


def _poisoned(tape: Tape) -> Tape:
    """With memory of other bytes."""

    def filled(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def made() -> torch.Tensor:
            tensor = make()
            torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8).fill_(_POISON)
            return tensor

        return made

    return replace(tape, makes=tuple(make and filled(make) for make in tape.makes), ready={})
