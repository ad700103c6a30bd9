"""State-space operators in plain PyTorch; gradients are not provided."""

import torch

from shardwise.ops.attention.batch import read_batch
from shardwise.ops.dtypes import check_cache, check_float
from shardwise.ops.mamba.checks import check_ssm
from shardwise.ops.mamba.ssd import scan, step, time_steps
from shardwise.ops.registry import operator
from shardwise.ops.state_batch import StateSpan, read_state_spans


def _ssm(hidden_states, A, B, C, D, dt, dt_bias, time_step_limit, chunk_size):
    return torch.empty_like(hidden_states, dtype=torch.float32, memory_format=torch.contiguous_format)


@operator(fake=_ssm)
def torch_ssm(
    hidden_states: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    time_step_limit: list[float],
    chunk_size: int,
) -> torch.Tensor:
    """Mamba2's scan from a zero state.

    hidden_states [b, s, H, P], A, D, dt_bias [H], B, C [b, s, G, N], dt [b, s, H] -> float32 [b, s, H, P].
    chunk_size sets the cost, not the result.
    """
    check_ssm("torch_ssm", hidden_states, A, B, C, D, dt, dt_bias, time_step_limit, chunk_size)
    check_float("torch_ssm", "hidden_states", hidden_states)
    steps = time_steps(dt, dt_bias, time_step_limit)
    return scan(hidden_states, steps, A, B, C, D, chunk_size)[0].contiguous()


def _cached_ssm(hidden_states, *_args):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@operator(fake=_cached_ssm, mutates=("ssm_state_cache",))
def torch_cached_ssm(
    hidden_states: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    batch_info_host: torch.Tensor,
    seq_len: torch.Tensor,
    cu_seqlen: torch.Tensor,
    slot_idx: torch.Tensor,
    use_initial_states: torch.Tensor,
    ssm_state_cache: torch.Tensor,
    time_step_limit: list[float],
    chunk_size: int,
) -> torch.Tensor:
    """Mamba2's scan over a flat batch, states read from and written to their slots in the cache's dtype.

    Inputs as in `torch_ssm`, [b, 1, ...] or [1, T, ...]: prefill sequences (continuing where use_initial_states),
    then decode tokens, then padding. ssm_state_cache [slots, H, P, N]. Slot -1 is skipped; its tokens and the
    padding give zeros. Result in hidden_states' dtype.
    """
    op = "torch_cached_ssm"
    check_ssm(op, hidden_states, A, B, C, D, dt, dt_bias, time_step_limit, chunk_size, ssm_state_cache)
    check_float(op, "hidden_states", hidden_states)
    check_cache(op, "ssm_state_cache", ssm_state_cache)
    x, B, C, dt = (t.flatten(0, 1) for t in (hidden_states, B, C, dt))
    batch = read_batch(op, batch_info_host)
    spans = read_state_spans(op, batch, x.shape[0], cu_seqlen, slot_idx, use_initial_states, ssm_state_cache.shape[0])
    steps = time_steps(dt, dt_bias, time_step_limit)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for span in spans[: batch.prefill]:
        _prefill(span, x, steps, A, B, C, D, chunk_size, ssm_state_cache, out)
    _decode(spans[batch.prefill :], x, steps, A, B, C, D, ssm_state_cache, out)
    return out.view(hidden_states.shape)


def _prefill(span: StateSpan, x, steps, A, B, C, D, chunk, cache, out) -> None:
    if span.slot < 0 or not span.length:
        return
    rows = slice(span.start, span.start + span.length)
    state = cache[span.slot][None] if span.resumes else None
    y, state = scan(x[None, rows], steps[None, rows], A, B[None, rows], C[None, rows], D, chunk, state)
    out[rows] = y[0].to(out.dtype)
    cache[span.slot] = state[0].to(cache.dtype)


def _decode(spans: list[StateSpan], x, steps, A, B, C, D, cache, out) -> None:
    spans = [span for span in spans if span.slot >= 0]
    if not spans:
        return
    rows = torch.tensor([span.start for span in spans], device=x.device)
    slots = torch.tensor([span.slot for span in spans], device=x.device)
    y, state = step(x[rows], steps[rows], A, B[rows], C[rows], D, cache[slots])
    out[rows] = y.to(out.dtype)
    cache[slots] = state.to(cache.dtype)
