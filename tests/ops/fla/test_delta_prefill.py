"""The prefill kernels of gated delta layers are the operators' chain, for sequences of any length and state."""

import pytest
import torch
import torch.nn.functional as F

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads
from shardwise.ops.fla.delta import match_heads, step
from shardwise.ops.fla.prefill import delta_prefill
from shardwise.ops.normalization.reference import torch_l2norm
from shardwise.ops.registry import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float16, torch.float32]
runs = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.skipif(not TRITON.state[0], reason=TRITON.state[1])


def token_by_token(rows, heads: DeltaHeads, gates: DeltaGates, states):
    """Results [T, values, V] of one sequence in float32, and its state after it."""
    keys, values = heads.keys * heads.key_dim, heads.values * heads.value_dim
    q, k, v, _, beta, a = rows.float().split((keys, keys, values, values, heads.values, heads.values), 1)
    q, k = (torch_l2norm(x.unflatten(1, (heads.keys, -1))) for x in (q, k))
    q, k = match_heads(q, k, v := v.unflatten(1, (heads.values, -1)))
    g, beta = gates.log_decay * F.softplus(a + gates.dt_bias), beta.sigmoid()
    out, states = [], states[None]
    for t in range(len(rows)):
        one = slice(t, t + 1)
        o, states = step(q[one], k[one], v[one], beta[one], g[one], heads.key_dim**-0.5, states)
        out.append(o)
    return torch.cat(out), states[0]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alike", [False, True], ids=["random keys", "equal keys"])
@pytest.mark.parametrize(
    ("heads", "lengths"),
    [(DeltaHeads(1, 2, 16, 32), (70, 3, 64)), (DeltaHeads(2, 2, 24, 40), (130,)), (DeltaHeads(1, 2, 128, 128), (65,))],
    ids=str,
)
def test_prompts_equal_the_rule_token_by_token(heads, lengths, alike, dtype):
    torch.manual_seed(0)
    width = heads.channels + heads.values * (heads.value_dim + 2)
    rows = torch.randn(sum(lengths), width + 5, device=DEVICE)[:, :width]
    if alike:  # the chunk's system is far from a diagonal one, and hardly anything fades
        rows[:, heads.keys * heads.key_dim : 2 * heads.keys * heads.key_dim] = 1.0
        rows[:, -heads.values :] = -9.0
    rows = rows.to(dtype)
    states = torch.randn(5, heads.values, heads.key_dim, heads.value_dim, device=DEVICE)
    decay, bias = torch.rand(2, heads.values, device=DEVICE)
    gates = DeltaGates(-decay, bias, torch.ones(heads.value_dim, device=DEVICE), 1e-6)
    slots, resumes = [4, 0, 2][: len(lengths)], [True, False, True][: len(lengths)]
    expected = states.clone()
    wanted = []
    for part, slot, goes_on in zip(rows.split(lengths), slots, resumes, strict=True):
        before = states[slot] if goes_on else torch.zeros_like(states[slot])
        out, expected[slot] = token_by_token(part, heads, gates, before)
        wanted.append(out)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    place = torch.tensor(slots, device=DEVICE), torch.tensor(resumes, device=DEVICE)
    out = delta_prefill(rows, bounds, *place, states, heads, gates)
    tolerance = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    for found, right in ((out.float(), torch.cat(wanted)), (states, expected)):
        assert (found - right).norm() / right.norm() < tolerance
