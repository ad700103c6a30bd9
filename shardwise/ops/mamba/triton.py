"""The state-space scan over a flat batch, on our own Triton kernels; gradients are not provided."""

import torch

from shardwise.ops.kernel_launch import Launch
from shardwise.ops.mamba.scan import plan_decode
from shardwise.ops.mamba.ssm import Backend, like_hidden, run_step
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import TRITON, operator


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

    Shapes and counts that contradict each other raise ValueError; so do, in the next call (`metadata_reports.py`), a
    slot outside the cache, which counts as -1, and a cu_seqlen that does not ascend from 0 to the prefill tokens. This
    and pieces that are not its own give wrong values for prefill sequences, never an access outside of the tensors.
    Nothing is synchronised.
    """
    given = hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    metadata = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
    return run_step(BACKEND, given, metadata, batch_info_host, time_step_limit, chunk_size)


def _decode(op: str, plan: Launch, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    plan.form(plan.grid, (*given, out, report_word(op)), plan.free)


BACKEND = Backend("triton_cached_ssm", plan_decode, _decode)
