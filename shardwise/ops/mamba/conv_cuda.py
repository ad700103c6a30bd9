"""Causal convolution in place, on our own CUDA C++ (`conv.cu`), compiled at first use."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.mamba.conv import ConvBatch, block_rows, halo_of, nothing, prepare
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.nvcc import library, on_device, stream
from shardwise.ops.registry import CUDA, NVCC, operator
from shardwise.ops.state_batch import check_metadata
from shardwise.ops.triton_support import dependent_launch, multiprocessors

_OP = "cuda_cached_causal_conv1d"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The struct Args of conv.cu: nine pointers, seven int64, nine int32 and what aligns the end.
_ARGS = struct.Struct("9P7q9i4x")
# Thread blocks of a decode step for each multiprocessor, all of which run at once: each walks over its share of the
# tokens and reads the weights of its channels once.
RESIDENT = 4
_BLOCK_BYTES = 128 * 16  # of a token's channels
_launchers: dict[int, Callable] = {}


@operator(
    fake=nothing,
    mutates=("input", "conv_state_cache"),
    needs=(CUDA, NVCC),
    instead="triton_cached_causal_conv1d",
)
def cuda_cached_causal_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    conv_state_cache: torch.Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    padding_mode: str,
    activation: str | None,
) -> None:
    """As `triton_cached_causal_conv1d`; K 2 to 4, one dtype (float32, float16, bfloat16) for all but the metadata."""
    batch = read_batch(_OP, batch_info_host)
    check_metadata(_OP, batch, input, cu_seqlen, slot_idx, use_initial_states, conv_state_cache)
    one = prepare(
        _OP, batch, input, weight, bias, cu_seqlen, slot_idx, use_initial_states, conv_state_cache, activation
    )
    _check(one)
    if batch.prefill_tokens:
        rows = block_rows(one)
        saved = one.x.new_empty(halo_of(one, rows))
        bounds, resumes = one.bounds.contiguous(), one.resumes.contiguous()
        pointers = bounds.data_ptr(), one.slots.data_ptr(), resumes.data_ptr()
        _launch(one, one.x.data_ptr(), pointers, saved.data_ptr(), rows, saved.shape[0])
    if batch.decode:
        x = one.x.data_ptr() + batch.prefill_tokens * one.x_t * one.x.element_size()
        pointers = 0, one.slots.data_ptr() + batch.prefill * one.slots.element_size(), 0
        _launch(one, x, pointers, 0, 0, batch.decode)


def _check(one: ConvBatch) -> None:
    dtype, bias = one.x.dtype, one.bias
    if (
        dtype not in _TYPES
        or not dtype == one.weight.dtype == one.cache.dtype
        or (bias is not None and bias.dtype != dtype)
    ):
        given = [str(t.dtype) for t in (one.x, one.weight, bias, one.cache) if t is not None]
        raise TypeError(
            f"{_OP}: input, weight, bias and cache must share one of {[*map(str, _TYPES)]}, got {given}; "
            "triton_cached_causal_conv1d takes mixtures"
        )
    if one.K > 4:
        raise ValueError(f"{_OP}: K must be 2, 3 or 4, got {one.K}; triton_cached_causal_conv1d takes any")
    for name, index in (("slot_idx", one.slots), ("cu_seqlen", one.bounds)):
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_OP}: {name} must be int32 or int64, got {index.dtype}")
    if one.batch.prefill and one.resumes.dtype != torch.bool:
        raise TypeError(f"{_OP}: use_initial_states must be bool, got {one.resumes.dtype}")


def _launch(one: ConvBatch, x: int, pointers: tuple[int, int, int], saved: int, rows: int, blocks: int) -> None:
    """The prefill kernels when there is room for the block borders at address `saved`, else the decode step."""
    cache, dtype, bias = one.cache, one.x.dtype, 0 if one.bias is None else one.bias.data_ptr()
    device = one.x.device
    strides, wide = cache.stride(), (not saved or one.bounds.dtype == torch.int64, one.slots.dtype == torch.int64)
    args = _ARGS.pack(
        x, one.weight.data_ptr(), bias, *pointers, cache.data_ptr(), saved,
        report_word(_OP).data_ptr(),
        one.x_t, one.x_c, *strides, cache.shape[0], one.batch.prefill_tokens,
        one.channels, one.batch.prefill, rows, blocks, *wide, one.silu, _groups(one, blocks), dependent_launch(device),
    )  # fmt: skip
    vector = _vector(one, x, bias, strides)
    with on_device(device):
        launcher = _launchers.get(device.index) or _compile(device)
        status = launcher(args, _TYPES[dtype], one.K, not saved, vector, stream(device))
    if status:
        raise RuntimeError(f"{_OP}: kernel launch failed with CUDA error {status}")


def _groups(one: ConvBatch, tokens: int) -> int:
    """Shares of equal size, but for one token, into which a decode step's tokens are cut."""
    tiles = -(-one.channels * one.x.element_size() // _BLOCK_BYTES)
    most = max(1, RESIDENT * multiprocessors(one.x.device) // tiles)
    return -(-tokens // -(-tokens // most))


def _compile(device: torch.device) -> Callable:
    path = Path(__file__).with_name("conv.cu")
    launcher = library(path, torch.cuda.get_device_capability(device)).shardwise_causal_conv
    launcher.argtypes = (ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_void_p)
    _launchers[device.index] = launcher
    return launcher


def _vector(one: ConvBatch, x: int, bias: int, strides: tuple[int, ...]) -> bool:
    """Whether 16-byte accesses are possible: aligned dense rows of channels, and a dense cache."""
    return (
        one.x_c == 1
        and strides[1] == one.K - 1
        and strides[2] == 1
        and (one.channels | one.x_t | strides[0]) * one.x.element_size() % 16 == 0
        and (x | bias | one.weight.data_ptr() | one.cache.data_ptr()) % 16 == 0
    )
