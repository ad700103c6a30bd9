"""The (gated) delta rule in plain PyTorch: the chunked form and the single step.

S_t = exp(g_t) S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t), o_t = scale S_t^T q_t; S is [K, V].
Within a chunk the u solve one unit lower-triangular system. Sources: Yang et al., arXiv:2406.06484 and 2412.06464.
"""

import torch
from torch import Tensor

CHUNK = 64


def match_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [..., H, K] repeated to the heads of v [..., HV, V], each serving HV / H neighbours."""
    repeat = v.shape[-2] // q.shape[-2]
    return (q, k) if repeat == 1 else (q.repeat_interleave(repeat, -2), k.repeat_interleave(repeat, -2))


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of every sequence: q, k [b, H, K], v [b, H, V], beta, g [b, H], state [b, H, K, V]; float32."""
    q, k, v, beta, state = (t.float() for t in (q, k, v, beta, state))
    if g is not None:
        state = state * g.float().exp()[..., None, None]
    update = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
    state = state + k[..., None] * update[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2), state


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor
) -> Tensor:
    """As `step`, of one sequence: q, k [H, K], v [H, V], beta, g [H]; its float32 state [H, K, V] is stepped in place.

    With u the update, S'^T q = S^T q + (k . q) u, so that the old state is read once for both products.
    """
    q, k, v = q.float(), k.float(), v.float()
    held = torch.stack((k, q), 1) @ state
    if g is not None:
        decay = g.float().exp()[:, None, None]
        held, state = held * decay, state.mul_(decay)
    update = (v - held[:, 0]) * beta[:, None]
    state.baddbmm_(k[:, :, None], update[:, None])
    return scale * (held[:, 1] + (q * k).sum(-1, keepdim=True) * update)


def scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens of sequences of one length.

    q, k [b, T, H, K], v [b, T, H, V], beta, g [b, T, H] (g the logarithm of the decay, or None), state [b, H, K, V]
    or None for zeros -> o [b, T, H, V], final state, float32.
    """
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    beta = beta.float().transpose(1, 2)
    g = torch.zeros_like(beta) if g is None else g.float().transpose(1, 2)
    state = q.new_zeros((*q.shape[:2], q.shape[-1], v.shape[-1])) if state is None else state.float()
    parts = []
    for begin in range(0, q.shape[2], CHUNK):
        one = slice(begin, begin + CHUNK)
        o, state = _chunk(q[:, :, one], k[:, :, one], v[:, :, one], beta[:, :, one], g[:, :, one], state)
        parts.append(o)
    o = torch.cat(parts, 2) if parts else torch.zeros_like(v)
    return scale * o.transpose(1, 2), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [b, H, l, K], v [b, H, l, V], beta, g [b, H, l], state [b, H, K, V]."""
    total = g.cumsum(-1)
    length = total.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp()
    carried = total.exp()[..., None]
    # solve_triangular takes the diagonal as ones and reads only what lies below it.
    system = beta[..., None] * between * (k @ k.transpose(-1, -2))
    wanted = beta[..., None] * (v - carried * (k @ state))
    update = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    o = carried * (q @ state) + (between * (q @ k.transpose(-1, -2))) @ update
    to_end = (total[..., -1:] - total).exp()[..., None]
    state = state * total[..., -1].exp()[..., None, None] + (k * to_end).transpose(-1, -2) @ update
    return o, state
