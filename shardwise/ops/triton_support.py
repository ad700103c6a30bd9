"""Triton where it is installed, and launches whose host side is decided once.

Kernel files write `from shardwise.ops.triton_support import tl, triton` and import on any machine; the operators
they serve declare the need `TRITON`, so a placeholder is never launched.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:

    class _Missing:
        """Stands for triton and triton.language while kernel files are imported; nothing of it can run."""

        constexpr = staticmethod(lambda value=None: value)

        def jit(self, function: Callable | None = None, **_options: Any) -> Callable:
            return function if function is not None else lambda decorated: decorated

    triton = tl = _Missing()  # type: ignore[assignment]


# Triton decides when a kernel is decorated; reading its switch costs a microsecond, too much for every launch.
_INTERPRETING = hasattr(triton, "knobs") and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the import)."""
    return _INTERPRETING


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start while their predecessor drains (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def await_predecessor(PDL: tl.constexpr):
    """First statement of a kernel launched with launch_pdl: no memory of earlier kernels is touched before it.

    Its successor may be scheduled from here on; that one waits for this whole kernel in the same way.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


class Launcher:
    """Launch one kernel, remembering the compiled form for every key.

    Triton binds and specialises all arguments at each launch, which costs 15 to 25 µs of host time. A caller that
    can name what the specialisation depends on passes it as `key`, and later launches with an equal key go
    straight to the compiled kernel.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(self, device: torch.device, key: Any, grid: tuple[int, int, int], args: tuple, **options: Any) -> None:
        """Run on `grid` with `args`, all of the kernel's parameters in order, constexprs included.

        key      hashable; must cover the dtypes, the 16-byte alignment of the pointers (see `aligned`), every
                 constexpr, every integer argument that is specialised, and every option
        options  num_warps, num_stages, launch_pdl
        """
        if 0 in grid:
            return
        if interpreting():
            options.pop("launch_pdl", None)
            self._kernel[grid](*args, **options)
            return
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(device, key, grid, args, **options)
        compiled = self._compiled.get((device.index, key))
        if compiled is None:
            self._compiled[device.index, key] = self._kernel[grid](*args, **options)
        else:
            compiled[grid](*args)


class Kernel:
    """A kernel whose parameters are in three runs: pointers, numbers that change freely, and what it is compiled for.

    The second run must be marked do_not_specialize; the third (specialised integers and constexprs) is, with dtypes
    and alignment, the key under which the compiled form is kept. Addresses are passed as numbers, which spares
    Triton a driver query for each pointer.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

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
        """Run on `grid`; an empty grid is no launch."""
        if 0 in grid:
            return
        if _INTERPRETING:
            self._kernel[grid](*pointers, *free, *fixed)
            return
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(device, grid, pointers, free, fixed, warps=warps, stages=stages, pdl=pdl)
        addresses = [tensor.data_ptr() for tensor in pointers]
        bits = 0
        for address in addresses:
            bits |= address
        odd = bits & 15 and tuple(address % 16 == 0 for address in addresses)
        key = (device.index, odd, warps, *[tensor.dtype for tensor in pointers], *fixed)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*addresses, *free, *fixed)
            return
        self._compiled[key] = self._kernel[grid](
            *pointers, *free, *fixed, num_warps=warps, num_stages=stages, launch_pdl=pdl
        )


def aligned(*tensors: Any) -> Any:
    """Key part for the 16-byte alignment of the tensors' addresses: 0 when all are aligned."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & 15 and tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
