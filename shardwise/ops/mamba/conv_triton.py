"""Causal convolution in place, on our own Triton kernels (`conv_kernels.py`, `conv_step_kernels.py`)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from shardwise.ops.kernel_launch import Kernel, Launch
from shardwise.ops.mamba import conv_kernels as kernels
from shardwise.ops.mamba.conv import ConvBatch, Tensors, block_rows, blocks_of, nothing, run_step
from shardwise.ops.mamba.conv_step_kernels import decode_dense_kernel, decode_kernel
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.triton_support import dependent_launch
from shardwise.plan_cache import PlanCache

_OP = "triton_cached_causal_conv1d"
# Channels of a program for each of its warps: eight of a thread, 16 bytes of a half-precision row.
WARP_CHANNELS = 256
PREFILL = {"warps": 4, "ahead": 4}
# From here on a decode program takes several tokens, which share one reading of the weights.
MANY_TOKENS, TOGETHER = 128, 2

_launch_save = Kernel(kernels.save_kernel)
_launch_prefill = Kernel(kernels.prefill_kernel)
_launch_decode = Kernel(decode_kernel)
_launch_decode_dense = Kernel(decode_dense_kernel)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class _Prefill(NamedTuple):
    """What prefill tokens launch, but for their tensors."""

    save: Launch
    walk: Launch
    halo: Callable[[], torch.Tensor]
    """Allocates the block borders"""


class _Plan(NamedTuple):
    """What a step launches, but for its tensors."""

    prefill: _Prefill | None
    decode: Launch | None


# Of steps whose tensors are taken as they are, by their layout.
PLANS: PlanCache[_Plan] = PlanCache()


def _run(plan: _Plan, given: Tensors, metadata: Tensors) -> None:
    x, weight, bias, slots, cache = given
    if plan.prefill is not None:
        bounds, resumes = metadata
        save, walk, allocate = plan.prefill
        halo = allocate()
        save.form(save.grid, (x, bounds, slots, resumes, cache, halo, report_word(_OP)), save.free)
        walk.form(walk.grid, (x, weight, bias, bounds, slots, halo), walk.free)
    if plan.decode is not None:
        plan.decode.form(plan.decode.grid, (x, weight, bias, slots, cache, report_word(_OP)), plan.decode.free)


def _plan(one: ConvBatch) -> _Plan:
    return _Plan(
        _plan_prefill(one) if one.batch.prefill_tokens else None, _plan_decode(one) if one.batch.decode else None
    )


def _plan_prefill(one: ConvBatch) -> _Prefill:
    (x, weight, bias, slots, cache), (bounds, resumes) = one.tensors, one.metadata
    channels, K, rows = one.channels, one.K, block_rows(one)
    (blocks, allocate), sequences, pdl = blocks_of(one, rows), one.batch.prefill, dependent_launch(x.device)
    lookup = _power(sequences)
    width = min(WARP_CHANNELS, _power(channels))
    free = sequences, one.batch.prefill_tokens, cache.shape[0], rows
    strides = channels, one.x_t, one.x_c
    save = _launch_save.form_for(
        x.device,
        (x, bounds, slots, resumes, cache, x, report_word(_OP)),
        (*strides, *cache.stride(), K, _power(K - 1), width, lookup, pdl),
        warps=4,
        pdl=pdl,
    )
    walk_width = min(PREFILL["warps"] * WARP_CHANNELS, _power(channels))
    walk = _launch_prefill.form_for(
        x.device,
        (x, weight, bias, bounds, slots, x),
        (*strides, K, PREFILL["ahead"], walk_width, lookup, one.bias is not None, one.silu, pdl),
        warps=PREFILL["warps"],
        pdl=pdl,
    )
    return _Prefill(
        Launch(save, (blocks * -(-channels // width), 1, 1), free),
        Launch(walk, (blocks * -(-channels // walk_width), 1, 1), free),
        allocate,
    )


def _plan_decode(one: ConvBatch) -> Launch:
    x, weight, bias, slots, cache = one.tensors
    channels, tokens, pdl = one.channels, one.batch.decode, dependent_launch(x.device)
    pointers = x, weight, bias, slots, cache, report_word(_OP)
    first, skip, slots_there = one.batch.prefill_tokens, one.batch.prefill, cache.shape[0]
    strides = slot, c, k = cache.stride()
    if one.K == 4 and one.x_c == 1 and c == 3 and k == 1 and channels % 8 == 0:
        together = 1 if tokens < MANY_TOKENS else TOGETHER
        dense = channels, one.x_t, slot, together, WARP_CHANNELS // 8, one.bias is not None, one.silu, pdl
        form = _launch_decode_dense.form_for(x.device, pointers, dense, warps=1, pdl=pdl)
        grid = (-(-channels // WARP_CHANNELS) * -(-tokens // together), 1, 1)
        return Launch(form, grid, (first, skip, tokens, slots_there))
    width = min(WARP_CHANNELS, _power(channels))
    fixed = channels, one.x_t, one.x_c, *strides, one.K, width, one.bias is not None, one.silu, pdl
    form = _launch_decode.form_for(x.device, pointers, fixed, warps=2, pdl=pdl)
    return Launch(form, (-(-channels // width) * tokens, 1, 1), (first, skip, slots_there))


@operator(fake=nothing, mutates=("input", "conv_state_cache"), needs=(TRITON,), instead="torch_cached_causal_conv1d")
def triton_cached_causal_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
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
    """Depthwise causal convolution of a flat batch, in place on `input`, SiLU fused where asked.

    input [b, 1, C] or [1, T, C]; weight [C, 1, K] or [C, K]; conv_state_cache [slots, C, K - 1] holds the last K - 1
    inputs: read where use_initial_states and for decode, brought up to date for all. Slot -1 is skipped: its tokens
    keep their values, as does the padding; a slot outside the cache counts as -1. A cu_seqlen that does not ascend from
    0 to the prefill tokens gives wrong values for prefill sequences, never an access outside of the tensors. Both raise
    ValueError in the next call (`metadata_reports.py`), shapes, K and counts that contradict each other in this one.
    stride to padding_mode are accepted and not used.
    """
    run_step(
        _OP, PLANS, _plan, _run, batch_info_host, input, weight, bias, cu_seqlen, slot_idx, use_initial_states,
        conv_state_cache, activation,
    )  # fmt: skip
