"""State-space duality in plain PyTorch: the chunked scan and the single step. Source: Dao and Gu, arXiv:2405.21060.

state_t = exp(dt_t A) state_{t-1} + dt_t x_t (outer) B_t,  y_t = state_t . C_t + D x_t, per head, in float32.
"""

import torch
from torch import Tensor


def time_steps(dt: Tensor, dt_bias: Tensor, limit: list[float]) -> Tensor:
    """softplus(dt + dt_bias), clamped to `limit` (lowest, highest); float32."""
    return torch.nn.functional.softplus(dt.float() + dt_bias.float()).clamp(limit[0], limit[1])


def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every sequence.

    x [b, H, P], dt [b, H] (after `time_steps`), B, C [b, G, N], state [b, H, P, N] -> y [b, H, P], new state, float32.
    """
    heads = x.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(heads, 1) for t in (B, C))
    x = x.float()
    decay = torch.exp(dt * A.float())[..., None, None]
    state = state.float() * decay + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    y = (state @ C[..., None]).squeeze(-1) + D.float()[:, None] * x
    return y, state


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens of sequences of one length.

    x [b, s, H, P], dt [b, s, H] (after `time_steps`), B, C [b, s, G, N], state [b, H, P, N] or None for zeros
    -> y [b, s, H, P], final state, float32. Quadratic inside a chunk, linear in s.
    """
    b, s, H, P = x.shape
    G, N = B.shape[2:]
    if state is None:
        state = x.new_zeros((b, G, H // G, P, N), dtype=torch.float32)
    else:
        state = state.float().view(b, G, H // G, P, N)
    x32 = x.float()
    grouped = (x32 * dt[..., None]).view(b, s, G, H // G, P)
    log_decay = (dt * A.float()).view(b, s, G, H // G)
    B, C = B.float(), C.float()
    parts = []
    for begin in range(0, s, chunk):
        span = slice(begin, begin + chunk)
        y, state = _chunk(grouped[:, span], log_decay[:, span], B[:, span], C[:, span], state)
        parts.append(y)
    y = torch.cat(parts, 1).view(b, s, H, P) if parts else torch.zeros_like(x32)
    return y + D.float()[:, None] * x32, state.reshape(b, H, P, N)


def _chunk(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x [b, l, G, h, P] (times dt), log_decay [b, l, G, h], B, C [b, l, G, N], state [b, G, h, P, N]."""
    total = log_decay.cumsum(1).permute(0, 2, 3, 1)  # [b, G, h, l]
    length = total.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp()
    scores = torch.einsum("btgn,bsgn->bgts", C, B)[:, :, None] * between
    x = x.permute(0, 2, 3, 1, 4)  # [b, G, h, l, P]
    y = scores @ x
    y += torch.einsum("btgn,bghpn->bghtp", C, state) * total.exp()[..., None]
    to_end = (total[..., -1:] - total).exp()[..., None]
    added = (x * to_end).transpose(-1, -2) @ B.transpose(1, 2)[:, :, None]
    state = state * total[..., -1].exp()[..., None, None] + added
    return y.permute(0, 3, 1, 2, 4), state
