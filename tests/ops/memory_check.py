"""A memory checker for Triton kernels in the interpreter: every address must lie in a tensor of the launch."""

import contextlib

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from shardwise.ops.kernel_launch import NONE, Form, Launcher


class OutOfBounds(AssertionError):
    pass


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin


@contextlib.contextmanager
def checked_memory(monkeypatch):
    """Raise OutOfBounds where a kernel started by a `Launcher` or a `Form` touches memory outside its tensor arguments.

    Yields a list that grows by the number of addresses checked: a proof that something was.
    """
    extents: list[tuple[int, int]] = []
    seen: list[int] = []
    launch, launch_form, load, store = (
        Launcher.__call__,
        Form.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def check(pointers, mask):
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in extents:
            inside |= (addresses >= begin) & (addresses + size <= end)
        seen.append(addresses.size)
        if not inside.all():
            raise OutOfBounds(f"{int((~inside).sum())} of {addresses.size} addresses lie outside the launch's tensors")

    def launched(self, device, key, grid, args, **options):
        tensors = (getattr(x, "base", x) for x in args)  # of descriptors
        extents[:] = [_extent(x) for x in tensors if isinstance(x, torch.Tensor)]
        launch(self, device, key, grid, args, **options)

    def launched_form(self, grid, pointers, free, kept=NONE):
        extents[:] = [_extent(x) for x in (*pointers, *kept.tensors)]
        launch_form(self, grid, pointers, free, kept)

    def loaded(self, ptrs, mask, *rest, **options):
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def stored(self, ptrs, value, mask, *rest):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "__call__", launched)
        patch.setattr(Form, "__call__", launched_form)
        patch.setattr(InterpreterBuilder, "create_masked_load", loaded)
        patch.setattr(InterpreterBuilder, "create_masked_store", stored)
        yield seen
