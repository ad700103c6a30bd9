"""Launches of Triton kernels whose host side is decided once.

`Kernel`, and the `Form` that it makes, serve kernels whose parameters come in three runs: pointers, numbers that change
freely, and what the kernel is compiled for; a `Chain` launches several of them on the same tensors. `Launcher` serves
the others: its caller names what a compiled kernel depends on, and may say how many programs share a multiprocessor.
"""

import ctypes
import math
from collections.abc import Sequence
from operator import itemgetter
from threading import get_ident
from typing import Any, NamedTuple

import torch

from shardwise import kernel_start
from shardwise.kernel_start import Start, current_device, start_of
from shardwise.ops.triton_support import interpreting

_INTERPRETING = interpreting()

recorders: dict[int, Any] = {}
"""By thread: whose `launched` is told of each launch's way to the driver, grid and arguments"""


def _note(start: Start, grid: tuple[int, int, int], args: tuple) -> None:
    recorder = recorders.get(get_ident())
    if recorder is not None:
        recorder.launched(start, grid, args)


_MOST_SHARED = 228 * 1024
"""Bytes of shared memory of a multiprocessor at the most (Hopper)."""


def _divide_memory(compiled: Any, programs: int) -> None:
    """Have shared memory take from the first-level cache what so many programs of a kernel need.

    Left to the driver, the same kernel takes up to 30 % longer, depending on what has run before.
    """
    needed = programs * (compiled.metadata.shared + 1024)  # bytes; each program has 1 KB of the system's
    percent = min(100, -(-100 * needed // _MOST_SHARED))
    carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    error = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(compiled.function), carveout, percent)
    if error:
        raise RuntimeError(f"cuFuncSetAttribute(shared memory carveout, {percent} %): CUDA error {error}")


class Launcher:
    """Launch one kernel, remembering the compiled form for every key.

    Triton binds and specialises all arguments at each launch, which costs 15 to 25 µs of host time. A caller that
    can name what the specialisation depends on passes it as `key`, and later launches with an equal key go
    straight to the compiled kernel.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._launches: dict[Any, Any] = {}

    def __call__(
        self,
        device: torch.device,
        key: Any,
        grid: tuple[int, int, int],
        args: tuple,
        *,
        sharing: int = 0,
        **options: Any,
    ) -> None:
        """Run on `grid` with `args`, all of the kernel's parameters in order, constexprs included.

        key      hashable; must cover the dtypes, the 16-byte alignment of the pointers (see `aligned`), every
                 constexpr, every integer argument that is specialised, and every option
        sharing  programs that are to share a multiprocessor where shared memory is scarce; 0: as the driver likes
        options  num_warps, num_stages, launch_pdl
        """
        if 0 in grid:
            return
        if _INTERPRETING:
            options.pop("launch_pdl", None)
            self._kernel[grid](*args, **options)
            return
        index = device.index
        if index != current_device():
            with torch.cuda.device(device):
                return self(device, key, grid, args, sharing=sharing, **options)
        launch = self._launches.get((index, key))
        if launch is None:
            compiled = self._kernel[grid](*args, **options)
            if sharing:
                _divide_memory(compiled, sharing)
            launch = self._launches[index, key] = start_of(compiled)
        else:
            launch.start(*grid, launch.stream_of(index), *launch.rest, *args)
        if recorders:
            _note(launch, grid, args)


address_of = torch.Tensor.data_ptr


def odd_addresses(addresses: Sequence[int]) -> Any:
    """What kernels are compiled for: False where all addresses are multiples of 16, else which are."""
    return math.gcd(16, *addresses) != 16 and tuple(address % 16 == 0 for address in addresses)


class Kept:
    """Tensors that many launches share, their addresses looked up once."""

    __slots__ = ("addresses", "tensors")

    def __init__(self, tensors: tuple[torch.Tensor, ...] = ()):
        self.tensors, self.addresses = tensors, tuple(map(address_of, tensors))


NONE = Kept()


class Form:
    """A kernel with all that it is compiled for; a launch adds the grid, the tensors and the numbers that change.

    Made by `Kernel.form`. Callers keep it with what else follows from shapes and dtypes.
    """

    __slots__ = ("_device", "_fixed", "_index", "_kernel", "_launches", "_options")

    def __init__(self, kernel: Any, device: torch.device, fixed: tuple[Any, ...], options: dict[str, Any]):
        self._kernel, self._device, self._index = kernel, device, device.index
        self._fixed, self._options = fixed, options
        self._launches: dict[Any, Any] = {}  # by the alignment of the addresses

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[torch.Tensor, ...],
        free: tuple[float, ...],
        kept: Kept = NONE,
    ) -> None:
        """Run on `grid` with the tensors `pointers` and `kept`, in this order; an empty grid launches nothing."""
        if 0 in grid:
            return
        if _INTERPRETING:
            self._kernel[grid](*pointers, *kept.tensors, *free, *self._fixed)
            return
        if self._index != current_device():
            with torch.cuda.device(self._device):
                return self(grid, pointers, free, kept)
        addresses = [*map(address_of, pointers), *kept.addresses]  # numbers spare Triton a driver query each
        odd = odd_addresses(addresses)
        launch = self._launches.get(odd)
        if launch is not None:
            start, stream_of, rest = launch
            try:
                start(*grid, stream_of(self._index), *rest, *addresses, *free, *self._fixed)
            except OverflowError:  # a free number outgrew the 32 bits that it was compiled for
                launch = None
        if launch is None:
            compiled = self._kernel[grid](*pointers, *kept.tensors, *free, *self._fixed, **self._options)
            launch = self._launches[odd] = start_of(compiled)
        if recorders:
            _note(launch, grid, (*pointers, *kept.tensors, *free, *self._fixed))

    def bound(self, addresses: Sequence[int], free: tuple[float, ...]) -> tuple[Start, tuple[float, ...]]:
        """The way to the driver that a launch with such addresses and numbers took, and all numbers after them."""
        return self._launches[odd_addresses(addresses)], (*free, *self._fixed)


class Kernel:
    """A kernel whose parameters are in three runs: pointers, numbers that change freely, and what it is compiled for.

    The second run must be marked do_not_specialize; the third holds specialised integers and constexprs.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._forms: dict[Any, Form] = {}

    def form(
        self, device: torch.device, fixed: tuple[Any, ...], *, warps: int, stages: int = 2, pdl: bool = False
    ) -> Form:
        """The kernel for `fixed`, to be launched with pointers of one dtype each, always the same."""
        return Form(self._kernel, device, fixed, {"num_warps": warps, "num_stages": stages, "launch_pdl": pdl})

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        pointers: tuple[torch.Tensor, ...],
        free: tuple[float, ...],
        fixed: tuple[Any, ...],
        *,
        warps: int,
        stages: int = 2,
        pdl: bool = False,
    ) -> None:
        """Run on `grid`, with the form that device, dtypes and `fixed` ask for; `pdl` follows from the device."""
        self.form_for(device, pointers, fixed, warps=warps, stages=stages, pdl=pdl)(grid, pointers, free)

    def form_for(
        self,
        device: torch.device,
        pointers: tuple[torch.Tensor, ...],
        fixed: tuple[Any, ...],
        *,
        warps: int,
        stages: int = 2,
        pdl: bool = False,
    ) -> Form:
        """The form that device, the dtypes of `pointers` and `fixed` ask for, made at its first use."""
        key = (device, warps, stages, *[tensor.dtype for tensor in pointers], *fixed)
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self.form(device, fixed, warps=warps, stages=stages, pdl=pdl)
        return form


