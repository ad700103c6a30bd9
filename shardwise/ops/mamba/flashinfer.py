"""The state-space scan with FlashInfer's decode step; prefill runs on our Triton kernels."""

import math

import torch

from shardwise.ops.attention.batch import Batch
from shardwise.ops.mamba.scan import Inputs, prefill, prepare
from shardwise.ops.mamba.ssd import time_steps
from shardwise.ops.mamba.triton import like_hidden
from shardwise.ops.registry import FLASHINFER, TRITON, operator


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
    """As `triton_cached_ssm`; the head size P must be 64 or 128 and the states of a slot contiguous."""
    op = "flashinfer_cached_ssm"
    if hidden_states.shape[-1] not in (64, 128):
        raise ValueError(
            f"{op}: FlashInfer takes head sizes 64 and 128, got {hidden_states.shape[-1]}; triton_cached_ssm takes any"
        )
    batch, one = prepare(
        op, hidden_states, A, B, C, D, dt, dt_bias, batch_info_host, slot_idx, use_initial_states,
        ssm_state_cache, time_step_limit, chunk_size,
    )  # fmt: skip
    if batch.prefill_tokens:
        prefill(one, batch, cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill, chunk_size)
    if batch.decode:
        _decode(one, batch)
    return one.out


def _decode(one: Inputs, batch: Batch) -> None:
    from flashinfer.mamba import selective_state_update

    span = slice(batch.prefill_tokens, batch.tokens)
    size, states = one.x.shape[3], one.B.shape[3]
    x, B, C, out, dt = (t.flatten(0, 1)[span] for t in (one.x, one.B, one.C, one.out, one.dt))
    bias = one.dt_bias
    clamped = one.low > 0 or not math.isinf(one.high)
    if clamped:  # which FlashInfer does not do
        dt = time_steps(dt, bias, [one.low, one.high])
    elif bias.dtype != dt.dtype:
        dt, bias = dt.float(), bias.float()
    slots = one.slots[batch.prefill : batch.sequences].to(torch.int32)
    selective_state_update(
        one.cache,
        x.contiguous(),
        dt.contiguous()[..., None].expand(-1, -1, size),
        one.A.float()[:, None, None].expand(-1, size, states),
        B.contiguous(),
        C.contiguous(),
        one.D.to(dt.dtype)[:, None].expand(-1, size),
        dt_bias=None if clamped else bias[:, None].expand(-1, size),
        dt_softplus=not clamped,
        state_batch_indices=slots,
        pad_slot_id=-1,
        out=out,
    )
    out.masked_fill_((slots < 0)[:, None, None], 0)
