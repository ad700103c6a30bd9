"""Samples of the delta-rule operators; the oracle is the recurrence in float64, token by token."""

import torch
from mamba_oracle import Batch
from operator_samples import Sample

HALF = torch.bfloat16
MIXED = Batch(prefill=(70, 0, 11, 1), decode=3, slots=(4, 6, 0, 2, 5, -1, 1), resumes=(True, False, False, True))
PADDED = Batch(prefill=(9, 3), decode=1, slots=(-1, 1, 0), resumes=(False, True), padding=2, entries=6)
DECODE = Batch(prefill=(), decode=4, slots=(2, -1, 0, 6), resumes=())


def recurrence(q, k, v, g, beta, scale, state):
    """q, k [T, H, K], v [T, HV, V], g (or None), beta [T, HV], state [HV, K, V]."""
    repeat = v.shape[1] // q.shape[1]
    q, k = (t.double().repeat_interleave(repeat, 1) for t in (q, k))
    v, beta, rows = v.double(), beta.double(), []
    for t in range(v.shape[0]):
        state = state if g is None else state * g[t].double().exp()[:, None, None]
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
        rows.append(scale * torch.einsum("hkv,hk->hv", state, q[t]))
    return (torch.stack(rows) if rows else v), state


def inputs(gated, batch, tokens, heads, v_heads, K, V, dtype, device):
    q, k = (
        torch.nn.functional.normalize(torch.randn(batch, tokens, heads, K, device=device), dim=-1) for _ in range(2)
    )
    v, beta = torch.randn(batch, tokens, v_heads, V, device=device), torch.rand(batch, tokens, v_heads, device=device)
    g = -torch.rand(batch, tokens, v_heads, device=device)
    q, k, v, beta = (t.to(dtype) for t in (q, k, v, beta))
    return (q, k, v, g, beta) if gated else (q, k, v, beta)


def plain_args(gated, tokens=75, heads=2, v_heads=None, K=16, V=24, dtype=torch.float32, scale=None):
    return lambda device: (*inputs(gated, 2, tokens, heads, v_heads or heads, K, V, dtype, device), scale)


def plain(gated):
    def oracle(q, k, v, *rest):
        g, beta, scale = rest if gated else (None, *rest)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        zero = v.new_zeros((v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float64)
        rows = [recurrence(q[i], k[i], v[i], g if g is None else g[i], beta[i], scale, zero)[0] for i in range(len(q))]
        return (torch.stack(rows),)

    return oracle


def cached_args(gated, batch, heads=2, v_heads=None, K=16, V=24, dtype=torch.float32, cache=torch.float32):
    def build(device):
        values = inputs(gated, 1, batch.tokens, heads, v_heads or heads, K, V, dtype, device)
        if not batch.prefill:
            values = tuple(t.transpose(0, 1).contiguous() for t in values)
        info, _, bounds, slots, resumes = batch.tensors(device)
        states = torch.randn(7, v_heads or heads, K, V, device=device).to(cache)
        return *values, info, bounds, slots, resumes, states, 0.3

    return build


def cached(gated, batch):
    def oracle(q, k, v, *rest):
        g, beta = rest[:2] if gated else (None, rest[0])
        states, scale = rest[-2].double(), rest[-1]
        shape, out = v.shape, v.new_zeros(v.flatten(0, 1).shape, dtype=torch.float64)
        q, k, v, beta = (t.flatten(0, 1) for t in (q, k, v, beta))
        g = g if g is None else g.flatten(0, 1)
        for rows, slot, resumes in batch.spans():
            if slot < 0 or rows.start == rows.stop:
                continue
            state = states[slot] if resumes else torch.zeros_like(states[slot])
            gate = g if g is None else g[rows]
            out[rows], states[slot] = recurrence(q[rows], k[rows], v[rows], gate, beta[rows], scale, state)
        return out.view(shape), states

    return oracle


FORMS = {"delta_rule": False, "gated_delta_rule": True}
BATCHES = {"mixed": MIXED, "padded": PADDED, "decode": DECODE}
SAMPLES = [
    *(Sample(op=f"torch_{n}", build=plain_args(g), oracle=plain(g), atol=1e-4, traced=True) for n, g in FORMS.items()),
    *(
        Sample(op=f"torch_{n}", build=plain_args(g, 5, 2, 6, scale=1.0), oracle=plain(g), note="shared q, k")
        for n, g in FORMS.items()
    ),
    *(
        Sample(op=f"fla_{n}", build=plain_args(g, 130, 2, 4, 64, 64, HALF), oracle=plain(g), atol=0.02, traced=True)
        for n, g in FORMS.items()
    ),
    *(
        Sample(
            op=f"torch_cached_{n}",
            build=cached_args(g, batch, v_heads=4 if g else None),
            oracle=cached(g, batch),
            atol=1e-4,
            traced=label == "mixed",
            note=label,
        )
        for n, g in FORMS.items()
        for label, batch in BATCHES.items()
    ),
    *(
        Sample(
            op=f"fla_cached_{n}",
            build=cached_args(g, batch, K=64, V=64, v_heads=4, dtype=HALF),
            oracle=cached(g, batch),
            atol=0.03,
            traced=label == "mixed",
            note=label,
        )
        for n, g in FORMS.items()
        for label, batch in BATCHES.items()
    ),
]
