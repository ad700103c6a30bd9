"""Triton where it is installed, and launches whose host side is decided once.

Kernel files write `from shardwise.ops.triton_support import tl, triton` and import on any machine; the operators
they serve declare the need `TRITON`, so a placeholder is never launched.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Stands for triton and triton.language while kernel files are imported; nothing of it can run."""

        constexpr = int

        def jit(self, function: Callable) -> Callable:
            return function

    triton = tl = _Missing()  # type: ignore[assignment]


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the import)."""
    knobs = getattr(triton, "knobs", None)
    return knobs is not None and bool(knobs.runtime.interpret)


class Launcher:
    """Launch one kernel, remembering the compiled form for every key.

    Triton binds and specialises all arguments at each launch, which costs 15 to 25 µs of host time. A caller that
    can name what the specialisation depends on passes it as `key`, and later launches with an equal key go
    straight to the compiled kernel.
    """

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._runners: dict[Any, Callable] = {}

    def __call__(self, key: Any, grid: tuple[int, int, int], args: tuple, **options: int) -> None:
        """Run on `grid` with `args`, all of the kernel's parameters in order, constexprs included.

        key      hashable; must cover the grid, the device, the dtypes, the 16-byte alignment of the pointers (see
                 `aligned`), every integer argument and every option
        options  num_warps, num_stages
        """
        runner = self._runners.get(key)
        if runner is not None:
            runner(*args)
            return
        compiled = self._kernel[grid](*args, **options)
        if not interpreting():
            self._runners[key] = compiled[grid]


def aligned(*tensors: Any) -> int:
    """The 16-byte misalignment of the tensors' addresses together; 0 when all are aligned."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & 15
