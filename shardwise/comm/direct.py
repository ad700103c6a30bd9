"""Reading a peer's private memory in one copy: Linux's process_vm_readv.

Shared memory costs two copies, in and out. Large payloads are read straight out of the peer's tensor instead, where
the kernel permits it: same user, and no ptrace restriction (Yama scope 0, or the capability). It is tried out first.
"""

import ctypes
import functools
import os

from torch import Tensor

PROBE = 0x5EED


class _Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@functools.cache
def _readv():
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    count = ctypes.c_ulong
    call.argtypes = [ctypes.c_int, ctypes.POINTER(_Piece), count, ctypes.POINTER(_Piece), count, count]
    call.restype = ctypes.c_ssize_t
    return call


def pull(pid: int, address: int, into: Tensor) -> None:
    """Fill contiguous `into` from `address` of process `pid`. Raises OSError where the kernel refuses."""
    _pull(pid, address, into.data_ptr(), into.nbytes)


def _pull(pid: int, address: int, target: int, length: int) -> None:
    while length > 0:
        moved = _readv()(pid, _Piece(target, length), 1, _Piece(address, length), 1, 0)
        if moved <= 0:
            code = ctypes.get_errno()
            raise OSError(code, f"process_vm_readv of process {pid}: {os.strerror(code)}")
        target, address, length = target + moved, address + moved, length - moved


_probe = ctypes.c_long(PROBE)


def probe_address() -> int:
    """Where this process keeps the number that its peers try to read."""
    return ctypes.addressof(_probe)


def readable(pid: int, address: int) -> tuple[bool, str]:
    """(this process may read the memory of `pid`, reason)."""
    found = ctypes.c_long(0)
    try:
        _pull(pid, address, ctypes.addressof(found), ctypes.sizeof(found))
    except (OSError, AttributeError) as error:
        return False, str(error)
    return found.value == PROBE, f"read from process {pid}"
