"""What the cached state-space operators share: a step's checks, planned launches, and prefill on our own kernels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.devices import require_one_device
from shardwise.ops.mamba.scan import Inputs, Prefill, plan_prefill, prepare
from shardwise.ops.metadata_reports import looks_first
from shardwise.ops.state_batch import check_metadata
from shardwise.plan_cache import PlanCache, allocator, taken_as_given


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step launches, but for its tensors."""

    out: Callable[[], Tensor]
    """Allocates the result"""
    prefill: Prefill | None
    decode: Any


@dataclass(frozen=True, slots=True)
class Backend:
    """What a cached state-space operator does its own way, and the launches of its steps."""

    op: str
    plan_decode: Callable[[str, Inputs, Batch], Any]
    decode: Callable[[str, Any, tuple[Tensor, ...], Tensor], None]
    """Decode tokens, from what `plan_decode` found, `Inputs.taken` and the result"""
    head_sizes: tuple[int, ...] = ()
    """All that it takes; none: any"""
    plans: PlanCache[Plan] = field(default_factory=PlanCache)
    """Of steps without a copy or padding, by their layout"""


def like_hidden(hidden_states, *_args):
    """Fake of the cached state-space operators."""
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def run_step(
    backend: Backend,
    given: tuple[Tensor, ...],
    metadata: tuple[Tensor, ...],
    batch_info_host: Tensor,
    time_step_limit: list[float],
    chunk_size: int,
) -> Tensor:
    """One call of an operator: its arguments are checked and its launches planned once for each layout.

    given     hidden_states, dt, dt_bias, A, B, C, D, slot_idx, ssm_state_cache
    metadata  cu_seqlen, use_initial_states, chunk_indices, chunk_offsets, seq_idx_prefill
    """
    op = backend.op
    batch = read_batch(op, batch_info_host)
    if looks_first(op, given[8]):
        check_metadata(op, batch, given[0], metadata[0], given[7], metadata[1], given[8])
    tensors = given + metadata if batch.prefill_tokens else given
    key = batch, given[8].dtype, *time_step_limit, chunk_size  # layouts of one key are searched one by one
    plan = backend.plans.get(key, tensors)
    if plan is not None:
        out = plan.out()
    else:
        require_one_device(op, *tensors)
        one = prepare(op, given, metadata[1], batch, time_step_limit, chunk_size)
        if backend.head_sizes and one.x.shape[-1] not in backend.head_sizes:
            legal = " and ".join(map(str, backend.head_sizes))
            raise ValueError(f"{op} takes head sizes {legal}, got {one.x.shape[-1]}; triton_cached_ssm takes any")
        out, cuts = one.out, tuple(tensor.contiguous() for tensor in tensors[len(given) :])
        plan = Plan(
            allocator(tuple(out.shape), out.dtype, out.device),
            plan_prefill(op, one, batch, cuts, chunk_size) if batch.prefill_tokens else None,
            backend.plan_decode(op, one, batch) if batch.decode else None,
        )
        taken = (*one.taken, *cuts)
        if batch.tokens == out.shape[0] * out.shape[1] and taken_as_given(taken, tensors):
            backend.plans.keep(key, tensors, plan)
        tensors = taken
    if plan.prefill is not None:
        prefill = plan.prefill
        prefill.launches((*tensors, out, prefill.allocate(), prefill.word))
    if plan.decode is not None:
        backend.decode(op, plan.decode, tensors[:9], out)
    return out
