"""What other packages do in a recorded call: launches of their Triton kernels, and zeros that they ask PyTorch for."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shardwise.kernel_start import Start, start_of
from shardwise.ops.kernel_launch import Kernel
from shardwise.ops.triton_support import tl, triton

Note = Callable[[Start, tuple[int, int, int], tuple], None]
_OURS = __name__.partition(".")[0] + "."
_BLOCK = 4096
_notes: dict[int, Note] = {}
"""By thread: whom to tell"""
_lock = threading.Lock()
_plain: Any = None
"""Triton's own `run` while it is replaced"""


@contextlib.contextmanager
def foreign_launches(note: Note) -> Iterator[None]:
    """Tells `note` each launch that this thread makes as `kernel[grid](...)` of a kernel that is not ours: its way to
    the driver, grid and arguments in the order of the parameters.

    Triton has no hook that is given these, so its own `run` is replaced while some thread is inside.
    """
    global _plain
    if not hasattr(triton, "runtime"):  # it is not installed
        yield
        return
    kernels, thread = triton.runtime.jit.JITFunction, threading.get_ident()
    with _lock:
        if not _notes:
            _plain, kernels.run = kernels.run, _run
        _notes[thread] = note
    try:
        yield
    finally:
        with _lock:
            del _notes[thread]
            if not _notes:
                kernels.run = _plain


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    compiled = _plain(self, *args, grid=grid, warmup=warmup, **named)
    note = _notes.get(threading.get_ident())
    if note is not None and not warmup and not self.__module__.startswith(_OURS):
        parameters = {name: value for name, value in named.items() if name in self.signature.parameters}
        bound = self.signature.bind(*args, **parameters)
        bound.apply_defaults()
        cut = grid(bound.arguments) if callable(grid) else grid
        note(start_of(compiled), (*cut, 1, 1)[:3], tuple(bound.arguments.values()))
    return compiled


@triton.jit(do_not_specialize=["count"])
def zeros_kernel(out_ptr, count, BLOCK: tl.constexpr):
    """Zeros in [count]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < count)


_zeros = Kernel(zeros_kernel)


def fill_zeros(out: torch.Tensor) -> None:
    """Zeros in contiguous memory by a launch of ours, which can be recorded where PyTorch's cannot."""
    grid = -(-out.numel() // _BLOCK), 1, 1
    _zeros(out.device, grid, (out,), (out.numel(),), (_BLOCK,), warps=4)
