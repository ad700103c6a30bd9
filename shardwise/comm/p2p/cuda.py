"""The few CUDA runtime calls that PyTorch does not offer: plain device memory and its sharing between processes.

Buffers come from cudaMalloc, never from PyTorch's allocator, whose memory cannot be shared by handle when
`expandable_segments` is on.
"""

import ctypes
import functools

import torch

from shardwise.comm.base import CommError

_LAZY_PEER_ACCESS = 1
_PEER_ACCESS_ALREADY_ENABLED = 704
_COPY_DEFAULT = 4


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


@functools.cache
def _runtime() -> ctypes.CDLL:
    major = (torch.version.cuda or "none").split(".")[0]
    name = f"libcudart.so.{major}"
    try:
        library = ctypes.CDLL(name)  # PyTorch has loaded it: the loader finds it by this name
    except OSError as error:
        raise CommError(f"GPU peer-to-peer needs {name} (PyTorch's CUDA runtime): {error}") from error
    library.cudaGetErrorString.restype = ctypes.c_char_p
    # By value: without argument types ctypes would pass a pointer's low half, or the structure by reference.
    library.cudaMalloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
    library.cudaFree.argtypes = [ctypes.c_void_p]
    library.cudaMemset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    library.cudaMemcpyAsync.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    library.cudaIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), ctypes.c_void_p]
    library.cudaIpcOpenMemHandle.argtypes = [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint]
    library.cudaIpcCloseMemHandle.argtypes = [ctypes.c_void_p]
    library.cudaDeviceEnablePeerAccess.argtypes = [ctypes.c_int, ctypes.c_uint]
    return library


def _call(name: str, *arguments) -> None:
    """Call on the current device; CommError with CUDA's own text when it fails."""
    library = _runtime()
    code = getattr(library, name)(*arguments)
    if code:
        library.cudaGetLastError()
        raise CommError(f"{name} failed: {library.cudaGetErrorString(code).decode()} (error {code})")


def malloc(size: int, device: int) -> int:
    """Address of `size` bytes of device memory."""
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cudaMalloc", ctypes.byref(pointer), size)
    return pointer.value or 0


def free(address: int, device: int) -> None:
    with torch.cuda.device(device):
        _call("cudaFree", address)


def fill(address: int, byte: int, size: int, device: int) -> None:
    """Set `size` bytes; complete on return."""
    with torch.cuda.device(device):
        _call("cudaMemset", address, byte, size)
        torch.cuda.synchronize()


def copy(target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Copy between any two addresses (of this device, a peer, or pinned host memory), in stream order."""
    with torch.cuda.device(stream.device):
        _call("cudaMemcpyAsync", target, source, size, _COPY_DEFAULT, stream.cuda_stream)


def share(address: int, device: int) -> bytes:
    """Handle by which another process of this host can open the allocation at `address`."""
    handle = _Handle()
    with torch.cuda.device(device):
        _call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
    return ctypes.string_at(ctypes.byref(handle), ctypes.sizeof(handle))


def open_shared(handle: bytes, device: int) -> int:
    """Address, valid on `device`, of another process's allocation."""
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("cudaIpcOpenMemHandle", ctypes.byref(pointer), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    return pointer.value or 0


def close_shared(address: int, device: int) -> None:
    with torch.cuda.device(device):
        _call("cudaIpcCloseMemHandle", address)


def enable_peer_access(device: int, peer: int) -> None:
    """Let `device` use addresses of `peer` in this process."""
    if device == peer:
        return
    with torch.cuda.device(device):
        library = _runtime()
        code = library.cudaDeviceEnablePeerAccess(peer, 0)
        library.cudaGetLastError()
        if code not in (0, _PEER_ACCESS_ALREADY_ENABLED):
            text = library.cudaGetErrorString(code).decode()
            raise CommError(f"device {device} cannot use memory of device {peer}: {text} (error {code})")
