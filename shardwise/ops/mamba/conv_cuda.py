"""Causal convolution in place, on our own CUDA C++ (`conv.cu`), compiled at first use."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from shardwise.ops.mamba.conv import ConvBatch, halo, nothing, prepare
from shardwise.ops.nvcc import library, stream
from shardwise.ops.registry import CUDA, NVCC, operator

_OP = "cuda_cached_causal_conv1d"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTERS = ("x", "weight", "bias", "bounds", "slots", "resumes", "cache", "halo")
_LONGS = ("x_t", "x_c", "cache_slot", "cache_c", "cache_k", "slot_count")
_INTS = ("channels", "sequences", "rows", "blocks", "wide_bounds", "wide_slots", "silu")
ROWS = 32


class _Args(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in _POINTERS]
        + [(name, c_int64) for name in _LONGS]
        + [(name, c_int32) for name in _INTS]
    )


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
    one = prepare(
        _OP, input, weight, bias, batch_info_host, cu_seqlen, slot_idx, use_initial_states, conv_state_cache, activation
    )
    _check(one)
    if one.batch.prefill_tokens:
        saved = halo(one, ROWS)
        _launch(one, one.x, one.slots, saved.shape[0], saved)
    if one.batch.decode:
        x = one.x[one.batch.prefill_tokens : one.batch.tokens]
        _launch(one, x, one.slots[one.batch.prefill :], x.shape[0], None)


def _check(one: ConvBatch) -> None:
    dtypes = {t.dtype for t in (one.x, one.weight, one.bias, one.cache) if t is not None}
    if len(dtypes) > 1 or one.x.dtype not in _TYPES:
        raise TypeError(
            f"{_OP}: input, weight, bias and cache must share one of {[*map(str, _TYPES)]}, got {[*map(str, dtypes)]}; "
            "triton_cached_causal_conv1d takes mixtures"
        )
    if one.weight.shape[1] > 4:
        raise ValueError(
            f"{_OP}: K must be 2, 3 or 4, got {one.weight.shape[1]}; triton_cached_causal_conv1d takes any"
        )
    for name, index in (("slot_idx", one.slots), ("cu_seqlen", one.bounds)):
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_OP}: {name} must be int32 or int64, got {index.dtype}")
    if one.batch.prefill and one.resumes.dtype != torch.bool:
        raise TypeError(f"{_OP}: use_initial_states must be bool, got {one.resumes.dtype}")


def _launch(one: ConvBatch, x: torch.Tensor, slots: torch.Tensor, blocks: int, saved: torch.Tensor | None) -> None:
    """The prefill kernels when `saved` has room for the block borders, else the decode step."""
    channels, K = one.weight.shape
    decode = saved is None

    def pointer(tensor):
        return None if tensor is None else tensor.data_ptr()

    args = _Args(
        x.data_ptr(), one.weight.data_ptr(), pointer(one.bias),
        None if decode else one.bounds.data_ptr(), slots.data_ptr(),
        None if decode else one.resumes.data_ptr(), one.cache.data_ptr(), pointer(saved),
        *x.stride(), *one.cache.stride(), one.cache.shape[0],
        channels, one.batch.prefill, ROWS, blocks,
        not decode and one.bounds.dtype == torch.int64, slots.dtype == torch.int64, one.silu,
    )  # fmt: skip
    device = x.device
    with torch.cuda.device(device):
        compiled = library(Path(__file__).with_name("conv.cu"), torch.cuda.get_device_capability(device))
        status = compiled.shardwise_causal_conv(
            ctypes.byref(args), _TYPES[x.dtype], K, decode, _vector(one, x), c_void_p(stream(device))
        )
    if status:
        raise RuntimeError(f"{_OP}: kernel launch failed with CUDA error {status}")


def _vector(one: ConvBatch, x: torch.Tensor) -> bool:
    """Whether 16-byte accesses are possible: aligned dense rows of channels, and a dense cache."""
    width = 16 // x.element_size()
    taps = one.cache.shape[2]
    tensors = [t for t in (x, one.weight, one.bias, one.cache) if t is not None]
    return (
        x.stride(1) == 1
        and one.cache.stride()[1:] == (taps, 1)
        and not any(n % width for n in (x.shape[1], x.stride(0), one.cache.stride(0)))
        and not any(t.data_ptr() % 16 for t in tensors)
    )
