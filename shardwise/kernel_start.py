"""A compiled Triton kernel's own way to the driver, for launches whose host side is decided once."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import triton
except ImportError:  # then nothing is compiled that could be started
    triton = None

# Triton's way from a compiled kernel to the driver asks for device and stream, reads its settings, runs empty hooks and
# looks for scratch memory at every launch: 3 of 4.4 µs on the host. The way around them is for the launchers of these
# versions.
DIRECT = getattr(triton, "__version__", "").rsplit(".", 1)[0] in ("3.5", "3.6")


# The current device's number; torch.cuda.current_device asks first whether CUDA is started, which takes longer.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_NOTHING = contextlib.nullcontext()


def on_device(index: int) -> contextlib.AbstractContextManager:
    """Makes GPU number `index` current; costs nothing where it is, unlike torch.cuda.device."""
    return _NOTHING if index == current_device() else torch.cuda.device(index)


class Start(NamedTuple):
    """A compiled kernel's way to the driver: `start(*grid, stream_of(device number), *rest, *arguments)`.

    Tensors may be given as addresses.
    """

    start: Callable[..., None]
    stream_of: Callable[[int], int]
    rest: tuple[Any, ...]


@functools.cache
def raw_stream() -> Callable[[int], int]:
    """Device number -> handle of its current stream."""
    return triton.runtime.driver.active.get_current_stream


def start_of(compiled: Any) -> Start:
    """The shortest way that this version of Triton has; the kernel's handles are initialised."""
    if not DIRECT:
        return Start(lambda x, y, z, stream, *args: compiled[x, y, z](*args), lambda device: 0, ())
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size:
        return Start(run, raw_stream(), (function, packed, None, None, None))
    # No scratch memory; no metadata for hooks, and none of them.
    rest = function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None
    return Start(run.launch, raw_stream(), rest)
