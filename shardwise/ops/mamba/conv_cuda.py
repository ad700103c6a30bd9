"""Causal convolution in place, on our own CUDA C++ (`conv.cu`), compiled at first use."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from shardwise.kernel_start import on_device
from shardwise.ops.mamba.conv import ConvBatch, Tensors, block_rows, blocks_of, nothing, run_step
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.nvcc import library, stream
from shardwise.ops.registry import CUDA, NVCC, operator
from shardwise.ops.triton_support import dependent_launch, multiprocessors
from shardwise.plan_cache import PlanCache

_OP = "cuda_cached_causal_conv1d"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The struct Args of conv.cu: nine pointers, then seven int64, nine int32 and what aligns the end.
_POINTERS, _NUMBERS = struct.Struct("9P"), struct.Struct("7q9i4x")
# Thread blocks of a decode step for each multiprocessor (kResident of conv.cu), all of which run at once: each walks
# over its share of the tokens and reads the weights of its channels once.
RESIDENT = 10
_BLOCK_BYTES = 64 * 16  # of a token's channels (kStepThreads)
# From so many a multiprocessor on, blocks have two tokens or more: to start one takes longer than its second token.
_SINGLE = 4
_launchers: dict[int, Callable] = {}


class _Phase(NamedTuple):
    """A launch for the prefill tokens, or for the decode tokens, but for addresses."""

    numbers: bytes
    x_offset: int
    """Bytes before the first of its tokens"""
    slot_offset: int
    halo: Callable[[], torch.Tensor] | None
    """Allocates the block borders of prefill"""


class _Plan(NamedTuple):
    """What a step launches, but for its tensors."""

    phases: tuple[_Phase, ...]
    kind: tuple[int, int]
    """Type and K"""
    bias: bool
    wide: bool
    """Whether 16-byte accesses are possible where addresses are aligned: dense rows of channels and a dense cache"""


# Of steps whose tensors are taken as they are, by their layout.
PLANS: PlanCache[_Plan] = PlanCache()


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
    run_step(
        _OP, PLANS, _plan, _run, batch_info_host, input, weight, bias, cu_seqlen, slot_idx, use_initial_states,
        conv_state_cache, activation,
    )  # fmt: skip


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


def _run(plan: _Plan, given: Tensors, metadata: Tensors) -> None:
    x, weight, bias, slots, cache = given
    device, first, taps, states = x.device, x.data_ptr(), weight.data_ptr(), cache.data_ptr()
    offset = bias.data_ptr() if plan.bias else 0
    with on_device(device.index):
        launcher, queue = _launchers.get(device.index) or _compile(device), stream(device)
        for phase in plan.phases:
            begin, halo, of_prefill = first + phase.x_offset, None, (0, 0, 0)
            if phase.halo is not None:
                halo = phase.halo()
                bounds, resumes = metadata
                of_prefill = bounds.data_ptr(), resumes.data_ptr(), halo.data_ptr()
            pointers = _POINTERS.pack(
                begin, taps, offset, of_prefill[0], slots.data_ptr() + phase.slot_offset, of_prefill[1], states,
                of_prefill[2], report_word(_OP).data_ptr(),
            )  # fmt: skip
            vector = plan.wide and (begin | offset | taps | states) % 16 == 0
            status = launcher(pointers + phase.numbers, *plan.kind, halo is None, vector, queue)
            if status:
                raise RuntimeError(f"{_OP}: kernel launch failed with CUDA error {status}")


def _plan(one: ConvBatch) -> _Plan:
    _check(one)
    batch, item, strides, rows = one.batch, one.x.element_size(), one.cache.stride(), block_rows(one)
    bits = one.channels | one.x_t | strides[0]
    dense = one.x_c == 1 and strides[1:] == (one.K - 1, 1)
    phases: tuple[_Phase, ...] = ()
    if batch.prefill_tokens:
        blocks, allocate = blocks_of(one, rows)
        phases = (_Phase(_numbers(one, rows, blocks), 0, 0, allocate),)
    if batch.decode:
        x_offset, slot_offset = batch.prefill_tokens * one.x_t * item, batch.prefill * one.slots.element_size()
        phases = (*phases, _Phase(_numbers(one, 0, batch.decode), x_offset, slot_offset, None))
    kind = _TYPES[one.x.dtype], one.K
    # Strides in bytes are 32-bit numbers to the wide form.
    fits = strides[0] * item < 2**32
    return _Plan(phases, kind, one.bias is not None, dense and fits and bits * item % 16 == 0)


def _numbers(one: ConvBatch, rows: int, blocks: int) -> bytes:
    """Strides and counts, in the order of Args."""
    wide = rows > 0 and one.bounds.dtype == torch.int64, one.slots.dtype == torch.int64
    return _NUMBERS.pack(
        one.x_t, one.x_c, *one.cache.stride(), one.cache.shape[0], one.batch.prefill_tokens,
        one.channels, one.batch.prefill, rows, blocks, *wide, one.silu, _groups(one, blocks),
        dependent_launch(one.x.device),
    )  # fmt: skip


def _groups(one: ConvBatch, tokens: int) -> int:
    """Shares of equal size, but for one token, into which a decode step's tokens are cut."""
    tiles, places = -(-one.channels * one.x.element_size() // _BLOCK_BYTES), multiprocessors(one.x.device)
    each = -(-tokens // max(1, RESIDENT * places // tiles))
    return -(-tokens // max(each, 2 if tokens * tiles > _SINGLE * places else 1))


def _compile(device: torch.device) -> Callable:
    path = Path(__file__).with_name("conv.cu")
    launcher = library(path, torch.cuda.get_device_capability(device)).shardwise_causal_conv
    launcher.argtypes = (ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_void_p)
    _launchers[device.index] = launcher
    return launcher
