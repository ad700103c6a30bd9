"""Delta-rule operators in plain PyTorch, for any device and dtype; gradients are not provided.

Callers normalise q and k. The gated forms take g, the logarithm of the decay of every token and head.
"""

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.dtypes import check_float
from shardwise.ops.fla.checks import check_delta
from shardwise.ops.fla.delta import match_heads, scan, step, step_in_place
from shardwise.ops.registry import operator
from shardwise.ops.state_batch import read_state_spans


def like_v(q, k, v, *_args, **_kwargs):
    """Fake of every delta-rule operator."""
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _uncached(op, q, k, v, g, beta, scale):
    check_delta(op, q, k, v, beta, g)
    check_float(op, "v", v)
    q, k = match_heads(q, k, v)
    o, _ = scan(q, k, v, beta, g, q.shape[-1] ** -0.5 if scale is None else scale)
    return o.to(v.dtype).contiguous()


@operator(fake=like_v)
def torch_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] -> v's shape and dtype; scale None: K^-0.5."""
    return _uncached("torch_delta_rule", q, k, v, None, beta, scale)


@operator(fake=like_v)
def torch_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """As `torch_delta_rule` with a decay exp(g) a step; v may have HV heads, a multiple of H. g, beta [B, T, HV]."""
    return _uncached("torch_gated_delta_rule", q, k, v, g, beta, scale)


def _cached(op, q, k, v, g, beta, batch_info_host, cu_seqlen, slot_idx, use_initial_states, cache, scale):
    check_delta(op, q, k, v, beta, g, cache)
    check_float(op, "v", v)
    shape = v.shape
    q, k = match_heads(q, k, v)
    q, k, v, beta = (t.flatten(0, 1) for t in (q, k, v, beta))
    g = g if g is None else g.flatten(0, 1)
    batch = read_batch(op, batch_info_host)
    spans = read_state_spans(op, batch, v.shape[0], cu_seqlen, slot_idx, use_initial_states, cache.shape[0])
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for span in spans[: batch.prefill]:
        if span.slot < 0 or not span.length:
            continue
        rows = slice(span.start, span.start + span.length)
        state = cache[span.slot][None] if span.resumes else None
        gate = None if g is None else g[None, rows]
        o, state = scan(q[None, rows], k[None, rows], v[None, rows], beta[None, rows], gate, scale, state)
        out[rows] = o[0].to(out.dtype)
        cache[span.slot] = state[0].to(cache.dtype)
    live = [span for span in spans[batch.prefill :] if span.slot >= 0]
    if cache.dtype == torch.float32 and not cache.is_cuda:  # one by one: copies of states cost a CPU more than all else
        for span in live:
            row, gate = span.start, None if g is None else g[span.start]
            out[row] = step_in_place(q[row], k[row], v[row], beta[row], gate, scale, cache[span.slot])
    elif live:
        tokens = torch.tensor([span.start for span in live], device=v.device)
        slots = torch.tensor([span.slot for span in live], device=v.device)
        gate = None if g is None else g[tokens]
        o, state = step(q[tokens], k[tokens], v[tokens], beta[tokens], gate, scale, cache[slots])
        out[tokens] = o.to(out.dtype)
        cache[slots] = state.to(cache.dtype)
    return out.view(shape)


@operator(fake=like_v, mutates=("delta_cache",))
def torch_cached_delta_rule(
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
    """Delta rule over a flat batch [b, 1, ...] or [1, T, ...]; states [slots, H, K, V] are read and written in place.

    Prefill sequences continue where use_initial_states, decode tokens always; slot -1 is skipped and gives zeros.
    """
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("torch_cached_delta_rule", q, k, v, None, beta, *rest)


@operator(fake=like_v, mutates=("delta_cache",))
def torch_cached_gated_delta_rule(
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
    """As `torch_cached_delta_rule` with a decay exp(g) a step; v, g, beta and the states may have HV heads."""
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("torch_cached_gated_delta_rule", q, k, v, g, beta, *rest)
