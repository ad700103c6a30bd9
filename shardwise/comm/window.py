"""Strategy NCCL_SYMMETRIC: NCCL's kernels for memory that all ranks have registered as one window.

With NCCL_NVLS_ENABLE=0 NCCL makes no multicast object for a window and takes the forms that write to each peer
(docs/communication.md says how that was seen in the library). NCCL reads the variable once, so it must have been there
when the process started; otherwise, and with a version that nobody looked at, the strategy is refused.

Tensors are copied into the window and out of it. NCCL adds 16-bit floats in float32; its waits have no deadline.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.comm.base import CommError, Unavailable
from shardwise.comm.p2p.workspace import host_identity

BUFFER_BYTES = 32 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST, LAST = (2, 27), (2, 31)
"""Versions of NCCL whose windows were looked into: 2.27.7, 2.28.9, 2.29.7, 2.30.7 and 2.31.2."""
_SWITCH, _PLUGIN = "NCCL_NVLS_ENABLE", "NCCL_ENV_PLUGIN"
_SYMMETRIC = 1
"""NCCL_WIN_COLL_SYMMETRIC of nccl.h."""


class Window:
    """One rank's part of the window. Every rank of `group` makes one at the same call."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, tell: Callable[[Any], list[Any]]):
        """`tell` gathers a value of each rank. Raises on every rank when one cannot."""
        self.group = group
        self._address = self._window = self._communicator = 0
        if len(set(tell(host_identity()))) > 1:
            raise Unavailable(
                "strategy NCCL_SYMMETRIC serves ranks of one host, these are on several hosts or containers"
            )
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # NCCL makes its communicator at the first call
        self._agree(tell, lambda: self._allocate(device))
        self._agree(tell, self._register)
        self.buffer = torch.as_tensor(_Bytes(self._address), device=device)

    def _agree(self, tell: Callable[[Any], list[Any]], step: Callable[[], None]) -> None:
        """`step` on every rank; where it fails on one, all raise and keep nothing."""
        reason = None
        try:
            step()
        except Exception as error:  # whatever stops one rank must reach all, or they wait for it
            reason = str(error)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(tell(reason)) if text]
        if failed:
            self.close()
            raise CommError("strategy NCCL_SYMMETRIC: " + "; ".join(failed))

    def _allocate(self, device: torch.device) -> None:
        self._communicator = self.group._get_backend(device)._comm_ptr()  # type: ignore[attr-defined]
        if not self._communicator:
            raise CommError("torch made no NCCL communicator for this group")
        address = ctypes.c_void_p()
        _call("ncclMemAlloc", ctypes.byref(address), BUFFER_BYTES)
        self._address = address.value or 0

    def _register(self) -> None:
        """A collective call: NCCL exchanges the handles."""
        window = ctypes.c_void_p()
        _call(
            "ncclCommWindowRegister",
            *(self._communicator, self._address, BUFFER_BYTES, ctypes.byref(window), _SYMMETRIC),
        )
        self._window = window.value or 0
        if not self._window:
            raise CommError("NCCL makes no windows here (NCCL_WIN_ENABLE or NCCL_CUMEM_ENABLE is 0, or no peer access)")

    def all_reduce(self, source: Tensor, target: Tensor) -> None:
        """target = sum of source over the ranks. Flat, contiguous, a dtype of DTYPES."""
        limit = BUFFER_BYTES // source.element_size()
        for part, result in zip(source.split(limit), target.split(limit), strict=True):
            staged = self.buffer.view(source.dtype)[: part.numel()]
            staged.copy_(part)
            dist.all_reduce(staged, group=self.group)
            result.copy_(staged)

    def close(self) -> None:
        """Give the memory back; no call of this rank may be running."""
        if self._window:
            torch.cuda.synchronize()
            _call("ncclCommWindowDeregister", self._communicator, self._window)
        if self._address:
            _call("ncclMemFree", self._address)
        self._window = self._address = 0


class _Bytes:
    """The window's memory as torch reads others' arrays."""

    def __init__(self, address: int):
        self.__cuda_array_interface__ = {
            "shape": (BUFFER_BYTES,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def obstacle(size: int, capturing: bool) -> str | None:
    """Why this rank cannot make a Window now."""
    if os.environ.get(_SWITCH) != "0" or _started_with(_SWITCH) != "0":
        return f"{_SWITCH}=0 must be set before the process starts: NCCL binds windows to multicast otherwise"
    if os.environ.get(_PLUGIN):
        return f"{_PLUGIN} is set: NCCL may read another {_SWITCH} than 0 from it"
    if capturing:
        return "its window cannot be made while a graph is captured: call it once before"
    try:
        version = _version()
    except OSError as error:
        return f"torch has loaded no libnccl.so.2: {error}"
    if not FIRST <= version[:2] <= LAST:
        first, last = (".".join(map(str, each)) for each in (FIRST, LAST))
        return f"it needs NCCL {first} to {last}, whose windows are known to need no multicast; this is {version}"
    if not hasattr(dist.ProcessGroupNCCL, "_comm_ptr"):
        return f"torch {torch.__version__} does not tell NCCL's communicator (2.11 does)"
    return None


def require_dtype(dtype: torch.dtype) -> None:
    """CommError for a dtype that NCCL's symmetric kernels do not add."""
    if dtype not in DTYPES:
        raise CommError(f"strategy NCCL_SYMMETRIC sums bfloat16, float16 and float32, not {dtype}; use AUTO")


def _started_with(name: str) -> str | None:
    """The variable's value in the environment that this process was started with, whatever was set since."""
    for entry in Path("/proc/self/environ").read_bytes().split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key.decode(errors="replace") == name:
            return value.decode(errors="replace")
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    """The libnccl that torch has loaded, and no other. Raises OSError where there is none."""
    library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    pointer = ctypes.c_void_p
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclMemAlloc.argtypes = [ctypes.POINTER(pointer), ctypes.c_size_t]
    library.ncclMemFree.argtypes = [pointer]
    library.ncclCommWindowRegister.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.POINTER(pointer), ctypes.c_int]
    library.ncclCommWindowDeregister.argtypes = [pointer, pointer]
    return library


def _version() -> tuple[int, int, int]:
    number = ctypes.c_int()
    _library().ncclGetVersion(ctypes.byref(number))
    return number.value // 10_000, number.value // 100 % 100, number.value % 100


def _call(name: str, *arguments) -> None:
    """Call NCCL; CommError with its own text when it fails."""
    code = getattr(_library(), name)(*arguments)
    if code:
        raise CommError(f"{name} failed: {_library().ncclGetErrorString(code).decode()} (error {code})")
