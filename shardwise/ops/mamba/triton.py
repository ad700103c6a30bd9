"""The state-space scan over a flat batch, on our own Triton kernels; gradients are not provided."""

from typing import NamedTuple

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.mamba.scan import Prefill, plan_decode, plan_prefill, prefill, prepare
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import TRITON, operator
from shardwise.ops.state_batch import check_metadata
from shardwise.ops.triton_support import Launch, keep_launch, layout


class _Plan(NamedTuple):
    """What a step launches, but for its tensors."""

    prefill: Prefill | None
    decode: Launch | None


# Of steps without a copy or padding, by their layout.
STEPS: dict[tuple, _Plan] = {}


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

    Shapes and counts that contradict each other raise ValueError; so do, in the next call (`metadata_reports.py`), a
    slot outside the cache, which counts as -1, and a cu_seqlen that does not ascend from 0 to the prefill tokens. This
    and pieces that are not its own give wrong values for prefill sequences, never an access outside of the tensors.
    Nothing is synchronised.
    """
    op = "triton_cached_ssm"
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, hidden_states, cu_seqlen, slot_idx, use_initial_states, ssm_state_cache)
    given = hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    metadata: tuple[torch.Tensor, ...] = ()
    if batch.prefill_tokens:
        metadata = cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
    key = batch, *time_step_limit, chunk_size, hidden_states.device, layout(*given, *metadata)
    again = STEPS.get(key)
    if again is not None:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        _run(op, again, given, metadata, out)
        return out
    one = prepare(
        op, hidden_states, A, B, C, D, dt, dt_bias, batch, slot_idx, use_initial_states,
        ssm_state_cache, time_step_limit, chunk_size,
    )  # fmt: skip
    cuts = tuple(tensor.contiguous() for tensor in metadata)
    plan = _Plan(
        plan_prefill(op, one, batch, cuts, chunk_size) if batch.prefill_tokens else None,
        plan_decode(op, one, batch) if batch.decode else None,
    )
    _run(op, plan, one.taken, cuts, one.out)
    if batch.tokens == hidden_states.shape[0] * hidden_states.shape[1]:
        keep_launch(STEPS, key, plan, (*one.taken, *cuts), (*given, *metadata))
    return one.out


def _run(op: str, plan: _Plan, given: tuple, metadata: tuple, out: torch.Tensor) -> None:
    if plan.prefill is not None:
        prefill(op, given, metadata, out, plan.prefill)
    if plan.decode is not None:
        plan.decode.form(plan.decode.grid, (*given, out, report_word(op)), plan.decode.free)
