"""The state-space scan over a flat batch, on our own Triton kernels; gradients are not provided."""

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.mamba.scan import decode, prefill, prepare
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.state_batch import check_metadata
from shardwise.ops.triton_support import Launch, keep_launch, layout

# Steps of decode tokens alone, without a copy or padding, by their layout.
STEPS: dict[tuple, Launch] = {}


def like_hidden(hidden_states, *_args):
    """Fake of the cached state-space operators."""
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@operator(fake=like_hidden, mutates=("ssm_state_cache",), needs=(TRITON,), instead="torch_cached_ssm")
def triton_cached_ssm(
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
    """As `torch_cached_ssm`, with the pieces that `mamba_ssm_prepare_metadata` cut for the same chunk_size.

    Nothing is synchronised: a slot outside the cache is treated as -1; a cu_seqlen that does not ascend from 0 to the
    prefill tokens, or pieces that are not its own, give wrong values for prefill sequences, never an access outside of
    the tensors. Shapes and counts that contradict each other raise ValueError.
    """
    op = "triton_cached_ssm"
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, hidden_states, cu_seqlen, slot_idx, use_initial_states, ssm_state_cache)
    given = hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    key = None
    if not batch.prefill:
        key = (batch, *time_step_limit, chunk_size, hidden_states.device, layout(*given))
        again = STEPS.get(key)
        if again is not None:
            out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
            again.form(again.grid, (*given, out, report_word(op)), again.free)
            return out
    one = prepare(
        op, hidden_states, A, B, C, D, dt, dt_bias, batch, slot_idx, use_initial_states,
        ssm_state_cache, time_step_limit, chunk_size,
    )  # fmt: skip
    if batch.prefill_tokens:
        rest = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
        prefill(op, one, batch, *rest, chunk_size)
    if batch.decode:
        launch = decode(op, one, batch)
        taken = one.x, one.dt, one.dt_bias, one.A, one.B, one.C, one.D, one.slots, one.cache
        if key is not None and batch.decode == hidden_states.shape[0] * hidden_states.shape[1]:
            keep_launch(STEPS, key, launch, taken, given)
    return one.out
