"""Delta-rule operators on the kernels of the flash-linear-attention package (fla-core): float16 and bfloat16."""

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.fla.checks import check_delta
from shardwise.ops.fla.reference import like_v
from shardwise.ops.registry import FLA, operator
from shardwise.ops.state_batch import check_counts


def _half(op: str, q: torch.Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{op}: fla's chunked kernels take float16 and bfloat16, got {q.dtype}; torch_* takes any dtype"
        )


def _chunked(q, k, v, g, beta, scale, state=None, bounds=None, final=False):
    options = {"scale": scale, "initial_state": state, "output_final_state": final, "cu_seqlens": bounds}
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, beta, **options)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, **options)


def _recurrent(q, k, v, g, beta, scale, state):
    options = {"beta": beta, "scale": scale, "initial_state": state, "output_final_state": True}
    if g is None:
        from fla.ops.delta_rule import fused_recurrent_delta_rule

        return fused_recurrent_delta_rule(q, k, v, **options)
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    return fused_recurrent_gated_delta_rule(q, k, v, g, **options)


def _uncached(op, q, k, v, g, beta, scale):
    check_delta(op, q, k, v, beta, g)
    _half(op, q)
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
    check_delta(op, q, k, v, beta, g, cache)
    _half(op, q)
    batch = read_batch(op, batch_info_host)
    shape = v.shape
    q, k, v, beta = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v, beta))
    g = g if g is None else g.reshape(1, *v.shape[1:3])
    check_counts(op, batch, v.shape[1], slot_idx, use_initial_states)
    slots = slot_idx[: batch.sequences].long()
    out = torch.zeros_like(v) if batch.tokens < v.shape[1] else torch.empty_like(v)
    if batch.prefill_tokens:
        bounds = cu_seqlen[: batch.prefill + 1].long()
        rows = torch.where(bounds.diff() > 0, slots[: batch.prefill], -1)  # an empty sequence keeps its state
        resumes = use_initial_states[: batch.prefill].to(torch.bool)
        state = cache[rows.clamp(min=0)].float() * (resumes & (rows >= 0)).view(-1, 1, 1, 1)
        one = slice(0, batch.prefill_tokens)
        gate = g if g is None else g[:, one]
        o, state = _chunked(q[:, one], k[:, one], v[:, one], gate, beta[:, one], scale, state, bounds, True)
        out[:, : batch.prefill_tokens] = _skip_tokens(o, bounds, rows)
        _store(cache, rows, state)
    if batch.decode:
        rows = slots[batch.prefill :]
        span = slice(batch.prefill_tokens, batch.tokens)
        gate = g if g is None else g[0, span, None]
        new_q, new_k, new_v, new_beta = (t[0, span, None] for t in (q, k, v, beta))
        o, state = _recurrent(new_q, new_k, new_v, gate, new_beta, scale, cache[rows.clamp(min=0)].float())
        out[0, span] = torch.where((rows >= 0).view(-1, 1, 1), o[:, 0], 0)
        _store(cache, rows, state)
    return out.view(shape)


def _skip_tokens(o: torch.Tensor, bounds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Zeros for the tokens of sequences without a slot, with no look at device memory."""
    token = torch.arange(o.shape[1], device=o.device)
    owner = torch.searchsorted(bounds[1:], token, right=True)
    return torch.where((rows[owner] >= 0).view(1, -1, 1, 1), o, 0)


def _store(cache: torch.Tensor, rows: torch.Tensor, state: torch.Tensor) -> None:
    """Write the states of live rows.

    Rows of -1 repeat the write of the batch's first live row instead of being left out: choosing the live ones would
    synchronise the device.
    """
    live = rows >= 0
    source = torch.where(live, torch.arange(len(rows), device=rows.device), live.to(torch.int8).argmax())
    keep = live.any().view(1, 1, 1, 1)
    target = rows[source].clamp(min=0)
    cache[target] = torch.where(keep, state[source].to(cache.dtype), cache[target])


@operator(fake=like_v, mutates=("delta_cache",), needs=(FLA,), instead="torch_cached_delta_rule")
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
    """`torch_cached_delta_rule` by fla: chunked kernel for the prefill tokens, recurrent step for decode."""
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("fla_cached_delta_rule", q, k, v, None, beta, *rest)


@operator(fake=like_v, mutates=("delta_cache",), needs=(FLA,), instead="torch_cached_gated_delta_rule")
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
    """`torch_cached_gated_delta_rule` by fla: chunked kernel for the prefill tokens, recurrent step for decode."""
    rest = (batch_info_host, cu_seqlen, slot_idx, use_initial_states, delta_cache, scale)
    return _cached("fla_cached_gated_delta_rule", q, k, v, g, beta, *rest)
