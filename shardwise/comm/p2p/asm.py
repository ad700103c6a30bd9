"""What all inline PTX shares: whether this process compiles it at all, and its operands' constraints."""

# Triton's language, not Python's, where types are concerned.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.knobs import runtime as _runtime

INTERPRET = tl.constexpr(_runtime.interpret)
"""Kernels run in Triton's interpreter, which knows no PTX: every piece has a plain twin for it."""


@triton.constexpr_function
def constraints(outputs, kinds, chunks):
    """Of `outputs` registers and of inputs of these kinds (r, l, f), each of `chunks` elements of a thread."""
    return ",".join(["=&" + outputs[0]] * (len(outputs) * chunks) + [kind for kind in kinds for _ in range(chunks)])
