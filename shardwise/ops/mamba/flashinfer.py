"""The state-space scan with FlashInfer's decode step; prefill runs on our Triton kernels."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.scan import Inputs
from shardwise.ops.mamba.ssm import Plan, like_hidden, run_step
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.plan_cache import PlanCache, View, allocator, view
from shardwise.ops.registry import FLASHINFER, TRITON, operator
from shardwise.ops.scratch import Scratch
from shardwise.ops.triton_support import Kernel, Launch

_ready = Kernel(kernels.ready_kernel)
BLOCK = 1024
"""Numbers of a row that a program copies"""
# Of steps without a copy or padding, by their layout.
PLANS: PlanCache[Plan] = PlanCache()


@operator(fake=like_hidden, mutates=("ssm_state_cache",), needs=(FLASHINFER, TRITON), instead="torch_cached_ssm")
def flashinfer_cached_ssm(
    hidden_states: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    chunk_indices: torch.Tensor,
    chunk_offsets: torch.Tensor,
    seq_idx_prefill: torch.Tensor,
    ssm_state_cache: torch.Tensor,
    time_step_limit: list[float],
    chunk_size: int,
) -> torch.Tensor:
    """As `triton_cached_ssm`; the head size P must be 64 or 128, the states of a slot contiguous, the cache begin at a
    multiple of 16 bytes, and there must be at least as many slots as decode sequences."""
    op = "flashinfer_cached_ssm"
    if hidden_states.shape[-1] not in (64, 128):
        raise ValueError(
            f"{op}: FlashInfer takes head sizes 64 and 128, got {hidden_states.shape[-1]}; triton_cached_ssm takes any"
        )
    given = hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    metadata = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
    return run_step(op, PLANS, _plan_decode, _decode, given, metadata, batch_info_host, time_step_limit, chunk_size)


class _Rows(NamedTuple):
    """What FlashInfer reads, as `ssd_kernels.ready_kernel` makes it; vectors and time steps are repeated by strides."""

    time_steps: torch.Tensor
    """[tokens, H, P]"""
    slots: torch.Tensor
    A: torch.Tensor
    """[H, P, N]"""
    D: torch.Tensor
    """[H, P]"""
    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode step, but for its tensors: a small kernel of ours that makes what FlashInfer reads, and FlashInfer's.

    FlashInfer wants time steps, which it would not clamp, in the dtype of D, 32-bit slots, and dense rows of x, B and C
    at multiples of 16 bytes. For a token without a slot it computes something from an empty state.
    """

    ready: Launch
    rows: Scratch[_Rows]
    out: View
    """Where the result has the decode tokens, [tokens, H, P]"""


@functools.cache
def _update() -> Callable:
    from flashinfer.mamba import selective_state_update

    return selective_state_update


def _plan_decode(op: str, one: Inputs, batch: Batch) -> _Decode:
    count, device, (heads, size) = batch.decode, one.x.device, one.x.shape[2:]
    if one.cache.shape[0] < count:
        raise ValueError(
            f"{op}: FlashInfer wants a slot for each of the {count} decode sequences, the cache has "
            f"{one.cache.shape[0]}; triton_cached_ssm takes any number"
        )
    (groups, states), dtype = one.B.shape[2:], one.x.dtype
    makers = (
        allocator((count, heads, size), torch.float32, device, strides=(heads, 1, 0)),
        allocator((count,), torch.int32, device),
        allocator((heads, size, states), torch.float32, device, strides=(1, 0, 0)),
        allocator((heads, size), torch.float32, device, strides=(1, 0)),
        allocator((count, heads, size), dtype, device),
        allocator((count, groups, states), dtype, device),
        allocator((count, groups, states), dtype, device),
    )
    rows = Scratch(device, count, lambda: _Rows(*[make() for make in makers]))
    ready = _ready.form_for(
        device,
        (one.x, one.dt, one.dt_bias, one.A, one.B, one.C, one.D, one.slots, *rows.take(), one.out, report_word(op)),
        (one.x_t, one.x.stride(2), one.dt_t, one.B_t, one.B.stride(2), one.C_t, one.C.stride(2))
        + (heads // groups, size, states, 1 << (heads - 1).bit_length(), BLOCK),
        warps=4,
    )
    parts = -(-max(heads * size, groups * states) // BLOCK)
    return _Decode(
        Launch(
            ready,
            (count, parts, 1),
            (batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high),
        ),
        rows,
        ((count, heads, size), (heads * size, size, 1), batch.prefill_tokens * heads * size),
    )


def _decode(op: str, plan: _Decode, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    x, dt, dt_bias, A, B, C, D, slots, cache = given
    form, grid, free = plan.ready
    rows = plan.rows.take()
    form(grid, (x, dt, dt_bias, A, B, C, D, slots, *rows, out, report_word(op)), free)
    try:
        _update()(
            cache, rows.x, rows.time_steps, rows.A, rows.B, rows.C, rows.D,
            state_batch_indices=rows.slots, pad_slot_id=-1, out=view(out, *plan.out),
        )  # fmt: skip
    except RuntimeError:  # all else that FlashInfer refuses is refused before
        if cache.data_ptr() % 16:
            raise ValueError(f"{op}: ssm_state_cache must begin at a multiple of 16 bytes") from None
        raise
