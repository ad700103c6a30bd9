"""Gluon, Triton's lower level, where layouts are the kernel's own: kernels of it are written once and run twice.

`gl`, `jit` and `mma_v2` are Gluon's on a GPU and stand-ins in Triton's interpreter, which Gluon lacks: there layouts
mean nothing, products are float32, and no memory is shared (`async_copy` is None). Kernel files write
`from shardwise.ops.gluon_support import gl, jit, mma_v2`, import on any machine, and keep to what the stand-ins offer.
"""

from typing import Any

from torch import Tensor

from shardwise.ops.triton_support import interpreting, tl, triton


def _layout(*_args: Any, **_options: Any) -> None:
    """Stands for any layout."""


class _Language:
    """The part of Gluon's language that kernels here use, on Triton's, without layouts."""

    NVMMADistributedLayout = DotOperandLayout = BlockedLayout = SliceLayout = staticmethod(_layout)
    DistributedLinearLayout = staticmethod(_layout)

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)  # what both languages have

    @staticmethod
    def arange(start, end, layout=None):
        return tl.arange(start, end)

    @staticmethod
    def zeros(shape, dtype, layout=None):
        return tl.zeros(shape, dtype)

    @staticmethod
    def convert_layout(value, layout, assert_trivial=False):
        return value


def _product(a, b, acc):
    return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


def _found() -> tuple[Any, Any, Any, Any, bool]:
    """(language, jit, matrix product, copies to shared memory, whether kernels of it can run here)."""
    stand_ins = _Language(), triton.jit, _product, None
    if interpreting():
        return *stand_ins, True
    try:
        import triton.experimental.gluon.language as language
        from triton.experimental.gluon import jit
        from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
    except ImportError:
        return *stand_ins, False
    return language, jit, mma_v2, async_copy, True


gl, jit, mma_v2, async_copy, GLUON = _found()
ROLES = GLUON and not interpreting() and triton.__version__.startswith("3.6.")
"""Whether kernels compile whose groups of warps have each a role: other versions name and call what these need
otherwise."""


def swizzled_tiles(tensor: Tensor, *block: int) -> Any:
    """Descriptor of a tensor in tiles of so many elements of each dimension, 64 or 128 bytes of the last.

    For kernels on a GPU.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    itemsize = tensor.element_size()
    layout = gl.NVMMASharedLayout(block[-1] * itemsize, element_bitwidth=8 * itemsize, rank=len(block))
    return TensorDescriptor.from_tensor(tensor, list(block), layout)
