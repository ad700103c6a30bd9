"""Delta-rule operators on the kernels of the flash-linear-attention package (fla-core): float16 and bfloat16.

Its chunked kernels compute prefill tokens. A decode token is one pass over its state, which our own kernel (`step.py`)
makes in the cache itself; fla's recurrent kernel would want the states copied out and back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from shardwise.ops.attention.batch import Batch, read_batch
from shardwise.ops.devices import require_one_device
from shardwise.ops.fla.checks import check_delta
from shardwise.ops.fla.chunked import chunked
from shardwise.ops.fla.reference import like_v
from shardwise.ops.fla.step import Prefill, plan_decode, plan_prefill
from shardwise.ops.kernel_launch import Launch
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.registry import FLA, TRITON, operator
from shardwise.ops.state_batch import check_counts, check_metadata, token_rows
from shardwise.plan_cache import PlanCache, allocator, taken_as_given


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step launches, but for its tensors."""

    word: torch.Tensor
    """For reports of the decode step"""
    prefill: Prefill | None
    decode: Launch | None
    out: Callable[[], torch.Tensor]
    """Allocates the result of a step of decode tokens alone"""
    shape: tuple[int, ...] | None
    """Of the result of other steps, where it is not [1, T, HV, V]"""


PLANS: PlanCache[Plan] = PlanCache()
"""Of steps without a copy, by their layout"""


def _half(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{op}: fla's chunked kernels take q, k and v of one dtype, float16 or bfloat16, got {q.dtype}, {k.dtype}, "
            f"{v.dtype}; torch_* takes any"
        )


def _uncached(op, q, k, v, g, beta, scale):
    check_delta(op, q, k, v, beta, g)
    _half(op, q, k, v)
    if v.numel() == 0:
        return like_v(q, k, v)
    return chunked(q, k, v, g, beta, q.shape[-1] ** -0.5 if scale is None else scale, v.shape[1])


@operator(fake=like_v, needs=(FLA,), instead="torch_delta_rule")
def fla_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """`torch_delta_rule` by fla's chunked kernels (WY form, chunks of 64)."""
    return _uncached("fla_delta_rule", q, k, v, None, beta, scale)


@operator(fake=like_v, needs=(FLA,), instead="torch_gated_delta_rule")
def fla_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """`torch_gated_delta_rule` by fla's chunked kernels."""
    return _uncached("fla_gated_delta_rule", q, k, v, g, beta, scale)


def _cached(op, q, k, v, g, beta, batch_info_host, cu_seqlen, slot_idx, use_initial_states, cache, scale):
    batch = read_batch(op, batch_info_host)
    check_metadata(op, batch, v, cu_seqlen, slot_idx, use_initial_states, cache)
    given = q, k, v, beta, g, slot_idx, cache, cu_seqlen, use_initial_states
    compared = (q, k, v, beta, slot_idx, cache) if g is None else (q, k, v, beta, g, slot_idx, cache)
    if batch.prefill_tokens:
        compared = *compared, cu_seqlen, use_initial_states
    key = batch, scale, g is None
    plan = PLANS.get(key, compared)
    if plan is None:
        require_one_device(op, *compared)
        taken = _taken(op, batch, *given)
        plan = _plan(op, batch, scale, v, *taken)
        if taken_as_given(taken, given):
            PLANS.keep(key, compared, plan)
        given = taken
    q, k, v, beta, g, slots, cache, bounds, resumes = given
    if plan.prefill is None:
        out = plan.out()
    else:
        out = _prefill(plan.prefill, q, k, v, beta, g, slots, cache, bounds, resumes, scale)
        out = out if plan.shape is None else out.view(plan.shape)
    if plan.decode is not None:
        form, grid, free = plan.decode
        form(grid, (q, k, v, beta, beta if g is None else g, slots, cache, out, plan.word), free)
    return out


def _prefill(one: Prefill, q, k, v, beta, g, slots, cache, cu_seqlen, resumes, scale) -> torch.Tensor:
    """Results [1, T, HV, V] of the prefill tokens, their states into the cache."""
    room = None if one.rooms is None else one.rooms.take()
    before = one.before(room, cu_seqlen, slots, resumes, cache)
    out, final = chunked(q, k, v, g, beta, scale, one.tokens, *before)
    one.after(room, cu_seqlen, slots, cache, final, out)
    return out


def _taken(op: str, batch: Batch, q, k, v, beta, g, slots, cache, cu_seqlen, resumes) -> tuple:
    """Checked tensors as kernels take them: copies where these need some, a step with prefill tokens as [1, T, ...]."""
    check_delta(op, q, k, v, beta, g, cache)
    _half(op, q, k, v)
    if cache.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of delta_cache must be contiguous, got strides {cache.stride()}")
    slots, tokens = slots.contiguous(), v.shape[0] * v.shape[1]
    check_counts(op, batch, tokens, slots, resumes)
    if batch.prefill_tokens:
        cu_seqlen, resumes = cu_seqlen.contiguous(), resumes.contiguous()
        if v.shape[0] != 1:
            q, k, v, beta, g = (t if t is None else t.reshape(1, tokens, *t.shape[2:]) for t in (q, k, v, beta, g))
    q, k, v, beta, g = (t if t is None else token_rows(t)[0] for t in (q, k, v, beta, g))
    return q, k, v, beta, g, slots, cache, cu_seqlen, resumes


def _plan(op: str, batch: Batch, scale, like, q, k, v, beta, g, slots, cache, cu_seqlen, resumes) -> Plan:
    """`like`: v as it was given, and so the result."""
    form = tuple(like.shape), like.dtype, like.device
    whole = batch.tokens == like.shape[0] * like.shape[1]
    return Plan(
        report_word(op),
        plan_prefill(op, batch, v, cu_seqlen, slots, resumes, cache) if batch.prefill_tokens else None,
        plan_decode(op, batch, q, k, v, beta, g, slots, cache, scale) if batch.decode else None,
        allocator(*form) if whole else partial(torch.zeros, form[0], dtype=form[1], device=form[2]),
        None if like.shape == v.shape else form[0],
    )


@operator(fake=like_v, mutates=("delta_cache",), needs=(FLA, TRITON), instead="torch_cached_delta_rule")
def fla_cached_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    delta_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`torch_cached_delta_rule` by fla's chunked kernels for the prefill tokens and our own step for decode.

    Nothing is synchronised, except in a layout's second call (`recorded.py`): a slot outside the cache counts as -1.
    fla gets cu_seqlen clamped to the prefill tokens and made to ascend: one that does not ascend from 0 to them gives
    wrong values for prefill sequences, never an access outside of the tensors. Both raise ValueError in the next call
    (`metadata_reports.py`), shapes and counts that contradict each other in this one, and a dtype that fla does not
    take raises TypeError.
    """
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("fla_cached_delta_rule", q, k, v, None, beta, *rest)


@operator(fake=like_v, mutates=("delta_cache",), needs=(FLA, TRITON), instead="torch_cached_gated_delta_rule")
def fla_cached_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    batch_info_host: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    delta_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`torch_cached_gated_delta_rule` by fla's chunked kernels and our own step, as `fla_cached_delta_rule`."""
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("fla_cached_gated_delta_rule", q, k, v, g, beta, *rest)
