"""What a user may ask of the runtime, by word or number, as far as that is known without torch, ranks and weights."""

import os
from collections.abc import Sequence
from pathlib import Path

from shardwise.comm.base import TRANSPORTS

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of weights and activations; auto: bfloat16 on GPUs, float32 on the CPU."""
WEIGHT_FORMS = ("auto", "native", "dequantised")
KERNEL_PATHS = ("graphs", "fused")
"""Those that run the kernels of a GPU by name; `fused` also does in Triton's interpreter."""
DECODE_PATHS = ("auto", *KERNEL_PATHS, "layers")
ATTENTIONS = ("auto", "triton", "flashinfer", "torch")
DEVICES = ("auto", "cpu", "cuda")
RUN_TRANSPORTS = ("auto", *(name for name in TRANSPORTS if name not in ("threads", "fake")))
"""Transports between processes that answer: threads share one process, the peers of fake are imagined."""
CUDA_TRANSPORTS = ("nccl", "p2p", "flashinfer")
HOST_PAGE, DEVICE_PAGE = 16, 64
"""Tokens of a page of the KV cache: on average half a page of every sequence is unused; what decode kernels take."""


class NotOffered(ValueError):
    """What was asked for by name is not to be had on this machine; `exit_code` is the job's."""

    exit_code = 2


def require_known(name: str, value: str, legal: Sequence[str]) -> None:
    """ValueError for a word that is not one of `legal`."""
    if value not in legal:
        raise ValueError(f"{name} {value!r} is unknown, legal: {', '.join(legal)}")


def made_folder(name: str, path: str) -> str:
    """The absolute path of a folder, made now: ValueError where that cannot be would else come after the work."""
    if not str(path):
        raise ValueError(f"{name} is empty: name a folder")
    folder = Path(path).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} {path}: no folder can be made there: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name} {path}: no permission to write there")
    return str(folder)


def require_transport(transport: str, device: str) -> None:
    """ValueError for one that does not carry a model's collectives between processes, NotOffered for one that needs
    other devices than those of this type."""
    if transport in TRANSPORTS and transport not in RUN_TRANSPORTS:
        raise ValueError(
            f"transport {transport} has no peers in other processes, it is for tests and dry runs of collectives; "
            f"legal: {', '.join(RUN_TRANSPORTS)}"
        )
    require_known("transport", transport, RUN_TRANSPORTS)
    if device == "cpu" and transport in CUDA_TRANSPORTS:
        raise NotOffered(f"transport {transport} needs CUDA devices; legal here: auto, gloo, mpi, shm")


def require_decode(path: str, device: str, *, interpreted: bool = True) -> None:
    """ValueError for an unknown path, NotOffered for one that a device of this type does not run.

    device       cpu, cuda, or auto: whichever is there
    interpreted  whether Triton's interpreter runs the kernels of a GPU on the CPU, or may do so in the ranks
    """
    require_known("decode", path, DECODE_PATHS)
    if device == "cpu" and (path == "graphs" or (path == "fused" and not interpreted)):
        raise NotOffered(f"decode {path} needs a CUDA device; legal here: auto, layers")


def require_attention(backend: str, device: str) -> None:
    """ValueError for an unknown one, NotOffered for one that a device of this type does not run."""
    require_known("attention", backend, ATTENTIONS)
    if device == "cpu" and backend in ("triton", "flashinfer"):
        raise NotOffered(f"attention {backend} needs a CUDA device; legal here: auto, torch")


def require_page(cache_tokens: int | None, device: str) -> None:
    """ValueError for a KV cache of less than one page; None leaves its size open.

    device  cuda where the kernels of a GPU read the cache, cpu, or auto
    """
    if cache_tokens is None:
        return
    page = DEVICE_PAGE if device == "cuda" else HOST_PAGE
    if not isinstance(cache_tokens, int) or cache_tokens < page:
        raise ValueError(
            f"cache_tokens is {cache_tokens!r}: the KV cache is made of pages, of {HOST_PAGE} tokens on the CPU and "
            f"{DEVICE_PAGE} for the kernels of GPUs, so that {page} is the least here"
        )
