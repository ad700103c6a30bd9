"""Triton where it is installed, what kernels begin with, and what they ask of a device.

Kernel files write `from shardwise.ops.triton_support import tl, triton` and import on any machine; the operators
they serve declare the need `TRITON`, so a placeholder is never launched. `kernel_launch.py` launches kernels.
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
        constexpr_function = staticmethod(lambda function: function)

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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 stand for the interpreter's device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 4096 stand for the interpreter's device, so that tests see both sides of it."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 4096


@functools.cache
def asynchronous_products(device: torch.device) -> bool:
    """Whether tl.dot runs as wgmma, whose end a kernel has to wait for (compute capability 9 alone)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def await_predecessor(PDL: tl.constexpr):
    """First statement of a kernel launched with launch_pdl: no memory of earlier kernels is touched before it.

    Its successor may be scheduled from here on; that one waits for this whole kernel in the same way.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def await_alone(PDL: tl.constexpr):
    """As `await_predecessor`, but the successor is not scheduled before this kernel's programs have ended, whose place
    on the device it would take: for kernels of many long programs."""
    if PDL:
        gdc_wait()


@triton.jit
def await_and_trigger(PDL: tl.constexpr):
    """As `await_predecessor` for a kernel whose successor may read, before it waits itself, what the kernels in front
    of this one wrote: it may start only when those have ended."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
