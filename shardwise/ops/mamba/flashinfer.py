"""The state-space scan with FlashInfer's decode step; prefill runs on our Triton kernels."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.kernel_launch import Kept, Kernel, Launch
from shardwise.ops.mamba.scan import Inputs
from shardwise.ops.mamba.ssd_step_kernels import ready_kernel
from shardwise.ops.mamba.ssm import Backend, like_hidden, run_step
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import FLASHINFER, TRITON, operator
from shardwise.ops.repeated import Repeated
from shardwise.ops.scratch import Scratch
from shardwise.plan_cache import View, allocator, view

_ready = Kernel(ready_kernel)
BLOCK = 1024
"""Numbers of a row that a program copies"""


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
    given = hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    metadata = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
    return run_step(BACKEND, given, metadata, batch_info_host, time_step_limit, chunk_size)


class _Rows(NamedTuple):
    """What FlashInfer reads, as `ssd_step_kernels.ready_kernel` makes it."""

    made: Kept
    """float32 [tokens + 2, H], slots, and [tokens, rows of x, B and C]; and the word for reports"""
    read: tuple
    """FlashInfer's arguments behind the state: views of them, vectors and time steps repeated by strides; no gate, no
    bias of time steps, no softplus; slots, of which -1 is padding"""


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode step, but for its tensors: a small kernel of ours that makes what FlashInfer reads, and FlashInfer's.

    FlashInfer wants time steps, which it would not clamp, in the dtype of D, 32-bit slots, and dense rows of x, B and C
    at multiples of 16 bytes. For a token without a slot it computes something from an empty state.
    """

    ready: Scratch[tuple[Repeated, tuple]]
    """Our kernel, and what FlashInfer's reads"""
    out: View
    """Where the result has the decode tokens, [tokens, H, P]"""


@functools.cache
def _update() -> Callable:
    from flashinfer.mamba import selective_state_update

    return selective_state_update


@functools.cache
def _rows_for(
    device: torch.device, dtype: torch.dtype, count: int, heads: int, size: int, groups: int, states: int
) -> Scratch[_Rows]:
    """Of all steps with `count` decode tokens: prompts beside them come in many lengths, each with its own plan."""
    inner, outer = heads * size, groups * states
    wide = inner + 2 * outer
    numbers = allocator((count + 2, heads), torch.float32, device)
    index = allocator((count,), torch.int32, device)
    rows = allocator((count, wide), dtype, device)
    word = report_word("flashinfer_cached_ssm")

    def make() -> _Rows:
        made = f32, slots, dense = numbers(), index(), rows()
        x = view(dense, (count, heads, size), (wide, size, 1))
        B, C = (view(dense, (count, groups, states), (wide, states, 1), inner + skip) for skip in (0, outer))
        steps = view(f32, (count, heads, size), (heads, 1, 0))
        A = view(f32, (heads, size, states), (1, 0, 0), count * heads)
        D = view(f32, (heads, size), (1, 0), (count + 1) * heads)
        return _Rows(Kept((*made, word)), (x, steps, A, B, C, D, None, None, False, slots, -1))

    return Scratch(device, count, make)


def _plan_decode(op: str, one: Inputs, batch: Batch) -> _Decode:
    count, device, (heads, size) = batch.decode, one.x.device, one.x.shape[2:]
    if one.cache.shape[0] < count:
        raise ValueError(
            f"{op}: FlashInfer wants a slot for each of the {count} decode sequences, the cache has "
            f"{one.cache.shape[0]}; triton_cached_ssm takes any number"
        )
    (groups, states), dtype = one.B.shape[2:], one.x.dtype
    inner, outer = heads * size, groups * states
    scratch = _rows_for(device, dtype, count, heads, size, groups, states)
    ready = _ready.form_for(
        device,
        (*one.taken[:-1], one.out, *scratch.take().made.tensors),
        (one.x_t, one.x.stride(2), one.dt_t, one.B_t, one.B.stride(2), one.C_t, one.C.stride(2))
        + (heads // groups, size, states, 1 << (heads - 1).bit_length(), BLOCK),
        warps=4,
    )
    free = batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high
    launch = Launch(ready, (count, -(-max(inner, outer) // BLOCK), 1), free)

    def make() -> tuple[Repeated, tuple]:
        made, read = scratch.take()
        return Repeated(device, launch, made), read

    return _Decode(Scratch(device, count, make), ((count, heads, size), (inner, size, 1), batch.prefill_tokens * inner))


def _decode(op: str, plan: _Decode, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    launch, read = plan.ready.take()
    cache = given[8]
    launch((*given[:8], out))
    try:
        _update()(cache, *read, out=view(out, *plan.out))
    except RuntimeError:  # all else that FlashInfer refuses is refused before
        if cache.data_ptr() % 16:
            raise ValueError(f"{op}: ssm_state_cache must begin at a multiple of 16 bytes") from None
        raise


BACKEND = Backend("flashinfer_cached_ssm", _plan_decode, _decode, head_sizes=(64, 128))