class Launch(NamedTuple):
    """A launch of one layout of tensors, but for these; callers keep it where finding it out costs as much."""

    form: Form
    grid: tuple[int, int, int]
    free: tuple[float, ...]


class Chain:
    """Launches one after another on the same tensors, whose addresses are looked up once for all."""

    def __init__(self, device: torch.device, tensors: Sequence[str], *launches: tuple[Launch, Sequence[str]]):
        """`launches`, none with an empty grid: each with the names of its pointers (two at least), out of `tensors`."""
        self._index = device.index
        self._launches = [(launch, itemgetter(*map(tensors.index, names))) for launch, names in launches]
        self._bound: dict[Any, list[tuple]] = {}  # by the alignment of the addresses

    def __call__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Run all."""
        addresses = [*map(address_of, tensors)]
        odd = odd_addresses(addresses)
        bound = self._bound.get(odd)
        if bound is None or recorders or self._index != current_device():
            return self._launch_singly(tensors, addresses, odd)
        stream = kernel_start.raw_stream()(self._index)
        for start, grid, rest, pick, numbers in bound:
            start(*grid, stream, *rest, *pick(addresses), *numbers)

    def _launch_singly(self, tensors: tuple[torch.Tensor, ...], addresses: list[int], odd: Any) -> None:
        for (form, grid, free), pick in self._launches:
            form(grid, pick(tensors), free)
        if _INTERPRETING:
            return
        bound = []  # kept when it is whole: other threads launch what they find
        for (form, grid, free), pick in self._launches:
            (start, _, rest), numbers = form.bound(pick(addresses), free)
            bound.append((start, grid, rest, pick, numbers))
        self._bound[odd] = bound


def aligned(*tensors: Any) -> Any:
    """Key part for the 16-byte alignment of the tensors' addresses: 0 when all are aligned."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & 15 and tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
