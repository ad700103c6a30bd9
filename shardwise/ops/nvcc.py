"""CUDA C++ sources compiled by nvcc at first use and kept: one shared library a source, GPU architecture and compiler.

The libraries have a plain C interface and are called through ctypes, so that no headers of PyTorch are compiled
(seconds instead of a minute) and no Python or PyTorch version is baked in.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from shardwise.ops.registry import NVCC, OperatorUnavailable

FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared")


def cache_folder() -> Path:
    """Where compiled libraries are kept: $SHARDWISE_CACHE, else shardwise under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shardwise"
    return Path(os.environ.get("SHARDWISE_CACHE", default)) / "cuda"


@functools.cache
def library(source: Path, capability: tuple[int, int]) -> ctypes.CDLL:
    """The compiled form of `source` for GPUs of this compute capability. Raises OperatorUnavailable without nvcc,
    RuntimeError with the compiler's words when it refuses the source."""
    found, compiler = NVCC.state
    if not found:
        raise OperatorUnavailable(f"{source.name} must be compiled: {compiler}")
    return ctypes.CDLL(str(_compiled(source, compiler, "{}{}".format(*capability))))


def _compiled(source: Path, compiler: str, architecture: str) -> Path:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    identity = [source.read_text(), target, *FLAGS, compiler, str(os.stat(compiler).st_mtime_ns)]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    path = cache_folder() / f"{source.stem}-{name}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks of one job compile side by side; the rename is atomic and the last one wins with an equal file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        done = subprocess.run(
            [compiler, *FLAGS, target, "-o", str(result), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot compile {source}:\n{done.stderr[-2000:]}")
        os.replace(result, path)
    return path


def stream(device: torch.device) -> int:
    """Handle of the current stream, for a kernel launch."""
    return torch._C._cuda_getCurrentRawStream(device.index)
