"""What the cached state-space operators share: a step's checks, its kept launches, and prefill on our own kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.kept import Kept, fresh, taken_as_given
from shardwise.ops.mamba.scan import Inputs, Prefill, plan_prefill, prefill, prepare
from shardwise.ops.state_batch import check_metadata


class Plan(NamedTuple):
    """What a step launches, but for its tensors."""

    out: Callable[[], Tensor]
    """Makes room for the result"""
    prefill: Prefill | None
    decode: Any


def like_hidden(hidden_states, *_args):
    """Fake of the cached state-space operators."""
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def run_step(
    op: str, kept: Kept[Plan], plan_decode: Callable[[str, Inputs, Batch], Any],
    run_decode: Callable[[str, Any, tuple[Tensor, ...], Tensor], None], hidden_states, A, B, C, D, dt, dt_bias,
    batch_info_host, cu_seqlen, slot_idx, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill,
    ssm_state_cache, time_step_limit, chunk_size,
) -> Tensor:  # fmt: skip
    """One call of the operator `op`: its arguments are checked and its launches planned once for each layout.

    kept        launches of steps without a copy or padding, by their layout
    run_decode  decode tokens, from what `plan_decode` found, `Inputs.taken` and the result
    """
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, hidden_states, cu_seqlen, slot_idx, use_initial_states, ssm_state_cache)
    tensors: tuple[Tensor, ...] = (hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache)
    if batch.prefill_tokens:
        tensors = (*tensors, cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill)
    key = batch, *time_step_limit, chunk_size
    plan = kept.get(key, tensors)
    if plan is not None:
        out = plan.out()
    else:
        one = prepare(
            op, hidden_states, A, B, C, D, dt, dt_bias, batch, slot_idx, use_initial_states,
            ssm_state_cache, time_step_limit, chunk_size,
        )  # fmt: skip
        given, out = tensors, one.out
        metadata = tuple(tensor.contiguous() for tensor in given[len(one.taken) :])
        tensors = (*one.taken, *metadata)
        plan = Plan(
            fresh(tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device),
            plan_prefill(op, one, batch, metadata, chunk_size) if batch.prefill_tokens else None,
            plan_decode(op, one, batch) if batch.decode else None,
        )
        whole = batch.tokens == hidden_states.shape[0] * hidden_states.shape[1]
        if whole and taken_as_given(tensors, given):
            kept.keep(key, tensors, plan)
    if plan.prefill is not None:
        prefill(plan.prefill, tensors, out)
    if plan.decode is not None:
        run_decode(op, plan.decode, tensors[:9], out)
    return out
