"""A compiled Triton kernel's own way to the driver, for launches whose host side is decided once."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
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


MAPS = 256
"""Addresses of one argument whose tensor maps are kept"""


def unfold(
    start: Start, args: tuple[Any, ...]
) -> tuple[Callable[..., None], tuple, dict[int, Callable[[int], Any]]] | None:
    """A launcher without Triton's loop over descriptors, 3 µs and more, and its arguments with descriptors taken apart.

    The third part tells, by the place of a descriptor's tensor among the arguments, what the driver takes instead for
    its address. None where this version of Triton does not show its launcher.
    """
    if not any(hasattr(arg, "block_shape") for arg in args):
        return start.start, args, {}
    within = inspect.getclosurevars(start.start).nonlocals if inspect.isfunction(start.start) else {}
    kinds = within.get("tensordesc_meta") or ()
    if "launcher" not in within or not kinds or None in kinds:
        return None
    flat: list[Any] = []
    maps: dict[int, Callable[[int], Any]] = {}
    rest = iter(kinds)
    for arg in args:
        if hasattr(arg, "block_shape"):
            maps[len(flat)] = _tensor_maps(arg, next(rest))
            flat += [arg.base, *arg.shape, *arg.strides]
        else:
            flat.append(arg)
    return within["launcher"], tuple(flat), maps


def _tensor_maps(descriptor: Any, kind: Any) -> Callable[[int], Any]:
    """The driver's form of a descriptor whose tensor lies at an address."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    shape, strides, padding = list(descriptor.shape), list(descriptor.strides), descriptor.padding
    made: dict[int, Any] = {}

    def form(address: int) -> Any:
        found = made.get(address)
        if found is None:
            if len(made) >= MAPS:
                made.clear()
            base = SimpleNamespace(data_ptr=lambda: address)
            there = SimpleNamespace(base=base, shape=shape, strides=strides, padding=padding)
            found = made[address] = make_tensordesc_arg(there, kind)[0]
        return found

    return form
