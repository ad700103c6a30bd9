"""Delta-rule operators on the kernels of the flash-linear-attention package (fla-core): float16 and bfloat16.

Its chunked kernels compute prefill tokens. A decode token is one pass over its state, which our own kernel (`step.py`)
makes in the cache itself; fla's recurrent kernel would want the states copied out and back.
"""

from collections.abc import Callable

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.devices import require_one_device
from shardwise.ops.fla.checks import check_delta
from shardwise.ops.fla.reference import like_v
from shardwise.ops.fla.step import Prefill, decode
from shardwise.ops.metadata_reports import report_word
from shardwise.ops.plan_cache import PlanCache, allocator, taken_as_given
from shardwise.ops.registry import FLA, TRITON, operator
from shardwise.ops.state_batch import check_counts, check_metadata
from shardwise.ops.triton_support import Launch

# Steps of decode tokens alone, without a copy or padding, and what allocates their results, by their layout.
PLANS: PlanCache[tuple[Launch, Callable[[], torch.Tensor]]] = PlanCache()


def _half(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{op}: fla's chunked kernels take q, k and v of one dtype, float16 or bfloat16, got {q.dtype}, {k.dtype}, "
            f"{v.dtype}; torch_* takes any"
        )


def _chunked(q, k, v, g, beta, scale, state=None, bounds=None, chunks=None):
    """o, and the final states where initial ones are given. `chunks` spares fla a look at device memory."""
    options = {"initial_state": state, "output_final_state": state is not None}
    cuts = {"cu_seqlens": bounds, "chunk_indices": chunks}
    if g is not None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g, beta, scale=scale, **options, **cuts)
    # The steps of its gated form, all of which do without a gate. Its plain form wants as many heads of k as of v, and
    # makes the chunk indices itself; it also takes a launch more and writes what lies between.
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra

    q, k, v, beta = (t.contiguous() for t in (q, k, v, beta))
    w, u, _ = chunk_gated_delta_rule_fwd_intra(k, v, beta=beta, **cuts)
    states, u, final = chunk_gated_delta_rule_fwd_h(k, w, u, **options, **cuts)
    return chunk_fwd_o(q, k, u, states, scale=scale, **cuts), final


def _uncached(op, q, k, v, g, beta, scale):
    check_delta(op, q, k, v, beta, g)
    _half(op, q, k, v)
    if v.numel() == 0:
        return like_v(q, k, v)
    return _chunked(q, k, v, g, beta, q.shape[-1] ** -0.5 if scale is None else scale)[0].to(v.dtype).contiguous()


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
    given = q, k, v, beta, beta if g is None else g, slot_idx, cache
    key, compared = (batch, scale, g is None), given if g is not None else (*given[:4], *given[5:])
    if not batch.prefill:
        again = PLANS.get(key, compared)
        if again is not None:
            launch, allocate = again
            out = allocate()
            launch.form(launch.grid, (*given, out, report_word(op)), launch.free)
            return out
    metadata = (cu_seqlen, use_initial_states) if batch.prefill_tokens else ()
    require_one_device(op, *compared, *metadata)
    check_delta(op, q, k, v, beta, g, cache)
    _half(op, q, k, v)
    if cache.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of delta_cache must be contiguous, got strides {cache.stride()}")
    tokens, slots = v.shape[0] * v.shape[1], slot_idx.contiguous()
    check_counts(op, batch, tokens, slots, use_initial_states)
    if not batch.prefill_tokens:
        make = torch.empty_like if batch.tokens == tokens else torch.zeros_like
        out = make(v, memory_format=torch.contiguous_format)
    else:
        one = Prefill(op, batch, tokens, cu_seqlen.contiguous(), slots, use_initial_states.contiguous(), cache)
        rows = [t.reshape(1, tokens, *t.shape[2:]) for t in (q, k, v, beta)]
        gate = None if g is None else g.reshape(1, tokens, -1)
        o, final = _chunked(rows[0], rows[1], rows[2], gate, rows[3], scale, one.states(), *one.chunks())
        out = o.to(v.dtype).contiguous().view(*v.shape)
        one.finish(out, final)
    if batch.decode:
        launch, taken = decode(op, q, k, v, g, beta, slots, cache, out, scale, batch)
        if batch.decode == tokens and taken_as_given(taken[:-2], given):
            PLANS.keep(key, compared, (launch, allocator(tuple(v.shape), v.dtype, v.device)))
    return out


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

    Nothing is synchronised: a slot outside the cache counts as -1. fla gets cu_seqlen clamped to the prefill tokens and
    made to ascend: one that does not ascend from 0 to them gives wrong values for prefill sequences, never an access
    outside of the tensors. Both raise ValueError in the next call (`metadata_reports.py`), shapes and counts that
    contradict each other in this one, and a dtype that fla does not take raises TypeError.
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
