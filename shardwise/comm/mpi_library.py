"""The MPI library that mpi4py has: initialised when first needed, never by an import; communicators, what it can do."""

import atexit
import ctypes
import functools
import os
import re
from typing import Any

import torch

from shardwise.comm import leaving
from shardwise.comm.arrival import free_owned, owned
from shardwise.comm.base import Unavailable
from shardwise.comm.bootstrap import Rendezvous
from shardwise.comm.mpi_wait import bounded
from shardwise.comm.watch import Deadlines


@functools.cache
def load():
    """mpi4py's MPI module with MPI initialised. Raises Unavailable with the reason where there is none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"transport mpi needs mpi4py and an MPI library: {error}") from None
    if not MPI.Is_initialized():
        _init(MPI)
        atexit.register(_finalize, MPI)
        os.register_at_fork(after_in_child=lambda: atexit.unregister(_finalize))
    return MPI


def _init(MPI) -> None:
    """As mpi4py does it, but with the interpreter's lock released, as MPI_Init waits for the other ranks."""
    try:
        init = ctypes.CDLL(MPI.__file__).MPI_Init_thread
    except (OSError, AttributeError):  # mpi4py has bound the library in another way
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
        return
    if init(None, None, MPI.THREAD_SERIALIZED, ctypes.byref(ctypes.c_int())) != MPI.SUCCESS:
        raise Unavailable("transport mpi: MPI_Init_thread failed")
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # which mpi4py turns into exceptions


def _finalize(MPI) -> None:
    if not MPI.Is_finalized() and leaving.leave_all(Deadlines.from_environment().stop):
        free_owned()
        MPI.Finalize()


def world_communicator():
    """A communicator of our own over all ranks that mpirun started."""
    return owned(load().COMM_WORLD.Dup())


@functools.cache
def meeting_place():
    """The one over all ranks that mpirun started by which groups are made; it stays."""
    return world_communicator()


def world_ranks(comm) -> list[int]:
    """Ranks of `comm`'s members in COMM_WORLD, in the order of `comm`."""
    MPI = load()
    return MPI.Group.Translate_ranks(comm.Get_group(), list(range(comm.Get_size())), MPI.COMM_WORLD.Get_group())


@functools.cache
def takes_device_pointers() -> tuple[bool, str]:
    """(MPI reads and writes CUDA memory, reason): what the loaded library answers, not what it is believed to be."""
    load()
    with open("/proc/self/maps") as maps:
        paths = sorted(set(re.findall(r"/\S*/libmpi[.\w]*\.so[.\d]*", maps.read())))
    for path in paths:
        try:
            query = ctypes.CDLL(path).MPIX_Query_cuda_support
        except (OSError, AttributeError):
            continue
        return (True, f"{path} is CUDA-aware") if query() else (False, f"{path} is built without CUDA")
    return False, "the MPI library has no MPIX_Query_cuda_support"


class MpiRendezvous(Rendezvous):
    """Through an MPI communicator."""

    def __init__(self, comm):
        super().__init__(comm.Get_rank(), world_ranks(comm))
        self.comm = comm

    def gather(self, key: str, value: Any, timeout: float) -> list[Any]:
        with bounded(self.ranks[self.rank], self.ranks, timeout):
            return self.comm.allgather(value)


def datatypes() -> dict[torch.dtype, Any]:
    """MPI's names of the dtypes that it sums as torch does, and of bytes."""
    MPI = load()
    return {
        torch.float64: MPI.DOUBLE,
        torch.float32: MPI.FLOAT,
        torch.int64: MPI.INT64_T,
        torch.int32: MPI.INT32_T,
        torch.uint8: MPI.UINT8_T,
    }
