"""The state-space scan with FlashInfer's decode step; prefill runs on our Triton kernels."""

import functools
from collections.abc import Callable

import torch

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.mamba import ssd_kernels as kernels
from shardwise.ops.mamba.scan import Inputs, plan_prefill, prefill, prepare
from shardwise.ops.mamba.triton import like_hidden
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import FLASHINFER, TRITON, operator
from shardwise.ops.state_batch import check_metadata
from shardwise.ops.triton_support import Kernel

_launch_ready = Kernel(kernels.ready_kernel)
_launch_drop = Kernel(kernels.drop_kernel)


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
    """As `triton_cached_ssm`; the head size P must be 64 or 128, the states of a slot contiguous, and there must be at
    least as many slots as decode sequences."""
    op = "flashinfer_cached_ssm"
    if hidden_states.shape[-1] not in (64, 128):
        raise ValueError(
            f"{op}: FlashInfer takes head sizes 64 and 128, got {hidden_states.shape[-1]}; triton_cached_ssm takes any"
        )
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, hidden_states, cu_seqlen, slot_idx, use_initial_states, ssm_state_cache)
    one = prepare(
        op, hidden_states, A, B, C, D, dt, dt_bias, batch, slot_idx, use_initial_states,
        ssm_state_cache, time_step_limit, chunk_size,
    )  # fmt: skip
    if batch.prefill_tokens:
        metadata = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
        cuts = tuple(tensor.contiguous() for tensor in metadata)
        prefill(op, one.taken, cuts, one.out, plan_prefill(op, one, batch, cuts, chunk_size))
    if batch.decode:
        if ssm_state_cache.shape[0] < batch.decode:
            raise ValueError(
                f"{op}: FlashInfer wants a slot for each of the {batch.decode} decode sequences, the cache has "
                f"{ssm_state_cache.shape[0]}; triton_cached_ssm takes any number"
            )
        _decode(op, one, batch)
    return one.out


@functools.cache
def _update() -> Callable:
    from flashinfer.mamba import selective_state_update

    return selective_state_update


def _decode(op: str, one: Inputs, batch: Batch) -> None:
    """FlashInfer's step between two small kernels of ours.

    The first makes the time steps, clamped, which FlashInfer's are not, and 32-bit slots; the last gives zeros to the
    tokens without a slot, for which FlashInfer computes something from an empty state.
    """
    count, device = batch.decode, one.x.device
    (heads, size), states = one.x.shape[2:], one.B.shape[3]
    steps = torch.empty((count, heads, 1), dtype=torch.float32, device=device)
    slots = torch.empty(count, dtype=torch.int32, device=device)
    free = batch.prefill_tokens, batch.prefill, heads, one.cache.shape[0], one.low, one.high
    fixed = one.dt_t, 1 << (heads - 1).bit_length()
    pointers = one.dt, one.dt_bias, one.slots, steps, slots, report_word(op)
    _launch_ready(device, (count, 1, 1), pointers, free, fixed, warps=4)
    x, B, C = (_tokens(t, batch) for t in (one.x, one.B, one.C))
    A, D, out = one.A.float(), one.D.float(), _tokens(one.out, batch)
    _update()(
        one.cache,
        x,
        steps.expand(count, heads, size),
        A.as_strided((heads, size, states), (1, 0, 0)),
        B,
        C,
        D.as_strided((heads, size), (1, 0)),
        state_batch_indices=slots,
        pad_slot_id=-1,
        out=out,
    )
    _launch_drop(device, (count, 1, 1), (slots, out), (heads * size,), (1024,), warps=4)


def _tokens(t: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The decode tokens of `t` [b, s, H, D], dense [decode, H, D]."""
    if batch.prefill_tokens or batch.tokens < t.shape[0] * t.shape[1]:
        return t.flatten(0, 1)[batch.prefill_tokens : batch.tokens].contiguous()
    return t.contiguous().view(-1, *t.shape[2:])
